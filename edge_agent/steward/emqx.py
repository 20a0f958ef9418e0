"""The same access list for EMQX 5: who may say and hear what, as rules of its ``acl.conf``.

Owns the writer; what is granted is ``steward.mosquitto``'s, one table for both.  Rules:

* EMQX judges a subscription by its filter when it is made, not each message: a board is granted each filter that it subscribes
  to, ``#`` opens nothing, and the last rule denies.
* A place holder stands for a whole level: what a program hears that asks on a board's behalf (``sly ask --config``) cannot be
  granted.
* EMQX strips ``$share/GROUP/`` before it judges; groups are refused to boards by their zone (docs/cluster.md).

Not run against an EMQX by this project: written by its documentation, see docs/cluster.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edge_agent.core.values import BOARD_ID, checked
from edge_agent.steward.mosquitto import (
    CLIENT,
    HEARD_BY_A_BOARD,
    OPERATOR_PREFIX,
    OWN_ECHO,
    SAID_BY_A_BOARD,
    SAID_BY_AN_OPERATOR,
    SELF,
    topic_filter,
)  # fmt: skip
from edge_agent.transport.topics import PREFIX

PLACE_HOLDERS = {SELF: "${username}", CLIENT: "${clientid}"}


def acl_conf(fleet: str, operators: Iterable[str], revoked: Iterable[str]) -> str:
    """The text of ``acl.conf`` for one fleet. ``revoked``: boards that may neither say nor hear anything."""
    return "\n".join([*fleet_rules(fleet, operators, revoked), "{deny, all}."]) + "\n"


def fleet_rules(fleet: str, operators: Iterable[str], revoked: Iterable[str]) -> Iterator[str]:
    """The rules of one fleet, without the last that denies the rest: those of many fleets may stand in one file."""
    root = f"{PREFIX}/{fleet}/"
    yield f"%% Who may say and hear what in the fleet {fleet}, by the common name in the certificate: sly fleet broker --for emqx"
    for board in sorted(revoked):
        yield f'{{deny, {{username, "{checked(BOARD_ID, "revoked board", board)}"}}, all, ["#"]}}.'
    for operator in sorted(operators):
        name = OPERATOR_PREFIX + checked(BOARD_ID, "operator", operator)
        said = [topic_filter(kind, {}) for kind in SAID_BY_AN_OPERATOR]
        yield _rule(f'{{username, "{name}"}}', "subscribe", [f"{root}#"])
        yield _rule(f'{{username, "{name}"}}', "publish", [root + each for each in [*said, OWN_ECHO.format(operator=operator)]])
    for action, granted in (("publish", SAID_BY_A_BOARD), ("subscribe", HEARD_BY_A_BOARD)):
        filters = (root + topic_filter(kind, parts) for kind, parts in granted)
        yield _rule("all", action, [each for each in map(_with_place_holders, filters) if each])


def _with_place_holders(topic: str) -> str:
    """Empty for what EMQX cannot say: a place holder that is a part of a level."""
    levels = [PLACE_HOLDERS.get(level, level) for level in topic.split("/")]
    return "" if any(mark in level for level in levels for mark in PLACE_HOLDERS) else "/".join(levels)


def _rule(who: str, action: str, topics: list[str]) -> str:
    listed = ",\n  ".join(f'"{topic}"' for topic in topics)
    return f"{{allow, {who}, {action}, [\n  {listed}\n]}}."
