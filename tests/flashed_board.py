"""The root folder of a board as flash.sh leaves it, small (an agent of one module, pip, a key), and its first boot."""

from __future__ import annotations

import ensurepip
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from board_support import first_boot
from ota import launcher
from ota.wheelhouse import FACTS, encode_facts
from tests.needs import needs
from tests.wheels import facts, wheel

SUPPORT = Path(first_boot.__file__).parent
PYTHON = Path("/usr/bin/python3")
"""What ``/opt/sly/python`` leads to: the system's, which has none of our packages."""
KEY = bytes(range(32))
LIMIT_S = 300
NOTHING: Mapping[str, str] = {}

NOT_AS_ROOT = """
import os
assert os.geteuid(), "root is not who will import it"
VERSION = {version!r}
if __name__ == "__main__":
    print(VERSION)
"""


def pip_wheel() -> Path:
    """The one that comes with Python, or with Debian's python3-pip-whl."""
    folders = [Path(ensurepip.__file__).parent / "_bundled", Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/nonexistent")]
    found = [path for folder in folders for path in folder.glob("pip-*.whl")]
    needs(found, "this Python came without pip's wheel (apt-get install python3-venv)")
    return found[0]


def system_python() -> str:
    needs(PYTHON.exists(), f"there is no {PYTHON}, which the units start")
    asked = [str(PYTHON), "-I", "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class FlashedBoard:
    """``root``, with release 1 of the small agent flashed unless it is ``flashed``; ``boot`` runs what lies in it."""

    def __init__(self, root: Path, flashed: bool = False, pip: bool = True, told: Mapping[str, str] = NOTHING) -> None:
        self.root, self.opt, self.state = root, root / "opt/sly", root / "var/lib/sly"
        self.script = self.opt / "first_boot.py"
        if not flashed:
            self._lay_down()
            self.flash(1, pip=pip, told=told)

    def _lay_down(self) -> None:
        for folder in ("opt/sly/models", "etc/sly", "etc/sysusers.d"):
            (self.root / folder).mkdir(parents=True)
        shutil.copy(first_boot.__file__, self.opt)
        shutil.copy(launcher.__file__, self.opt)
        (self.opt / "python").symlink_to(PYTHON)
        shutil.copy(SUPPORT / "sysusers" / "sly.conf", self.root / "etc/sysusers.d")
        (self.root / "etc/sly/agent.toml").write_text("[board]\n")
        (self.root / "etc/sly/agent.toml").chmod(0o600)
        (self.state / "kitchen").mkdir(parents=True, mode=0o700)
        (self.state / "kitchen/identity.key").write_bytes(KEY)
        (self.state / "kitchen/identity.key").chmod(0o600)
        (self.state / "kitchen/ca.pem").write_text("a certificate")

    def flash(self, version: int, module: str = NOT_AS_ROOT, pip: bool = True, told: Mapping[str, str] = NOTHING) -> None:
        """Other wheels, and the list; ``told``: what they say of themselves."""
        wheels = self.opt / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir()
        wheel(wheels, "tiny", f"{version}.0", {"tiny.py": module.replace("{version!r}", repr(f"{version}.0"))})
        if pip:
            shutil.copy(pip_wheel(), wheels)
        (wheels / FACTS).write_bytes(encode_facts(facts(**{"python": system_python(), **told})))
        self.write_list()

    def write_list(self) -> None:
        lines = ["# board jalapeno", "# id kitchen"]
        for path in sorted([*self.opt.rglob("*"), *(self.root / "etc").rglob("*"), *self.state.rglob("*")]):
            if path.name not in (".pwd.lock", "flashed.list") and "factory" not in str(path):
                lines.append(self._line(path))
        (self.opt / "flashed.list").write_text("\n".join(lines) + "\n")

    def _line(self, path: Path) -> str:
        name = f"/{path.relative_to(self.root)}"
        if path.is_symlink():
            return f"l\t0777\t{name}\t{path.readlink()}"
        if path.is_dir():
            return f"d\t0755\t{name}\t-"
        kept = name.startswith(("/var/", "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"))
        return f"f\t0644\t{name}\t{'-' if kept else sha256(path.read_bytes()).hexdigest()}"

    def command(self, *before: str) -> list[str]:
        return [*before, str(self.opt / "python"), "-I", str(self.script), "--root", str(self.root)]

    def boot(self, *before: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """Its exit code, and what it said. ``before``: words to run it under."""
        done = subprocess.run(
            self.command(*before), capture_output=True, text=True, timeout=LIMIT_S, env=environment or dict(os.environ)
        )
        assert done.stderr == "", done.stderr
        return done.returncode, done.stdout

    def agent(self) -> str:
        """What the launcher starts; "" if nothing."""
        words = ["--folder", str(self.root / "slots"), "--factory", str(self.opt / "factory/bin/python")]
        start: Sequence[str] = [
            str(self.opt / "python"),
            "-I",
            str(self.opt / "launcher.py"),
            *words,
            "--module",
            "tiny",
            "--probe",
            "tiny",
        ]
        who = {"user": 65534, "group": 65534, "extra_groups": ()}
        done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT_S, **who)  # type: ignore[call-overload]
        return str(done.stdout.strip())

    def environments(self) -> list[str]:
        return sorted(path.name for path in self.opt.glob("factory-*"))
