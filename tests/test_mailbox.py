"""What is owed: in order, within a window, kept until the broker has it, and a full ledger loses no answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.core import wire
from edge_agent.core.cose import Signer, verify1
from edge_agent.core.values import InferenceResult, Status, Tensor
from edge_agent.node.events import Acknowledge, Log, Publish
from edge_agent.node.mailbox import WINDOW_MESSAGES, Mailbox
from edge_agent.node.returns import Returns
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.store.ledger import Bounds, Ledger
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Message
from tests.virtual_board import seed_of

SIGNER = Signer(b"b", seed_of("b"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db", Bounds(unanswered_count=100, owed_count=50)) as ledger:
        yield ledger


@pytest.fixture
def mailbox(ledger: Ledger) -> Mailbox:
    return Mailbox(ledger, Voice(NodeSettings("b", 1, SIGNER)))


def result(number: int, size_bytes: int = 0) -> InferenceResult:
    outputs = {"x": Tensor("uint8", (size_bytes,), bytes(size_bytes))}
    return InferenceResult(f"{number:032x}", Status.OK, "b", outputs=outputs)


def owe(mailbox: Mailbox, ledger: Ledger, number: int, size_bytes: int = 0) -> list[Log]:
    key = f"c/{number:032x}"
    ledger.accept(key, b"")
    return [effect for effect in mailbox.answer(key, "c", result(number, size_bytes), 60) if isinstance(effect, Log)]


def told(message: Message) -> InferenceResult:
    signed = verify1(message.payload, lambda kid: SIGNER.public_key, wire.AAD_RESULT, MAX_PAYLOAD_BYTES)
    return wire.decode_result(signed.payload, "c")


def test_what_is_owed_goes_out_in_order_within_the_window_and_on_as_it_is_confirmed(ledger: Ledger, mailbox: Mailbox) -> None:
    for i in range(WINDOW_MESSAGES + 5):
        owe(mailbox, ledger, i)
    first = list(mailbox.to_publish())
    assert [told(each.message) for each in first] == [result(i) for i in range(WINDOW_MESSAGES)]
    assert not list(mailbox.to_publish())
    for each in first[:3]:
        mailbox.confirmed(each.ticket)
    assert [told(each.message) for each in mailbox.to_publish()] == [result(WINDOW_MESSAGES + i) for i in range(3)]


def test_large_answers_that_come_in_small_batches_do_not_wait_for_a_tick(ledger: Ledger, mailbox: Mailbox) -> None:
    for i in range(5):
        owe(mailbox, ledger, i, size_bytes=3 * 2**20)
    sent = []
    while found := list(mailbox.to_publish()):
        sent += found
    assert len(sent) == 5


def test_a_new_connection_gets_everything_that_the_last_one_did_not_confirm(ledger: Ledger, mailbox: Mailbox) -> None:
    for i in range(4):
        owe(mailbox, ledger, i)
    sent = list(mailbox.to_publish())
    mailbox.confirmed(sent[1].ticket)
    mailbox.restart()
    assert [each.ticket for each in mailbox.to_publish()] == [sent[i].ticket for i in (0, 2, 3)]


def test_a_confirmation_of_something_else_changes_nothing(ledger: Ledger, mailbox: Mailbox) -> None:
    owe(mailbox, ledger, 1)
    (sent,) = mailbox.to_publish()
    for ticket in (0, -1, sent.ticket + 1):
        mailbox.confirmed(ticket)
        mailbox.rejected(ticket)
    assert len(ledger.owed(9)) == 1
    mailbox.confirmed(sent.ticket)
    mailbox.confirmed(sent.ticket)
    assert not ledger.owed(9)


def test_what_the_link_would_not_take_is_tried_again_after_a_while_and_not_at_once(ledger: Ledger, mailbox: Mailbox) -> None:
    for i in range(3):
        owe(mailbox, ledger, i)
    sent = list(mailbox.to_publish())
    mailbox.rejected(sent[0].ticket)
    mailbox.rejected(sent[2].ticket)
    assert not list(mailbox.to_publish()), "a link that refuses everything must not keep the agent spinning"
    mailbox.retry()
    assert [each.ticket for each in mailbox.to_publish()] == [sent[0].ticket, sent[2].ticket]
    mailbox.confirmed(sent[1].ticket)
    assert [ticket for ticket, _ in ledger.owed(9)] == [sent[0].ticket, sent[2].ticket]


def test_an_answer_without_room_waits_as_a_failure_that_says_so_and_is_kept_when_there_is_room(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db", Bounds(unanswered_count=9, owed_count=2)) as ledger:
        mailbox = Mailbox(ledger, Voice(NodeSettings("b", 1, SIGNER)))
        logs = [log for i in range(3) for log in owe(mailbox, ledger, i)]
        assert len(logs) == 1 and "no room" in logs[0].text
        assert mailbox.congested and len(mailbox) == 1
        assert [key for key, _ in ledger.unanswered(9)] == [f"c/{2:032x}"], "a restart would take it up"
        first = list(mailbox.to_publish())
        mailbox.confirmed(first[0].ticket)
        assert not mailbox.congested and not ledger.unanswered(9)
        (last,) = mailbox.to_publish()
        assert told(last.message).status is Status.FAILED and "no room to keep the answer" in told(last.message).reason


def test_an_answer_that_does_not_fit_into_a_message_becomes_a_failure_that_says_so(ledger: Ledger, mailbox: Mailbox) -> None:
    owe(mailbox, ledger, 1, size_bytes=MAX_PAYLOAD_BYTES)
    (sent,) = mailbox.to_publish()
    assert told(sent.message).status is Status.FAILED and "a message holds at most" in told(sent.message).reason


MESSAGE = Message("sly/1/home/board/b/reply/c", b"answer")


def returns() -> Returns:
    return Returns(iter(range(-1, -99, -1)))


def test_a_delivery_is_acknowledged_when_the_broker_has_its_answer() -> None:
    table = returns()
    (sent,) = table.give(7, MESSAGE)
    assert sent == Publish(MESSAGE, -1) and table.holds(7)
    assert not list(table.confirmed(-2)) and table.holds(7)
    assert list(table.confirmed(-1)) == [Acknowledge(7)]
    assert not table.holds(7) and not list(table.confirmed(-1))


def test_a_delivery_that_the_broker_repeats_is_answered_once() -> None:
    table = returns()
    assert len([*table.give(7, MESSAGE), *table.give(7, MESSAGE)]) == 1


def test_an_answer_that_the_link_would_not_take_is_tried_again_with_another_ticket() -> None:
    table = returns()
    list(table.give(7, MESSAGE))
    table.rejected(-1)
    assert list(table.retry()) == [Publish(MESSAGE, -2)] and not list(table.retry())
    assert list(table.confirmed(-2)) == [Acknowledge(7)]


def test_what_the_broker_does_not_keep_is_answered_without_more_ado() -> None:
    table = returns()
    assert list(table.give(0, MESSAGE)) == [Publish(MESSAGE)] and not len(table)


def test_tokens_of_an_ended_connection_are_worth_nothing() -> None:
    table = returns()
    list(table.give(7, MESSAGE))
    table.restart()
    assert not table.holds(7) and not list(table.confirmed(-1)) and not len(table)
