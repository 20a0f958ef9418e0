"""Shares and bytes as people write them on a command line."""

from __future__ import annotations

import argparse
import re

_SHARE = re.compile(r"(\d{1,3})(?:\.(\d))?\s*%")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|M|G)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
MAX_BYTES = 10**12


def permille(text: str) -> int:
    """``10%`` and ``2.5%`` as per mille."""
    found = _SHARE.fullmatch(text.strip())
    value = int(found[1]) * 10 + int(found[2] or 0) if found else -1
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a share from 0% to 100%, like 10% or 2.5%")
    return value


def part(text: str) -> int:
    """As ``permille``, of which something must be left."""
    value = permille(text)
    if not value:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a share above 0%, up to 100%")
    return value


def byte_count(text: str) -> int:
    """``500kB``, ``2MB`` or plain bytes."""
    found = _BYTES.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: bytes, like 500kB or 2MB")
    value = int(float(found[1]) * _UNITS[found[2].lower()])
    if value > MAX_BYTES:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: at most 1 TB")
    return value
