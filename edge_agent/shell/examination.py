"""What a board's self-test examines: each thing that is seen (``looking``) is put to its judgement (``checks``).

Rules: the agent and the command examine alike; a check that cannot be made is a warning that says why, never left out; what looks
at the machine blocks, for as long as its disk and its board's own tools take.
"""

from __future__ import annotations

from collections.abc import Callable

from board_support.board import Board, BoardInfo
from board_support.sysfs import Tree
from edge_agent.attest.self_test import Check, Verdict
from edge_agent.core.clock import Clock
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import SlyError
from edge_agent.shell import checks, looking
from edge_agent.shell.known_answer import Asked
from ota.agent_slots import launched_from


def machine_checks(config: AgentConfig, board: Board, clock: Clock) -> list[Check]:
    """What can be seen without serving: board, clock, identity, certificate, user. Blocks; bounded by the disk alone."""
    tree = Tree(board.settings.root)
    now_s = clock.wall_us() // 1_000_000

    def clock_check() -> Check:
        return checks.clock(now_s, looking.clock_floor(config), looking.synchronised(tree))

    time = made("clock", clock_check)
    right = time.verdict is not Verdict.FAIL
    return [
        made("board", lambda: _board(board, clock)),
        time,
        made("identity", lambda: checks.identity(looking.key_files(config))),
        made("certificate", lambda: checks.certificate(
            now_s, looking.certificate(config), config.broker.certificate_file, right)),
        made("user", lambda: checks.user(looking.user(tree), board.emulated)),
    ]  # fmt: skip


def disk_check(config: AgentConfig, why_not_kept: str) -> Check:
    if not config.state.folder.is_dir():
        return checks.warned(
            "disk", f"no folder {config.state.folder} yet", "start the agent, or make it, the agent's user's own"
        )
    return made("disk", lambda: checks.disk(looking.room(config, launched_from() is not None), why_not_kept))


def answer_checks(asked: Asked) -> list[Check]:
    return [checks.inference(asked), checks.sandbox(asked.layers, asked.why)]


def made(name: str, make: Callable[[], Check]) -> Check:
    """The check, or a warning that it cannot be made."""
    try:
        return make()
    except OSError as error:
        return checks.unseen(name, f"{error.filename or ''} {error.strerror or error}".strip())
    except SlyError as error:
        return checks.unseen(name, str(error))


def in_order(found: list[Check]) -> tuple[Check, ...]:
    """As a person should read them: what does not pass first."""
    order = [Verdict.FAIL, Verdict.WARN, Verdict.PASS]
    return tuple(sorted(found, key=lambda check: order.index(check.verdict)))


def _board(board: Board, clock: Clock) -> Check:
    found = board.probe()
    throttled = board.read_sensors(clock.monotonic_us()).throttled if isinstance(found, BoardInfo) and not board.emulated else ()
    return checks.board(found, throttled)
