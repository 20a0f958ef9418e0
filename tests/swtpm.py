"""A software TPM 2.0 for tests: a real ``swtpm`` with its own state, on a unix socket in a short folder, ended by its id.

Rules: it is there when its socket is; what it keeps survives ``start`` after ``stop``, as a chip's flash does.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from edge_agent.attest.tpm import GENERATED
from tests.needs import needs_swtpm

START_LIMIT_S = 30.0


class Swtpm:
    def __init__(self) -> None:
        self._program = needs_swtpm()
        self.folder = Path(tempfile.mkdtemp(prefix="swtpm-"))
        self._socket = self.folder / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self.tcti = f"swtpm:path={self._socket}"

    def start(self) -> None:
        control = Path(f"{self._socket}.ctrl")
        for path in (self._socket, control):
            path.unlink(missing_ok=True)
        command = [self._program, "socket", "--tpm2", "--tpmstate", f"dir={self.folder}"]
        command += ["--server", f"type=unixio,path={self._socket}", "--ctrl", f"type=unixio,path={control}"]
        command += ["--flags", "not-need-init,startup-clear"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_LIMIT_S
        while not (self._socket.exists() and control.exists()):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"swtpm does not listen; it ended with {self._process.poll()}")
            time.sleep(0.005)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_LIMIT_S)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def run(self, program: str, *arguments: str) -> None:
        """One of tpm2-tools, beside the agent."""
        subprocess.run([program, "-T", self.tcti, *arguments], check=True, capture_output=True, timeout=START_LIMIT_S)


def attest_bytes(
    extra_data: bytes, pcr_digest: bytes, *, pcr: int = 23, magic: int = GENERATED, kind: int = 0x8018, bank: int = 0x000B,
    selections: int = 1, select_bytes: int = 3, also_pcr: int | None = None, tail: bytes = b"",
) -> bytes:  # fmt: skip
    """A TPMS_ATTEST as a TPM would write it (part 2, section 10.12.12), or not quite."""
    selected = 1 << pcr | (0 if also_pcr is None else 1 << also_pcr)
    return b"".join(
        [
            magic.to_bytes(4, "big"), kind.to_bytes(2, "big"), _sized(b"\x00\x0b" + bytes(32)), _sized(extra_data),
            (393).to_bytes(8, "big"), (1).to_bytes(4, "big"), bytes(4), b"\x01", bytes(8),
            selections.to_bytes(4, "big"), bank.to_bytes(2, "big"), bytes([select_bytes]),
            selected.to_bytes(select_bytes, "little"), _sized(pcr_digest), tail,
        ]
    )  # fmt: skip


def public_bytes(point: bytes, *, attributes: int = 0x00050472, curve: int = 0x0003, kind: int = 0x0023) -> bytes:
    """A TPM2B_PUBLIC of an ECDSA key (part 2, section 12.2.5)."""
    halves = _sized(point[1:33]) + _sized(point[33:])
    numbers = [(0x0010, 2), (0x0018, 2), (0x000B, 2), (curve, 2), (0x0010, 2)]
    area = kind.to_bytes(2, "big") + b"\x00\x0b" + attributes.to_bytes(4, "big") + _sized(b"")
    return _sized(area + b"".join(number.to_bytes(size, "big") for number, size in numbers) + halves)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data
