"""What a test may need from outside, and what happens without it: a skip with its reason on a laptop, a failure in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def needs(present: object, reason: str) -> None:
    """Skip the calling test, or fail it in CI, unless ``present``."""
    if present:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {reason}")
    pytest.skip(reason)


def needs_mosquitto() -> str:
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    needs(path, "Mosquitto is not installed (apt-get install mosquitto)")
    return str(path)


def needs_shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    needs(path.exists(), f"the shared vectors are not beside this checkout: {'/'.join(parts)}")
    return path


def needs_cwt() -> str:
    """A Python that has the library cwt: ``SLY_CWT_PYTHON``, or the one that ``make test`` makes."""
    path = Path(os.environ.get("SLY_CWT_PYTHON") or Path(__file__).resolve().parents[1] / ".venv-cwt" / "bin" / "python")
    needs(path.exists(), f"there is no {path} with the library cwt (make .venv-cwt/cwt.made, or set SLY_CWT_PYTHON)")
    return str(path)


def needs_swtpm() -> str:
    """A software TPM 2.0, and the programs that speak to it."""
    present = shutil.which("swtpm") and shutil.which("tpm2_quote")
    needs(present, "there is no software TPM (apt-get install swtpm swtpm-tools tpm2-tools)")
    return str(shutil.which("swtpm"))


def needs_module(name: str, extra: str) -> None:
    """In CI too it may be missing from an environment that is made without it: those named in ``SLY_TESTS_WITHOUT``."""
    if not importlib.util.find_spec(name) and name in os.environ.get("SLY_TESTS_WITHOUT", "").split():
        pytest.skip(f"this environment is made without {name}")
    needs(importlib.util.find_spec(name), f"{name} is not installed (pip install 'slyos-edge[{extra}]')")


def needs_program(name: str, package: str) -> str:
    """Debian's ``package`` has it."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    needs(path, f"there is no {name} (apt-get install {package})")
    return str(path)


def needs_root() -> None:
    """Files that must belong to root are written by root."""
    needs(os.geteuid() == 0, "this is root's to do (run the tests as root)")
