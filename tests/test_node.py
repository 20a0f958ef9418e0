"""One node, event by event: what it believes, what it drops, what it promises, and when it acknowledges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from edge_agent.core import wire
from edge_agent.core.cbor import decode, encode
from edge_agent.core.chat import CHAT, ChatMessage, Turn
from edge_agent.core.config import QueueSection
from edge_agent.core.cose import Signer, sign1, verify1
from edge_agent.core.errors import UnavailableError
from edge_agent.core.kv import KvAnswer, KvAsk, KvHome, KvItem, KvState, Place, session_hash
from edge_agent.core.values import (
    AnswerPart,
    DataClass,
    InferenceRequest,
    InferenceResult,
    Limits,
    Status,
    Tensor,
    TrustTier,
    failure,
)
from edge_agent.core.wanted import Wanted, shape_of
from edge_agent.gossip.presence import Presence, Standing, sign_presence
from edge_agent.gossip.record import BoardRecord, sign_record
from edge_agent.node.announcer import CHANGED_PERIOD_US, QUIET_PERIOD_US
from edge_agent.node.events import (
    Abandoned,
    Acknowledge,
    Cancel,
    Drain,
    Effect,
    Event,
    Execute,
    Executed,
    Hosted,
    KvChanged,
    KvFind,
    KvFound,
    KvGave,
    KvGive,
    KvPut,
    KvStored,
    Log,
    Partial,
    Publish,
    Reply,
    ReplyPart,
    Sensed,
    Submitted,
    Subscribe,
    Tick,
    Withdrawn,
)
from edge_agent.node.ingress import PATIENCE_US
from edge_agent.node.node import Node
from edge_agent.node.report import decision_report, fleet_report
from edge_agent.node.routing import MAX_DECISIONS
from edge_agent.node.settings import NodeSettings
from edge_agent.node.streams import end_tensor, turn_of, turn_request
from edge_agent.node.words import class_words
from edge_agent.placement.cost import expected_cost, shared
from edge_agent.store.ledger import Bounds, Ledger
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Delivered, LinkDown, LinkUp, Message, Published, Rejected
from edge_agent.transport.topics import Topics
from tests.scripted_speaker import end_of_turn
from tests.virtual_board import RULES, TASK, echo, offer, seed_of

SECOND_US = 1_000_000
Kind = TypeVar("Kind")
SIGNERS = {name: Signer(name.encode(), seed_of(name)) for name in ("a", "b", "c")}
MEMBERS = {name: signer.public_key for name, signer in SIGNERS.items()}
TOPICS = Topics("home")
SMALL = offer("small", 10_000)


class Desk:
    """A node with a ledger, and a hand that feeds it."""

    def __init__(self, folder: Path, bounds: Bounds | None = None, queue: QueueSection | None = None) -> None:
        self.ledger = Ledger(folder / "ledger.db", bounds)
        self.queue = queue or QueueSection()
        self.trust: dict[str, TrustTier] = {}
        self.now_us = 0
        self.tokens = 0
        self.boots = 0
        self.boot()

    def boot(self) -> list[Effect]:
        self.boots += 1
        settings = NodeSettings(
            "a", self.boots, SIGNERS["a"], members=MEMBERS, rules=RULES, queue=self.queue, trust=self.trust
        )  # fmt: skip
        self.node = Node(settings, self.ledger)
        self.feed(Hosted(SMALL))
        with self.ledger.transaction():
            return self.node.recover(self.now_us)

    def feed(self, event: Event, after_us: int = 0) -> list[Effect]:
        self.now_us += after_us
        with self.ledger.transaction():
            return self.node.handle(event, self.now_us)

    def deliver(self, message: Message) -> list[Effect]:
        self.tokens += 1
        return self.feed(Delivered(message, self.tokens))

    def acknowledged(self, effects: list[Effect]) -> bool:
        return Acknowledge(self.tokens) in effects

    def meet(self, *boards: str, busy_us: int = 1_000) -> None:
        """Connect, and hear of boards that are online and faster than this one."""
        self.feed(LinkUp(session_present=False))
        for board in boards:
            self.deliver(presence(board))
            self.deliver(record(board, offers=(offer("small", busy_us),)))

    def state(self) -> object:
        """Everything that an outside message could have changed."""
        node, known = self.node, self.node.fleet.records()
        return (
            node.fleet.digest(),
            [(each.board, node.fleet.standing(each.board)) for each in known],
            len(node.router.ingress),
            len(node.execution),
            node.idle,
            self.ledger.unanswered(9),
            self.ledger.owed(9),
            len(node.returns),
            len(node.mailbox),
        )


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger.close()


@pytest.fixture
def small_desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, Bounds(unanswered_count=2, owed_count=1), QueueSection(max_requests=9))
    yield desk
    desk.ledger.close()


def of(kind: type[Kind], effects: list[Effect]) -> list[Kind]:
    return [effect for effect in effects if isinstance(effect, kind)]


def request(number: int = 1, deadline_us: int = 10 * SECOND_US, model: str | None = None) -> InferenceRequest:
    tensor = Tensor("uint8", (4,), b"\0\1\2\3")
    return InferenceRequest(f"{number:032x}", TASK, {"image": tensor}, model, Limits(deadline_us))


def presence(board: str, standing: Standing = Standing.ONLINE, boot_epoch: int = 1) -> Message:
    return Message(TOPICS.online(board), sign_presence(Presence(board, boot_epoch, standing), SIGNERS[board]), retain=True)


def record(board: str, **settings: object) -> Message:
    said = BoardRecord(**{"board": board, "boot_epoch": 1, "sequence": 1, **settings})  # type: ignore[arg-type]
    return Message(TOPICS.record(board), sign_record(said, SIGNERS[board]), retain=True)


def dispatch(asked: InferenceRequest, ingress: str = "b", board: str = "a") -> Message:
    placed = asked.placed(asked.model or "small", asked.limits.deadline_us)
    payload = sign1(wire.encode_request(placed, board), SIGNERS[ingress], wire.AAD_REQUEST)
    return Message(TOPICS.request(board), payload, correlation=bytes.fromhex(asked.request_id))


def client_request(asked: InferenceRequest, client: str = "camera") -> Message:
    return Message(
        TOPICS.request("a"),
        wire.encode_request(asked, "a"),
        response_topic=TOPICS.reply("a", client),
        correlation=bytes.fromhex(asked.request_id),
    )


def reply(result: InferenceResult, addressee: str = "a", signer: str = "") -> Message:
    payload = sign1(wire.encode_result(result, addressee), SIGNERS[signer or result.board], wire.AAD_RESULT)
    return Message(TOPICS.reply(result.board, addressee), payload)


def told(message: Message, addressee: str) -> InferenceResult:
    signed = verify1(message.payload, lambda kid: MEMBERS["a"], wire.AAD_RESULT, MAX_PAYLOAD_BYTES)
    return wire.decode_result(signed.payload, addressee)


def dispatches(effects: list[Effect]) -> list[Publish]:
    return [effect for effect in of(Publish, effects) if "/request" in effect.message.topic]


# what is hostile


SIGNED = {
    "record": record("b", sequence=2),
    "presence": presence("b", Standing.OFFLINE),
    "request": dispatch(request(7)),
    "result": reply(failure(request(1).request_id, Status.REFUSED, "b", "no")),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_34_every_bit_flip_and_truncation_of_what_a_board_signed_is_dropped_logged_and_acknowledged(
    desk: Desk, kind: str
) -> None:
    desk.meet("b")
    (sent,) = dispatches(desk.feed(Submitted(request(1), 1)))
    before, message = desk.state(), SIGNED[kind]
    payload = message.payload
    flips = [payload[:i] + bytes((payload[i] ^ 1 << bit,)) + payload[i + 1 :] for i in range(len(payload)) for bit in range(8)]
    for wrong in flips + [payload[:size] for size in range(len(payload))]:
        effects = desk.deliver(replace(message, payload=wrong))
        assert of(Log, effects) and desk.acknowledged(effects)
        assert not of(Execute, effects) and not of(Reply, effects)
    assert desk.state() == before
    after = desk.deliver(message)
    assert desk.acknowledged(after) and desk.state() != before, "the message as it was signed is taken"


@pytest.mark.parametrize(
    "message",
    [
        Message("sly/1/home/board/b/record", b""),
        Message("sly/1/home/board/b/online", b""),
        Message("sly/1/other/board/b/record", record("b").payload),
        Message("sly/1/home/board/c/record", record("b", sequence=9).payload),
        Message("sly/1/home/board/c/online", presence("b", Standing.OFFLINE).payload),
        Message("sly/1/home/digest/b", b"\1"),
        Message("nonsense", b"\1"),
        Message("sly/1/home/board/a/request", b""),
        Message("sly/1/home/board/a/request", b"\xa0"),
        replace(client_request(request()), response_topic=None),
        replace(client_request(request()), response_topic="sly/1/home/board/b/reply/camera"),
        replace(client_request(request()), response_topic="sly/1/home/board/a/reply/b"),
        replace(client_request(request()), response_topic="sly/1/home/board/a/online"),
        replace(client_request(request()), correlation=None),
        replace(client_request(request()), correlation=b"short"),
        dispatch(request(7), board="c"),
        replace(dispatch(request(7), board="c"), topic=TOPICS.request("a")),
        replace(reply(echo(request(1), "b", "small", 1), addressee="c"), topic=TOPICS.reply("b", "a")),
        reply(echo(request(1), "b", "small", 1), signer="c"),
        replace(reply(echo(request(1), "c", "small", 1), signer="b"), topic=TOPICS.reply("b", "a")),
        replace(reply(echo(request(1), "c", "small", 1)), topic=TOPICS.reply("b", "a")),
    ],
)
def test_a_message_that_is_wrong_is_dropped_logged_and_acknowledged(desk: Desk, message: Message) -> None:
    desk.meet("b")
    desk.feed(Submitted(request(1), 1))
    before = desk.state()
    effects = desk.deliver(message)
    assert desk.acknowledged(effects) and of(Log, effects)
    assert desk.state() == before


def test_a_signature_of_one_purpose_is_dropped_on_a_topic_of_another(desk: Desk) -> None:
    desk.meet("b")
    before = desk.state()
    for message in SIGNED.values():
        for topic in (TOPICS.record("b"), TOPICS.online("b"), TOPICS.reply("b", "a"), TOPICS.request("a")):
            if topic != message.topic and not message.topic.endswith("request"):
                assert desk.acknowledged(desk.deliver(replace(message, topic=topic)))
    assert desk.state() == before


def test_an_answer_from_a_board_that_was_not_asked_is_dropped(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Submitted(request(1), 1))
    effects = desk.deliver(reply(echo(request(1), "c", "small", 1)))
    assert not of(Reply, effects) and "was not asked" in of(Log, effects)[0].text


def test_a_request_that_this_board_sent_comes_back_to_it_and_is_refused(desk: Desk) -> None:
    desk.meet("b")
    (sent,) = dispatches(desk.feed(Submitted(request(1), 1)))
    before = desk.state()
    assert of(Log, desk.deliver(replace(sent.message, topic=TOPICS.request("a"))))
    assert desk.state() == before


def test_29_a_later_boot_of_this_very_board_on_the_broker_is_told_to_a_person(desk: Desk) -> None:
    desk.meet()
    text = " ".join(log.text for log in of(Log, desk.deliver(presence("a", boot_epoch=9))))
    assert "another board has this key, or the ledger was put back" in text


# answers


def test_a_local_client_gets_one_answer_even_when_the_engine_says_it_twice(desk: Desk) -> None:
    (begun,) = of(Execute, desk.feed(Submitted(request(), 5)))
    result = echo(request(), "a", "small", 1)
    assert of(Reply, desk.feed(Executed(begun.key, result))) == [Reply(5, result)]
    again = desk.feed(Executed(begun.key, result))
    assert not of(Reply, again) and of(Log, again)


def test_a_broker_clients_request_is_acknowledged_when_it_is_durable_and_answered_by_the_outbox(desk: Desk) -> None:
    desk.meet()
    effects = desk.deliver(client_request(request()))
    assert desk.acknowledged(effects)
    assert [key for key, _ in desk.ledger.unanswered(9)] == [f"camera/{request().request_id}"]
    (begun,) = of(Execute, effects)
    effects = desk.feed(Executed(begun.key, echo(request(), "a", "small", 1)))
    (sent,) = of(Publish, effects)[:1]
    assert told(sent.message, "camera").status is Status.OK
    assert desk.ledger.owed(9) and not desk.ledger.unanswered(9)
    desk.feed(Published(sent.ticket))
    assert not desk.ledger.owed(9)


def test_37_a_duplicate_of_a_request_in_work_is_acknowledged_and_starts_nothing(desk: Desk) -> None:
    desk.meet()
    desk.deliver(client_request(request()))
    effects = desk.deliver(client_request(request()))
    assert desk.acknowledged(effects) and not of(Execute, effects) and len(desk.node.execution) == 0


def test_37_a_duplicate_while_the_answer_is_on_its_way_is_left_to_the_outbox(desk: Desk) -> None:
    desk.meet()
    (begun,) = of(Execute, desk.deliver(client_request(request())))
    desk.feed(Executed(begun.key, echo(request(), "a", "small", 1)))
    effects = desk.deliver(client_request(request()))
    assert desk.acknowledged(effects) and not of(Publish, effects)


def test_37_a_duplicate_after_the_answer_is_acknowledged_when_the_broker_has_the_answer_again(desk: Desk) -> None:
    desk.meet()
    (begun,) = of(Execute, desk.deliver(client_request(request())))
    (sent, *_) = of(Publish, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))
    desk.feed(Published(sent.ticket))
    effects = desk.deliver(client_request(request()))
    (again,) = of(Publish, effects)
    assert again.message.payload == sent.message.payload and again.ticket < 0
    assert not desk.acknowledged(effects), "if the connection ended now, nobody would say it again"
    assert desk.acknowledged(desk.feed(Published(again.ticket)))


def test_a_malformed_request_of_a_client_is_answered_refused_once(desk: Desk) -> None:
    desk.meet()
    wrong = replace(client_request(request()), payload=encode({1: b"x"}))
    effects = desk.deliver(wrong)
    (sent,) = of(Publish, effects)
    assert desk.acknowledged(effects) and told(sent.message, "camera").status is Status.REFUSED
    assert not of(Publish, desk.deliver(wrong))


def test_an_id_in_the_correlation_that_is_not_the_requests_is_refused(desk: Desk) -> None:
    desk.meet()
    effects = desk.deliver(replace(client_request(request(1)), correlation=bytes.fromhex(request(2).request_id)))
    (sent,) = of(Publish, effects)
    assert told(sent.message, "camera").status is Status.REFUSED and sent.message.correlation == bytes(15) + b"\2"
    assert desk.node.idle


def test_a_dispatched_request_is_run_and_answered_to_its_ingress(desk: Desk) -> None:
    desk.meet("b")
    effects = desk.deliver(dispatch(request()))
    (begun,) = of(Execute, effects)
    assert begun.key == f"b/{request().request_id}" and desk.acknowledged(effects)
    (sent, *_) = of(Publish, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))
    assert sent.message.topic == TOPICS.reply("a", "b") and told(sent.message, "b").status is Status.OK


def test_a_request_of_the_broker_is_explained_with_its_class_like_any_other(desk: Desk) -> None:
    desk.meet("b")
    desk.deliver(client_request(request(1)))
    assert decision_report(desk.node.decisions[request(1).request_id])["class"] == class_words(Wanted.of(request(1)).classed())


def test_what_this_board_has_in_a_cloud_is_not_for_other_boards(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Hosted(replace(offer("cloud.large", 1000, task="chat"), cloud=True, price_us=1)))
    effects = desk.deliver(dispatch(replace(request(), model="cloud.large", data=DataClass.PUBLIC)))
    (sent, *_) = of(Publish, effects)
    assert not of(Execute, effects) and told(sent.message, "b").status is Status.FAILED
    assert "does not host 'cloud.large'" in told(sent.message, "b").reason


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (Withdrawn("small", "quarantined after 3 deaths"), "quarantined after 3 deaths"),
        (Drain(), "a is being stopped"),
    ],
)
def test_a_dispatched_request_that_cannot_be_run_fails_at_once_and_says_why(desk: Desk, prepare: Event, reason: str) -> None:
    desk.meet("b")
    desk.feed(prepare)
    (sent, *_) = of(Publish, desk.deliver(dispatch(request())))
    assert told(sent.message, "b").status is Status.FAILED and reason in told(sent.message, "b").reason


def test_a_dispatched_request_whose_deadline_passes_in_the_queue_is_answered_and_never_run(desk: Desk) -> None:
    desk.meet("b")
    (begun,) = of(Execute, desk.deliver(dispatch(request(1))))
    desk.deliver(dispatch(request(2, deadline_us=SECOND_US)))
    (sent, *_) = of(Publish, desk.feed(Tick(), after_us=SECOND_US))
    assert told(sent.message, "b") == failure(
        request(2).request_id, Status.FAILED, "a", "its deadline passed while it waited on a"
    )
    assert not of(Execute, desk.feed(Executed(begun.key, echo(request(1), "a", "small", 1))))


# placing, and placing again


def test_the_fastest_board_is_asked_and_its_answer_is_the_clients(desk: Desk) -> None:
    desk.meet("b")
    (sent,) = dispatches(desk.feed(Submitted(request(), 5)))
    assert sent.message.topic == TOPICS.request("b") and sent.message.expiry_s == 10
    placed = wire.decode_request(verify1(sent.message.payload, MEMBERS_BY_KID, wire.AAD_REQUEST).payload, "b")
    assert placed.model == "small" and placed.limits.deadline_us == 10 * SECOND_US
    result = echo(request(), "b", "small", 1)
    assert of(Reply, desk.deliver(reply(result))) == [Reply(5, result)]
    late = desk.deliver(reply(result))
    assert not of(Reply, late) and "dropped" in of(Log, late)[0].text and desk.acknowledged(late)


def MEMBERS_BY_KID(kid: bytes) -> bytes | None:
    return MEMBERS.get(kid.decode())


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda sent: Delivered(reply(failure(request().request_id, Status.FAILED, "b", "no")), 99), id="failed"),
        pytest.param(lambda sent: Delivered(presence("b", Standing.OFFLINE), 99), id="offline"),
        pytest.param(lambda sent: Delivered(presence("b", Standing.STOPPED), 99), id="stopped"),
        pytest.param(lambda sent: LinkDown("cable"), id="link down"),
        pytest.param(lambda sent: Rejected("too much waits", sent.ticket), id="rejected"),
    ],
)
def test_a_board_that_cannot_do_it_is_left_at_once_and_not_asked_again(desk: Desk, trouble: object) -> None:
    desk.meet("b")
    (sent,) = dispatches(desk.feed(Submitted(request(), 5)))
    effects = desk.feed(trouble(sent))  # type: ignore[operator]
    (begun,) = of(Execute, effects)
    assert begun.key == f"a/{request().request_id}" and not dispatches(effects)
    assert desk.node.router.ingress.placed_on("b") == []


def test_a_silent_board_is_left_after_a_while_and_its_late_answer_still_counts(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Submitted(request(), 5))
    assert not of(Execute, desk.feed(Tick(), after_us=PATIENCE_US))
    (begun,) = of(Execute, desk.feed(Tick(), after_us=SECOND_US))
    late = echo(request(), "b", "small", 1)
    assert of(Reply, desk.deliver(reply(late))) == [Reply(5, late)]
    assert not of(Reply, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))


def test_a_late_answer_takes_the_request_out_of_this_boards_queue_and_a_late_failure_changes_nothing(desk: Desk) -> None:
    desk.feed(Hosted(offer("large", 30_000, 900)))
    (begun,) = of(Execute, desk.feed(Submitted(request(1, 60 * SECOND_US, "large"), 1)))
    desk.meet("b")
    for i in (2, 3):
        assert dispatches(desk.feed(Submitted(request(i, model="small"), i)))
    desk.feed(Tick(), after_us=PATIENCE_US + SECOND_US)
    assert len(desk.node.execution) == 2
    effects = desk.deliver(reply(failure(request(2).request_id, Status.FAILED, "b", "no")))
    pending = desk.node.router.ingress.get(request(2).request_id)
    assert not of(Reply, effects) and pending is not None and pending.placed_on == "a"
    assert of(Reply, desk.deliver(reply(echo(request(3), "b", "small", 1))))
    assert len(desk.node.execution) == 1
    effects = desk.feed(Executed(begun.key, echo(request(1), "a", "large", 1)))
    assert [each.key for each in of(Execute, effects)] == [f"a/{request(2).request_id}"]


def test_a_board_that_fell_silent_is_asked_nothing_more_until_it_is_heard_again(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Submitted(request(1), 1))
    desk.feed(Tick(), after_us=PATIENCE_US + SECOND_US)
    assert not dispatches(desk.feed(Submitted(request(2), 2)))
    assert "said nothing since" in desk.node.decisions[request(2).request_id].excluded[0].reason
    desk.deliver(record("b", sequence=1, offers=(offer("small", 1_000),)))
    assert not dispatches(desk.feed(Submitted(request(3), 3))), "the same record again is no sign of life"
    desk.deliver(record("b", sequence=2, offers=(offer("small", 1_000),)))
    assert dispatches(desk.feed(Submitted(request(4), 4)))


def test_a_silent_board_is_waited_for_until_the_deadline_when_there_is_no_other(desk: Desk) -> None:
    desk.feed(Withdrawn("small", "gone"))
    desk.meet("b")
    desk.feed(Submitted(request(1), 1))
    desk.feed(Submitted(request(2), 2))
    assert not of(Reply, desk.feed(Tick(), after_us=5 * SECOND_US))
    assert of(Reply, desk.deliver(reply(echo(request(1), "b", "small", 1))))
    (shed,) = of(Reply, desk.feed(Tick(), after_us=5 * SECOND_US))
    assert shed.handle == 2 and shed.result.status is Status.SHED and "passed after b" in shed.result.reason


def test_when_the_deadline_passes_that_is_the_answer_and_the_engines_comes_too_late(desk: Desk) -> None:
    (begun,) = of(Execute, desk.feed(Submitted(request(deadline_us=SECOND_US), 5)))
    (shed,) = of(Reply, desk.feed(Tick(), after_us=SECOND_US))
    assert shed.result.status is Status.SHED and "its deadline of 1000000 µs passed while it was on a" in shed.result.reason
    assert not of(Reply, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))


def test_a_request_that_a_board_refuses_is_refused_and_not_tried_elsewhere(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Submitted(request(), 5))
    refused = failure(request().request_id, Status.REFUSED, "b", "NaN in input image")
    effects = desk.deliver(reply(refused))
    assert of(Reply, effects) == [Reply(5, refused)] and not of(Execute, effects)


@pytest.mark.parametrize(
    ("event", "named"),
    [
        (Delivered(presence("b", Standing.OFFLINE), 9), "b: it is offline"),
        (Delivered(record("b", sequence=2, serving=False, offers=(SMALL,)), 9), "b: it is being stopped"),
        (
            Delivered(record("b", sequence=2, temperature_mdegc=84_000, trip_mdegc=85_000, offers=(SMALL,)), 9),
            "b: too hot: 1000 m°C",
        ),
        (LinkDown("cable"), r"b: the broker link is down \(cable\)"),
    ],
)
def test_a_request_is_shed_with_the_reason_of_every_board(desk: Desk, event: Event, named: str) -> None:
    import re

    desk.meet("b")
    desk.feed(event)
    desk.feed(Sensed(84_500, 85_000))
    (shed,) = of(Reply, desk.feed(Submitted(request(), 5)))
    assert shed.result.status is Status.SHED
    assert re.search(named, shed.result.reason) and "a: too hot: 500 m°C" in shed.result.reason


def test_a_request_too_large_for_a_message_goes_nowhere_and_is_told_why(desk: Desk) -> None:
    desk.meet("b")
    desk.feed(Withdrawn("small", "gone"))
    size_bytes = MAX_PAYLOAD_BYTES - 1000
    large = replace(request(), inputs={"image": Tensor("uint8", (size_bytes,), bytes(size_bytes))})
    (shed,) = of(Reply, desk.feed(Submitted(large, 5)))
    assert f"b: {size_bytes} bytes do not fit into one message" in shed.result.reason


def test_a_ticket_of_an_ended_connection_moves_nothing(desk: Desk) -> None:
    desk.meet("b")
    (sent,) = dispatches(desk.feed(Submitted(request(), 5)))
    (begun,) = of(Execute, desk.feed(LinkDown("cable")))
    assert not of(Reply, desk.feed(Rejected("too late", sent.ticket)))
    assert of(Reply, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))


def test_work_that_was_sent_and_is_not_answered_counts_before_the_board_says_so(desk: Desk) -> None:
    desk.meet("b", busy_us=4_000)
    sent = [dispatches(desk.feed(Submitted(request(i), i))) for i in range(1, 6)]
    assert 0 < sum(map(len, sent)) < 5, "some go to b, until a is the better choice"


def test_a_client_that_goes_takes_its_waiting_request_along(desk: Desk) -> None:
    (begun,) = of(Execute, desk.feed(Submitted(request(1), 1)))
    desk.feed(Submitted(request(2), 2))
    desk.feed(Abandoned(2))
    desk.feed(Abandoned(2))
    effects = desk.feed(Executed(begun.key, echo(request(1), "a", "small", 1)))
    assert not of(Execute, effects) and desk.node.idle


def test_a_second_request_with_an_id_that_is_in_work_is_shed_and_disturbs_nothing(desk: Desk) -> None:
    (begun,) = of(Execute, desk.feed(Submitted(request(), 1)))
    (shed,) = of(Reply, desk.feed(Submitted(request(), 2)))
    assert shed.handle == 2 and "is being served already" in shed.result.reason
    (answer,) = of(Reply, desk.feed(Executed(begun.key, echo(request(), "a", "small", 1))))
    assert answer.handle == 1


# restarts


def test_after_a_boot_clients_requests_are_taken_up_and_dispatched_ones_are_given_back(desk: Desk) -> None:
    desk.meet("b")
    desk.deliver(client_request(request(1)))
    desk.deliver(dispatch(request(2)))
    (begun,) = of(Execute, desk.boot())
    assert begun.request.request_id == request(1).request_id
    effects = desk.feed(LinkUp(session_present=True))
    (sent,) = [each for each in of(Publish, effects) if each.ticket > 0]
    assert told(sent.message, "b").status is Status.FAILED and "restarted" in told(sent.message, "b").reason
    assert not of(Execute, desk.deliver(dispatch(request(2)))), "it was accepted once"


def test_a_request_in_the_inbox_that_cannot_be_read_any_more_is_refused_and_does_not_stop_the_boot(desk: Desk) -> None:
    desk.ledger.accept(f"camera/{request().request_id}", b"\xffan older version's bytes")
    desk.boot()
    desk.feed(LinkUp(session_present=True))
    assert not desk.ledger.unanswered(9)
    assert told_owed(desk, "camera").status is Status.REFUSED


def told_owed(desk: Desk, addressee: str) -> InferenceResult:
    (entry,) = desk.ledger.owed(9)
    return told(Message(entry[1].topic, entry[1].payload), addressee)


def test_a_board_that_left_the_fleet_does_not_stop_the_boot_with_what_it_had_sent(desk: Desk) -> None:
    desk.meet("b")
    desk.deliver(dispatch(request()))
    settings = NodeSettings("a", 9, SIGNERS["a"], members={"a": MEMBERS["a"]}, rules=RULES)
    with desk.ledger.transaction():
        Node(settings, desk.ledger).recover(0)
    assert told_owed(desk, "b").status is Status.FAILED


# a ledger without room


def test_a_full_inbox_answers_shed_without_it_and_acknowledges_when_the_broker_has_that(small_desk: Desk) -> None:
    desk = small_desk
    desk.meet()
    begun = [each for i in (1, 2) for each in of(Execute, desk.deliver(client_request(request(i))))]
    effects = desk.deliver(client_request(request(3)))
    (sent,) = of(Publish, effects)
    assert not desk.acknowledged(effects) and sent.ticket < 0
    assert told(sent.message, "camera").status is Status.SHED and "2 of 2 entries" in told(sent.message, "camera").reason
    assert desk.acknowledged(desk.feed(Published(sent.ticket)))
    (answer, *_) = of(Publish, desk.feed(Executed(begun[0].key, echo(request(1), "a", "small", 1))))
    desk.feed(Published(answer.ticket))
    assert desk.acknowledged(desk.deliver(client_request(request(3)))), "there is room again"


def test_an_answer_without_the_ledger_that_the_link_would_not_take_is_tried_again_with_the_next_tick(small_desk: Desk) -> None:
    desk = small_desk
    desk.meet()
    for i in (1, 2):
        desk.deliver(client_request(request(i)))
    (sent,) = of(Publish, desk.deliver(client_request(request(3))))
    assert not of(Publish, desk.feed(Rejected("too much waits", sent.ticket)))
    (again,) = of(Publish, desk.feed(Tick()))
    assert again.message == sent.message and desk.acknowledged(desk.feed(Published(again.ticket)))


def test_a_full_inbox_gives_a_dispatched_request_back_to_its_ingress(small_desk: Desk) -> None:
    desk = small_desk
    desk.meet("b")
    for i in (1, 2):
        desk.deliver(client_request(request(i)))
    (sent,) = of(Publish, desk.deliver(dispatch(request(3))))
    assert told(sent.message, "b").status is Status.FAILED and len(desk.node.returns) == 1
    desk.feed(LinkDown("cable"))
    assert not len(desk.node.returns)


def test_a_full_outbox_takes_nothing_new_and_recovers_when_the_broker_takes_what_is_owed(small_desk: Desk) -> None:
    desk = small_desk
    desk.meet()
    (begun,) = of(Execute, desk.deliver(client_request(request(1))))
    desk.deliver(client_request(request(2)))
    (begun,) = of(Execute, desk.feed(Executed(begun.key, echo(request(1), "a", "small", 1))))
    desk.feed(Executed(begun.key, echo(request(2), "a", "small", 1)))
    assert len(desk.node.mailbox) == 1
    desk.deliver(client_request(request(3)))
    assert len(desk.node.mailbox) == 2 and desk.node.idle, "the third is not run, for it could not be answered"
    for _ in range(3):
        (ticket, _owed) = desk.ledger.owed(1)[0]
        desk.feed(Published(ticket))
    assert not len(desk.node.mailbox) and not desk.ledger.owed(9) and not desk.ledger.unanswered(9)


def test_a_disk_that_fails_fails_the_transaction_so_that_nothing_is_acknowledged(desk: Desk) -> None:
    desk.meet()
    desk.ledger._database._connection.execute("PRAGMA query_only=ON")
    with pytest.raises(UnavailableError):
        desk.deliver(client_request(request()))


# the link and the board's own word


def test_every_new_connection_is_subscribed_and_told_whatever_the_broker_says_it_remembers(desk: Desk) -> None:
    for present in (False, True):
        effects = desk.feed(LinkUp(session_present=present))
        assert {each.topic_filter for each in of(Subscribe, effects)} == {
            "sly/1/home/board/+/online",
            "sly/1/home/board/+/record",
            "sly/1/home/digest/+",
            "sly/1/home/board/+/reply/a",
            "sly/1/home/board/a/request",
            "sly/1/home/board/a/cancel",
            "sly/1/home/board/a/kv/+",
        }
        assert [each.message.topic for each in of(Publish, effects)] == [TOPICS.online("a"), TOPICS.record("a")]
        assert all(each.message.retain for each in of(Publish, effects))
        desk.feed(LinkDown("cable"))


def own_words(effects: list[Effect]) -> list[str]:
    """What the board says of itself, besides its word on the table."""
    said = [each.message.topic.rsplit("/", 2) for each in of(Publish, effects) if each.message.retain]
    return [what for _, kind, what in said if kind != "digest"]


def test_a_record_is_said_a_second_after_a_change_and_every_15_seconds_without_one(desk: Desk) -> None:
    desk.feed(LinkUp(session_present=False))
    assert not own_words(desk.feed(Sensed(50_000, 85_000), after_us=CHANGED_PERIOD_US - 1))
    assert own_words(desk.feed(Tick(), after_us=1)) == ["record"]
    assert not own_words(desk.feed(Tick(), after_us=CHANGED_PERIOD_US))
    assert own_words(desk.feed(Tick(), after_us=QUIET_PERIOD_US)) == ["online", "record"]


def test_36_a_board_that_hears_it_is_offline_says_otherwise_but_not_while_it_drains(desk: Desk) -> None:
    desk.feed(LinkUp(session_present=False))
    assert not own_words(desk.deliver(presence("a", Standing.OFFLINE, boot_epoch=1)))
    assert own_words(desk.feed(Tick(), after_us=CHANGED_PERIOD_US)) == ["online", "record"]
    desk.feed(Drain())
    desk.now_us += CHANGED_PERIOD_US
    assert own_words(desk.deliver(presence("a", Standing.STOPPED, boot_epoch=1))) == ["record"], "its serving has changed"


def test_a_word_that_the_link_would_not_take_is_said_again_later_and_not_at_once(desk: Desk) -> None:
    desk.feed(LinkUp(session_present=False))
    assert not own_words(desk.feed(Rejected("too much waits")))
    assert own_words(desk.feed(Tick(), after_us=CHANGED_PERIOD_US)) == ["online", "record"]


def test_a_link_that_refuses_everything_does_not_keep_the_node_spinning(desk: Desk) -> None:
    desk.meet("b")
    for i in range(3):
        desk.deliver(client_request(request(i)))
    effects = desk.feed(Submitted(request(9), 9))
    for _ in range(50):
        refused = of(Publish, effects)
        effects = [each for publish in refused for each in desk.feed(Rejected("full", publish.ticket))]
        if not refused:
            return
    pytest.fail("the node publishes again whatever was refused, for ever")


def test_a_node_that_drains_takes_nothing_new_and_finishes_what_it_has(desk: Desk) -> None:
    desk.meet()
    (begun,) = of(Execute, desk.feed(Submitted(request(1), 1)))
    desk.feed(Drain())
    (shed,) = of(Reply, desk.feed(Submitted(request(2), 2)))
    assert shed.result.status is Status.SHED and "is being stopped" in shed.result.reason
    assert not desk.node.idle
    assert of(Reply, desk.feed(Executed(begun.key, echo(request(1), "a", "small", 1)))) and desk.node.idle


# bounds and what a person is told


def test_decisions_are_remembered_for_who_asks_and_their_room_is_bounded(desk: Desk) -> None:
    desk.meet("b", "c")
    desk.feed(Submitted(request(0), 1))
    report = decision_report(desk.node.decisions[request(0).request_id])
    assert [option["board"] for option in report["options"]] == ["b", "c", "a"]  # type: ignore[attr-defined]
    assert report["class"] == class_words(Wanted.of(request(0)).classed())
    for i in range(1, MAX_DECISIONS + 10):
        desk.feed(Submitted(request(i), i))
        desk.feed(Abandoned(i))
    assert len(desk.node.decisions) == MAX_DECISIONS and request(0).request_id not in desk.node.decisions


def test_the_fleet_report_is_plain_values_that_can_be_sent(desk: Desk) -> None:
    desk.meet("b")
    report = fleet_report(desk.node, 0)
    assert decode(encode(report)) == report
    assert [board["board"] for board in report["boards"]] == ["a", "b"]  # type: ignore[attr-defined]


def test_pending_requests_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    desk = Desk(tmp_path, queue=QueueSection(max_requests=3, max_bytes=2**20))
    for i in range(3):
        desk.feed(Submitted(request(i), i))
    (shed,) = of(Reply, desk.feed(Submitted(request(3), 3)))
    assert "3 requests are pending, the limit is 3" in shed.result.reason
    desk.feed(Abandoned(2))
    large = replace(request(4), inputs={"x": Tensor("uint8", (2**20,), bytes(2**20))})
    (shed,) = of(Reply, desk.feed(Submitted(large, 4)))
    assert "8 bytes of requests are pending and 1048576 came" in shed.result.reason
    desk.ledger.close()


# parts of answers, and work that nobody wants


def turn(number: int = 1, tokens: int = 20) -> InferenceRequest:
    asked = Turn((ChatMessage("user", f"q{number}"),), max_tokens=tokens)
    return turn_request(f"{number:032x}", asked, None, Limits(10 * SECOND_US))


def part_of(number: int, offset: int, text: str, tokens: int = 1) -> AnswerPart:
    return AnswerPart(f"{number:032x}", offset, text, tokens)


def part_message(part: AnswerPart, board: str = "b", addressee: str = "a", signer: str = "") -> Message:
    payload = sign1(wire.encode_part(part, addressee), SIGNERS[signer or board], wire.AAD_PART)
    return Message(TOPICS.reply(board, addressee), payload, qos=0)


def cancellation(number: int, ingress: str = "b", board: str = "a") -> Message:
    request_id = f"{number:032x}"
    return Message(TOPICS.cancel(board), sign1(wire.encode_cancel(request_id, board), SIGNERS[ingress], wire.AAD_CANCEL))


TALK = replace(offer("parrot", 1_000_000, task=CHAT), parallel=2)


def talking(desk: Desk) -> None:
    """Turn 1 of a client here is on b, turn 2 of b runs here."""
    desk.feed(Hosted(TALK))
    desk.feed(LinkUp(session_present=False))
    desk.deliver(presence("b"))
    desk.deliver(record("b", offers=(replace(TALK, busy_us=1_000),)))
    assert dispatches(desk.feed(Submitted(turn(1), 1)))
    (begun,) = of(Execute, desk.deliver(dispatch(replace(turn(2), model="parrot"))))
    assert begun.key == f"b/{turn(2).request_id}"


def test_parts_of_the_board_that_has_the_turn_reach_the_client_in_order_and_of_no_other(desk: Desk) -> None:
    talking(desk)
    assert not of(ReplyPart, desk.deliver(part_message(part_of(1, 0, "xy"), "c"))), "c was not asked"
    assert not of(ReplyPart, desk.deliver(part_message(part_of(1, 2, "c", 3))))
    shown = of(ReplyPart, desk.deliver(part_message(part_of(1, 0, "ab", 2))))
    assert [(each.handle, each.part.offset, each.part.text) for each in shown] == [(1, 0, "ab"), (1, 2, "c")]
    assert not of(ReplyPart, desk.deliver(part_message(part_of(1, 0, "ab", 2))))


def test_34_every_bit_flip_and_truncation_of_a_part_or_a_cancellation_is_dropped_logged_and_acknowledged(desk: Desk) -> None:
    talking(desk)
    before = desk.state()
    for message in (part_message(part_of(1, 0, "ab")), cancellation(2)):
        payload = message.payload
        wrong = [
            payload[:i] + bytes((payload[i] ^ 1 << bit,)) + payload[i + 1 :] for i in range(len(payload)) for bit in range(8)
        ]
        for each in wrong + [payload[:size] for size in range(len(payload))]:
            effects = desk.deliver(replace(message, payload=each))
            assert of(Log, effects) and desk.acknowledged(effects) and not of(ReplyPart, effects) and not of(Cancel, effects)
    assert desk.state() == before


@pytest.mark.parametrize(
    "message",
    [
        part_message(part_of(1, 0, "ab"), addressee="c"),
        replace(part_message(part_of(1, 0, "ab"), addressee="c"), topic=TOPICS.reply("b", "a")),
        part_message(part_of(1, 0, "ab"), "b", signer="c"),
        replace(cancellation(2, board="c"), topic=TOPICS.cancel("a")),
        replace(part_message(part_of(1, 0, "ab")), topic=TOPICS.cancel("a")),
        replace(cancellation(1), topic=TOPICS.reply("b", "a")),
        cancellation(2, ingress="a"),
    ],
)
def test_a_part_or_cancellation_that_is_wrong_is_dropped_logged_and_acknowledged(desk: Desk, message: Message) -> None:
    talking(desk)
    effects = desk.deliver(message)
    assert of(Log, effects) and desk.acknowledged(effects)
    assert not of(ReplyPart, effects) and not of(Cancel, effects)


def test_a_board_cancels_what_it_gave_and_nothing_else(desk: Desk) -> None:
    talking(desk)
    assert not of(Cancel, desk.deliver(cancellation(2, ingress="c")))
    (cancel,) = of(Cancel, desk.deliver(cancellation(2)))
    assert cancel.key == f"b/{turn(2).request_id}"
    ended = failure(turn(2).request_id, Status.FAILED, "a", "broken off")
    assert of(Publish, desk.feed(Executed(cancel.key, ended))) and desk.node.execution.running == 0


def test_a_waiting_turn_that_is_cancelled_is_answered_and_never_begun(desk: Desk) -> None:
    talking(desk)
    for number in (3, 4):
        desk.deliver(dispatch(replace(turn(number), model="parrot")))
    assert len(desk.node.execution) == 1
    (sent, *_) = of(Publish, desk.deliver(cancellation(4)))
    assert "wants it no more" in told(sent.message, "b").reason and len(desk.node.execution) == 0


def test_a_picture_that_runs_is_not_broken_off(desk: Desk) -> None:
    desk.meet("b")
    (begun,) = of(Execute, desk.deliver(dispatch(request(5))))
    assert not of(Cancel, desk.deliver(cancellation(5)))
    assert of(Publish, desk.feed(Executed(begun.key, echo(request(5), "a", "small", 1))))


def test_a_part_that_the_link_would_not_take_is_lost_and_nothing_follows(desk: Desk) -> None:
    talking(desk)
    key = f"b/{turn(2).request_id}"
    (sent,) = of(Publish, desk.feed(Partial(key, part_of(2, 0, "ab"))))
    assert sent.message.qos == 0 and sent.message.topic == TOPICS.reply("a", "b")
    before = desk.state()
    assert not desk.feed(Rejected("full", sent.ticket)) and desk.state() == before


def test_parts_are_not_made_while_there_is_no_link(desk: Desk) -> None:
    talking(desk)
    desk.feed(LinkDown("cable"))
    assert not of(Publish, desk.feed(Partial(f"b/{turn(2).request_id}", part_of(2, 0, "ab"))))


def test_a_late_answer_that_does_not_begin_with_what_was_shown_is_dropped(desk: Desk) -> None:
    talking(desk)
    desk.deliver(part_message(part_of(1, 0, "q1")))
    (begun,) = of(Execute, desk.feed(Tick(), after_us=PATIENCE_US + SECOND_US))
    assert turn_of(begun.request).begun == "q1"
    desk.feed(Partial(begun.key, part_of(1, 2, "another way", 1)))
    late = InferenceResult(turn(1).request_id, Status.OK, "b", "parrot", outputs=end_tensor(end_of_turn(turn_of(turn(1)))))
    effects = desk.deliver(reply(late))
    assert not of(Reply, effects) and "another's beginning" in of(Log, effects)[0].text


def test_the_end_of_a_turn_that_was_told_to_end_is_no_news_but_a_second_one_is(desk: Desk) -> None:
    talking(desk)
    assert of(Publish, desk.feed(Abandoned(1)))
    ended = failure(turn(1).request_id, Status.FAILED, "b", "broken off")
    assert not of(Log, desk.deliver(reply(ended)))
    assert "late answer" in of(Log, desk.deliver(reply(ended)))[0].text


# a turn that waits for the KV of its session


KV = KvState("parrot", b"f" * 32, 100, 200, 2**30, 4096)
HOME = replace(KV, homes=(KvHome(session_hash("s"), 1000, Place.RAM),))


def waiting_for_kv(desk: Desk) -> tuple[str, KvAsk]:
    """Turn 1 of session s was placed here, and its KV is on b: the job's key, and what b was asked."""
    desk.feed(Hosted(TALK))
    desk.feed(KvChanged(KV))
    desk.feed(LinkUp(session_present=False))
    desk.deliver(presence("b"))
    desk.deliver(record("b", kv=(HOME,), serving=False, offers=(TALK,)))
    asked = replace(turn(1), session="s")
    effects = desk.deliver(dispatch(replace(asked, model="parrot"), ingress="c"))
    assert not of(Execute, effects)
    return f"c/{asked.request_id}", asked_of_b(effects)


@pytest.mark.parametrize(("tier", "fetches"), [(TrustTier.NONE, False), (TrustTier.WARNING, False), (TrustTier.AFFIRMING, True)])
def test_what_a_board_under_the_tier_of_a_turn_has_computed_is_not_fetched_for_it(
    desk: Desk, tier: TrustTier, fetches: bool
) -> None:
    desk.trust = {"a": TrustTier.AFFIRMING, "b": tier}
    desk.boot()
    for event in (Hosted(TALK), KvChanged(KV), LinkUp(session_present=False)):
        desk.feed(event)
    desk.deliver(presence("b"))
    desk.deliver(record("b", kv=(HOME,), serving=False, offers=(TALK,)))
    asked = replace(turn(1), session="s", model="parrot", limits=Limits(10 * SECOND_US, trust=TrustTier.AFFIRMING))
    effects = desk.deliver(dispatch(asked, ingress="c"))
    assert [bool(of(Execute, effects)), any("/kv/" in each.message.topic for each in of(Publish, effects))] == [
        not fetches,
        fetches,
    ]


def asked_of_b(effects: list[Effect]) -> KvAsk:
    (sent,) = [each for each in of(Publish, effects) if "/kv/" in each.message.topic]
    assert sent.message.topic == TOPICS.kv("b", "a")
    signed = verify1(sent.message.payload, MEMBERS_BY_KID, wire.AAD_KV_ASK)
    return wire.decode_kv_ask(signed.payload, "b")


def kv_answer(answer: KvAnswer, board: str = "b", addressee: str = "a", signer: str = "") -> Message:
    payload = sign1(wire.encode_kv_answer(answer, addressee), SIGNERS[signer or board], wire.AAD_KV_ANSWER)
    return Message(TOPICS.kv(addressee, board), payload)


def kv_ask(ask: KvAsk, board: str = "b", addressee: str = "a") -> Message:
    return Message(TOPICS.kv(addressee, board), sign1(wire.encode_kv_ask(ask, addressee), SIGNERS[board], wire.AAD_KV_ASK))


MANIFEST_HERE = KvAnswer(session_hash("s"), KvItem.MANIFEST, payload=b"manifest")


def test_a_turn_begins_when_its_sessions_kv_is_here_and_the_home_is_told(desk: Desk) -> None:
    key, ask = waiting_for_kv(desk)
    assert (ask.item, ask.session, ask.fingerprint) == (KvItem.MANIFEST, session_hash("s"), b"f" * 32)
    (find,) = of(KvFind, desk.deliver(kv_answer(MANIFEST_HERE)))
    assert (find.key, find.model, find.session, find.manifest) == (key, "parrot", "s", b"manifest")
    assert asked_of_b(desk.feed(KvFound(key, (b"n" * 32,), rows=False))).name == b"n" * 32
    block = KvAnswer(session_hash("s"), KvItem.BLOCK, b"n" * 32, b"block")
    (put,) = of(KvPut, desk.deliver(kv_answer(block)))
    assert put.payload == b"block"
    effects = desk.feed(KvStored(key, KvItem.BLOCK, b"n" * 32))
    (begun,) = of(Execute, effects)
    assert (begun.key, begun.moved_from) == (key, "b") and asked_of_b(effects).item is KvItem.MOVED


@pytest.mark.parametrize(
    "trouble",
    [
        Delivered(kv_answer(KvAnswer(session_hash("s"), KvItem.MANIFEST, refusal="it is not here")), 77),
        Delivered(presence("b", Standing.OFFLINE), 77),
        Tick(),
    ],
)
def test_a_turn_whose_kv_does_not_come_begins_without_it(desk: Desk, trouble: Event) -> None:
    key, _ = waiting_for_kv(desk)
    (begun,) = of(Execute, desk.feed(trouble, after_us=8 * SECOND_US if isinstance(trouble, Tick) else 0))
    assert (begun.key, begun.moved_from) == (key, "")


def test_a_turn_that_is_broken_off_while_it_waits_for_kv_is_answered_and_never_begins(desk: Desk) -> None:
    key, _ = waiting_for_kv(desk)
    effects = desk.deliver(cancellation(1, ingress="c"))
    assert not of(Cancel, effects) and desk.node.execution.running == 0
    assert "broken off" in told(of(Publish, effects)[0].message, "c").reason
    assert not of(KvFind, desk.deliver(kv_answer(MANIFEST_HERE)))
    assert not of(Execute, desk.feed(Tick(), after_us=9 * SECOND_US)), key


@pytest.mark.parametrize(
    "wrong",
    [
        kv_answer(MANIFEST_HERE, signer="c"),
        replace(kv_answer(MANIFEST_HERE, addressee="c"), topic=TOPICS.kv("a", "b")),
        replace(kv_answer(MANIFEST_HERE), topic=TOPICS.kv("a", "c")),
        replace(kv_answer(MANIFEST_HERE), payload=kv_answer(MANIFEST_HERE).payload[:-1]),
        replace(kv_ask(KvAsk(bytes(16), bytes(32), KvItem.ROWS)), topic=TOPICS.kv("a", "c")),
        kv_ask(KvAsk(bytes(16), bytes(32), KvItem.ROWS), board="a"),
    ],
)
def test_a_kv_message_that_is_wrong_is_dropped_logged_and_acknowledged(desk: Desk, wrong: Message) -> None:
    waiting_for_kv(desk)
    effects = desk.deliver(wrong)
    assert of(Log, effects) and desk.acknowledged(effects) and not of(KvFind, effects) and not of(KvGive, effects)
    assert of(KvFind, desk.deliver(kv_answer(MANIFEST_HERE)))


def test_what_another_board_asks_of_a_session_is_read_and_sent_to_it(desk: Desk) -> None:
    desk.meet("b")
    ask = KvAsk(session_hash("s"), b"f" * 32, KvItem.ROWS)
    (give,) = of(KvGive, desk.deliver(kv_ask(ask)))
    (sent,) = of(Publish, desk.feed(KvGave(give.board, give.ask, b"rows")))
    signed = verify1(sent.message.payload, MEMBERS_BY_KID, wire.AAD_KV_ANSWER)
    assert sent.message.topic == TOPICS.kv("b", "a")
    assert wire.decode_kv_answer(signed.payload, "b") == KvAnswer(session_hash("s"), KvItem.ROWS, payload=b"rows")
    large = KvGave("b", KvAsk(session_hash("s"), b"f" * 32, KvItem.ROWS), bytes(MAX_PAYLOAD_BYTES))
    (sent,) = of(Publish, desk.feed(large))
    signed = verify1(sent.message.payload, MEMBERS_BY_KID, wire.AAD_KV_ANSWER)
    assert "do not fit into one message" in wire.decode_kv_answer(signed.payload, "b").refusal


def test_the_record_says_what_the_language_models_hold_and_what_a_turn_waits(desk: Desk) -> None:
    talking(desk)
    desk.feed(KvChanged(HOME))
    desk.deliver(dispatch(replace(turn(3), model="parrot")))
    (state,) = desk.node._record(1, desk.now_us).kv
    waits_us = 2 * expected_cost(TALK, shape_of(turn(3))).busy_us + 7 * 1_000_000 // 200
    assert state.homes == HOME.homes and state.queue_us == shared(waits_us // 2, TALK.parallel), (
        "its 28 bytes are 7 tokens, which 200 a second are read of"
    )
    desk.feed(Withdrawn("parrot", "gone"))
    assert not desk.node._record(1, desk.now_us).kv
