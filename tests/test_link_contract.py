"""The contract of a link, on the loopback, the embedded broker and Mosquitto."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.transport.embedded import EmbeddedBroker
from edge_agent.transport.link import (
    MAX_PAYLOAD_BYTES,
    MAX_TOPIC_BYTES,
    RECEIVE_MAXIMUM,
    LinkUp,
    Message,
    Rejected,
    Will,
    is_filter,
    matches,
)
from tests.brokers import Mosquitto, embedded_broker
from tests.worlds import EmbeddedWorld, LoopbackWorld, MosquittoWorld, World


@pytest.fixture(scope="module")
def mosquitto_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def rumqttd() -> Iterator[EmbeddedBroker]:
    with embedded_broker() as broker:
        yield broker


@pytest.fixture(params=["loopback", "embedded", "mosquitto"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "loopback":
        made: World = LoopbackWorld()
    elif request.param == "embedded":
        made = EmbeddedWorld(request.getfixturevalue("rumqttd"))
    else:
        made = MosquittoWorld(request.getfixturevalue("mosquitto_broker"))
    yield made
    made.close()


def test_a_message_arrives_with_all_its_properties(world: World) -> None:
    receiver, sender = world.subscribed("props-r", "props/#"), world.station("props-s")
    sent = Message("props/1", b"\0payload\xff", 1, False, 60, "props/answer", b"\0\1corr")
    sender.link.publish(sent, ticket=7)
    world.wait(lambda: receiver.messages and sender.tickets, "message and ticket")
    assert receiver.messages == [sent]
    assert sender.tickets == [7]


def test_qos_0_arrives_and_is_owed_nothing(world: World) -> None:
    receiver, sender = world.subscribed("q0-r", "q0/+", qos=0), world.station("q0-s")
    sender.link.publish(Message("q0/a", b"x", qos=0), ticket=1)
    sender.link.publish(Message("q0/b", b"y", qos=1), ticket=2)
    world.wait(lambda: len(receiver.messages) == 2 and sender.tickets, "both messages")
    assert receiver.messages == [Message("q0/a", b"x", qos=0), Message("q0/b", b"y", qos=0)]
    assert [delivered.token for delivered in receiver.delivered] == [0, 0]
    assert sender.tickets == [2]


def test_a_subscription_does_not_raise_the_qos_of_a_publication(world: World) -> None:
    receiver, sender = world.subscribed("raise-r", "raise/+", qos=1), world.station("raise-s")
    sender.link.publish(Message("raise/a", b"x", qos=0))
    world.wait(lambda: receiver.messages, "the message")
    assert (receiver.messages[0].qos == 1) is bool(world.raises_qos), world.raises_qos
    assert (receiver.delivered[0].token != 0) is bool(world.raises_qos), world.raises_qos


def test_an_unacknowledged_message_comes_again_after_the_connection_broke_and_an_acknowledged_one_does_not(world: World) -> None:
    receiver, sender = world.subscribed("again-r", "again/#"), world.station("again-s")
    sender.link.publish(Message("again/kept", b"kept"))
    sender.link.publish(Message("again/lost", b"lost"))
    world.wait(lambda: len(receiver.messages) == 2, "both messages")
    receiver.link.acknowledge(receiver.delivered[0].token)
    world.fence(receiver)
    world.cut("again-r")
    world.wait(lambda: receiver.downs, "the break is noticed")
    world.mend("again-r")
    world.wait(lambda: len(receiver.messages) >= 3, "the unacknowledged message again")
    assert receiver.payloads == [b"kept", b"lost", b"lost"]
    assert receiver.ups[-1] == LinkUp(session_present=True)
    receiver.link.acknowledge(receiver.delivered[1].token)
    receiver.link.acknowledge(receiver.delivered[2].token)
    world.fence(receiver)
    assert receiver.payloads == [b"kept", b"lost", b"lost"]


def test_a_token_of_an_ended_connection_acknowledges_nothing(world: World) -> None:
    receiver, sender = world.subscribed("stale-r", "stale/#"), world.station("stale-s")
    sender.link.publish(Message("stale/1", b"one"))
    world.wait(lambda: receiver.messages, "the message")
    stale = receiver.delivered[0].token
    while len(receiver.messages) < 3:
        before = len(receiver.messages)
        world.cut("stale-r")
        world.wait(lambda: not receiver.link.up, "the break is noticed")
        world.mend("stale-r")
        world.wait(lambda: len(receiver.messages) > before, "the message again")  # noqa: B023
        receiver.link.acknowledge(stale)
        world.fence(receiver)
    assert receiver.payloads == [b"one"] * 3


def test_nothing_comes_of_a_subscription_that_was_taken_back_and_the_others_stay(world: World) -> None:
    receiver, sender = world.subscribed("back-r", "back/a"), world.station("back-s")
    receiver.link.subscribe("back/b")
    sender.link.publish(Message("back/a", b"still wanted"))
    world.wait(lambda: receiver.messages, "what is asked for")
    receiver.link.unsubscribe("back/a")
    receiver.link.unsubscribe("back/never-asked-for")
    world.fence(receiver)
    sender.link.publish(Message("back/a", b"not wanted any more"))
    sender.link.publish(Message("back/b", b"wanted"))
    world.wait(lambda: len(receiver.messages) > 1, "what is still asked for")
    world.fence(receiver)
    assert receiver.payloads == [b"still wanted", b"wanted"]
    assert not receiver.downs
    assert not any(isinstance(event, Rejected) for event in receiver.events)


def test_a_subscription_that_was_taken_back_stays_so_when_the_session_goes_on(world: World) -> None:
    receiver, sender = world.subscribed("backed-r", "backed/a"), world.station("backed-s")
    receiver.link.unsubscribe("backed/a")
    world.fence(receiver)
    world.cut("backed-r")
    world.wait(lambda: receiver.downs, "the break is noticed")
    sender.link.publish(Message("backed/a", b"while away"), ticket=1)
    world.wait(lambda: sender.tickets, "the broker has it")
    world.mend("backed-r")
    world.wait(lambda: receiver.link.up, "it is back")
    world.fence(receiver)
    assert receiver.payloads == []


def test_a_message_that_came_while_away_is_delivered_on_return(world: World) -> None:
    receiver, sender = world.subscribed("away-r", "away/#"), world.station("away-s")
    world.cut("away-r")
    world.wait(lambda: receiver.downs, "the break is noticed")
    sender.link.publish(Message("away/1", b"while away"), ticket=1)
    world.wait(lambda: sender.tickets, "the broker has it")
    world.mend("away-r")
    world.wait(lambda: receiver.messages, "the message")
    assert receiver.payloads == [b"while away"]


def test_retained_state_is_delivered_on_subscription_and_an_empty_message_clears_it(world: World) -> None:
    owner = world.station("ret-owner")
    for number in (1, 2):
        owner.link.publish(Message("ret/state", b"state %d" % number, retain=True), ticket=number)
    world.wait(lambda: owner.tickets == [1, 2], "both are published")
    late = world.subscribed("ret-late", "ret/#")
    assert late.messages == [Message("ret/state", b"state 2", retain=True)]
    owner.link.publish(Message("ret/state", b"", retain=True), ticket=3)
    world.wait(lambda: len(late.messages) == 2 and owner.tickets == [1, 2, 3], "the empty message")
    assert late.messages[1] == Message("ret/state", b"", retain=False)
    assert world.subscribed("ret-later", "ret/#").messages == []


def test_the_will_is_sent_for_a_link_that_vanished(world: World) -> None:
    watcher = world.subscribed("will-watcher", "will/#")
    world.station("will-board", Will(Message("will/board", b"offline", retain=True)))
    world.cut("will-board")
    world.wait(lambda: watcher.messages, "the will")
    assert watcher.messages == [Message("will/board", b"offline")]
    assert world.subscribed("will-late", "will/#").messages == [Message("will/board", b"offline", retain=True)]


def test_the_will_is_not_sent_after_a_clean_close(world: World) -> None:
    watcher = world.subscribed("clean-watcher", "clean/#")
    board = world.station("clean-board", Will(Message("clean/board", b"offline")))
    board.link.publish(Message("clean/board", b"stopped"))
    board.link.close()
    world.station("clean-board").link.publish(Message("clean/board", b"a later life"))
    world.wait(lambda: b"a later life" in watcher.payloads, "a message of the same client's next life")
    assert watcher.payloads == [b"stopped", b"a later life"]


def test_a_delayed_will_is_sent_if_the_link_stays_away_and_not_if_it_returns(world: World) -> None:
    watcher = world.subscribed("delay-watcher", "delay/#")
    for name in ("delay-returns", "delay-stays-away"):
        world.station(name, Will(Message(f"delay/{name}", b"offline"), delay_s=2))
        world.cut(name)
    returning = world.stations[-2]
    world.wait(lambda: returning.downs, "the break is noticed")
    world.mend("delay-returns")
    world.wait(lambda: len(returning.ups) == 2, "it is back")
    world.wait(lambda: watcher.messages, "the will of the other")
    world.fence(watcher)
    assert [message.topic for message in watcher.messages] == ["delay/delay-stays-away"]


def test_publish_and_subscribe_while_down_raise_and_lose_nothing_silently(world: World) -> None:
    never_opened = world.closed_station("down-new")
    with pytest.raises(UnavailableError, match="publish after LinkUp"):
        never_opened.link.publish(Message("down/1", b""))
    station = world.station("down-cut")
    world.cut("down-cut")
    world.wait(lambda: station.downs, "the break is noticed")
    assert not station.link.up
    with pytest.raises(UnavailableError, match="not connected"):
        station.link.publish(Message("down/1", b""))
    with pytest.raises(UnavailableError, match="not connected"):
        station.link.subscribe("down/#")
    with pytest.raises(UnavailableError, match="not connected"):
        station.link.unsubscribe("down/#")


def test_a_restarted_broker_is_found_again_without_help(world: World) -> None:
    station = world.subscribed("restart", "restart/#")
    state = world.station("restart-state")
    state.link.publish(Message("restart/state", b"state", retain=True), ticket=1)
    world.wait(lambda: state.tickets and station.messages, "the state is known")
    station.link.acknowledge(station.delivered[0].token)
    world.fence(station)
    world.stop_broker()
    world.wait(lambda: station.downs and state.downs, "both notice")
    world.start_broker()
    world.wait(lambda: station.link.up and state.link.up, "both are back")
    assert station.ups[-1].session_present is not bool(world.forgets), world.forgets
    retained = world.subscribed("restart-late", "restart/#").payloads
    assert retained == ([] if world.forgets else [b"state"]), world.forgets


def test_a_link_that_opens_before_the_broker_comes_up_later(world: World) -> None:
    world.stop_broker()
    station = world.closed_station("cold")
    station.link.open(station.deliver)
    world.wait(lambda: len(station.downs) >= 2, "two attempts failed")
    assert all(down.reason for down in station.downs)
    world.start_broker()
    world.wait(lambda: station.link.up, "it is up")


def test_wildcards_match_what_mqtt_says_they_match(world: World) -> None:
    one_level, rest = world.subscribed("wild-1", "wild/+/x"), world.subscribed("wild-2", "wild/a/#")
    sender = world.station("wild-s")
    for topic in ("wild/a/x", "wild/b/x", "wild/a", "wild/a/y/z", "wild/a/b/x", "wildly/a/x"):
        sender.link.publish(Message(topic, topic.encode()))
    sender.link.publish(Message("wild/a/x", b"end"))
    world.wait(lambda: b"end" in one_level.payloads and b"end" in rest.payloads, "the last message")
    assert one_level.payloads == [b"wild/a/x", b"wild/b/x", b"end"]
    assert rest.payloads == [b"wild/a/x", b"wild/a", b"wild/a/y/z", b"wild/a/b/x", b"end"]


def test_messages_of_one_topic_stay_in_order(world: World) -> None:
    receiver, sender = world.subscribed("order-r", "order/#"), world.station("order-s")
    for number in range(150):
        sender.link.publish(Message("order/1", b"%d" % number), ticket=number)
        world.wait(lambda: len(receiver.messages) >= number - 10, "it keeps up")  # noqa: B023
        for delivered in receiver.delivered:
            receiver.link.acknowledge(delivered.token)
    world.wait(lambda: len(receiver.messages) == 150 and len(sender.tickets) == 150, "all of them")
    assert receiver.payloads == [b"%d" % number for number in range(150)]
    assert sender.tickets == list(range(150))


def test_the_receive_maximum_holds_messages_back_and_none_is_lost(world: World) -> None:
    receiver, sender = world.subscribed("hold-r", "hold/#"), world.station("hold-s")
    for number in range(60):
        sender.link.publish(Message("hold/1", b"%d" % number), ticket=number)
    world.wait(lambda: len(sender.tickets) == 60 and len(receiver.messages) >= 32, "the broker has all")
    world.fence(sender)
    assert (len(receiver.messages) > RECEIVE_MAXIMUM) is bool(world.ignores_receive_maximum), world.ignores_receive_maximum
    taken = 0
    while taken < 60:
        world.wait(lambda: len(receiver.delivered) > taken, "the next message")  # noqa: B023
        receiver.link.acknowledge(receiver.delivered[taken].token)
        taken += 1
    assert receiver.payloads == [b"%d" % number for number in range(60)]
    assert not receiver.downs


def test_the_largest_message_passes_and_a_larger_one_is_refused(world: World) -> None:
    receiver, sender = world.subscribed("large-r", "large/#"), world.station("large-s")
    sender.link.publish(Message("large/1", b"z" * MAX_PAYLOAD_BYTES), ticket=1)
    world.wait(lambda: receiver.messages and sender.tickets, "the largest message")
    assert len(receiver.messages[0].payload) == MAX_PAYLOAD_BYTES
    with pytest.raises(RefusedError, match=f"at most {MAX_PAYLOAD_BYTES} bytes"):
        Message("large/1", b"z" * (MAX_PAYLOAD_BYTES + 1))
    assert not receiver.downs
    assert not sender.downs


def test_an_expired_message_is_not_delivered_to_a_late_subscriber(world: World) -> None:
    owner = world.subscribed("expiry-owner", "expiry-clock/#")
    owner.link.publish(Message("expiry/state", b"old", retain=True, expiry_s=1), ticket=1)
    world.wait(lambda: owner.tickets == [1], "it is published")
    clock = world.station("expiry-clock", Will(Message("expiry-clock/1", b"", qos=0), delay_s=3))
    world.cut("expiry-clock")
    world.wait(lambda: owner.messages, "three seconds of the broker's time have passed")
    assert clock.ups
    assert world.subscribed("expiry-late", "expiry/#").messages == []


def test_the_older_of_two_links_with_one_client_id_is_told_why_it_ended(world: World) -> None:
    older = world.station("twin")
    newer = world.closed_station("twin")
    newer.link.open(newer.deliver)
    world.wait(lambda: newer.ups and older.downs, "the newer took the session over")
    assert "another client uses" in older.downs[0].reason


def test_every_event_is_delivered_on_the_thread_that_opened_the_link(world: World) -> None:
    receiver = world.subscribed("thread", "thread/#")
    receiver.link.publish(Message("thread/1", b"x"), ticket=1)
    world.wait(lambda: receiver.messages and receiver.tickets, "message and ticket")
    world.cut("thread")
    world.wait(lambda: receiver.downs, "the break is noticed")
    assert receiver.threads == {threading.get_ident()}


def test_nothing_is_said_after_close_and_closing_twice_is_harmless(world: World) -> None:
    station, sender = world.subscribed("closed", "closed/#"), world.subscribed("closed-s", "closed/#")
    sender.link.publish(Message("closed/1", b"before"))
    station.link.close()
    said = list(station.events)
    station.link.close()
    sender.link.publish(Message("closed/1", b"after"))
    world.wait(lambda: b"after" in sender.payloads, "a message after the close")
    world.fence(sender)
    assert station.events == said
    assert not station.link.up
    with pytest.raises(UnavailableError):
        station.link.publish(Message("closed/1", b""))


def test_a_closed_link_can_be_opened_again_and_an_open_one_cannot(world: World) -> None:
    station = world.station("reopen")
    with pytest.raises(RuntimeError, match="open already"):
        station.link.open(station.deliver)
    station.link.close()
    station.link.open(station.deliver)
    world.wait(lambda: len(station.ups) == 2, "it is up again")


@pytest.mark.parametrize("topic", ["", "a/+/b", "#", "a\0b", "x" * (MAX_TOPIC_BYTES + 1), "\ud800"])
def test_a_message_refuses_a_topic_that_cannot_be_published(topic: str) -> None:
    with pytest.raises(RefusedError, match="topic"):
        Message(topic, b"")
    with pytest.raises(RefusedError, match="response topic"):
        Message("good", b"", response_topic=topic)


@pytest.mark.parametrize("topic_filter", ["", "a#", "#/a", "a/#/b", "a+", "a/b+/c", "a\0", "x" * (MAX_TOPIC_BYTES + 1)])
def test_a_malformed_filter_is_the_callers_bug(topic_filter: str) -> None:
    link = LoopbackWorld().station("filter").link
    with pytest.raises(ValueError, match="topic filter"):
        link.subscribe(topic_filter)
    with pytest.raises(ValueError, match="topic filter"):
        link.unsubscribe(topic_filter)


def test_filters_match_as_the_standard_says() -> None:
    assert is_filter("+/a/#")
    assert is_filter("#")
    for topic_filter, topic in [("a/#", "a"), ("#", "a/b"), ("+/b", "/b"), ("a/+", "a/"), ("$SYS/#", "$SYS/x")]:
        assert matches(topic_filter, topic), (topic_filter, topic)
    for topic_filter, topic in [("a/+", "a"), ("a/+", "a/b/c"), ("#", "$SYS/x"), ("+/x", "$SYS/x"), ("a", "a/b"), ("a/b", "a")]:
        assert not matches(topic_filter, topic), (topic_filter, topic)
