"""Fabricated machines: the ``/sys``, ``/proc`` and ``/etc`` files of boards, and native libraries that behave badly.

Owns the trees that the board tests probe.  Rules: a tree is a mapping of paths to text, so that a test can change one
line of it; the libraries are ELF files written here byte by byte, so that no compiler is needed.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Mapping
from pathlib import Path

from board_support.coral import DELEGATE_SYMBOLS
from tests.needs import needs

EDGETPU_PATH = "usr/lib/x86_64-linux-gnu/libedgetpu.so.1"
MEMINFO = "MemTotal:        8052000 kB\nMemFree:          123456 kB\n"


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write a tree below ``root``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def zone(index: int, kind: str, temperature: str, **trips: str) -> dict[str, str]:
    """A thermal zone; ``passive="70000"`` and so on are its trip points in order."""
    folder = f"sys/devices/virtual/thermal/thermal_zone{index}"
    files = {f"{folder}/type": kind + "\n", f"{folder}/temp": temperature + "\n"}
    for i, (trip_kind, at) in enumerate(trips.items()):
        files |= {f"{folder}/trip_point_{i}_temp": at + "\n", f"{folder}/trip_point_{i}_type": trip_kind + "\n"}
    return files


def jetson_files() -> dict[str, str | bytes]:
    rails = "sys/bus/i2c/devices/1-0040/hwmon/hwmon1"
    return {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "proc/meminfo": MEMINFO,
        **zone(0, "cpu-thermal", "51250", active="50000", passive="99000", critical="104500"),
        **zone(1, "gpu-thermal", "53500", passive="97000"),
        f"{rails}/name": "ina3221\n",
        f"{rails}/in1_label": "VDD_IN\n", f"{rails}/in1_input": "5000\n", f"{rails}/curr1_input": "1400\n",
        f"{rails}/curr1_crit": "4000\n",
        f"{rails}/in2_label": "VDD_CPU_GPU_CV\n", f"{rails}/in2_input": "5000\n", f"{rails}/curr2_input": "300\n",
        f"{rails}/in3_label": "VDD_SOC\n", f"{rails}/in3_input": "5000\n", f"{rails}/curr3_input": "250\n",
        f"{rails}/in7_label": "sum of shunt voltages\n", f"{rails}/in7_input": "12000\n", f"{rails}/curr7_input": "9\n",
        "sys/bus/i2c/devices/0-0050/hwmon/hwmon0/name": "spd5118\n",
        "sys/class/devfreq/17000000.gpu/device/load": "437\n",
    }  # fmt: skip


def coral_pcie_files() -> dict[str, str | bytes]:
    apex = "sys/class/apex/apex_0"
    return {
        "proc/device-tree/model": "Phanbell\0",
        "proc/meminfo": MEMINFO,
        f"{apex}/temp": "47050\n",
        f"{apex}/trip_point0_temp": "84800\n",
        f"{apex}/trip_point1_temp": "89800\n",
        f"{apex}/trip_point2_temp": "94800\n",
        EDGETPU_PATH: shared_library(),
    }


def coral_usb_files() -> dict[str, str | bytes]:
    stick, hub = "sys/bus/usb/devices/2-1", "sys/bus/usb/devices/usb2"
    return {
        "sys/class/dmi/id/product_name": "A small computer\n",
        "proc/meminfo": MEMINFO,
        f"{hub}/idVendor": "1d6b\n", f"{hub}/idProduct": "0003\n",
        f"{stick}/idVendor": "1a6e\n", f"{stick}/idProduct": "089a\n",
        EDGETPU_PATH: shared_library(),
    }  # fmt: skip


def raspberry_pi_files(
    model: str = "Raspberry Pi 5 Model B Rev 1.0", revision: str = "d04170", throttled: str = "0"
) -> dict[str, str | bytes]:
    return {
        "proc/device-tree/model": model + "\0",
        "proc/cpuinfo": f"processor\t: 0\n\nRevision\t: {revision}\nSerial\t\t: 0123456789abcdef\nModel\t\t: {model}\n",
        "proc/meminfo": MEMINFO,
        "sys/devices/platform/soc/soc:firmware/get_throttled": throttled + "\n",
        **zone(0, "cpu-thermal", "48312", active="50000", critical="110000"),
    }


def unreadable(path: Path) -> None:
    """Put a file there that opens and cannot be read, even by root: EIO."""
    path.symlink_to("/proc/self/mem")


def fifo(path: Path) -> None:
    """Put a pipe there that nobody writes to."""
    os.mkfifo(path)


MACHINES = {"x86_64": 62, "aarch64": 183}
CODE = {
    ("x86_64", ""): b"\xc3",  # ret
    ("x86_64", "segfault"): b"\x31\xc0\x89\x00",  # xor eax, eax; mov [rax], eax
    ("x86_64", "hang"): b"\xeb\xfe",  # jmp .
    ("aarch64", ""): struct.pack("<I", 0xD65F03C0),  # ret
    ("aarch64", "segfault"): struct.pack("<2I", 0xD2800000, 0xF9000000),  # mov x0, #0; str x0, [x0]
    ("aarch64", "hang"): struct.pack("<I", 0x14000000),  # b .
}


def shared_library(symbols: tuple[str, ...] = DELEGATE_SYMBOLS, at_load: str = "") -> bytes:
    """A 64-bit ELF shared object that defines ``symbols`` and does ``at_load`` ("segfault", "hang") in its constructor.

    Layout: header, three program headers, then hash table, symbols, strings, dynamic section and code in one segment
    (System V gABI chapters 4 and 5).
    """
    machine = platform.machine()
    needs(machine in MACHINES, f"no native library can be written for {machine}")
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in symbols)
    count, code = len(symbols) + 1, CODE[machine, at_load]
    hash_table = struct.pack(f"<{3 + count}I", 1, count, 1 % count, *((i + 1) % count if i else 0 for i in range(count)))
    hash_at = 64 + 3 * 56
    symbols_at = _aligned(hash_at + len(hash_table))
    strings_at = symbols_at + 24 * count
    dynamic_at = _aligned(strings_at + len(strings))
    entries = [(4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, 24), (12, 0), (0, 0)]
    code_at = _aligned(dynamic_at + 16 * len(entries))
    entries[5] = (12, code_at)
    offsets = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in symbols]
    table = bytes(24) + b"".join(struct.pack("<IBBHQQ", offset, 0x12, 0, 1, code_at, 1) for offset in offsets)
    size = code_at + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, MACHINES[machine], 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    programs = (
        struct.pack("<IIQQQQQQ", 1, 7, 0, 0, 0, size, size, 0x10000)
        + struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, 16 * len(entries), 16 * len(entries), 8)
        + struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)
    )
    image = bytearray(size)
    for at, part in (
        (0, header),
        (64, programs),
        (hash_at, hash_table),
        (symbols_at, table),
        (strings_at, strings),
        (dynamic_at, b"".join(struct.pack("<QQ", *entry) for entry in entries)),
        (code_at, code),
    ):
        image[at : at + len(part)] = part
    return bytes(image)


def _aligned(offset: int) -> int:
    return -(-offset // 16) * 16
