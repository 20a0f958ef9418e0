"""From a model's Jinja chat template to a table: at build time only, so that no board runs a template that came with a file.

Rules: the template is rendered in Jinja's sandbox on probe conversations; from what it writes the table of ``chat_template`` is
read off, and must then write every probe exactly as Jinja did.  A template of any other form is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from edge_agent.core.chat import ChatMessage
from edge_agent.core.errors import RefusedError, UnavailableError
from models.chat_template import ChatTemplate, Part, Parts

SUBJECT = "chat template"
FORM = "a text before and after each message that depends on its role alone"
REMEDY = "a template of another form cannot be used yet"
MAX_TEMPLATE_CHARS = 2**16
MAX_RENDERED_CHARS = 2**20
_CONTENTS = {"system": "\ue000S", "user": "\ue001U", "assistant": "\ue002A"}
Render = Callable[[Sequence[str], bool], str]


def probed(source: str, specials: Mapping[str, int], variables: Mapping[str, str]) -> ChatTemplate:
    """The table of a template. ``specials``: ids of special tokens by text; ``variables``: what it may name, as bos_token.

    Raises ``RefusedError`` for a template of another form and ``UnavailableError`` when jinja2 is not installed.
    """
    write = _renderer(source, variables)
    around = {
        "system": _after(write, ("system",), ()),
        "user": _after(write, ("system", "user"), ("system",)),
        "assistant": _after(write, ("system", "user", "assistant"), ("system", "user")),
    }
    begin = _begin(write, around["system"][0])
    around["system"] = (around["system"][0].removeprefix(begin), around["system"][1])
    alone = write(["user"], False)
    inner = "".join((around["user"][0], _CONTENTS["user"], around["user"][1]))
    if not alone.startswith(begin) or not alone.endswith(inner):
        raise _refused("a first message unlike a later one")
    no_system = alone.removeprefix(begin).removesuffix(inner)
    answer = write(["user"], True).removeprefix(alone)

    def cut(text: str) -> Parts:
        return _cut(text, specials)

    pairs = {role: (cut(before), cut(after)) for role, (before, after) in around.items()}
    found = [ChatTemplate(cut(begin), cut(no_system), pairs, cut(answer), trim) for trim in (False, True)]
    texts = {number: text for text, number in specials.items()}
    for table in found:
        if all(_written(table, talk, answer, texts) == _rendered(source, variables, talk, answer) for talk, answer in _PROBES):
            return table
    raise _refused("a template that writes some probe otherwise")


def _refused(got: str) -> RefusedError:
    return RefusedError(SUBJECT, got, FORM, REMEDY)


def _renderer(source: str, variables: Mapping[str, str]) -> Render:
    def write(roles: Sequence[str], answer: bool) -> str:
        return _rendered(source, variables, [ChatMessage(role, _CONTENTS[role]) for role in roles], answer)

    return write


def _rendered(source: str, variables: Mapping[str, str], talk: Sequence[ChatMessage], answer: bool) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UnavailableError("jinja2", "not installed", "pip install 'slyos-edge[build]'") from error
    if len(source) > MAX_TEMPLATE_CHARS:
        raise RefusedError(SUBJECT, f"{len(source)} characters", f"at most {MAX_TEMPLATE_CHARS} characters")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": each.role, "content": each.content} for each in talk]
    try:
        text: str = environment.from_string(source).render(messages=messages, add_generation_prompt=answer, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
        raise _refused(f"{type(error).__name__}: {error}") from error
    if len(text) > MAX_RENDERED_CHARS:
        raise _refused(f"{len(text)} characters for {len(talk)} messages")
    return text


def _after(write: Render, roles: Sequence[str], before: Sequence[str]) -> tuple[str, str]:
    """What stands before and after the last message of ``roles``, which follow on ``before``."""
    begun, whole = write(before, False) if before else "", write(roles, False)
    parts = whole.removeprefix(begun).split(_CONTENTS[roles[-1]])
    if not whole.startswith(begun) or len(parts) != 2:
        raise _refused(f"a message of the {roles[-1]} that is not simply added to the text")
    return parts[0], parts[1]


def _begin(write: Render, first: str) -> str:
    """What only the first message has before it, of what stands before a first system message: a later one has the rest."""
    try:
        later = _after(write, ("system", "user", "system"), ("system", "user"))[0]
    except RefusedError:
        return ""
    return first.removesuffix(later) if first.endswith(later) else ""


def _cut(text: str, specials: Mapping[str, int]) -> Parts:
    pattern = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    parts: list[Part] = [specials[each] if odd % 2 else each for odd, each in enumerate(pieces)]
    return tuple(part for part in parts if part != "")


def _written(table: ChatTemplate, talk: Sequence[ChatMessage], answer: bool, texts: Mapping[int, str]) -> str:
    return "".join(part if isinstance(part, str) else texts[part] for part in table.parts(talk, answer=answer))


def _talk(*roles: str, ends: str = "") -> list[ChatMessage]:
    return [ChatMessage(role, f"{ends}{role} says {{{{ {number} }}}} % {{% x %}}{ends}") for number, role in enumerate(roles)]


_ROLES = ("system", "user", "assistant", "user", "assistant", "user")
_PROBES = [
    (_talk(*roles, ends=ends), answer)
    for roles in (*(_ROLES[:count] for count in range(1, 7)), *(_ROLES[1:count] for count in range(2, 7)))
    for ends in ("", " \n ")
    for answer in (False, True)
]
