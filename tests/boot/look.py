"""Runs inside the virtual machine, by the system's Python and its standard library: prints as JSON what there is to see."""

import json
import os
import pwd
import socket
import subprocess
from pathlib import Path
from typing import Any

UNIT = "sly-agent.service"
OUTSIDE = (("deb.debian.org", 80), ("pypi.org", 443), ("1.1.1.1", 443))
LIMIT_S = 3.0


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def shown(unit: str, name: str) -> str:
    return said("systemctl", "show", unit, "--value", "-p", name)


def process(pid: int) -> dict[str, Any]:
    pairs = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {name: value.strip() for name, value in pairs}
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {
        "pid": pid,
        "user": pwd.getpwuid(int(status["Uid"].split()[1])).pw_name,
        "capabilities": max(status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")),
        "bounding set": status["CapBnd"],
        "no new privileges": status["NoNewPrivs"] == "1",
        "seccomp": int(status["Seccomp"]),
        "seccomp filters": int(status["Seccomp_filters"]),
        "python": words[0].decode(),
        "pss_kib": next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")),
    }


def children(pid: int) -> list[int]:
    found = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    return found + [below for each in found for below in children(each)]


def way_out(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, LIMIT_S):
            return True
    except OSError:
        return False


def main() -> None:
    state = said("systemctl", "is-system-running", "--wait")
    pid = int(shown(UNIT, "MainPID"))
    engines = [each for each in children(pid) if b"worker" in Path(f"/proc/{each}/cmdline").read_bytes()]
    told = {
        "system": state,
        "failed units": said("systemctl", "list-units", "--failed", "--plain", "--no-legend"),
        "kernel": os.uname().release + " " + os.uname().machine,
        "lsm": Path("/sys/kernel/security/lsm").read_text() if Path("/sys/kernel/security/lsm").exists() else "",
        "agent": {**process(pid), "restarts": int(shown(UNIT, "NRestarts"))},
        "engine": process(engines[0]) if engines else {},
        "others": [Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:100] for each in children(pid)],
        "ways out": [f"{host}:{port}" for host, port in OUTSIDE if way_out((host, port))],
        "exposure": said("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1:],
        "first boot": said("journalctl", "-u", "sly-first-boot", "-o", "cat", "--no-pager").splitlines()[-12:],
    }
    print(json.dumps(told))


main()
