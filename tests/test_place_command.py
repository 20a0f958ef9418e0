"""``sly place --dry-run``: what would be decided about a request that is not sent, and that asking leaves no trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.agent import Agent
from edge_agent.client import Client
from edge_agent.commands import place
from edge_agent.commands.limits import DATA, TIERS, TURN_MS
from edge_agent.core import wire
from edge_agent.core.cbor import encode
from edge_agent.core.chat import CHAT
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import MAX_TENSOR_BYTES, DataClass, InferenceRequest, Limits, Tensor, TrustTier
from edge_agent.gateway import terms
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.shell.door import SOCKET_NAME
from edge_agent.shell.imagined import NOT_SENT, imagined
from tests.fetched import model_path, picture_path
from tests.needs import needs, needs_module
from tests.scripted_speaker import TALK_OFFER, Parrot

WAIT_S = 60.0
BODY: dict[str, object] = {
    "task": "chat", "model": "", "size_bytes": 1000, "deadline_us": 10**7, "quality_permille": 0, "energy_uj": 0,
    "trust": "none", "data": "private", "session": "", "answer_tokens": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a real agent with two detectors and no broker."""
    models = ["blazeface-short", "blazeface-full"]
    for model in models:
        needs(model_path(model), "the model")
    with LocalFleet(tmp_path_factory.mktemp("place"), [Member("kitchen", "raspberry_pi_5")], models, 0) as fleet:
        fleet.start()
        yield fleet.socket_of("kitchen")


def asked(capsys: pytest.CaptureFixture[str], socket: Path, *arguments: object) -> Any:
    code = cli.main(["place", "--dry-run", "--socket", str(socket), *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


# at the terminal


def test_it_prints_every_option_and_why_the_first_would_win(capsys: pytest.CaptureFixture[str], socket: Path) -> None:
    picture = picture_path("grace_hopper")
    arguments = ["place", "--dry-run", "--socket", str(socket), "--task", "detect_faces", "--picture", str(picture)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "request class: detect_faces, 64 KiB, within 8.39 s" in said
    assert "-> kitchen/blazeface-short" in said and "\n   kitchen/blazeface-full" in said
    assert "chosen: kitchen/blazeface-short" in said and "no other board is left" in said


def test_what_is_sent_goes_where_it_was_said_to_go(capsys: pytest.CaptureFixture[str], socket: Path) -> None:
    picture = picture_path("grace_hopper")
    size_bytes = picture.stat().st_size
    would = asked(capsys, socket, "--task", "detect_faces", "--size-bytes", size_bytes)
    assert cli.main(["ask", "detect_faces", str(picture), "--socket", str(socket), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert would["why"]["chosen"] == f"{answer['board']}/{answer['model']}"
    assert cli.main(["explain", "last", "--socket", str(socket), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["request"] == answer["request"] and done["class"] == would["class"]
    assert [each["model"] for each in done["options"]] == [each["model"] for each in would["options"]]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (("--quality", 700), "quality 489 ‰ is under the request's floor of 700 ‰"),
        (("--energy-mj", 1), "over the request's 1000 µJ"),
        (("--trust", "affirming"), "the request asks for affirming"),
        (("--model", "blazeface-long"), "does not host blazeface-long"),
    ],
    ids=str,
)
def test_a_limit_shows_the_filter_that_excludes(
    capsys: pytest.CaptureFixture[str], socket: Path, limit: tuple[object, ...], reason: str
) -> None:
    report = asked(capsys, socket, "--task", "detect_faces", *limit)
    assert any(reason in each["reason"] for each in report["excluded"])


def test_where_nothing_may_serve_it_says_so(capsys: pytest.CaptureFixture[str], socket: Path) -> None:
    report = asked(capsys, socket, "--task", "classify")
    assert (report["options"], report["why"]["text"]) == ([], "nothing can be chosen: every option is excluded")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--task", "detect_faces"), "sly ask sends a picture"),
        (("--dry-run", "--task", "Read Minds"), "Read Minds"),
        (("--dry-run", "--task", "invoke"), "a model name"),
        (("--dry-run", "--task", "detect_faces", "--tokens", "9"), "--task chat"),
        (("--dry-run", "--task", "detect_faces", "--session", "a"), "--task chat"),
        (("--dry-run", "--task", "chat", "--session", "a b"), "session"),
        (("--dry-run", "--task", "chat", "--tokens=-1"), "answer_tokens"),
        (("--dry-run", "--task", "detect_faces", "--size-bytes=-1"), "size_bytes"),
        (("--dry-run", "--task", "detect_faces", f"--size-bytes={2**40}"), "size_bytes"),
        (("--dry-run", "--task", "detect_faces", "--deadline-ms", "0"), "deadline"),
        (("--dry-run", "--task", "detect_faces", "--trust", "blind"), "'blind'"),
        (("--dry-run", "--task", "detect_faces", "--data", "secret"), "'secret'"),
        (("--dry-run", "--task", "detect_faces", "--picture", "none.jpg"), "none.jpg"),
    ],
    ids=str,
)
def test_what_cannot_be_placed_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], socket: Path, arguments: tuple[str, ...], named: str
) -> None:
    try:
        code: object = cli.main(["place", "--socket", str(socket), *arguments])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert (code, said.out) == (cli.USAGE_ERROR, "")
    assert said.err.startswith("sly: ") and said.err.count("\n") == 1 and named in said.err


# the request that is not sent


def test_what_is_asked_about_is_the_request_that_would_be_sent() -> None:
    told = {"deadline_us": 5_000_000, "quality_permille": 700, "energy_uj": 9000, "trust": "affirming", "data": "local"}
    request = imagined(BODY | told | {"model": "parrot", "session": "talk", "answer_tokens": 99})
    turn = {"turn": Tensor("uint8", (1000,), bytes(1000))}
    limits = Limits(5_000_000, 9000, 700, TrustTier.AFFIRMING)
    assert request == InferenceRequest(NOT_SENT, "chat", turn, "parrot", limits, "talk", DataClass.LOCAL, 99)


@pytest.mark.parametrize(
    "change",
    [
        {"task": 7}, {"size_bytes": True}, {"size_bytes": MAX_TENSOR_BYTES + 1}, {"trust": "contraindicated"}, {"trust": "TOP"},
        {"data": "secret"}, {"deadline_us": 0}, {"energy_uj": -1}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_body_that_is_none_is_refused(change: Mapping[str, object]) -> None:
    with pytest.raises(RefusedError):
        imagined({**BODY, **change})
    with pytest.raises(RefusedError):
        imagined({name: value for name, value in BODY.items() if name not in change} | {"odd": 1})


def test_what_is_asked_is_as_the_protocol_says() -> None:
    needs_module("pycddl", "dev")
    from tests.test_protocol import is_a

    assert is_a("not-sent", encode(BODY))
    assert is_a("call", encode({0: 1, 1: "place", 2: BODY}))
    assert not is_a("not-sent", encode(BODY | {"data": "secret"}))


# talk


def test_a_turn_of_talk_is_placed_within_its_limits_and_explained(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        with pytest.raises(RefusedError, match="none was placed here yet"):
            await agent.verbs.handle("explain", "last")
        said = await asyncio.to_thread(talk, Limits(5_000_000, quality_permille=TALK_OFFER.quality_permille))
        report: Any = await agent.verbs.handle("explain", "last")
        assert (said, report["why"]["chosen"]) == ("", "kitchen/parrot")
        for limits, reason in (
            (Limits(quality_permille=TALK_OFFER.quality_permille + 1), "quality 700 ‰ is under the request's floor of 701 ‰"),
            (Limits(trust=TrustTier.AFFIRMING), "the request asks for affirming"),
        ):
            assert reason in await asyncio.to_thread(talk, limits)
            report = await agent.verbs.handle("explain", "last")
            assert [reason in each["reason"] for each in report["excluded"]] == [True]

    def talk(limits: Limits) -> str:
        """What was said against it."""
        with Client(tmp_path / SOCKET_NAME) as client:
            try:
                client.chat("hello", limits=limits, max_tokens=3).text()
            except RefusedError as error:
                return str(error)
        return ""

    in_agent(tmp_path, scene)


# no trace


def in_agent(folder: Path, scene: Callable[[Agent], Awaitable[None]]) -> None:
    async def play() -> None:
        config = {
            "board": {"id": "kitchen", "backend": "jalapeno"}, "state": {"folder": str(folder)},
            "models": {"releases": [TALK_OFFER.digest.hex()]},
        }  # fmt: skip
        async with asyncio.timeout(WAIT_S), Agent(AgentConfig.from_mapping(config), lambda text: None) as agent:
            agent.host_speaker(TALK_OFFER, Parrot())
            await scene(agent)

    asyncio.run(play())


def digest(agent: Agent, folder: Path) -> str:
    """Of all that the node holds, down to the last counter, and of every file of the board."""
    known: dict[int, int] = {}
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("**/*")) if path.is_file()}
    return sha256(f"{_plain(agent.node, known)}{files}".encode()).hexdigest()


def _plain(value: object, known: dict[int, int]) -> object:
    if isinstance(value, int | str | bytes | float | None):
        return repr(value)
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = len(known)
    if isinstance(value, Mapping):
        return [(_plain(key, known), _plain(item, known)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        return [_plain(item, known) for item in value]  # type: ignore[attr-defined]
    names = [*getattr(value, "__dict__", {}), *(name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))]
    if not names or callable(value):
        return repr(value)
    return [(name, _plain(getattr(value, name, None), known)) for name in names]


def test_asking_leaves_no_trace_and_sending_does(tmp_path: Path) -> None:
    """A dry run suspends nowhere, so nothing else can happen between the two looks."""

    async def scene(agent: Agent) -> None:
        before = digest(agent, tmp_path)
        for change in ({}, {"session": "talk"}, {"task": "detect_faces"}, {"data": "local", "answer_tokens": 64}):
            report: Any = await agent.verbs.handle("place", BODY | change)
            assert digest(agent, tmp_path) == before
            assert bool(report["options"]) == (change.get("task", "chat") == "chat")
        assert not agent.node.decisions
        with pytest.raises(RefusedError):
            await agent.verbs.handle("place", BODY | {"data": "secret"})
        assert digest(agent, tmp_path) == before
        await agent.verbs.handle("infer", wire.encode_request(imagined(BODY | {"task": "classify"}), wire.LOCAL))
        assert digest(agent, tmp_path) != before, "what is sent is seen by the same look"

    in_agent(tmp_path, scene)


def test_a_board_that_would_not_take_it_says_so_without_hiding_the_options(tmp_path: Path) -> None:
    async def scene(agent: Agent) -> None:
        report: Any = await agent.verbs.handle("place", BODY)
        assert (report["refused"], report["request"]) == ("", "")
        agent.node._inbound.draining = True
        report = await agent.verbs.handle("place", BODY)
        assert report["refused"] == "kitchen is being stopped" and report["options"]

    in_agent(tmp_path, scene)


def test_the_command_line_knows_the_words_and_defaults_that_it_does_not_import() -> None:
    assert tuple(DataClass) == DATA and tuple(terms.TIERS) == TIERS
    assert TURN_MS * 1000 == terms.TALK_DEADLINE_US and place.CHAT == CHAT
