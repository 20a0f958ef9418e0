"""The light on a board that anybody can see: it blinks slowly while something is wrong, and is its own otherwise.

Rules: what the light did before is remembered and given back; one that blinks already, for an agent that had no time to give it
back or a start that failed, is given back at the first pass; one that is not there is an ``Absent`` with its reason; nothing here
raises for what the machine does.  The files of the pace appear with the trigger, and are this user's only when udev has seen
them: until then, the pace is the kernel's, half a second on and half a second off.
Source: the kernel's Documentation/leds/leds-class.rst, and ledtrig-timer (``delay_on`` and ``delay_off``, in ms).
"""

from __future__ import annotations

import re
from pathlib import Path

from board_support.sysfs import Absent, Tree

LEDS = {"raspberry_pi": ("ACT", "led0")}
"""By backend: the names of the light that is for everybody, the newest kernel's first."""
BLINK = "timer"
BLINK_MS = 1000
"""On, and as long off."""
_IN_FORCE = re.compile(r"\[([\w:-]{1,64})\]")
_RESTING = ("mmc0", "default-on", "none")
"""What a light does, by the first of them that it has, that was left blinking."""


class Led:
    """``show`` as often as you like; ``give_back`` at the end."""

    def __init__(self, tree: Tree, name: str, before: str, blinks: bool) -> None:
        self.name, self._tree, self._folder, self._before = name, tree, f"sys/class/leds/{name}", before
        self._blinks, self._paced = blinks, False

    def show(self, failing: bool) -> str:
        """Blink or be its own again; why that cannot be, empty if it is so."""
        why = ""
        if failing != self._blinks:
            why = self._write("trigger", BLINK if failing else self._before)
            self._blinks, self._paced = failing and not why, False
        if self._blinks and not self._paced:
            self._paced = not any(self._write(pace, str(BLINK_MS)) for pace in ("delay_on", "delay_off"))
        return why

    def give_back(self) -> None:
        self.show(False)

    def _write(self, file: str, text: str) -> str:
        path = self._tree.root / self._folder / file
        try:
            with path.open("r+b", buffering=0) as opened:
                opened.write(text.encode())
        except OSError as error:
            return f"/{self._folder}/{file}: {error.strerror or error}"
        return ""


def open_led(backend: str, root: Path) -> Led | Absent:
    """The light of this kind of board, below ``root``."""
    names = LEDS.get(backend, ())
    tree, reasons = Tree(root), []
    for name in names:
        trigger = tree.text(f"sys/class/leds/{name}/trigger")
        if isinstance(trigger, Absent):
            reasons.append(trigger.reason)
            continue
        words = trigger.replace("[", "").replace("]", "").split()
        if BLINK not in words:
            reasons.append(f"/sys/class/leds/{name}/trigger: it has no {BLINK} (kernel module ledtrig-timer)")
            continue
        in_force = _IN_FORCE.search(trigger)
        return Led(tree, name, _before(in_force, words), bool(in_force and in_force[1] == BLINK))
    return Absent("; ".join(reasons) or f"{backend} has none that is known")


def _before(in_force: re.Match[str] | None, words: list[str]) -> str:
    if in_force and in_force[1] != BLINK:
        return in_force[1]
    return next((each for each in _RESTING if each in words), "none")
