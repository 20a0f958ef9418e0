"""The publisher's side of a release: a model on this machine becomes a manifest.

Owns ``build_release`` and ``release_of_model``.  Rules: every byte is read once, and hashed whole and by chunks in that pass; a
release holds the files that its card names and no other; a card of the catalog that gets another file becomes a card of one's
own, of the next version; nothing is signed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import reaching
from models.card import OWN_SUFFIX, Card, OwnSource
from models.catalog import catalog, read_card
from models.fetch import default_folder
from models.language_card import CARD_SUFFIX, LanguageCard, find, is_language_model, read_language_card
from models.released import card_of
from ota.manifest import CHUNK_BYTES, MAX_FILE_BYTES, Kind, Release, ReleasedFile
from ota.rehearsal import rehearse

READ_CHUNKS = 16
"""Chunks that are read at once."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those of all files."""


@dataclass(frozen=True, slots=True)
class Built:
    """A release, where its files lie, and what the operator should know of it."""

    release: Release
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def build_release(
    model: str,
    number: int,
    card_text: str,
    files: Mapping[str, Path],
    kind: Kind,
    classes: Sequence[str] = (),
    min_agent: str = "0.0.0",
    progress: Progress = lambda done, whole: None,
) -> Release:
    """The release of ``files``, by the names that they have in it.

    Raises ``RefusedError`` for a card that is another model's or of other files, ``UnavailableError`` for a file that cannot be
    read.
    """
    release = Release(model, number, kind, tuple(_hashed_all(files, progress)), card_text, tuple(classes), min_agent)
    if kind is not Kind.AGENT:
        check_card(release)
    return release


def release_of_model(
    model: str,
    number: int,
    *,
    name: str = "",
    folder: Path | None = None,
    card_path: Path | None = None,
    before: str = "",
    licence: str = "",
    classes: Sequence[str] = (),
    min_agent: str = "0.0.0",
    golden: bool = True,
    progress: Progress = lambda done, whole: None,
) -> Built:
    """The release of a model of the models folder, by its name, or of a file of one's own.

    ``model``: a name that ``sly models fetch`` or ``build`` brought into ``folder``; a ``.tflite`` file, of the model ``name``
    (the file's own name without one); or the ``NAME.card.toml`` of a language model, beside its files.  A file's card is that in
    ``card_path``, or that of the release ``before`` (as text), or the catalog's, with the file's digest and size and the next
    version.

    ``golden``: run it once in the sandbox; refuse what does not even run here, and write the right answer to its golden input
    into the card where every CPU gives the same.  Not for language models.  Not to be called from a running event loop.

    Raises ``RefusedError`` and ``UnavailableError``.
    """
    folder = folder or default_folder()
    if model.endswith(CARD_SUFFIX):
        return _language(read_language_card(Path(model)), Path(model).parent, number, classes, min_agent, progress)
    if not model.endswith(OWN_SUFFIX) and is_language_model(model, folder):
        return _language(find(model, folder), folder, number, classes, min_agent, progress)
    if model.endswith(OWN_SUFFIX):
        path = Path(model)
        _size_bytes(path)
        known = _card_for(name or path.stem, card_path, before)
        (hashed,) = _hashed_all({known.name + OWN_SUFFIX: path}, progress)
        card = _card_of_file(known, hashed, licence)
    else:
        card = _catalogued(model)
        path = folder / card.filename
        (hashed,) = _hashed_all({card.filename: path}, progress)
    notes = []
    if golden:
        rehearsed = asyncio.run(rehearse(card, path))
        notes.append(rehearsed.note)
        card = replace(card, golden=MappingProxyType({**card.golden, **rehearsed.golden}))
    release = Release(card.name, number, Kind.PERCEPTION, (hashed,), card.to_toml(), tuple(classes), min_agent)
    check_card(release)
    return Built(release, {hashed.name: path}, tuple(notes))


def check_card(release: Release) -> None:
    """Raises ``RefusedError`` unless the card can be read, is this model's, and names just the files of the release."""
    card = card_of(release.kind is Kind.LANGUAGE, release.card)
    if card.name != release.model:
        raise RefusedError(f"card of {release.model}", f"that of {card.name}", release.model)
    named = named_files(card)
    held = {each.name: (each.digest, each.size_bytes) for each in release.files}
    if named != held:
        odd = sorted(name for name in named.keys() | held.keys() if named.get(name) != held.get(name))
        allowed = "just the files that its card names, with its digests and sizes"
        raise RefusedError(f"files of {release.model}", f"another {', '.join(odd)}", allowed, "fetch or build the model again")


def named_files(card: Card | LanguageCard) -> dict[str, tuple[bytes, int]]:
    """SHA-256 and size in bytes of each file that a card names."""
    if isinstance(card, LanguageCard):
        return {each.filename: (bytes.fromhex(each.sha256), each.size_bytes) for each in card.entries()}
    return {card.filename: (bytes.fromhex(card.source.sha256), card.source.size_bytes)}


def _language(card: LanguageCard, folder: Path, number: int, classes: Sequence[str], min_agent: str, progress: Progress) -> Built:
    files = {each.filename: folder / each.filename for each in card.entries()}
    release = build_release(card.name, number, card.to_toml(), files, Kind.LANGUAGE, classes, min_agent, progress)
    return Built(release, files)


def _catalogued(name: str) -> Card:
    if name in catalog():
        return catalog()[name]
    remedy = "give the path of a file of your own, with its card: --card CARD.toml"
    raise RefusedError("model", name, f"{', '.join(catalog())}, or a language model that was built", remedy)


def _card_for(name: str, card_path: Path | None, before: str) -> Card:
    if card_path is not None:
        with reaching(card_path):
            return replace(read_card(card_path), name=name)
    if before:
        card = card_of(False, before)
        if isinstance(card, Card) and card.name == name:
            return card
    return _catalogued(name)


def _card_of_file(card: Card, file: ReleasedFile, licence: str) -> Card:
    """``card`` as it is if it is that of the file; else of the next version, with the file as its source."""
    source = card.source
    if (source.sha256, source.size_bytes) == (file.digest.hex(), file.size_bytes):
        return card
    own = OwnSource(file.digest.hex(), file.size_bytes, licence or source.licence, source.url)
    return replace(card, version=card.version + 1, source=own, golden=MappingProxyType({}))


def _size_bytes(path: Path) -> int:
    with reaching(path):
        return path.stat().st_size


def _hashed_all(files: Mapping[str, Path], progress: Progress) -> list[ReleasedFile]:
    whole, before, hashed = sum(map(_size_bytes, files.values())), 0, list[ReleasedFile]()
    for name, path in files.items():
        hashed.append(_hashed(name, path, lambda done: progress(before + done, whole)))  # noqa: B023
        before += hashed[-1].size_bytes
    return hashed


def _hashed(name: str, path: Path, done: Callable[[int], None]) -> ReleasedFile:
    """One pass over the file: its whole digest and that of every chunk."""
    whole, chunks, size_bytes = sha256(), bytearray(), 0
    with reaching(path), path.open("rb") as file:
        while block := file.read(READ_CHUNKS * CHUNK_BYTES):
            whole.update(block)
            for start in range(0, len(block), CHUNK_BYTES):
                chunks += sha256(block[start : start + CHUNK_BYTES]).digest()
            size_bytes += len(block)
            if size_bytes > MAX_FILE_BYTES:
                raise RefusedError(f"file {path}", "more", f"at most {MAX_FILE_BYTES} bytes")
            done(size_bytes)
    return ReleasedFile(name, size_bytes, whole.digest(), bytes(chunks))
