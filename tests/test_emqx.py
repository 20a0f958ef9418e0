"""The access list for EMQX says what Mosquitto's says: by a reader of its rules that follows its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError
from edge_agent.steward.emqx import acl_conf
from edge_agent.steward.enrolling import Enrolment, enroll, revoke
from edge_agent.transport.link import matches
from edge_agent.transport.topics import TOOL, Kind, Topics
from tests.enrolled_fleet import sly
from tests.operators import new_fleet
from tests.test_acl import BOARDS_OWN, every_topic

TOPICS = Topics("home")
TEXT = acl_conf("home", ["ann"], ["barn"])
RULE = re.compile(r'\{(allow|deny), (all|\{username, "([^"]+)"\})(?:, (all|publish|subscribe), \[\s*([^\]]*?)\s*\])?\}\.')
RULES = RULE.findall(re.sub(r"^%%.*$", "", TEXT, flags=re.MULTILINE))


def may(user: str, action: str, topic: str) -> bool:
    """The first rule that fits decides (EMQX 5, "Use ACL File"); a filter of a subscription is matched like a name."""
    for verdict, _, name, what, topics in RULES:
        listed = [each.replace("${username}", user) for each in re.findall(r'"([^"]+)"', topics)]
        fits = not listed or any(matches(each, topic) for each in listed)
        if fits and name in ("", user) and what in ("", "all", action):
            return bool(verdict == "allow")
    raise AssertionError("no rule fits")


def test_every_line_is_a_rule_and_the_last_denies_all_that_is_left() -> None:
    assert re.sub(RULE, "", re.sub(r"^%%.*$", "", TEXT, flags=re.MULTILINE)).strip() == ""
    assert RULES[-1][:2] == ("deny", "all") and not RULES[-1][3]


def test_a_board_says_the_same_as_at_mosquitto() -> None:
    assert {topic for topic in every_topic("kitchen", "barn") if may("kitchen", "publish", topic)} == BOARDS_OWN


def test_a_board_subscribes_to_what_is_its_own_or_for_all_and_to_nothing_else() -> None:
    root = "sly/1/home/"
    for_me = [TOPICS.request("kitchen"), TOPICS.cancel("kitchen"), TOPICS.challenge("kitchen"), TOPICS.kv_of("kitchen")]
    for_all = [Kind.ONLINE, Kind.RECORD, Kind.QUOTE, Kind.APPRAISAL, Kind.EPOCH, Kind.WORD, Kind.DIGEST, Kind.OTA_META]
    for topic in [*for_me, TOPICS.replies_to("kitchen"), *map(TOPICS.every, for_all), TOPICS.ota_chunk("ab" * 32)]:
        assert may("kitchen", "subscribe", topic), topic
    for_barn = [TOPICS.request("barn"), TOPICS.cancel("barn"), TOPICS.challenge("barn"), TOPICS.kv_of("barn")]
    greedy = ["#", "+/#", f"{root}#", f"{root}board/#", f"{root}board/+/#", f"{root}board/+/request", f"{root}board/+/reply/+"]
    for topic in [*for_barn, *greedy, f"{root}+/barn/request", TOPICS.replies_to("barn"), "$SYS/#", "$SYS/brokers"]:
        assert not may("kitchen", "subscribe", topic), topic
    assert not may("kitchen", "subscribe", f"{root}board/+/reply/kitchen{TOOL}ask-1"), "EMQX cannot say it: docs/cluster.md"


def test_an_operator_says_what_the_fleet_trusts_and_whoever_is_revoked_nothing() -> None:
    trusted = [TOPICS.ota_meta("timestamp"), TOPICS.rollout("smollm2"), TOPICS.word("kitchen")]
    for topic in trusted:
        assert may("operator.ann", "publish", topic) and not may("operator.eve", "publish", topic)
        assert not may("kitchen", "publish", topic)
    assert may("operator.ann", "subscribe", "sly/1/home/#")
    for topic in (*BOARDS_OWN, TOPICS.record("barn")):
        assert not may("barn", "publish", topic) and not may("barn", "subscribe", topic)


def test_a_name_that_would_end_a_rule_is_refused() -> None:
    with pytest.raises(RefusedError):
        acl_conf("home", ['ann"}, all}.'], [])


def test_the_command_prints_it_from_the_charter(tmp_path: Path) -> None:
    folder = new_fleet(tmp_path / "fleet")
    enroll(folder, Enrolment("barn", "jalapeno"))
    revoke(folder, "barn", "stolen")
    done = sly(folder, "fleet", "broker", "--for", "emqx")
    assert done.returncode == 0 and done.stdout == TEXT, done.stderr
