"""The trace of a simulated run: a line for every event and effect of every board, and their SHA-256.

Rules: a line holds what is decided by, and a message's very bytes; nothing in it depends on the machine, on the order of a set
or on a hash seed, so that equal digests mean equal runs.
"""

from __future__ import annotations

from edge_agent.node.events import (
    Cancel,
    Effect,
    Event,
    Execute,
    Executed,
    KvChanged,
    Log,
    Publish,
    Reply,
    Submitted,
    Subscribe,
)
from edge_agent.transport.link import Delivered, Published

Line = tuple[str, bytes | memoryview]
"""Words, and the bytes of a message."""


def told_event(board: str, event: Event) -> Line:
    match event:
        case Delivered(message, token):
            return f"{board} < delivered {token} {message.topic}", message.payload
        case Submitted(request, handle):
            return f"{board} < submitted {handle} {request.request_id}", b""
        case Executed(key, result):
            return f"{board} < executed {key} {result.status.value} {result.busy_us} {result.energy_uj}", b""
        case Published(ticket):
            return f"{board} < published {ticket}", b""
        case KvChanged(state):
            return f"{board} < kv {state.model} {len(state.homes)} {state.free_bytes}", b""
    return f"{board} < {event!r}", b""


def told_effect(board: str, effect: Effect) -> Line:
    match effect:
        case Publish(message, ticket):
            return f"{board} > publish {ticket} {message.topic}", message.payload
        case Execute(key, _, model, budget_us):
            return f"{board} > execute {key} {model} {budget_us}", b""
        case Reply(handle, result):
            return f"{board} > reply {handle} {result.status.value} {result.board} {result.reason}", b""
        case Log(text):
            return f"{board} > {text}", b""
        case Subscribe(topic_filter):
            return f"{board} > subscribe {topic_filter}", b""
        case Cancel(key):
            return f"{board} > cancel {key}", b""
    return f"{board} > {effect!r}", b""
