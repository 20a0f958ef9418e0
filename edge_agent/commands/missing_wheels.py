"""Which wheels a kind of board would need that nobody made: asked of the package index when a pack could not be fetched.

Rules: all of them are named, not only the first; nothing is downloaded to find out; an index that cannot be reached is never
taken for wheels that are missing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from itertools import product
from pathlib import Path
from typing import Any

from edge_agent.core.errors import ConfigError

DISTRIBUTION = "slyos-edge"
PYTHONS = ("3.11", "3.12", "3.13")
"""On which every test of the agent passes."""
MACHINES = ("aarch64", "x86_64")
ASKED_AT_ONCE = 4
ASKING_LIMIT_S = 120
OF_PYTHON_ALONE = ("pip", "paho-mqtt", "tuf")
"""They have wheels for every machine, so an index without them for a board is one that did not answer."""
OF_SOME = re.compile(r"extra ==|python_version|python_full_version")
"""Requirements that some Pythons or extras have; their names are known, their versions are not asked for."""
VERSIONS = (">", "<", "=", "~", "!")
MISSING = re.compile(r"No matching distribution found for (?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")

Flags = Callable[[str, str], Sequence[str]]
"""The options by which pip looks for a Python's and machine's wheels."""


def name_missing(own: Path, extras: str, board: str, python: str, machine: str, flags: Flags) -> None:
    """Find why the wheels that the agent ``own`` (a wheel) needs could not be fetched.

    Raises ``ConfigError`` that names every one that such a board lacks, and for which Pythons and machines all are there; returns
    if none is missing, or the index does not answer.
    """
    if _asked({name: name for name in OF_PYTHON_ALONE}, flags(python, machine)) is not None:
        return
    needed = _needed(own, extras)
    missing = _missing(needed, flags(python, machine))
    if not missing:
        return
    pairs = [(p, m) for m, p in product(dict.fromkeys((machine, *MACHINES)), PYTHONS) if (p, m) != (python, machine)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        lacking = list(threads.map(lambda pair: _asked(needed, flags(*pair)), pairs))
    allowed = _by_machine([pair for pair, lacks in zip(pairs, lacking, strict=True) if lacks is None])
    subject = f"wheels for {board} (Python {python} on {machine})" if board else f"wheels for Python {python} on {machine}"
    raise ConfigError(subject, f"none of {', '.join(needed[each] for each in missing)}", allowed, "see docs/boards.md")


def _by_machine(pairs: Sequence[tuple[str, str]]) -> str:
    machines = dict.fromkeys(machine for _, machine in pairs)
    told = [f"Python {', '.join(p for p, m in pairs if m == machine)} on {machine}" for machine in machines]
    return "; ".join(told) or "no Python and machine that the agent runs on"


def _needed(own: Path, extras: str) -> dict[str, str]:
    """What must be there: everything that pip would install here for ``own``, each with the versions that are asked for.

    Where pip cannot tell, because this machine lacks wheels itself, only what ``own`` asks for.
    """
    done = _pip_install(["--ignore-installed", "--report", "-", f"{own}{extras}"])
    packages = [_metadata(own)] if done.returncode else [each["metadata"] for each in json.loads(done.stdout)["install"]]
    lines = [line for each in packages for line in each.get("requires_dist", ()) if not OF_SOME.search(line)]
    named = [_name(line) for line in lines] if done.returncode else [each["name"] for each in packages]
    asked: dict[str, set[str]] = {_normal(name): set() for name in named if _normal(name) != DISTRIBUTION}
    for line in lines:
        versions = line.split(";")[0].replace(" ", "").removeprefix(_name(line))
        if versions.startswith(VERSIONS) and _normal(_name(line)) in asked:
            asked[_normal(_name(line))].add(versions)
    return {name: name + ",".join(sorted(versions)) for name, versions in asked.items()}


def check_python(own: Path, python: str) -> None:
    """Raises ``ConfigError`` if the agent ``own`` (a wheel) is not for Python ``python``."""
    oldest = re.fullmatch(r">=\s*3\.(\d+)", _metadata(own).get("requires_python", ""))
    if oldest and int(python.split(".")[1]) < int(oldest[1]):
        remedy = "install it beside the system's own, and flash with that: see docs/boards.md"
        raise ConfigError("--python", python, f"3.{oldest[1]} or later, which {own.name} needs", remedy)


def _metadata(own: Path) -> dict[str, Any]:
    with zipfile.ZipFile(own) as packed:
        inside = next(name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        told = message_from_bytes(packed.read(inside))
    told_of = {"name": told["Name"], "requires_python": told["Requires-Python"] or ""}
    return {**told_of, "requires_dist": told.get_all("Requires-Dist", [])}


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _normal(name: str) -> str:
    """A project's name, of which there are many spellings (PyPA specifications, name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _missing(needed: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """The names of which there is no wheel. pip stops at the first, so it is asked again without that one."""
    left, missing = dict(needed), []
    while left and (name := _asked(left, flags)):
        missing.append(name)
        del left[name]
    return missing


def _asked(needed: Mapping[str, str], flags: Sequence[str]) -> str | None:
    """One name of which there is no wheel, each taken by itself; ``None`` if there are all, ``""`` if pip says something else."""
    with tempfile.TemporaryDirectory(prefix="sly-asked-") as target:
        done = _pip_install(["--no-deps", "--ignore-installed", "--target", target, *flags, *needed.values()])
    if done.returncode == 0:
        return None
    found = MISSING.search(done.stderr)
    name = _normal(found["name"]) if found else ""
    return name if name in needed else ""


def _pip_install(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What pip says it would do."""
    command = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--quiet"]
    command += ["--only-binary=:all:", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASKING_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "")
