"""What can be seen inside a machine that runs, by SSH as root: who the agent is, what it may do, and what there is of a network.

Owns ``Inside``.  Rules: what must hold is asserted here, and what was seen is handed back to be shown; nothing inside is changed.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

LIMIT_S = 300.0
PROGRAM = Path(__file__).with_name("look.py")
"""Runs inside, by the system's Python."""


class Inside:
    """``look`` runs ``look.py`` there. Raises ``AssertionError`` for what does not hold."""

    def __init__(self, port: int, key: Path) -> None:
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=60",
            "BatchMode=yes",
        )
        self._ssh = [
            "ssh",
            "-i",
            str(key),
            "-p",
            str(port),
            *(word for each in options for word in ("-o", each)),
            "root@127.0.0.1",
        ]

    def run(self, command: str, stdin: str = "") -> str:
        done = subprocess.run([*self._ssh, command], input=stdin, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}{done.stdout[-2000:]}"
        return done.stdout

    def look(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.run("python3 -I -", PROGRAM.read_text()))
        for name in ("agent", "engine"):
            process = told[name]
            assert process["user"] == "sly", f"the {name} runs as {process['user']}"
            assert int(process["capabilities"], 16) == 0 and process["no new privileges"], process
        filters = told["engine"]["seccomp filters"], told["agent"]["seccomp filters"]
        assert filters[0] > filters[1] > 0, f"the engine has no filter of its own: {filters}"
        assert told["agent"]["python"].startswith("/opt/sly/factory"), told["agent"]
        assert told["system"] == "running" and told["agent"]["restarts"] == 0, told
        assert not told["ways out"], told["ways out"]
        return told
