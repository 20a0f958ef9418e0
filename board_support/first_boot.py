"""What a board does once before its agent's first start: the user, the owners, and the factory's environment.

    /opt/sly/python -I /opt/sly/first_boot.py [--root DIR]

Owns ``/opt/sly/factory`` and what it points to.  Rules:

* The standard library only, in this one file, run as root by a Python of the system: nothing of the agent is there yet.
* No network and no index: what is installed are the wheels that flash.sh wrote, each of the digest that it wrote down.
* An environment counts once its stamp lies in it, and the stamp is written last; the symlink is switched to a whole one.
  So the power may go at any point: the old one, or nothing, is there, and the next boot begins anew.
* No link is followed and nothing with a second name is given away: what lies in the agent's folder may be hostile.
* A second start finds both stamps and only looks at owners.

``ota/wheelhouse.py`` builds environments from releases in nearly the same steps.  It cannot be used here: it is inside a wheel
that is still packed.  Nor this there: it is a task among others in an agent that goes on serving, and copies what it checks,
because the folder that it takes files from is no root's.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import grp
import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

USER = "sly"
LIST, WHEELS, FACTORY = "opt/sly/flashed.list", "opt/sly/wheels", "opt/sly/factory"
STAMP, CHECKED = "first_boot.stamp", "opt/sly/first_boot.checked"
STATE, CONFIG, SYSUSERS = "var/lib/sly", "etc/sly/agent.toml", "etc/sysusers.d/sly.conf"
NEEDED = ("/opt/sly/python", "/opt/sly/launcher.py", "/opt/sly/wheels/wheelhouse.json", "/etc/sly/agent.toml")
PROBED = "edge_agent.agent"
"""As ``ota.launcher.PROBED``, where the wheels do not say another."""
LEDS = ("ACT", "led0")
BLINK_MS = 100

MAX_LIST_BYTES = 4 * 2**20
MAX_SHEET_BYTES = 16_384
MAX_WORDS_CHARS = 300
MAX_DEPTH = 64
"""Of folders in the agent's; no agent makes more than a dozen."""
READ_BYTES = 2**20
BLOCK_BYTES = 4096
SPARE_BYTES = 32 * 2**20
"""Left free beside the environment: the ledger and the journal are written, too."""
BUILD_LIMIT_S = 3600
PROBE_LIMIT_S = 300

FLASH_AGAIN = "run flash.sh for this card again"
REMEDIES = {
    errno.ENOSPC: "make room, or grow the partition (flash.sh --grow), and start again",
    errno.EROFS: "mount it for writing; if it became read-only by itself, the card is failing: see dmesg",
    errno.EIO: "the card is failing: see dmesg",
}


class FirstBootError(Exception):
    """What went wrong, and what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(what)


class Entry(NamedTuple):
    """A line of ``flashed.list``: ``kind`` d, f or l; ``digest``: SHA-256 of a file, target of a link, or "-"."""

    kind: str
    mode: int
    path: str
    digest: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_wheel(self) -> bool:
        return self.kind == "f" and self.path.startswith(f"/{WHEELS}/") and self.name.endswith(".whl")


def say(text: str) -> None:
    print(f"first boot: {text}", flush=True)


# what flash.sh wrote


def flashed(root: Path) -> list[Entry]:
    """What must be here. Raises ``FirstBootError`` where a flashing was not finished."""
    unfinished = FirstBootError(f"this card was not finished: /{LIST} is missing or torn", FLASH_AGAIN)
    try:
        data = (root / LIST).read_bytes()
    except FileNotFoundError:
        raise unfinished from None
    if not data.endswith(b"\n") or len(data) > MAX_LIST_BYTES:
        raise unfinished
    lines = [line for line in data.decode("utf-8", "replace").splitlines() if line and not line.startswith("#")]
    try:
        entries = [_entry(line) for line in lines]
    except ValueError:
        raise unfinished from None
    missing = [path for path in NEEDED if path not in {each.path for each in entries}]
    if missing or not any(each.is_wheel for each in entries):
        raise unfinished
    return entries


def _entry(line: str) -> Entry:
    kind, mode, path, digest = line.split("\t")
    whole = kind in ("d", "f", "l") and path.startswith("/") and ".." not in path.split("/")
    if not whole or (kind == "f" and not re.fullmatch(r"-|[0-9a-f]{64}", digest)):
        raise ValueError(line)
    return Entry(kind, int(mode, 8), path, digest)


def check(root: Path, entries: Sequence[Entry]) -> None:
    """Every file as it was flashed, looked at once a flashing. Raises ``FirstBootError`` naming those that are not."""
    stamp = _flashing(root)
    if stamped(root / CHECKED, stamp):
        return
    size_bytes = sum(_size_bytes(root, each) for each in entries)
    say(f"checking {len(entries)} files, {_mib(size_bytes)}")
    wrong = [f"{each.path}: {why}" for each in entries if (why := why_damaged(root, each))]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        remedy = f"{FLASH_AGAIN}; if it happens twice, the card is worn out"
        raise FirstBootError(f"damaged: {'; '.join(wrong[:5])}{more}", remedy)
    _write(root / CHECKED, stamp)


def _flashing(root: Path) -> str:
    """The list, and when it was written: a second flashing may write the same one."""
    path = root / LIST
    return f"{_digest(path)} {path.stat().st_mtime_ns}"


def stamped(path: Path, stamp: str) -> bool:
    try:
        return path.read_text().strip() == stamp
    except (OSError, ValueError):
        return False


def why_damaged(root: Path, entry: Entry) -> str:
    """ "" for what is as it was flashed."""
    path = root / entry.path.lstrip("/")
    try:
        found = path.lstat().st_mode
        if not {"d": stat.S_ISDIR, "f": stat.S_ISREG, "l": stat.S_ISLNK}[entry.kind](found):
            return "it is of another kind"
        if entry.kind == "l":
            target = str(path.readlink())
            return "" if entry.digest in ("-", target) else f"it points to {target}"
        if entry.kind == "f" and entry.digest not in ("-", _digest(path)):
            return "its bytes are not those that were written"
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _size_bytes(root: Path, entry: Entry) -> int:
    with suppress(OSError):
        return (root / entry.path.lstrip("/")).lstat().st_size if entry.kind == "f" else 0
    return 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


# the user


class Identity(NamedTuple):
    uid: int
    gid: int


def user(root: Path) -> Identity:
    """The agent's user, made with its groups where one is missing. Raises ``FirstBootError`` if that cannot be."""
    found = _known(root)
    if found is None or not _groups(root) >= _wanted_groups(root):
        say(f"making the user {USER} and its groups")
        _make_user(root)
        found = _known(root)
    if found is None:
        raise FirstBootError(
            f"there is no user {USER}, and neither systemd-sysusers nor useradd made one", f"run: useradd -r {USER}"
        )
    if not found.uid or not found.gid:
        raise FirstBootError(f"the user {USER} has root's number", f"give it another: see /etc/passwd, or {FLASH_AGAIN}")
    return found


def _known(root: Path) -> Identity | None:
    if root == Path("/"):
        with suppress(KeyError):
            return Identity(pwd.getpwnam(USER).pw_uid, grp.getgrnam(USER).gr_gid)
        return None
    numbers = []
    for path in ("etc/passwd", "etc/group"):
        lines = (root / path).read_text().splitlines() if (root / path).exists() else []
        numbers += [int(line.split(":")[2]) for line in lines if line.startswith(f"{USER}:")]
    return Identity(*numbers) if len(numbers) == 2 else None


def _groups(root: Path) -> set[str]:
    if root == Path("/"):
        return {each.gr_name for each in grp.getgrall()}
    path = root / "etc/group"
    return {line.split(":")[0] for line in path.read_text().splitlines()} if path.exists() else set()


def _wanted_groups(root: Path) -> set[str]:
    """Without one of those that it names, systemd would not start the agent's unit."""
    lines = [line.split() for line in (root / SYSUSERS).read_text().splitlines()]
    return {words[1] for words in lines if words[:1] == ["g"]}


def _make_user(root: Path) -> None:
    """By sysusers.d(5); where systemd-sysusers is missing, what the same file says by groupadd(8), useradd(8) and usermod(8)."""
    sysusers = root / SYSUSERS
    if shutil.which("systemd-sysusers"):
        _try(["systemd-sysusers", f"--root={root}", str(sysusers)])
        return
    place = [] if root == Path("/") else ["--prefix", str(root)]
    for line in sysusers.read_text().splitlines():
        words = line.split()
        if words[:1] == ["g"]:
            _try(["groupadd", *place, "--system", "--force", words[1]])
        elif words[:1] == ["u"]:
            shell = "/usr/sbin/nologin"
            _try(["useradd", *place, "--system", "--user-group", "--no-create-home", "-d", f"/{STATE}", "-s", shell, words[1]])
        elif words[:1] == ["m"]:
            _try(["usermod", *place, "--append", "--groups", words[2], words[1]])


def _try(command: Sequence[str]) -> None:
    """What comes of it is looked for afterwards; what it complains of is passed on."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        say(f"{error.filename}: {error.strerror}")
        return
    if done.returncode:
        say(f"{command[0]}: {_last_line(done.stderr)}")


# owners


def give(root: Path, owner: Identity) -> None:
    """The state folder to the agent alone; the configuration to be read by it, and changed by root only.

    Raises ``FirstBootError`` for what root must not give away.
    """
    state = root / STATE
    state.mkdir(0o700, parents=True, exist_ok=True)
    with _opened(state, os.O_DIRECTORY) as fd:
        given = _give_folder(fd, f"/{STATE}", owner)
    if given:
        say(f"{given} files and folders in /{STATE} are {USER}'s now")
    with _opened(root / CONFIG) as fd:
        _check_alone(fd, f"/{CONFIG}")
        os.fchown(fd, 0, owner.gid)
        os.fchmod(fd, 0o640)


@contextmanager
def _opened(path: str | Path, flags: int = 0, folder: int | None = None) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _give_folder(fd: int, name: str, owner: Identity) -> int:
    """How many below ``fd`` had another owner; each is only ever reached from its folder's descriptor."""
    if name.count("/") > MAX_DEPTH:
        raise FirstBootError(f"folders in /{STATE} lie more than {MAX_DEPTH} deep", "no agent made them: look, and remove them")
    given = int(_give(fd, owner))
    with os.scandir(fd) as entries:
        found = [(each.name, each.stat(follow_symlinks=False).st_mode) for each in entries]
    for child, mode in found:
        if stat.S_ISDIR(mode):
            with _opened(child, os.O_DIRECTORY, fd) as below:
                given += _give_folder(below, f"{name}/{child}", owner)
        elif stat.S_ISREG(mode):
            with _opened(child, folder=fd) as file:
                facts = os.fstat(file)
                if (facts.st_uid, facts.st_gid) != owner:
                    _check_alone(file, f"{name}/{child}")
                    given += _give(file, owner)
        elif stat.S_ISLNK(mode):
            os.chown(child, *owner, dir_fd=fd, follow_symlinks=False)
    return given


def _give(fd: int, owner: Identity) -> bool:
    """Whether it was another's. It is nobody's but the owner's from then on."""
    facts = os.fstat(fd)
    if (facts.st_uid, facts.st_gid) == owner:
        return False
    os.fchown(fd, *owner)
    os.fchmod(fd, stat.S_IMODE(facts.st_mode) & 0o700)
    return True


def _check_alone(fd: int, name: str) -> None:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        what = f"{name} has {facts.st_nlink} names" if stat.S_ISREG(facts.st_mode) else f"{name} is no regular file"
        raise FirstBootError(
            f"{what}: who put it there could be given a file of root's by it", "remove it, and look where it is from"
        )


# the factory's environment


@dataclass(frozen=True)
class Wheelhouse:
    """``facts``: ``wheelhouse.json``; ``stamp``: what an environment of exactly these wheels and this Python has in it."""

    wheels: tuple[Path, ...]
    facts: dict[str, object]
    stamp: str

    @property
    def probed(self) -> str:
        return str(self.facts.get("probe", PROBED))


def wheelhouse(root: Path, entries: Sequence[Entry]) -> Wheelhouse:
    chosen = sorted((each.name, each.digest) for each in entries if each.is_wheel)
    told = json.dumps([platform.python_version_tuple()[:2], platform.machine(), chosen])
    data = (root / WHEELS / "wheelhouse.json").read_bytes()[:MAX_SHEET_BYTES]
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise FirstBootError(f"/{WHEELS}/wheelhouse.json: {error}", FLASH_AGAIN) from error
    wheels = tuple(root / WHEELS / name for name, _ in chosen)
    return Wheelhouse(wheels, facts if isinstance(facts, dict) else {}, hashlib.sha256(told.encode()).hexdigest())


def check_platform(facts: dict[str, object]) -> None:
    """Raises ``FirstBootError`` if the wheels are for another Python or machine than this."""
    here = (".".join(platform.python_version_tuple()[:2]), platform.machine())
    if (facts.get("python"), facts.get("machine")) != here:
        got = f"the wheels are for Python {facts.get('python')} on {facts.get('machine')}"
        raise FirstBootError(
            f"{got}; this system has Python {here[0]} on {here[1]}", "run flash.sh again: it packs for what is here"
        )


def whole(root: Path, stamp: str) -> bool:
    """Whether the factory's environment is of these wheels."""
    return stamped(root / FACTORY / STAMP, stamp) and (root / FACTORY / "bin" / "python").exists()


def build(root: Path, house: Wheelhouse, owner: Identity) -> None:
    """The environment under its own name, then the link to it, then nothing else.

    Scripts name the folder that they lie in, so it is built where it stays: what has no stamp is none.  It is of the Python that
    ``/opt/sly/python`` leads to, not of the link: flashed again with another, it runs until the new one is whole.
    """
    target = root / f"{FACTORY}-{house.stamp[:8]}"
    _sweep(root, keep=_current(root) if _current(root) != target.name else "")
    _check_room(target.parent, house.wheels)
    say(f"unpacking {len(house.wheels)} wheels; this takes minutes on a slow card")
    _run("venv", [os.path.realpath(sys.executable), "-I", "-m", "venv", "--without-pip", str(target)])
    python = str(target / "bin" / "python")
    _run("pip", [python, "-I", _pip(house.wheels), "install", *_HERMETIC, *map(str, house.wheels)])
    _run("pip", [python, "-I", "-m", "pip", "check"])
    say("trying it")
    _run("the agent", [python, "-I", "-c", f"import {house.probed}"], PROBE_LIMIT_S, owner)
    say("making it durable")
    _settle(target)
    _write(target / STAMP, house.stamp)
    _link(root / FACTORY, target.name)
    _sweep(root, keep=target.name)


_HERMETIC = ("--no-index", "--no-deps", "--no-cache-dir", "--no-warn-script-location", "--root-user-action=ignore", "--quiet")


def _pip(wheels: Sequence[Path]) -> str:
    """pip out of its own wheel: a minimal system has no ensurepip."""
    found = [wheel for wheel in wheels if wheel.name.startswith("pip-")]
    if not found:
        raise FirstBootError("there is no wheel of pip among them", "pack them by sly ota pack-agent, then run flash.sh again")
    return str(found[0] / "pip")


def _current(root: Path) -> str:
    with suppress(OSError):
        return str((root / FACTORY).readlink())
    return ""


def _sweep(root: Path, keep: str) -> None:
    """Older environments, and what was not finished."""
    base = root / FACTORY
    for path in base.parent.glob(f"{base.name}-*"):
        if path.name != keep and re.fullmatch(rf"{base.name}-[0-9a-f]{{8}}", path.name):
            shutil.rmtree(path)


def _check_room(folder: Path, wheels: Sequence[Path]) -> None:
    needed, free = sum(map(unpacked_bytes, wheels)) + SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        what = f"the disk is too full: {_mib(needed)} are needed, {_mib(free)} are free, {_mib(needed - free)} are missing"
        raise FirstBootError(what, REMEDIES[errno.ENOSPC])


def unpacked_bytes(wheel: Path) -> int:
    """Room for its files, and for the bytecode of its modules, which is about as large."""
    with zipfile.ZipFile(wheel) as packed:
        sizes = [each.file_size * (2 if each.filename.endswith(".py") else 1) for each in packed.infolist()]
    return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)


def _run(step: str, command: Sequence[str], limit_s: int = BUILD_LIMIT_S, owner: Identity | None = None) -> None:
    """Raises ``FirstBootError`` with its last words."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LANG": "C.UTF-8"}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    who = {"user": owner.uid, "group": owner.gid, "extra_groups": ()} if owner else {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, cwd="/", timeout=limit_s, **who
        )  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise FirstBootError(f"{step} did not end within {limit_s} s", "is the card failing? see dmesg") from None
    if done.returncode:
        raise _failure(step, done.returncode, done.stderr + done.stdout)


def _failure(step: str, code: int, output: str) -> FirstBootError:
    for number, remedy in REMEDIES.items():
        if os.strerror(number) in output:
            return FirstBootError(f"{step}: {os.strerror(number)}", remedy)
    if "No module named venv" in output:
        return FirstBootError("this Python has no venv", "install it in the image: apt-get install python3-venv")
    return FirstBootError(f"{step}: {_last_line(output) or f'code {code}'}", FLASH_AGAIN)


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("ERROR")] or lines
    return telling[-1][:MAX_WORDS_CHARS] if telling else ""


# the disk


def _settle(folder: Path) -> None:
    """Make every file and folder below ``folder`` durable."""
    _sync_disk(folder)
    for path, _, files in os.walk(folder):
        for name in files:
            if not (Path(path) / name).is_symlink():
                _fsync(Path(path) / name)
        _fsync(Path(path))
    _fsync(folder.parent)


def _sync_disk(folder: Path) -> None:
    """All of its file system at once (syncfs(2)): thousands of fsyncs are quick after it, and each says whether it held."""
    with _opened(folder) as fd:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def _fsync(path: Path) -> None:
    with _opened(path) as fd:
        os.fsync(fd)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}")
    with part.open("w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _fsync(path.parent)


def _link(link: Path, target: str) -> None:
    part = link.with_name(f".{link.name}")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)
    _fsync(link.parent)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


# what a person sees


def blink(root: Path) -> None:
    """Fast, where the board has a light that can be told to (Linux: leds-class, ledtrig-timer)."""
    for name in LEDS:
        folder = root / "sys/class/leds" / name
        with suppress(OSError):
            (folder / "trigger").write_text("timer")
            for each in ("delay_on", "delay_off"):
                (folder / each).write_text(str(BLINK_MS))
            return


def first_boot(root: Path) -> None:
    """Raises ``FirstBootError``, ``OSError``."""
    entries = flashed(root)
    house = wheelhouse(root, entries)
    owner = user(root)
    give(root, owner)
    check(root, entries)
    if whole(root, house.stamp):
        say("nothing to do: the agent's environment is there")
        return
    check_platform(house.facts)
    build(root, house, owner)
    say("done: the agent can start")


def main(arguments: Sequence[str] | None = None, work: Callable[[Path], None] = first_boot) -> int:
    parser = argparse.ArgumentParser(prog="first_boot.py", description="Make this board ready for its agent's first start.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="the board's root folder (default: /)")
    root = parser.parse_args(arguments).root.resolve()
    os.umask(0o022)
    try:
        work(root)
    except FirstBootError as error:
        return _failed(root, str(error), error.remedy)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        return _failed(
            root, str(error), "make room and start again" if full else f"is the card failing? see dmesg; else {FLASH_AGAIN}"
        )
    return 0


def _failed(root: Path, what: str, remedy: str) -> int:
    say(f"FAILED: {what}")
    say(f"what to do: {remedy}")
    blink(root)
    return 1


if __name__ == "__main__":
    sys.exit(main())
