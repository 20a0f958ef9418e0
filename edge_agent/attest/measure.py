"""What a board runs, as digests of files: the agent's own code, the interpreter library, the delegate.

Owns how files are found and hashed.  Rules: everything is SHA-256; a tree's digest depends on the relative paths and the bytes of
its files alone, not on where it lies, when it was written, or what the interpreter cached beside it; nothing that is hashed is
imported or loaded here (the agent process holds no interpreter); files are read, never mapped, so that one that shrinks meanwhile
is a short file and no SIGBUS.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_agent.attest.evidence import MAX_LIBRARY_CHARS, NO_DIGEST
from edge_agent.core.cbor import encode
from edge_agent.core.errors import UnavailableError

PACKAGES = ("board_support", "edge_agent", "models", "ota")
"""The agent's own; one that is not there is left out."""
DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}
"""The interpreter packages, the preferred one first, and what they are installed from."""
ROOT = Path(__file__).resolve().parents[2]
READ_BYTES = 128 * 2**10
MAX_CODE_FILES = 4096
MAX_LIBRARY_FILES = 256
LIBRARY_FOLDERS = ("/usr/local/lib", "/usr/lib/{machine}-linux-gnu", "/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib", "/lib")


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files that are measured as one: ``name`` with its version, ``files`` by their name within the set."""

    name: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)

    def digests(self) -> dict[str, bytes]:
        """Of the files as they are now. Raises ``UnavailableError`` if one cannot be read."""
        return {name: file_digest(path) for name, path in self.files.items()}


@dataclass(frozen=True, slots=True)
class Software:
    """What was found at the start: the digest of the code, and the files of library and delegate with those of each."""

    code: bytes
    library: FileSet
    library_digests: Mapping[str, bytes]
    delegate: FileSet = FileSet()
    delegate_digests: Mapping[str, bytes] = field(default_factory=dict)

    def with_delegate(self, library: str) -> Software:
        """``library``: a path or a soname. Raises ``UnavailableError`` if its file cannot be read."""
        found = delegate_files(library)
        return replace(self, delegate=found, delegate_digests=found.digests())

    @property
    def recognized(self) -> frozenset[bytes]:
        """What a verifier of this very make takes for a right library or delegate."""
        return frozenset(set_digest(each) for each in (self.library_digests, self.delegate_digests) if each)


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file that a loaded model came from: where it lies, what it must hold (SHA-256), and the descriptor that its engine maps,
    -1 where it is known by its path alone."""

    path: Path
    digest: bytes
    fd: int = -1


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model that is loaded now. ``digest_of``: what it is called, of the digests of its ``files``; ``version``, ``slot``: of
    its release, 0 and empty for what set-up brought."""

    name: str
    offered: bytes
    files: tuple[MappedFile, ...]
    digest_of: Callable[..., bytes]
    delegated_permille: int | None = None
    version: int = 0
    slot: str = ""


def measured_software(runtime: str, root: Path = ROOT) -> Software:
    """Hash code and library. ``runtime``: a package of ``DISTRIBUTIONS`` or "auto".

    Raises ``UnavailableError`` for a file that cannot be read.
    """
    library = library_files(runtime)
    return Software(code_digest(root), library, library.digests())


def code_digest(root: Path = ROOT) -> bytes:
    """Of every ``.py`` file of ``PACKAGES`` below ``root``. Raises ``UnavailableError`` for one that cannot be read."""
    found = (path for name in PACKAGES for path in _below(root / name, ".py"))
    paths = _at_most(found, MAX_CODE_FILES, f"code in {root}")
    return set_digest({path.relative_to(root).as_posix(): file_digest(path) for path in paths})


def library_files(runtime: str = "auto") -> FileSet:
    """The shared objects of an interpreter package, found without importing it; an empty set if none is installed.

    Its name is that of the package with its version and the machine that it was built for, as references have it.
    """
    for package, distribution in DISTRIBUTIONS.items():
        if runtime in ("auto", package) and (folders := _folders(package)):
            version = importlib.metadata.version(distribution)
            found = (path for folder in folders for path in _shared_objects(folder))
            files = {str(path.relative_to(folders[0].parent)): path for path in _at_most(found, MAX_LIBRARY_FILES, package)}
            return FileSet(f"{package} {version} {platform.machine()}"[:MAX_LIBRARY_CHARS], files)
    return FileSet("none")


def delegate_files(library: str) -> FileSet:
    """The file that a delegate's ``library`` (a path or a soname) names; without files if it is not where loaders look."""
    if not library:
        return FileSet()
    places = [Path(library)] if "/" in library else [Path(folder) / library for folder in _library_folders()]
    for path in places:
        if path.is_file():
            return FileSet(path.resolve().name[:MAX_LIBRARY_CHARS], {path.name: path})
    return FileSet(library[-MAX_LIBRARY_CHARS:])


def set_digest(digests: Mapping[str, bytes]) -> bytes:
    """Of files by their names within a set, in the order of the names; ``NO_DIGEST`` for none."""
    if not digests:
        return NO_DIGEST
    return hashlib.sha256(encode([[name, digests[name]] for name in sorted(digests)])).digest()


def file_digest(path: Path) -> bytes:
    """Raises ``UnavailableError`` for a file that cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            hasher = hashlib.sha256()
            while piece := file.read(READ_BYTES):
                hasher.update(piece)
    except OSError as error:
        raise UnavailableError(f"file {path}", error.strerror or str(error), "it is measured: let this user read it") from error
    return hasher.digest()


def read_into(hasher: hashlib._Hash, fd: int, offset: int, size_bytes: int) -> int:
    """Feed ``hasher`` at most ``size_bytes`` of a descriptor from ``offset``; how many there were. Raises ``OSError``."""
    buffer, done = bytearray(min(READ_BYTES, size_bytes)), 0
    view = memoryview(buffer)
    while done < size_bytes and (got := os.preadv(fd, [view[: size_bytes - done]], offset + done)):
        hasher.update(view[:got])
        done += got
    return done


def _below(folder: Path, suffix: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(parent, name) for name in names if name.endswith(suffix))


def _shared_objects(folder: Path) -> Iterator[Path]:
    return (path for path in _below(folder, "") if is_shared_object(path.name))


def is_shared_object(name: str) -> bool:
    """By the name of a file; folders before it do not matter."""
    return name.endswith(".so") or ".so." in name.rsplit("/", 1)[-1]


def _folders(package: str) -> Sequence[Path]:
    """The package's own folder, then the one that ``auditwheel`` puts its libraries into, if there is one."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ()
    own = Path(next(iter(spec.submodule_search_locations)))
    return [each for each in (own, own.with_name(f"{package}.libs")) if each.is_dir()]


def _library_folders() -> Iterator[str]:
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    yield from (folder.format(machine=platform.machine()) for folder in LIBRARY_FOLDERS)


def _at_most(paths: Iterable[Path], most: int, subject: str) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if len(found) == most:
            raise UnavailableError(subject, f"more than {most} files", "that is no installation of it")
        found.append(path)
    return found
