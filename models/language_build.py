"""From a GGUF file to a built language model: the stages for both runtimes, the tokenizer, the card.

Rules: the same GGUF gives the same bytes on every machine; nothing but NumPy and the flatbuffer schema is needed (and jinja2, for
the chat template).  The files appear whole, the card last: a card that is there names files that are there.  A build under the
name of a catalog model must give the catalog's digests, or nothing is kept: boards of a fleet that say ``smollm2`` must mean the
same bits, for receipts and parked sessions rest on them.  Build it under another name where other bits are wanted.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edge_agent.core.errors import RefusedError
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import MODEL_NAME, checked
from models.calibration import PROSE, TALK
from models.card import Source
from models.fetch import NamedSource, fetch_file, is_fetched
from models.gguf import Gguf
from models.gguf_tokenizer import read_tokenizer
from models.language_card import CARD_SUFFIX, FILE_NAME, FileEntry, LanguageCard, language_catalog
from models.llama import LITERT, TFLITE_RUNTIME, VARIANTS, Weights, build
from models.llama_gguf import LlamaGguf
from models.smooth import smoothed
from models.tokenizer import Tokenizer
from models.whole_file import made_folder, written_whole

FILE_NAMES = {LITERT: "{}.litert.tflite", TFLITE_RUNTIME: "{}.tflite-runtime.tflite"}
TOKENIZER_NAME = "{}.tokenizer"
CALIBRATION_TOKENS = 640
"""At most, of each text."""

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is."""


def _silent(what: str, done: int, whole: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Words:
    """What a card says besides what is measured."""

    summary: str
    quality_permille: int = 0
    quality_source: str = "not measured"
    version: int = 1


def build_language_model(
    gguf_path: Path,
    name: str,
    folder: Path,
    words: Words | None = None,
    source: Source | None = None,
    progress: Progress = _silent,
) -> LanguageCard:
    """Build ``name`` from a GGUF file into ``folder``, and give its card.

    Raises ``RefusedError`` for a file that is not sound or not supported, and for a catalog name whose digests it does not
    give; ``UnavailableError`` when the folder cannot be written or jinja2 is missing.
    """
    checked(MODEL_NAME, "model name", name)
    with Gguf(gguf_path) as gguf:
        origin = _entry(gguf_path, gguf_path.name if FILE_NAME.fullmatch(gguf_path.name) else "model.gguf")
        llama = LlamaGguf(gguf)
        tokenizer = read_tokenizer(gguf)
        if tokenizer.vocabulary != llama.shape.vocabulary:
            raise RefusedError(
                f"tokenizer of {gguf_path.name}", f"{tokenizer.vocabulary} tokens", f"{llama.shape.vocabulary} by the embedding"
            )
        words = words or Words(f"{gguf.metadata.get('general.name', gguf_path.name)}"[:200])
        weights = calibrated(llama, llama.shape, tokenizer, progress)
        return install(weights, llama.shape, tokenizer, name, folder, words, source, origin, progress)


def build_from_catalog(name: str, folder: Path, as_name: str = "", progress: Progress = _silent) -> LanguageCard:
    """Build a model of the catalog from its source: ``NAME.gguf`` in ``folder``, else fetched for it and not kept.

    ``as_name`` is another name for it, under which any bits will do.  Raises as ``build_language_model`` and ``fetch``.
    """
    told = language_catalog().get(name)
    if told is None or told.source is None:
        raise RefusedError("language model", name, ", ".join(language_catalog()), "or give the path of a GGUF file")
    words = Words(told.summary, told.quality_permille, told.quality_source, told.version)
    made_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
        wanted = NamedSource(name, told.source)
        progress("fetching", 0, 1)
        gguf = fetch_file(wanted, folder if is_fetched(wanted, folder) else Path(scratch))
        progress("fetching", 1, 1)
        return build_language_model(gguf, as_name or name, folder, words, told.source, progress)


def is_built(card: LanguageCard, folder: Path) -> bool:
    """Whether every file of the card is there with its size and hash; raises as ``FileEntry.is_in``."""
    return all(entry.is_in(folder) for entry in card.entries())


def calibrated(weights: Weights, shape: ModelShape, tokenizer: Tokenizer, progress: Progress = _silent) -> Weights:
    """``weights`` smoothed on the texts of ``calibration``."""
    texts = [tokenizer.encode(PROSE), tokenizer.render(TALK, answer=False)]
    return smoothed(
        weights, shape, [ids[:CALIBRATION_TOKENS] for ids in texts], lambda done, whole: progress("measuring", done, whole)
    )


def install(
    weights: Weights,
    shape: ModelShape,
    tokenizer: Tokenizer,
    name: str,
    folder: Path,
    words: Words,
    source: Source | None,
    origin: FileEntry,
    progress: Progress = _silent,
) -> LanguageCard:
    """Write the files of a model whose weights are ready, then its card; raises as ``build_language_model``."""
    made_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as scratch:
        files = {}
        for runtime, pattern in FILE_NAMES.items():
            path = Path(scratch, pattern.format(name))

            def written(done: int, whole: int, runtime: str = runtime) -> None:
                progress(f"writing for {runtime}", done, whole)

            build(weights, shape, runtime, path, f"stages of the GGUF with SHA-256 {origin.sha256}", written)
            files[runtime] = _entry(path)
        path = Path(scratch, TOKENIZER_NAME.format(name))
        with written_whole(path) as file:
            file.write(tokenizer.to_bytes())
        card = LanguageCard(
            name=name,
            version=words.version,
            summary=words.summary,
            quality_permille=words.quality_permille,
            quality_source=words.quality_source,
            source=source,
            gguf=origin,
            shape=shape,
            static_rows=tuple(variant.rows for variant in VARIANTS[TFLITE_RUNTIME]),
            files=MappingProxyType(files),
            tokenizer=_entry(path),
        )
        _must_be_as_told(card)
        for entry in card.entries():
            Path(scratch, entry.filename).replace(folder / entry.filename)
    with written_whole(folder / f"{name}{CARD_SUFFIX}") as file:
        file.write(card.to_toml().encode())
    return card


def _must_be_as_told(card: LanguageCard) -> None:
    """Under a name of the catalog, the catalog's bits."""
    told = language_catalog().get(card.name)
    if told is None:
        return
    for made, expected in zip(card.entries(), told.entries(), strict=True):
        if made.sha256 != expected.sha256:
            raise RefusedError(
                f"build of {card.name}, {made.filename}",
                f"SHA-256 {made.sha256}",
                expected.sha256,
                f"this machine builds other bits than the catalog tells (please report it); to use them: "
                f"sly models build {card.name} --name {card.name}-local",
            )


def _entry(path: Path, filename: str = "") -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(filename or path.name, digest, path.stat().st_size)
