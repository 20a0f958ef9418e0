"""``--receipt FILE``: where a command writes the proof of what it was answered.

Rules: a place that cannot take the file is told before anything is asked; what was answered is shown before the proof is written.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_receipt(parser: argparse.ArgumentParser, told: str) -> None:
    parser.add_argument("--receipt", type=_place, metavar="FILE", help=f"write a proof of {told}, for sly verify")


def _place(text: str) -> Path:
    """Where a file can appear. Raises ``ArgumentTypeError`` for a folder, and in one that is not there or not this user's."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, which is a folder; allowed: a file's name")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a file in a folder that is there; run: mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a file in a folder that this user may write to")
    return path
