"""What the node asks for, carried out: on this board's models, to clients in this process, over the link.

Rules: nothing is decided here; without a link what is for it is nothing; what the link refuses comes back as an event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.node.events import (
    Acknowledge,
    Cancel,
    Effect,
    Endorse,
    Event,
    Execute,
    KvFind,
    KvGive,
    KvPut,
    Log,
    Publish,
    Reply,
    ReplyPart,
    Subscribe,
)
from edge_agent.shell.answers import Answers
from edge_agent.shell.endorsing import Endorsing
from edge_agent.shell.jobs import Jobs
from edge_agent.talk import Talks
from edge_agent.transport.link import Link, Rejected


class Effects:
    """``feed`` takes the node's events, ``say`` what is for people. ``link`` is set when there is one."""

    def __init__(
        self, jobs: Jobs, answers: Answers, talks: Talks, endorsing: Endorsing, feed: Callable[[Event], None],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._jobs, self._answers, self._talks, self._endorsing = jobs, answers, talks, endorsing
        self._feed, self._say = feed, say
        self.link: Link | None = None

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Execute():
                self._jobs.begin(effect)
            case Cancel(key):
                self._jobs.cancel(key)
            case KvFind() | KvPut() | KvGive():
                self._jobs.move(effect)
            case ReplyPart(handle, part):
                self._talks.part(handle, part)
            case Reply(handle, result):
                self._answers.answer(handle, result)
                self._talks.answer(handle, result)
            case Endorse(challenge):
                self._endorsing.begin(challenge)
            case Publish() | Subscribe() | Acknowledge():
                self._use_link(effect)
            case Log(text):
                self._say(text)
            case _:
                assert_never(effect)

    def _use_link(self, effect: Publish | Subscribe | Acknowledge) -> None:
        if self.link is None:
            return
        try:
            match effect:
                case Publish(message, ticket):
                    self.link.publish(message, ticket)
                case Subscribe(topic_filter):
                    self.link.subscribe(topic_filter)
                case Acknowledge(token):
                    self.link.acknowledge(token)
        except (UnavailableError, RefusedError) as error:
            if isinstance(effect, Publish):
                self._feed(Rejected(str(error), effect.ticket))
            else:
                self._say(f"not sent: {error}")
