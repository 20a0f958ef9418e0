"""How a conversation is written for a model: what stands before and after each message, as text and special tokens.

Rules: pure.  Special tokens are numbers here and content is text, so no content can become a special token.  Text that touches
is one run: it is split into words together, as the model saw it in training.  Where this table comes from: ``jinja_template``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from edge_agent.core.cbor import fields, list_of, map_of
from edge_agent.core.chat import ROLES, ChatMessage
from edge_agent.core.errors import RefusedError

Part = str | int
"""A run of text, or the id of a special token."""
Parts = tuple[Part, ...]
ASSISTANT = "assistant"
MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """``begin`` stands once before everything; ``no_system`` after it when the first message is no system message.

    ``around`` has for each role what stands before and after the content; ``answer`` asks the model to speak.  ``trim`` takes
    white space off both ends of a content.
    """

    begin: Parts
    no_system: Parts
    around: Mapping[str, tuple[Parts, Parts]]
    answer: Parts
    trim: bool = False

    def __post_init__(self) -> None:
        if self.around.keys() != set(ROLES):
            raise RefusedError("chat template roles", sorted(self.around), ", ".join(ROLES))

    def parts(
        self, messages: Iterable[ChatMessage], continuing: bool = False, answer: bool = True, begun: str = ""
    ) -> list[Part]:
        """The conversation in runs; ``continuing`` first closes the assistant's answer that the session ends with.

        ``begun`` is the beginning of the answer. Raises ``ValueError`` for it without ``answer``.
        """
        if begun and not answer:
            raise ValueError("a begun answer needs answer=True")
        messages = list(messages)
        pieces: list[Iterable[Part]] = [self.around[ASSISTANT][1]] if continuing else [self.begin]
        if not continuing and messages and messages[0].role != "system":
            pieces.append(self.no_system)
        for message in messages:
            before, after = self.around[message.role]
            pieces += before, (message.content.strip() if self.trim else message.content,), after
        if answer:
            pieces += self.answer, (begun,)
        return list(_runs(chain.from_iterable(pieces)))

    def to_value(self) -> dict[int, object]:
        """As CBOR can hold it."""
        around = {role: [list(before), list(after)] for role, (before, after) in self.around.items()}
        return {1: list(self.begin), 2: list(self.no_system), 3: around, 4: list(self.answer), 5: self.trim}

    @classmethod
    def from_value(cls, value: object) -> ChatTemplate:
        """Inverse of ``to_value``. Raises ``RefusedError`` for anything else."""
        entry = fields(value, "chat template", _FIELDS)
        around = {}
        for role, pair in map_of(entry["around"], "chat template roles", list, len(ROLES)).items():
            if len(pair) != 2:
                raise RefusedError(f"chat template role {role}", pair, "what stands before and after")
            around[role] = (_parts(pair[0]), _parts(pair[1]))
        begin, no_system, answer = (_parts(entry[name]) for name in ("begin", "no_system", "answer"))
        return cls(begin, no_system, around, answer, entry["trim"])


_FIELDS = {1: ("begin", list), 2: ("no_system", list), 3: ("around", dict), 4: ("answer", list), 5: ("trim", bool)}


def _parts(value: object) -> Parts:
    items = list_of(value, "chat template part", object, MAX_PARTS)
    for item in items:
        if type(item) is not str and (type(item) is not int or item < 0):
            raise RefusedError("chat template part", item, "text or a token id")
    return tuple(items)  # type: ignore[arg-type]


def _runs(parts: Iterable[Part]) -> Iterator[Part]:
    """Texts that touch become one; empty ones go."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        yield part
        text = ""
    if text:
        yield text
