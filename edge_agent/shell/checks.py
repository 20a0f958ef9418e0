"""The judgements of a board's self-test: what was seen of the machine in, one check out.

Rules: pure, one function a check; what does not pass says what to do; what could not be seen is a warning that says why, never a
pass.  What reads the machine is ``shell.looking``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

from board_support.board import BoardInfo, Unavailable
from edge_agent.attest.self_test import MAX_WORDS_CHARS, Check, Verdict
from edge_agent.core.printable import on_one_line
from edge_agent.shell.known_answer import Asked
from edge_agent.shell.looking import Floor, KeyFile, Room, User
from edge_agent.transport.certificate import Validity

DAY_S = 86_400
SOON_DAYS = 60
"""A certificate that ends within so many days is warned of."""
NEVER_SYNCHRONISED = "wait for the time server (timedatectl), or name one this board reaches; updates and TLS need the time"
ASK_AGAIN = "look as the agent's own user, or as root: sly self-test --config FILE"


def passed(name: str, what: str) -> Check:
    return Check(name, Verdict.PASS, _clipped(what))


def warned(name: str, what: str, remedy: str) -> Check:
    return Check(name, Verdict.WARN, _clipped(what), _clipped(remedy))


def failed(name: str, what: str, remedy: str) -> Check:
    return Check(name, Verdict.FAIL, _clipped(what), _clipped(remedy))


def unseen(name: str, why: str, remedy: str = ASK_AGAIN) -> Check:
    """A check that could not be made."""
    return warned(name, f"cannot be checked: {why}", remedy)


def board(found: BoardInfo | Unavailable, throttled: Sequence[str] = ()) -> Check:
    if isinstance(found, Unavailable):
        return failed("board", f"{found.backend}: {'; '.join(found.reasons)}", "sly board probe shows every board and why")
    about = f"{found.hardware_model}; {found.accelerator}" + (" (emulated)" if found.emulated else "")
    if throttled and not found.emulated:
        return warned("board", f"{about}; slowed now: {', '.join(throttled)}", "see its power supply and its cooling")
    return passed("board", about)


def inference(asked: Asked) -> Check:
    if asked.why:
        return failed("inference", asked.why, asked.remedy)
    return passed("inference", f"{asked.library} gives the known answer" + (f" with {asked.delegate}" if asked.delegate else ""))


def sandbox(layers: Sequence[str], why: str = "") -> Check:
    """``layers`` as the engine child names them; none if it did not get so far, and ``why``."""
    if not layers:
        if "seccomp" in why:
            return failed("sandbox", why, "run a kernel with seccomp (CONFIG_SECCOMP_FILTER)")
        return unseen("sandbox", why or "no engine child told of its layers", "mend inference first")
    missing = [layer for layer in layers if layer.startswith("no ")]
    if any("seccomp" in layer for layer in missing):
        return failed("sandbox", "; ".join(missing), "run a kernel with seccomp (CONFIG_SECCOMP_FILTER)")
    if missing:
        return warned("sandbox", "; ".join(missing), "run a kernel 5.13 or later with Landlock (lsm=landlock,...)")
    return passed("sandbox", ", ".join(layers))


def models(named: Collection[str], hosted: Collection[str], withdrawn: Mapping[str, str]) -> Check:
    """``named`` in the configuration; ``hosted`` now, or sound as files; ``withdrawn``: by name, why not."""
    missing = {name: withdrawn.get(name) or "it is not loaded" for name in named if name not in hosted}
    if missing:
        what = "; ".join(f"{name}: {why}" for name, why in sorted(missing.items()))
        return failed("models", what, "put the files there again: sly models fetch NAME, or sly models build NAME")
    if not named:
        return passed("models", "none is configured to be served here")
    return passed("models", ", ".join(sorted(named)))


def clock(now_s: int, floor: Floor, synchronised: bool | None) -> Check:
    """``synchronised``: as the kernel or the time service says; ``None`` if neither can be asked."""
    now = datetime.fromtimestamp(max(0, now_s), UTC)
    if now_s < floor.time_s:
        earliest = datetime.fromtimestamp(floor.time_s, UTC)
        what = f"{now:%Y-%m-%d}, and it cannot be before {earliest:%Y-%m-%d}: {floor.why}"
        return failed("clock", what, "set a time server (timedatectl), or replace the battery of the real-time clock")
    if synchronised is None:
        return unseen("clock", "neither the kernel nor the time service says whether it is synchronised", NEVER_SYNCHRONISED)
    if not synchronised:
        return warned("clock", f"{now:%Y-%m-%d}, not synchronised", NEVER_SYNCHRONISED)
    return passed("clock", "synchronised")


def disk(room: Room, why_not_kept: str) -> Check:
    if why_not_kept:
        return failed("disk", f"it takes nothing: {why_not_kept}", "make room on it, or replace a card that fails (dmesg)")
    told = f"{_mib(room.free_bytes)} MiB free on {room.folder}"
    if room.free_bytes < room.reserve_bytes:
        what = f"{told}, the ledger alone needs {_mib(room.reserve_bytes)} MiB"
        return failed("disk", what, "make room: without it this board keeps no receipt and no promise")
    if room.free_bytes < room.needed_bytes:
        what = f"{told}, the next update may need {_mib(room.needed_bytes)} MiB ({room.about})"
        return warned("disk", what, "make room, or lower [state] cache_bytes, before anything is rolled out here")
    return passed("disk", told)


def identity(files: Sequence[KeyFile]) -> Check:
    """Key files: there, of the owner of the state folder, and nobody else's to read."""
    for file in files:
        if file.why:
            judged = warned if file.expected else failed
            return judged("identity", f"{file.path}: {file.why}", file.remedy)
    return passed("identity", "its keys are its own: " + ", ".join(file.path.name for file in files))


def certificate(now_s: int, found: Validity | str, path: str, clock_is_right: bool = True) -> Check:
    """``found``: until when it is good, or why that cannot be read; "" where none is configured."""
    again = "renew it: sly fleet enroll BOARD --again, then bring its files here"
    if found == "":
        return passed("certificate", "none is configured")
    if isinstance(found, str):
        return failed("certificate", f"{path}: {found}", again)
    end = datetime.fromtimestamp(found.not_after_s, UTC)
    left_days = (found.not_after_s - now_s) // DAY_S
    if not clock_is_right:
        return unseen("certificate", f"it ends on {end:%Y-%m-%d}, and the clock is wrong", "mend the clock first")
    if left_days < 0:
        return failed("certificate", f"{path}: it ended on {end:%Y-%m-%d}", again)
    if left_days < SOON_DAYS:
        return warned("certificate", f"{path}: it ends in {left_days} days, on {end:%Y-%m-%d}", again)
    return passed("certificate", f"good until {end:%Y-%m-%d}")


def broker(address: str, connected: bool, why: str) -> Check:
    """``address``: empty for a board that stands alone; ``why``: what kept it from connecting, "" while it still tries."""
    if not address:
        return passed("broker", "none is configured: this board stands alone")
    if connected:
        return passed("broker", f"connected to {address}")
    if not why:
        return unseen("broker", f"{address}: no connection yet", "wait: it goes on trying")
    return failed("broker", why, "see that the broker runs, is reached from here, and knows this board: sly fleet broker")


def user(seen: User, emulated: bool) -> Check:
    if seen.why:
        return unseen("user", seen.why)
    held = f"capabilities {seen.capabilities:#x}" if seen.capabilities else ""
    who = "root" if seen.uid == 0 else f"user {seen.uid}"
    if (seen.uid == 0 or held) and not emulated:
        what = f"{who}{', ' if held else ''}{held}"
        return warned("user", what, "run it as a user of its own, without capabilities: the service that flash.sh installs does")
    return passed("user", f"{who}{', ' if held else ', no capabilities'}{held}")


def _mib(size_bytes: int) -> int:
    return size_bytes // 2**20


def _clipped(text: str) -> str:
    text = on_one_line(text) or "-"
    return text if len(text) <= MAX_WORDS_CHARS else text[: MAX_WORDS_CHARS - 1] + "…"
