"""A virtual machine that boots a board's image: its power, its console, its one way to the host.

Owns ``Machine``.  Rules: its network is a user-mode one whose host has nothing but a loopback (``run.sh`` sees to that), so that
it reaches the host's broker at 10.0.2.2 and nothing else; the console goes to a file; a power cut is SIGKILL, to this process.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.boot.disk import VolatileDisk

STOP_LIMIT_S = 60.0
MEMORY_MIB = 1024
LAST_LINES = 15
_OF = {
    "arm64": ("qemu-system-aarch64", "-M", "virt,gic-version=3", "ttyAMA0"),
    "amd64": ("qemu-system-x86_64", "-M", "q35", "ttyS0"),
}
CPU = {
    ("arm64", "tcg"): "cortex-a72",
    ("arm64", "kvm"): "host",
    ("amd64", "tcg"): "max",
    ("amd64", "kvm"): "host,arch-capabilities=off",
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """``arch``: arm64 or amd64; ``accel``: kvm, or tcg, which is emulation in software; kernel and initrd are the image's."""

    arch: str
    accel: str
    kernel: Path
    initrd: Path


class Machine:
    """``start`` and ``cut`` as often as one likes; ``ssh_port`` on 127.0.0.1 leads to the machine's 22."""

    def __init__(self, hardware: Hardware, disk: VolatileDisk, console: Path, ssh_port: int) -> None:
        self._hardware, self._disk, self.console, self.ssh_port = hardware, disk, console, ssh_port
        self._process: subprocess.Popen[bytes] | None = None
        self.boots = 0

    def start(self) -> None:
        """Switch it on."""
        if self._process is not None:
            raise RuntimeError("the machine runs already")
        self.boots += 1
        self._disk.open()
        with self.console.with_suffix(".qemu").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def cut(self) -> tuple[int, int]:
        """Pull the plug. Returns how many bytes the disk had not been told to keep, and how many of them it lost."""
        self._end()
        return self._disk.cut()

    def close(self) -> None:
        """End it and its disk, in whatever state it is."""
        if self._process is not None:
            self._end()
        self._disk.close()

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The end of the console, for who must say why something did not come about."""
        lines = self.console.read_text("utf-8", "replace").splitlines() if self.console.exists() else []
        return "\n".join(lines[-LAST_LINES:])

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_LIMIT_S)
        self._process = None

    def _command(self) -> list[str]:
        hardware = self._hardware
        program, option, kind, serial = _OF[hardware.arch]
        cpu = CPU[hardware.arch, hardware.accel]
        drive = f"driver=nbd,server.type=unix,server.path={self._disk.socket},node-name=disk"
        return [
            program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            option, kind, "-accel", hardware.accel, "-cpu", cpu, "-smp", "2", "-m", str(MEMORY_MIB),
            "-kernel", str(hardware.kernel), "-initrd", str(hardware.initrd),
            "-append", f"root=LABEL=root ro console={serial} panic=-1 systemd.show_status=1",
            "-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console",
            "-blockdev", drive, "-device", "virtio-blk-pci,drive=disk,write-cache=on",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip
