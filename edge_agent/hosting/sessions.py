"""Sessions that follow from one release of a language model to the next: their token ids do, their KV only where it fits.

Owns the folders in which the releases of a model keep their sessions.  Rules: a session that goes over keeps all its ids; KV of
another fingerprint is computed again, and that is said; ids of another tokenizer mean nothing, so such a session begins anew, and
that is said too; at a start every session is in the folder of the release that is confirmed, whatever a power cut left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.core.errors import SlyError, UnavailableError
from edge_agent.language.plan import UNNAMED
from edge_agent.store.files import Disk, reaching, write_atomically
from edge_agent.store.kv_held import common
from edge_agent.store.kv_peers import PeerKv
from edge_agent.store.kv_sessions import SessionStore

TOKENIZER = "tokenizer"
"""A file in a release's folder: the SHA-256 of its tokenizer, in hexadecimal digits."""
MAX_LEFT_BYTES = 2**40


def kept_as(name: str, number: int) -> str:
    """What the folders of a release are called; set-up's is called as the model."""
    return f"{name}@{number}" if number else name


def named(store: SessionStore) -> list[str]:
    return [name for name in store.names() if not name.startswith(UNNAMED)]


def carry(name: str, source: SessionStore, target: SessionStore) -> int:
    """Make ``target`` hold the session as ``source`` has it; how many of its tokens must be computed again.

    Blocking, meant for a thread. Raises ``UnavailableError``: the session is then not whole in ``target``.
    """
    there, here = source.look(name), target.look(name)
    if there is None:
        raise UnavailableError(f"session {name}", "it is not in the store")
    both = common(here.ids, there.ids) if here is not None else 0
    if here is None:
        target.create(name)
    target.rewind(name, both)
    if source.registry.kv_format.fingerprint == target.registry.kv_format.fingerprint:
        _carry_kv(name, PeerKv(source), PeerKv(target))
    else:
        target.prompt(name, there.ids[both:])
    target.sync(name)
    held = target.look(name)
    assert held is not None
    return len(held.pending)


def _carry_kv(name: str, source: PeerKv, target: PeerKv) -> None:
    manifest = source.export(name)
    target.adopt(manifest)
    missing = target.missing(manifest)
    for block in missing.blocks:
        target.import_block(manifest, block, source.export_block(block))
    if missing.rows:
        target.import_rows(manifest, source.export_rows(manifest))


def note_of(name: str, origin: str, tokens: int) -> str:
    """What the next turn of a session that was carried is to say; nothing where one token is left, as always."""
    return f"session {name} comes from {origin}: {tokens} of its tokens are computed again" if tokens > 1 else ""


def lost_note(name: str, origin: str) -> str:
    return f"session {name} begins anew: {origin} had another tokenizer, so its tokens mean nothing here"


def keep_tokenizer(state: Path, name: str, number: int, sha256: str) -> None:
    """Remember whose ids the folder of a release holds. Raises ``UnavailableError``."""
    folder = state / "kv" / kept_as(name, number)
    with reaching(folder):
        Disk().make_folder(folder)
        write_atomically(Disk(), folder / TOKENIZER, sha256.encode())


def forget(state: Path, name: str, number: int) -> None:
    """The folders of a release that has gone."""
    shutil.rmtree(state / "kv" / kept_as(name, number), ignore_errors=True)
    (state / "curves" / kept_as(name, number)).unlink(missing_ok=True)


def left_behind(state: Path, name: str, number: int) -> Iterator[int]:
    """The releases of a model, but ``number``, whose sessions are still in folders of their own."""
    for folder in (state / "kv").glob(f"{name}*"):
        found = folder.name.removeprefix(name)
        if found == "" and number:
            yield 0
        elif found.startswith("@") and found[1:].isdecimal() and int(found[1:]) != number:
            yield int(found[1:])


def take_in_left(
    state: Path, name: str, number: int, store: SessionStore, sha256: str, factory: str, report: Callable[[str], None]
) -> dict[str, str]:
    """Take in the sessions of releases that a crash kept from going; the notes for their next turns.

    Of two sessions of a name that stays which goes further.  ``sha256``: of this release's tokenizer; ``factory``: of set-up's.
    """
    notes: dict[str, str] = {}
    for other in left_behind(state, name, number):
        origin, folder = f"release {other}" if other else "the model as it was set up", state / "kv" / kept_as(name, other)
        if _tokenizer_of(folder, factory if not other else "") == sha256:
            notes |= _taken_in(folder, store, origin, report)
        else:
            report(f"model {name}: sessions of {origin} are left out, for it had another tokenizer")
        forget(state, name, other)
    return notes


def _taken_in(folder: Path, store: SessionStore, origin: str, report: Callable[[str], None]) -> dict[str, str]:
    notes: dict[str, str] = {}
    source = SessionStore(folder, store.registry.kv_format, 0, MAX_LEFT_BYTES, report=report)
    mine = {each.name: each.used_s for each in store.kept(len(store.names()))}
    for each in source.kept(len(source.names())):
        if not _goes_further(each.name, source, store, each.used_s > mine.get(each.name, -1)):
            continue
        try:
            notes[each.name] = note_of(each.name, origin, carry(each.name, source, store))
        except SlyError as error:
            report(f"session {each.name} of {origin} cannot be taken over: {error}")
    source.close()
    return {name: note for name, note in notes.items() if note}


def _goes_further(name: str, source: SessionStore, store: SessionStore, newer: bool) -> bool:
    """Whether to keep the session of ``source``: by its ids; by the clock, which may be wrong, only where both went on."""
    there, here = source.look(name), store.look(name)
    if there is None or here is None:
        return there is not None
    both = common(here.ids, there.ids)
    return both < len(there.ids) and (both == len(here.ids) or newer)


def _tokenizer_of(folder: Path, default: str) -> str:
    try:
        return (folder / TOKENIZER).read_text()[:64]
    except (OSError, UnicodeDecodeError):
        return default
