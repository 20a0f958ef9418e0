"""``sly ota pack-agent``: this agent as a folder of wheels, from which a release of the agent itself is made.

Rules: only wheels, never a source that a board would have to build; what the agent says of its ledger is read from the wheel that
was built, not from what runs here; the folder holds a whole agent or is removed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.commands.missing_wheels import DISTRIBUTION, check_python, name_missing
from edge_agent.core.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from ota.wheelhouse import Facts

ROOT = Path(__file__).resolve().parents[2]
PYTHON = re.compile(r"3\.\d{1,2}")
MACHINE = re.compile(r"[a-z0-9_]{1,20}")
GLIBC_MINOR = 35
"""Of Ubuntu 22.04, which JetPack 6 is made of: the oldest of the boards' systems (docs/boards.md)."""
OLDEST_GLIBC_MINOR = 17
NOT_SOURCE = (".*", "build", "dist", "demo", "docs", "tests", "__pycache__", "*.egg-info")
PIP_LIMIT_S = 1800
LEDGER = """
import sys
sys.path.insert(0, sys.argv[1])
from edge_agent.store import ledger
if not ledger.__file__.startswith(sys.argv[1]):
    sys.exit(f"there is no ledger in it: {ledger.__file__} was found instead")
print(ledger.SCHEMA, ledger.USABLE_FROM)
"""


def add(below: Any) -> None:
    parser = below.add_parser("pack-agent", help="this agent as a folder of wheels, to be released like a model")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="what is made; it must not exist")
    parser.add_argument(
        "--source", default="", metavar="DIR|WHEEL", help="what is packed (default: the checkout that this runs from)"
    )
    parser.add_argument("--python", default=here()[0], metavar="3.11", help="of the boards (default: %(default)s)")
    parser.add_argument("--machine", default=here()[1], metavar="aarch64", help="of the boards (default: %(default)s)")
    parser.add_argument("--board", default="", metavar="KIND", help="the kind of board, to be named where wheels are missing")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="an extra to pack too: gateway, tpm, cloud")
    parser.add_argument(
        "--like", type=Path, metavar="FOLDER", help="take the versions of an earlier pack: boards hold their bytes"
    )
    parser.add_argument("--json", action="store_true", help="for programs: the files and what they say of themselves")
    parser.set_defaults(run=run_pack)


def run_pack(args: argparse.Namespace) -> int:
    packed = pack(args.out, args.source, args.python, args.machine, args.extra, _say, args.like, args.board)
    if args.json:
        print(json.dumps(packed, indent=2))
        return 0
    for name, size_bytes in packed["files"].items():
        print(f"{size_bytes / 2**20:8.2f} MiB  {name}")
    total = sum(packed["files"].values())
    print(f"{total / 2**20:8.2f} MiB  {packed['agent']} for Python {packed['python']} on {packed['machine']}, in {args.out}")
    return 0


def pack(
    out: Path,
    source: str,
    python: str,
    machine: str,
    extras: Sequence[str],
    say: Callable[[str], None],
    like: Path | None = None,
    board: str = "",
) -> dict[str, Any]:
    """Make the folder ``out``: the wheels of ``source`` and of all that it needs, and their facts; what is in it.

    Whatever ``like``, an earlier pack, holds is taken in its version.

    Raises ``ConfigError`` for what cannot be packed, ``UnavailableError`` when the package index or a wheel is not to be had.
    """
    from ota.wheelhouse import FACTS, encode_facts, wheelhouse_files

    if out.exists():
        raise ConfigError("folder to pack into", f"{out}, which exists", "a name that is free")
    for option, got, form, example in (("--python", python, PYTHON, "3.11"), ("--machine", machine, MACHINE, "aarch64")):
        if not form.fullmatch(got):
            raise ConfigError(option, got, f"a word like {example}")
    out.mkdir(parents=True)
    try:
        say("building the agent's own wheel ...")
        own = _own_wheel(out, source)
        check_python(own, python)
        facts = _facts(own, python, machine)
        say(f"fetching the wheels that it needs, for Python {python} on {machine} ...")
        chosen = [*_chosen_for(python, machine), *_kept(like)]
        try:
            _pip("download", "--dest", str(out), *chosen, f"{own}{_extras(extras)}", *(_pinned(like) or ["pip"]))
        except UnavailableError:
            say("asking which of them nobody made ...")
            name_missing(own, _extras(extras), board, python, machine, _chosen_for)
            raise
        (out / FACTS).write_bytes(encode_facts(facts))
        files = wheelhouse_files(out)
        _check_bounds(files)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    about = {name: getattr(facts, name) for name in type(facts).__slots__}
    return {**about, "files": {name: path.stat().st_size for name, path in files.items()}}


def _own_wheel(out: Path, source: str) -> Path:
    with _source(source) as built_from:
        if built_from.suffix == ".whl":
            return Path(shutil.copy2(built_from, out))
        _pip("wheel", "--no-deps", "--wheel-dir", str(out), str(built_from))
    found = list(out.glob("*.whl"))
    if len(found) != 1:
        raise ConfigError("--source", source, f"the source of {DISTRIBUTION}")
    return found[0]


@contextmanager
def _source(source: str) -> Iterator[Path]:
    """A copy of a checkout without what was built or fetched in it: a build leaves nothing there, and takes no leftovers in."""
    path = Path(source) if source else ROOT
    if path.suffix == ".whl" and path.is_file():
        yield path
        return
    if not (path / "setup.cfg").is_file():
        raise ConfigError("--source", str(path), f"a checkout of {DISTRIBUTION}, or its wheel", "name one with --source")
    with tempfile.TemporaryDirectory(prefix="sly-pack-") as folder:
        copy = Path(folder) / "source"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
        yield copy


def _facts(own: Path, python: str, machine: str) -> Facts:
    from ota.wheelhouse import Facts

    asked = subprocess.run([sys.executable, "-I", "-c", LEDGER, str(own.resolve())], capture_output=True, text=True)
    words = asked.stdout.split()
    if asked.returncode or len(words) != 2:
        lines = asked.stderr.strip().splitlines() or ["nothing"]
        raise ConfigError(own.name, lines[-1], "an agent that says which schema of the ledger it writes")
    return Facts("-".join(own.name.split("-")[:2]), python, machine, int(words[0]), int(words[1]))


def _chosen_for(python: str, machine: str) -> list[str]:
    """Only wheels, of CPython, with a C library no newer than ``GLIBC_MINOR``: the same from wherever they are packed."""
    minors = range(OLDEST_GLIBC_MINOR, GLIBC_MINOR + 1)
    platforms = [f"manylinux2014_{machine}", *(f"manylinux_2_{minor}_{machine}" for minor in minors)]
    chosen = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    return [*chosen, *(f"--platform={each}" for each in platforms)]


def _kept(like: Path | None) -> list[str]:
    return ["--find-links", str(like)] if like else []


def _pinned(like: Path | None) -> list[str]:
    """Requirements that name what an earlier pack holds, but the agent itself."""
    from ota.wheelhouse import FACTS, wheelhouse_files

    names = [name.split("-")[:2] for name in wheelhouse_files(like) if name != FACTS] if like else []
    return [f"{name}=={version}" for name, version in names if name != DISTRIBUTION.replace("-", "_")]


def _extras(extras: Sequence[str]) -> str:
    return f"[{','.join(extras)}]" if extras else ""


def _pip(*words: str) -> None:
    command = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"pip {words[0]}", f"it did not end within {PIP_LIMIT_S} s", "is the network slow?") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.strip().splitlines()
        remedy = "every package must have a wheel for these boards: see --python and --machine"
        raise UnavailableError(f"pip {words[0]}", lines[-1] if lines else f"code {done.returncode}", remedy)


def _check_bounds(files: dict[str, Path]) -> None:
    from ota.manifest import FILE_NAME, MAX_FILES

    if len(files) > MAX_FILES:
        raise ConfigError("files of the agent", f"{len(files)}", f"at most {MAX_FILES}", "pack fewer extras")
    if odd := [name for name in files if not FILE_NAME.fullmatch(name)]:
        raise ConfigError("files of the agent", ", ".join(odd), f"names like {FILE_NAME.pattern}")


def here() -> tuple[str, str]:
    return ".".join(platform.python_version_tuple()[:2]), platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
