"""OpenAI's answers: chat and completion objects, chunks of a stream, models. Pure.

Rules: the fields and their order of coming are OpenAI's; what a turn took besides is the one object ``sly`` beside ``usage``.
Source: the public API reference of OpenAI, "Chat", "Completions (legacy)" and "Models".
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_agent.core.chat import TurnEnd
from edge_agent.gateway.openai_request import Asked

FINGERPRINT = "slyos-edge"
OWNER = "slyos-edge"


def usage(end: TurnEnd) -> dict[str, object]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def extension(end: TurnEnd) -> dict[str, object]:
    """The object ``sly``: what the turn took, and the signed receipt of the board that served it. Times in microseconds."""
    return {
        "session": end.session,
        "tier": end.tier.value,
        "kv_bytes": end.kv_bytes,
        "recomputed_tokens": end.recomputed_tokens,
        "first_token_us": end.first_token_us,
        "restore_us": end.restore_us,
        "prefill_us": end.prefill_us,
        "decode_us": end.decode_us,
        "tokens_per_s": tokens_per_s(end),
        "drafted_tokens": end.drafted_tokens,
        "accepted_tokens": end.accepted_tokens,
        "notes": list(end.notes),
        **receipt(end),
    }


def receipt(end: TurnEnd) -> dict[str, object]:
    """The signed receipt in base64 (RFC 4648, section 4); nothing where none was given."""
    return {"receipt": b64encode(end.receipt).decode()} if end.receipt else {}


def tokens_per_s(end: TurnEnd) -> float:
    """Of the tokens after the first one, which prefill gives; 0.0 where there was nothing to measure."""
    made = end.completion_tokens - 1
    return round(made * 1e6 / end.decode_us, 2) if made > 0 and end.decode_us > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Writer:
    """The objects of one answer: they share id, time and model."""

    asked: Asked
    id: str
    created: int

    def whole(self, end: TurnEnd) -> dict[str, object]:
        """The answer of a request that does not stream."""
        if self.asked.chat:
            message = {"role": "assistant", "content": end.text, "refusal": None}
            choice: dict[str, object] = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish.value}
        else:
            choice = {"index": 0, "text": end.text, "logprobs": None, "finish_reason": end.finish.value}
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": usage(end), "sly": extension(end)}

    def beginning(self) -> list[dict[str, object]]:
        return [self._chunk({"role": "assistant", "content": ""}, "")] if self.asked.chat else []

    def part(self, text: str) -> dict[str, object]:
        return self._chunk({"content": text}, text)

    def ending(self, end: TurnEnd) -> list[dict[str, object]]:
        chunks = [self._chunk({}, "", end.finish.value) | ({"sly": receipt(end)} if end.receipt else {})]
        if self.asked.include_usage:
            chunks.append(self._object(self._kind, []) | {"usage": usage(end), "sly": extension(end)})
        return chunks

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _chunk(self, delta: Mapping[str, str], text: str, finish: str | None = None) -> dict[str, object]:
        words: dict[str, object] = {"delta": dict(delta)} if self.asked.chat else {"text": text}
        choice = {"index": 0, **words, "logprobs": None, "finish_reason": finish}
        return self._object(self._kind, [choice]) | ({"usage": None} if self.asked.include_usage else {})

    def _object(self, kind: str, choices: Sequence[Mapping[str, object]]) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": FINGERPRINT,
            "choices": list(choices),
        }


def model_object(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def model_list(names: Sequence[str], created: int) -> dict[str, object]:
    return {"object": "list", "data": [model_object(name, created) for name in names]}


def event(value: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def to_json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
