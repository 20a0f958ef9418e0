"""The light of a board, on a fabricated ``/sys`` that takes and refuses as the kernel's does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from board_support.led import BLINK_MS, Led, open_led
from board_support.registry import board_classes
from board_support.sysfs import Absent

NOBODY = 65534
PI_4 = "none rc-feedback kbd-scrolllock timer oneshot heartbeat backlight gpio cpu default-on input panic [mmc0] mmc1 rfkill-any"


def a_led(root: Path, name: str = "ACT", trigger: str = PI_4) -> Path:
    """The files of one light; ``delay_on`` and ``delay_off`` are there as they are while the trigger is ``timer``."""
    folder = root / "sys/class/leds" / name
    folder.mkdir(parents=True)
    for file, text in (("trigger", trigger), ("delay_on", "500"), ("delay_off", "500")):
        (folder / file).write_text(text + "\n")
    return folder


def written(folder: Path, file: str) -> str:
    """What was written last: a write begins where the file does, as in sysfs."""
    return (folder / file).read_text()


def opened(root: Path) -> Led:
    led = open_led("raspberry_pi", root)
    assert isinstance(led, Led)
    return led


def test_a_failure_blinks_slowly_and_a_pass_gives_the_light_back_what_it_did(tmp_path: Path) -> None:
    folder = a_led(tmp_path)
    led = opened(tmp_path)
    assert led.show(False) == "" and written(folder, "trigger") == PI_4 + "\n", "a pass at first touches nothing"
    assert led.show(True) == "" and written(folder, "trigger").startswith("timer")
    assert [written(folder, file)[: len(str(BLINK_MS))] for file in ("delay_on", "delay_off")] == [str(BLINK_MS)] * 2
    (folder / "trigger").write_text("x" * 9)
    assert led.show(True) == "" and written(folder, "trigger") == "x" * 9, "it blinks already"
    assert led.show(False) == "" and written(folder, "trigger").startswith("mmc0")


def test_the_light_is_given_back_at_the_end(tmp_path: Path) -> None:
    folder = a_led(tmp_path)
    led = opened(tmp_path)
    led.show(True)
    led.give_back()
    assert written(folder, "trigger").startswith("mmc0")


@pytest.mark.parametrize("failed_once_more", [True, False])
@pytest.mark.parametrize(("left", "given_back"), [("none [timer] mmc0", "mmc0"), ("none [timer] default-on", "default-on"),
                                                  ("none [timer]", "none")])  # fmt: skip
def test_a_light_that_was_left_blinking_is_given_its_usual_work_at_the_first_pass(
    tmp_path: Path, left: str, given_back: str, failed_once_more: bool
) -> None:
    folder = a_led(tmp_path, trigger=left)
    led = opened(tmp_path)
    if failed_once_more:
        led.show(True)
        assert written(folder, "delay_on").startswith(str(BLINK_MS)), "first boot, or the kernel, may have left another pace"
    led.show(False)
    assert written(folder, "trigger").startswith(given_back)


def test_an_older_kernel_calls_it_led0_and_the_newest_name_is_taken_first(tmp_path: Path) -> None:
    a_led(tmp_path, "led0")
    assert opened(tmp_path).name == "led0"
    a_led(tmp_path, "ACT")
    assert opened(tmp_path).name == "ACT"


def test_a_light_that_is_not_there_cannot_blink_or_is_of_a_board_without_one_is_absent_with_its_reason(tmp_path: Path) -> None:
    nothing = open_led("raspberry_pi", tmp_path)
    assert isinstance(nothing, Absent) and "/sys/class/leds/ACT/trigger: No such file" in nothing.reason
    a_led(tmp_path, trigger="none [mmc0]")
    still = open_led("raspberry_pi", tmp_path)
    assert isinstance(still, Absent) and "ledtrig-timer" in still.reason
    for kind in board_classes():
        if kind.backend != "raspberry_pi":
            assert isinstance(open_led(kind.backend, tmp_path), Absent)


def test_a_light_that_may_not_be_switched_says_why_and_raises_nothing(tmp_path: Path) -> None:
    folder = a_led(tmp_path)
    led = opened(tmp_path)
    (folder / "trigger").unlink()
    (folder / "trigger").mkdir()
    assert "Is a directory" in led.show(True)
    led.give_back()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Of a user to whom files say no."""
    before = os.geteuid()
    os.seteuid(before or NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def passable() -> Iterator[Path]:
    """A root that every user may pass."""
    with tempfile.TemporaryDirectory(prefix="sly-led-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_a_light_whose_pace_is_roots_until_udev_has_seen_it_blinks_at_the_kernels_and_then_at_its_own(passable: Path) -> None:
    folder = a_led(passable)
    led = opened(passable)
    (folder / "trigger").chmod(0o666)
    for pace in ("delay_on", "delay_off"):
        (folder / pace).chmod(0o444)
    with unprivileged():
        with pytest.raises(PermissionError):
            (folder / "delay_on").open("r+b")
        assert led.show(True) == "" and written(folder, "trigger").startswith("timer"), "it blinks, which is no fault"
        assert written(folder, "delay_on") == "500\n"
    for pace in ("delay_on", "delay_off"):
        (folder / pace).chmod(0o666)
    with unprivileged():
        assert led.show(True) == ""
        assert [written(folder, pace)[: len(str(BLINK_MS))] for pace in ("delay_on", "delay_off")] == [str(BLINK_MS)] * 2
        assert led.show(False) == "" and written(folder, "trigger").startswith("mmc0")
