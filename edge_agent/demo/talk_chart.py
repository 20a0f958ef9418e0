"""A picture of the demo's talk: how long each turn waited for its first token, and what was held and what was read for it.

Needs Pillow; import it late.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edge_agent.core.errors import UnavailableError
from edge_agent.demo.conversation import Asked

WIDTH_PX, ROW_PX, LEFT_PX, TOP_PX, RIGHT_PX, BOTTOM_PX = 1400, 84, 260, 70, 330, 24
BACKGROUND, INK, FAINT, WAITING, AFTER_KILL = "#ffffff", "#202124", "#dadce0", "#4285f4", "#188038"
TITLE = "Time to the first token of each turn"


def draw_talk(path: Path, asked: Sequence[Asked], after_kill: str) -> None:
    """Write the chart as a PNG file; the turn named ``after_kill`` stands out. Raises ``UnavailableError`` if it cannot."""
    image = Image.new("RGB", (WIDTH_PX, TOP_PX + ROW_PX * len(asked) + BOTTOM_PX), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(size=20), ImageFont.load_default(size=16)
    draw.text((16, 20), TITLE, INK, ImageFont.load_default(size=24))
    longest_us = max([1, *(each.end.first_token_us for each in asked)])
    for row, each in enumerate(asked):
        top_px, end = TOP_PX + row * ROW_PX, each.end
        width_px = max(2, (WIDTH_PX - LEFT_PX - RIGHT_PX) * end.first_token_us // longest_us)
        draw.line((16, top_px, WIDTH_PX - 16, top_px), FAINT)
        draw.text((16, top_px + 28), each.what, INK, font)
        colour = AFTER_KILL if each.what == after_kill else WAITING
        draw.rectangle((LEFT_PX, top_px + 18, LEFT_PX + width_px, top_px + ROW_PX - 18), colour)
        place = (LEFT_PX + width_px + 12, top_px + 16)
        draw.text(place, f"{end.first_token_us / 1000:.0f} ms", INK, font)
        draw.text((place[0], place[1] + 28), f"{end.cached_tokens} tokens held, {each.computed_tokens} read", INK, small)
    try:
        image.save(path)
    except OSError as error:
        raise UnavailableError(f"picture {path}", error.strerror or str(error), "choose another --output") from error
