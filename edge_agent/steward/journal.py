"""What was rolled out from an operator's folder, for whoever asks later: a file for each plan, in ``rollouts/``.

Rules: an entry is written before the fleet hears of the order, and again whenever somebody saw how the rollout stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_agent.core.errors import RefusedError
from edge_agent.store.files import Disk, reaching, read_bounded, write_atomically
from ota.rollout import Rollout

FOLDER = "rollouts"
MAX_ENTRY_BYTES = 64 * 2**10
KEYS = {"model", "number", "serial", "boards", "operator", "action", "reason", "state", "why", "counts"}


class Journal:
    """Of the operator's folder ``folder``. Raises ``UnavailableError`` where that cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._place, self._disk = folder / FOLDER, Disk()

    def note(self, rollout: Rollout, status: Mapping[str, Any] | None = None) -> None:
        """Keep what is ordered, and how it stands (``rollout_status``) if somebody saw that."""
        with reaching(self._place):
            self._disk.make_folder(self._place)
        plan, seen = rollout.plan, status or {"state": "", "why": "", "counts": {}}
        entry = {
            "model": plan.model, "number": plan.number, "serial": plan.serial, "boards": len(plan.boards),
            "operator": rollout.operator, "action": rollout.action.value, "reason": rollout.reason,
            "state": str(seen["state"]), "why": seen["why"], "counts": dict(seen["counts"]),
        }  # fmt: skip
        write_atomically(self._disk, self._path(rollout), json.dumps(entry, indent=1).encode())

    def saw(self, rollout: Rollout, status: Mapping[str, Any]) -> None:
        """Keep how a rollout stands, if it was ordered from here."""
        if self._path(rollout).exists():
            self.note(rollout, status)

    def entries(self, model: str = "") -> list[dict[str, Any]]:
        """Every plan, the newest first; only of ``model``, if that is named. Raises ``RefusedError`` for a damaged entry."""
        if not self._place.is_dir():
            return []
        read = [self._read(self._place / name) for name in self._disk.names(self._place) if name.endswith(".json")]
        return sorted((each for each in read if model in ("", each["model"])), key=lambda each: -int(each["serial"]))

    def _path(self, rollout: Rollout) -> Path:
        return self._place / f"{rollout.plan.model}-{rollout.plan.serial}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            entry = json.loads(read_bounded(self._disk, path, MAX_ENTRY_BYTES))
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not entry.keys() >= KEYS or not isinstance(entry["serial"], int):
            raise RefusedError(
                f"entry {path}", "no entry of a rollout", "what sly ota wrote", "move it away: only history needs it"
            )
        return entry
