"""A picture of a demo: every request as a bar on the row of the board that answered it, and the incidents as lines.

Needs Pillow; import it late.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edge_agent.core.errors import UnavailableError
from edge_agent.demo.story import Served, Story
from edge_agent.local_fleet import Member

WIDTH_PX, ROW_PX, LEFT_PX, TOP_PX, BOTTOM_PX, RIGHT_PX = 1400, 96, 210, 112, 78, 24
LANES = 6
LANE_GAP_PX = 2
BACKGROUND, INK, FAINT, ALERT = "#ffffff", "#202124", "#dadce0", "#c5221f"
ACTS = {"all up": "#4285f4", "board lost": "#f29900", "broker lost": "#188038", "over the broker": "#a142f4"}


def draw_timeline(path: Path, story: Story, members: Sequence[Member]) -> None:
    """Write the timeline as a PNG file. Raises ``UnavailableError`` if it cannot be written."""
    end_s = max([0.1, *(each.answered_s for each in story.served)]) * 1.02
    image = Image.new("RGB", (WIDTH_PX, TOP_PX + ROW_PX * len(members) + BOTTOM_PX), BACKGROUND)
    canvas = _Canvas(ImageDraw.Draw(image), end_s, TOP_PX + ROW_PX * len(members))
    for row, member in enumerate(members):
        canvas.board(row, member, [each for each in story.served if each.result.board == member.board])
    canvas.axis()
    canvas.incidents(story.incidents)
    canvas.legend()
    try:
        image.save(path)
    except OSError as error:
        raise UnavailableError(f"picture {path}", error.strerror or str(error), "choose another --output") from error


class _Canvas:
    def __init__(self, draw: ImageDraw.ImageDraw, end_s: float, floor_px: int) -> None:
        self._draw, self._end_s, self._floor_px = draw, end_s, floor_px
        self._font, self._small = ImageFont.load_default(size=20), ImageFont.load_default(size=15)

    def _x(self, at_s: float) -> int:
        return LEFT_PX + int((WIDTH_PX - LEFT_PX - RIGHT_PX) * min(at_s / self._end_s, 1))

    def board(self, row: int, member: Member, served: Sequence[Served]) -> None:
        top_px = TOP_PX + row * ROW_PX
        self._draw.line((LEFT_PX, top_px, WIDTH_PX - RIGHT_PX, top_px), FAINT)
        self._draw.text((16, top_px + 20), member.board, INK, self._font)
        self._draw.text((16, top_px + 48), f"{member.profile}, {len(served)} answers", INK, self._small)
        lane_px = (ROW_PX - 8) // LANES
        for number, each in enumerate(sorted(served, key=lambda s: s.asked_s)):
            lane_top_px = top_px + 4 + (number % LANES) * lane_px
            left_px = self._x(each.asked_s)
            right_px = max(self._x(each.answered_s), left_px + 1)
            colour = ACTS.get(each.act, INK)
            self._draw.rectangle((left_px, lane_top_px, right_px, lane_top_px + lane_px - LANE_GAP_PX), colour)

    def axis(self) -> None:
        self._draw.line((LEFT_PX, self._floor_px, WIDTH_PX - RIGHT_PX, self._floor_px), INK)
        step_s = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60) if self._end_s / step <= 14 or step == 60)
        for tick in range(int(self._end_s / step_s) + 1):
            x = self._x(tick * step_s)
            self._draw.line((x, self._floor_px, x, self._floor_px + 6), INK)
            self._draw.text((x, self._floor_px + 8), f"{tick * step_s:g} s", INK, self._small, anchor="ma")

    def incidents(self, incidents: Sequence[tuple[float, str]]) -> None:
        places = [(self._x(at_s), 14 + (number % 4) * 22, text) for number, (at_s, text) in enumerate(incidents)]
        for x, y, _ in places:
            self._draw.line((x, y + 18, x, self._floor_px), ALERT, 2)
        for x, y, text in places:
            place, anchor = ((x - 4, y), "ra") if x > WIDTH_PX * 2 // 3 else ((x + 4, y), "la")
            self._draw.rectangle(self._draw.textbbox(place, text, self._small, anchor), BACKGROUND)
            self._draw.text(place, text, ALERT, self._small, anchor)

    def legend(self) -> None:
        x = LEFT_PX
        for act, colour in ACTS.items():
            self._draw.rectangle((x, self._floor_px + 44, x + 16, self._floor_px + 60), colour)
            self._draw.text((x + 24, self._floor_px + 43), act, INK, self._small)
            x += 200
