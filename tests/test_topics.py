"""The topic scheme: what is built is parsed back, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.errors import RefusedError
from edge_agent.transport.link import MAX_TOPIC_BYTES, is_filter, matches
from edge_agent.transport.topics import Kind, Topic, Topics

TOPICS = Topics("lab")
BUILT = {
    TOPICS.online("b1"): Topic(Kind.ONLINE, board="b1"),
    TOPICS.record("b1"): Topic(Kind.RECORD, board="b1"),
    TOPICS.quote("b1"): Topic(Kind.QUOTE, board="b1"),
    TOPICS.request("b1"): Topic(Kind.REQUEST, board="b1"),
    TOPICS.cancel("b1"): Topic(Kind.CANCEL, board="b1"),
    TOPICS.kv("b1", "b2"): Topic(Kind.KV, board="b1", peer="b2"),
    TOPICS.reply("b1", "Client-7"): Topic(Kind.REPLY, board="b1", client="Client-7"),
    TOPICS.appraisal("v1", "b1"): Topic(Kind.APPRAISAL, verifier="v1", board="b1"),
    TOPICS.digest("b1"): Topic(Kind.DIGEST, board="b1"),
    TOPICS.ota_meta("timestamp"): Topic(Kind.OTA_META, role="timestamp"),
    TOPICS.ota_want("b1"): Topic(Kind.OTA_WANT, board="b1"),
    TOPICS.ota_chunk("ab" * 32): Topic(Kind.OTA_CHUNK, digest="ab" * 32),
    TOPICS.rollout("vww"): Topic(Kind.ROLLOUT, model="vww"),
    TOPICS.report("b1"): Topic(Kind.REPORT, board="b1"),
    TOPICS.self_test("b1"): Topic(Kind.SELF_TEST, board="b1"),
}


def test_every_topic_of_the_protocol_has_its_published_name() -> None:
    assert sorted(BUILT) == sorted(
        "sly/1/lab/" + name
        for name in (
            "board/b1/online", "board/b1/record", "board/b1/quote", "appraisal/v1/b1", "digest/b1", "board/b1/request",
            "board/b1/cancel", "board/b1/kv/b2", "board/b1/reply/Client-7",
            "ota/meta/timestamp", "ota/want/b1", f"ota/chunk/{'ab' * 32}", "ota/rollout/vww",
            "fleet/report/b1", "fleet/self-test/b1",
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_is_parsed_back(name: str) -> None:
    assert TOPICS.parse(name) == BUILT[name]
    assert TOPICS.parse(name.encode()) == BUILT[name]


@pytest.mark.parametrize("name", BUILT)
def test_a_kinds_filter_matches_that_kind_and_no_other(name: str) -> None:
    for kind in Kind:
        assert is_filter(TOPICS.every(kind))
        assert matches(TOPICS.every(kind), name) is (kind is BUILT[name].kind), kind


def test_the_reply_filter_matches_one_clients_replies_of_any_board() -> None:
    wanted = TOPICS.replies_to("Client-7")
    assert is_filter(wanted)
    assert matches(wanted, TOPICS.reply("b9", "Client-7"))
    assert not matches(wanted, TOPICS.reply("b9", "Client-8"))


@pytest.mark.parametrize(
    "attack",
    [
        "sly/1/lab/board/../record",
        "sly/1/lab/board/../../etc/record",
        "sly/1/lab/board//record",
        "sly/1/lab/board/b\0/record",
        "sly/1/lab/board/b1/record\0",
        "sly/1/lab/board/+/record",
        "sly/1/lab/board/#",
        "sly/1/lab/#",
        "sly/1/other/board/b1/record",
        "board/b1/record",
        "sly/1/lab2/board/b1/record",
        "sly/2/lab/board/b1/record",
        "/sly/1/lab/board/b1/record",
        "$SYS/broker/version",
        "sly/1/lab/board/b1/record/more",
        "sly/1/lab/board/b1",
        "sly/1/lab/board/B1/record",
        "sly/1/lab/board/" + "b" * 33 + "/record",
        "sly/1/lab/board/b1/reply/" + "c" * 65,
        "sly/1/lab/ota/chunk/" + "g" * 64,
        "sly/1/lab/ota/meta/../root",
        "sly/1/lab/board/b1/record\n",
        "sly/1/lab/" + "x" * MAX_TOPIC_BYTES,
        "",
        b"sly/1/lab/board/\xff/record",
        b"sly/1/lab/board/\xed\xa0\x80/record",
        b"sly/1/lab/board/\xc0\xae\xc0\xae/record",
        b"\0" * 70_000,
        "sly/1/lab/board/\ud800/record",
    ],
)
def test_a_topic_that_the_builders_cannot_make_is_refused_in_a_short_line(attack: str | bytes) -> None:
    with pytest.raises(RefusedError) as refused:
        TOPICS.parse(attack)
    assert len(str(refused.value)) < 500
    assert "\0" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_overlong_topic_is_refused_by_its_length_before_it_is_read() -> None:
    with pytest.raises(RefusedError, match=f"got 70010 bytes; allowed: 1 to {MAX_TOPIC_BYTES} bytes"):
        TOPICS.parse("sly/1/lab/" + "/" * 70_000)


@given(
    st.binary(max_size=64) | st.text(max_size=64).map(lambda tail: ("sly/1/lab/board/" + tail).encode("utf-8", "surrogatepass"))
)
def test_parse_admits_only_what_the_builders_make(name: bytes) -> None:
    try:
        topic = TOPICS.parse(name)
    except RefusedError:
        return
    parts = {part: value for part in ("board", "client", "verifier", "role", "digest") if (value := getattr(topic, part))}
    assert name.decode() == "sly/1/lab/" + topic.kind.value.format(**parts)


@pytest.mark.parametrize("part", ["", "..", "a/b", "+", "#", "Ä", "a" * 33, "a\0", "a\n"])
def test_a_builder_refuses_a_bad_part(part: str) -> None:
    with pytest.raises(RefusedError):
        TOPICS.record(part)
    with pytest.raises(RefusedError):
        Topics(part)
