"""What the agent counts, as figures for ``/metrics``.

Rules: nothing here blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_agent.gateway.talker import Figure
from edge_agent.node.node import Node


def figures(node: Node) -> Iterable[Figure]:
    yield Figure("jobs_running", "jobs that run here", node.execution.running)
    yield Figure("jobs_waiting", "jobs that wait here", len(node.execution))
    yield Figure("requests_pending", "requests that came in here and are not answered", len(node.router.ingress))
    moved_in, given_up, moved_out = node.moves.counts
    yield Figure("sessions_moved_in_total", "sessions that moved here", moved_in, "counter")
    yield Figure("sessions_moved_out_total", "sessions that moved to another board", moved_out, "counter")
    yield Figure("session_moves_given_up_total", "moves here that did not come to their end", given_up, "counter")
    yield Figure("boards_online", "boards that are there, this one included", node.online_boards)
