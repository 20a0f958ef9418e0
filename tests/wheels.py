"""Small wheels, made here: an agent of one module, so that a test builds its environment in a second."""

from __future__ import annotations

import base64
import hashlib
import platform
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from edge_agent.store.ledger import SCHEMA, USABLE_FROM
from ota.manifest import AGENT, CHUNK_BYTES, Kind, Release, ReleasedFile
from ota.wheelhouse import FACTS, Facts, encode_facts

PYTHON = ".".join(platform.python_version_tuple()[:2])

SAYS_WHO_IT_IS = """
import signal
import sys
VERSION = {version!r}
if __name__ == "__main__":
    print(VERSION, *sys.argv[1:], flush=True)
    if "wait" in sys.argv:
        signal.pause()
"""


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str], requires: str = "") -> Path:
    """The smallest wheel that pip takes (the binary distribution format, PyPA specifications)."""
    info = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in content.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for member, text in content.items():
            packed.writestr(member, text)
        packed.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def facts(**changed: object) -> Facts:
    told: dict[str, object] = {
        "agent": "tiny", "python": PYTHON, "machine": platform.machine(), "reads": SCHEMA, "needs": USABLE_FROM, "probe": "tiny",
    }  # fmt: skip
    return Facts(**{**told, **changed})  # type: ignore[arg-type]


def tiny_agent(folder: Path, number: int, module: str = SAYS_WHO_IT_IS, **changed: object) -> tuple[Release, dict[str, Path]]:
    """Release ``number`` of an agent that is the module ``tiny``, and where its files lie."""
    folder.mkdir(parents=True, exist_ok=True)
    requires = str(changed.pop("requires", ""))
    made = wheel(folder, "tiny", f"{number}.0", {"tiny.py": module.replace("{version!r}", repr(f"{number}.0"))}, requires)
    (folder / FACTS).write_bytes(encode_facts(facts(**changed)))
    files = {FACTS: folder / FACTS, made.name: made}
    return release_of(number, files), files


def release_of(number: int, files: Mapping[str, Path]) -> Release:
    return Release(AGENT, number, Kind.AGENT, tuple(released(name, path.read_bytes()) for name, path in files.items()))


def released(name: str, data: bytes) -> ReleasedFile:
    pieces = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
    chunks = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    return ReleasedFile(name, len(data), hashlib.sha256(data).digest(), chunks)


def bare_environment(folder: Path, name: str, module: str) -> Path:
    """A virtual environment with the module ``tiny`` alone, made without pip; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / name)], check=True)
    packages = next((folder / name / "lib").glob("python*")) / "site-packages"
    (packages / "tiny.py").write_text(module.replace("{version!r}", repr(name)))
    return folder / name / "bin" / "python"
