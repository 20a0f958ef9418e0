"""Pipelines: what is no pipeline, the run as a machine without I/O over drawn graphs, and a real one on two boards."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent import cli
from edge_agent.attest.appraisal import open_appraisal
from edge_agent.attest.audit import Anchors, verify
from edge_agent.attest.evidence import open_quote
from edge_agent.attest.proof import decode_proof
from edge_agent.client import Client
from edge_agent.commands.terminal import WIDTH
from edge_agent.core.chat import CHAT, TURN, Finish, Turn, TurnEnd
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import DataClass, InferenceRequest, InferenceResult, Limits, Status, Tensor, TrustTier, failure
from edge_agent.local_fleet import LocalFleet, Member
from edge_agent.node.trust_report import evidence_of
from edge_agent.pipelines import MAX_AT_ONCE, Evidence, PipelineResult, drive, offered_by
from edge_agent.runtime.pipeline import MAX_FAN_OUT, MAX_STAGES, Gate, Kind, Pipeline, Reference, Stage
from edge_agent.runtime.pipeline_file import (
    MAX_PIPELINE_BYTES,
    pipeline_from_mapping,
    pipeline_from_toml,
    pipeline_named,
    read_pipeline,
    shipped,
)
from edge_agent.runtime.pipeline_run import Run
from edge_agent.runtime.ports import check, forms
from edge_agent.runtime.stage_progress import StageState
from models.catalog import catalog
from tests.attesting import EPOCH_US, AttestingFleet
from tests.attesting import run as run_attesting
from tests.brokers import Mosquitto
from tests.fetched import model_path, picture_path
from tests.virtual_board import offer

S = 1_000_000
FACES: dict[str, Any] = {"name": "faces", "task": "detect_faces", "inputs": {"image": "picture"}}
POINTS: dict[str, Any] = {
    "name": "points", "task": "face_landmarks", "for_each": "faces.boxes", "inputs": {"image": "picture", "region": "item"},
}  # fmt: skip
SEEN: dict[str, Any] = {"name": "seen", "task": "spot_person", "inputs": {"image": "picture"}}
SAID: dict[str, Any] = {
    "name": "said", "task": "chat", "prompt": "At the {place} a {seen.label}: {seen.score} %, {points.count} of {faces.count}.",
    "when": {"stage": "seen", "label": "person", "at_least": 0.6},
}  # fmt: skip
BASE: dict[str, Any] = {
    "name": "door", "inputs": {"picture": "picture", "place": "text"}, "results": ["said"],
    "stage": [FACES, POINTS | {"at_most": 8}, SEEN, SAID], "limits": {"deadline_ms": 9000},
}  # fmt: skip


def changed(path: str, value: object) -> dict[str, Any]:
    """``BASE`` with one value put in, or taken out when it is ``...``; stages are named by their place."""
    mapping: Any = deepcopy(BASE)
    *parents, last = path.split("/")
    place: Any = mapping
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    if value is ...:
        del place[last]
    elif last == "+":
        place.append(value)
    else:
        place[int(last) if last.isdigit() else last] = value
    return dict(mapping)


def door(**changes: object) -> Pipeline:
    return pipeline_from_mapping(BASE | changes)


# ---- what is no pipeline


def test_the_base_of_these_tests_is_a_pipeline() -> None:
    pipeline = door()
    assert [stage.name for stage in pipeline.order] == ["faces", "seen", "points", "said"]
    assert pipeline.depths == {"faces": 3, "points": 2, "seen": 2, "said": 1}
    assert set(check(pipeline)) == {"faces", "points", "seen", "said"}
    assert pipeline.limits.deadline_us == 9 * S and pipeline.data is DataClass.PRIVATE


BROKEN: list[tuple[str, object, str]] = [
    ("name", "Door!", "pipeline name: got 'Door!'"),
    ("name", ..., "pipeline: got no name"),
    ("extra", 1, "pipeline: got unknown key extra"),
    ("summary", "two\nlines", "summary"),
    ("inputs", {}, "pipeline door, inputs: got 0"),
    ("inputs", [], "pipeline, inputs: got .*allowed: a table"),
    ("inputs/picture", "video", "pipeline input picture: got 'video'; allowed: picture, text"),
    ("inputs/Bad", "text", "pipeline input: got 'Bad'"),
    ("inputs/item", "text", "the name item"),
    ("inputs/data", "text", "the name data"),
    ("inputs/faces", "text", "pipeline door: got two things named faces"),
    ("inputs/idle", "text", "input idle: got nobody uses it"),
    ("stage", [], "stages: got 0"),
    ("stage/+", FACES, "pipeline door: got two things named faces"),
    ("stage/+", FACES | {"name": "unused"}, "stage unused: got nobody uses it"),
    ("stage/+", 7, "stage 5: got 7; allowed: a table"),
    ("stage/0/name", "Faces", "stage name: got 'Faces'"),
    ("stage/0/name", ..., "stage 1: got no name"),
    ("stage/0/colour", "red", "stage faces: got unknown key colour"),
    ("stage/0/task", "read_minds", "stage faces: got unknown task read_minds; allowed: chat, classify, detect_faces"),
    ("stage/0/task", "invoke", "stage faces: got unknown task invoke"),
    ("stage/0/task", "Detect", "stage faces, task"),
    ("stage/0/task", ..., "stage faces: got no task"),
    ("stage/0/task", 3, "stage faces, task: got 3; allowed: text"),
    ("stage/0/model", "yolo", "stage faces: got unknown model yolo; allowed: blazeface-back"),
    ("stage/0/model", "resnet8-cifar10", "stage faces: got model resnet8-cifar10, which does classify; allowed: blazeface"),
    ("stage/3/model", "gpt-9", "stage said: got unknown model gpt-9; allowed: smollm2"),
    ("stage/0/model", "No Model", "stage faces, model"),
    ("stage/0/inputs", {}, "stage faces: got no input image; allowed: image = where its picture comes from"),
    ("stage/0/inputs/sound", "picture", "stage faces, input sound: got unknown input of detect_faces; allowed: image, region"),
    ("stage/0/inputs/image", "photo", "stage faces, input image: got unknown input photo; allowed: picture, place, faces.OUTPUT"),
    ("stage/0/inputs/image", "place", "stage faces, input image: got place, which is text; allowed: picture"),
    ("stage/0/inputs/image", 5, "stage faces, input image: got 5"),
    ("stage/0/inputs/image", "a.b.c", "stage faces, input image: got 'a.b.c'"),
    ("stage/0/inputs/region", "item", "stage faces, input region: got item; .*without for_each"),
    ("stage/0/inputs/region", "seen.scores", "stage faces, input region: got seen.scores, which is scores; allowed: box"),
    ("stage/1/inputs/region", "faces.boxes", "stage points, for_each: got no input that takes the item"),
    ("stage/1/inputs/image", "item", "stage points, input image: got item, which is box; allowed: picture"),
    ("stage/1/inputs/image", "nose.boxes", "stage points, input image: got unknown stage nose; allowed: faces, points"),
    ("stage/1/inputs/image", "faces.noses", "stage points, input image: got unknown output faces.noses; allowed: faces.labels"),
    ("stage/1/for_each", "nose.boxes", "stage points, for_each: got unknown stage nose"),
    ("stage/1/for_each", "faces.noses", "stage points, for_each: got unknown output faces.noses"),
    ("stage/1/for_each", "faces.scores", "stage points, for_each: got faces.scores, which is scores; allowed: boxes"),
    ("stage/1/for_each", "faces", "stage points, for_each: got faces; allowed: STAGE.OUTPUT"),
    ("stage/1/for_each", "said.text", "a cycle: "),
    ("stage/1/for_each", "points.points", "pipeline door: got a cycle: points -> points"),
    ("stage/1/at_most", 0, "stage points, at_most"),
    ("stage/1/at_most", MAX_FAN_OUT + 1, "stage points, at_most: got 33; allowed: a whole number from 1 to 32 items"),
    ("stage/1/at_most", 15, "stage said: got what up to 17 requests say; allowed: at most 16; lower at_most"),
    ("stage/1/prompt", "Hello", "stage points: got a prompt; allowed: none"),
    ("stage/1/quality", 1001, "stage points, quality"),
    ("stage/1/at_most", True, "stage points, at_most: got True; allowed: a whole number"),
    ("stage/2/task", "chat", "stage seen, input image: got unknown input of chat"),
    ("stage/3/prompt", "x" * 4097, "stage said, prompt"),
    ("stage/3/prompt", "{seen.colour} {place} {points.count}", "prompt: got unknown blank {seen.colour}; allowed: {seen.label}"),
    ("stage/3/prompt", "{seen.text} {place} {points.count}", "prompt: got unknown blank {seen.text}"),
    ("stage/3/prompt", "{picture} {place} {points.count}", "stage said, prompt: got {picture}, which is picture; allowed: text"),
    ("stage/3/prompt", "{nobody.label}", "stage said, prompt: got unknown stage nobody"),
    ("stage/3/prompt", "{weather}", "stage said, prompt: got unknown input weather"),
    ("stage/3/prompt", "{place!r}", "stage said, prompt: got {place} has a format"),
    ("stage/3/prompt", "{place:>9}", "stage said, prompt: got {place} has a format"),
    ("stage/3/prompt", "{place", "stage said, prompt: got .*expected"),
    ("stage/3/prompt", "{place.__class__.__mro__}", "stage said, prompt"),
    ("stage/3/prompt", "{0}", "stage said, prompt: got '0'"),
    ("stage/3/prompt", "{}", "stage said, prompt: got ''"),
    ("stage/3/prompt", "{said.text} {place} {points.count}", "pipeline door: got a cycle: said -> said"),
    ("stage/3/max_tokens", 0, "stage said, max_tokens"),
    ("stage/3/inputs", {"image": "picture"}, "stage said, input image: got unknown input of chat; allowed: none"),
    ("stage/3/for_each", "faces.boxes", "stage said, for_each: got no input that takes the item"),
    ("stage/3/when/stage", "nobody", "stage said, when: got unknown stage nobody"),
    ("stage/3/when/label", "cat", "stage said, when: got unknown label cat; allowed: person, no person"),
    ("stage/3/when/at_least", 1.5, "stage said, when, at_least: got 1.5; allowed: a score from 0 to 1"),
    ("stage/3/when/at_least", float("nan"), "stage said, when, at_least"),
    ("stage/3/when/at_least", "much", "stage said, when, at_least: got 'much'; allowed: a number"),
    ("stage/3/when/at_least", ..., "stage said, when: got no at_least"),
    ("stage/3/when/more", 1, "stage said, when: got unknown key more"),
    ("results", [], "pipeline door, results"),
    ("results", ["said", "said"], "pipeline door, results: .* each once"),
    ("results", ["nobody"], "pipeline door, results: got unknown stage nobody"),
    ("results", [1], "pipeline results"),
    ("results", ["faces"], "stage points: got nobody uses it"),
    ("limits/deadline_ms", 0, "limit deadline_us"),
    ("limits/energy_mj", 0, "limit energy_uj"),
    ("limits/trust", "contraindicated", "limits trust: got contraindicated; allowed: none, warning, affirming"),
    ("limits/data", "secret", "limits data: got secret; allowed: public, private, local"),
    ("limits/speed", 9, "limits: got unknown key speed"),
]


@pytest.mark.parametrize(("path", "value", "told"), BROKEN, ids=[f"{path}={str(value)[:24]}" for path, value, _ in BROKEN])
def test_a_pipeline_that_breaks_a_rule_is_refused_with_one_error(path: str, value: object, told: str) -> None:
    with pytest.raises(RefusedError, match=told.replace("{", r"\{").replace("}", r"\}")):
        check(pipeline_from_mapping(changed(path, value)))


def test_a_cycle_is_named_by_its_stages() -> None:
    ring = [{"name": f"s{n}", "task": "chat", "prompt": f"{{s{(n + 1) % 3}.text}} {{ask}}"} for n in range(3)]
    with pytest.raises(RefusedError, match="a cycle: s. -> s. -> s. -> s."):
        pipeline_from_mapping({"name": "ring", "inputs": {"ask": "text"}, "stage": ring, "results": ["s0"]})


def test_a_stage_that_talks_must_have_something_to_say() -> None:
    mute = {"name": "mute", "task": "chat", "when": {"stage": "seen", "label": "person", "at_least": 0}}
    with pytest.raises(RefusedError, match="stage mute: got no prompt; allowed: a prompt"):
        check(pipeline_from_mapping({"name": "m", "inputs": {"picture": "picture"}, "stage": [SEEN, mute], "results": ["mute"]}))


def test_too_many_stages_and_inputs_are_refused() -> None:
    chain = [{"name": "s0", "task": "chat", "prompt": "{ask}"}]
    chain += [{"name": f"s{n}", "task": "chat", "prompt": f"{{s{n - 1}.text}}"} for n in range(1, MAX_STAGES + 1)]
    mapping = {"name": "chain", "inputs": {"ask": "text"}, "stage": chain, "results": [f"s{MAX_STAGES}"]}
    with pytest.raises(RefusedError, match="stages: got 17"):
        pipeline_from_mapping(mapping)
    fits = pipeline_from_mapping(mapping | {"stage": chain[:-1], "results": [f"s{MAX_STAGES - 1}"]})
    assert fits.depths["s0"] == MAX_STAGES and check(fits)
    with pytest.raises(RefusedError, match="inputs: got 17"):
        door(inputs={f"i{n}": "text" for n in range(17)})


def test_with_what_boards_offer_every_stage_must_have_a_model() -> None:
    everything = {"blazeface-full", "face-landmark", "mobilenet-vww", "smollm2"}
    assert check(door(), everything)
    for missing, stage in (
        ("blazeface-full", "faces"),
        ("face-landmark", "points"),
        ("mobilenet-vww", "seen"),
        ("smollm2", "said"),
    ):
        with pytest.raises(RefusedError, match=f"stage {stage}: got no board offers"):
            check(door(), everything - {missing})
    pinned = pipeline_from_mapping(changed("stage/0/model", "blazeface-short"))
    with pytest.raises(RefusedError, match="stage faces: got no board offers blazeface-short; allowed: blazeface-full"):
        check(pinned, everything)
    assert check(pinned)
    own = pipeline_from_mapping(changed("stage/3/model", "my-own-model"))
    assert check(own, everything | {"my-own-model"}), "what no card tells of, but a board offers, is a language model"


def test_every_task_of_the_catalog_and_talk_have_a_form() -> None:
    assert set(forms()) == {card.task for card in catalog().values()} | {CHAT}
    assert dict(forms()["detect_faces"].gives) == {
        "labels": "labels",
        "scores": "scores",
        "boxes": "boxes",
        "keypoints": "points",
    }
    assert dict(forms()["face_landmarks"].gives) == {"labels": "labels", "scores": "scores", "points": "points"}
    assert dict(forms()["classify"].gives) == {"labels": "labels", "scores": "scores"}


def test_a_file_that_is_no_pipeline_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "door.toml"
    with pytest.raises(UnavailableError, match="name a file, or one of: faces-to-landmarks"):
        read_pipeline(path)
    for data, told in (
        (b"name = ", "TOML"),
        (b"\xff\xfe", "UTF-8"),
        (b"name = 'x'", "got no inputs"),
        (b"a" * 99_999, "at most"),
    ):
        path.write_bytes(data)
        with pytest.raises(RefusedError, match="door.toml.*" + told):
            read_pipeline(path)
    assert MAX_PIPELINE_BYTES < 99_999
    with pytest.raises(RefusedError, match="a TOML document"):
        pipeline_from_toml("[[")


@pytest.mark.parametrize("name", shipped())
def test_a_pipeline_that_comes_with_the_product_is_one_and_lies_under_its_name(name: str) -> None:
    pipeline = pipeline_named(name)
    assert pipeline.name == name and pipeline.summary
    check(pipeline)


# ---- the run


def tensor(dtype: str, shape: tuple[int, ...], numbers: list[float]) -> Tensor:
    return Tensor(dtype, shape, struct.pack(f"<{len(numbers)}{'f' if dtype == 'float32' else 'i'}", *numbers))


def boxes(*rows: tuple[float, float, float, float], scores: list[float] | None = None) -> dict[str, Tensor]:
    count = len(rows)
    return {
        "boxes": tensor("float32", (count, 4), [edge for row in rows for edge in row]),
        "scores": tensor("float32", (count,), scores or [0.9] * count),
        "labels": tensor("int32", (count,), [0] * count),
    }


def classes(*pairs: tuple[int, float]) -> dict[str, Tensor]:
    count = len(pairs)
    labels, scores = [label for label, _ in pairs], [score for _, score in pairs]
    return {"labels": tensor("int32", (count,), list(labels)), "scores": tensor("float32", (count,), scores)}


def said(text: str) -> dict[str, Tensor]:
    end = TurnEnd(text, Finish.STOP, 1, 0, 1).encode()
    return {TURN: Tensor("uint8", (len(end),), end)}


def ok(request: InferenceRequest, outputs: dict[str, Tensor], *, receipt: bytes | None = None, uj: int = 0) -> InferenceResult:
    """An OK answer; its receipt is some bytes that are its own."""
    signed = f"receipt of {request.request_id}".encode() if receipt is None else receipt
    return InferenceResult(request.request_id, Status.OK, "pi", "m", bytes(32), outputs, energy_uj=uj, receipt=signed)


def digest(request: InferenceRequest) -> bytes:
    """Of the receipt that ``ok`` makes."""
    return sha256(f"receipt of {request.request_id}".encode()).digest()


def ids() -> Callable[[], str]:
    numbers = iter(range(10**6))
    return lambda: f"{next(numbers):032x}"


GIVEN: dict[str, bytes | str] = {"picture": b"a picture", "place": "front door"}
BOX, OTHER = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)


def begun(pipeline: Pipeline | None = None, **settings: Any) -> tuple[Run, dict[str, InferenceRequest]]:
    """A run and its first requests by their task."""
    run = Run(pipeline or door(), GIVEN, 0, new_id=ids(), **settings)
    return run, {request.task: request for request in run.ready(0)}


def test_a_run_goes_from_picture_to_sentence_and_each_request_names_the_receipts_it_came_from() -> None:
    run, first = begun()
    assert set(first) == {"detect_faces", "spot_person"}, "what depends on nothing goes out at once"
    assert all(request.parents == () for request in first.values())
    assert dict(first["detect_faces"].inputs) == {"image": Tensor("uint8", (9,), b"a picture")}
    run.answered(ok(first["detect_faces"], boxes(BOX, OTHER)))
    points = run.ready(0)
    assert [struct.unpack("<4f", each.inputs["region"].data) for each in points] == [BOX, OTHER]
    assert all(each.parents == (digest(first["detect_faces"]),) and each.task == "face_landmarks" for each in points)
    run.answered(ok(first["spot_person"], classes((0, 0.875), (1, 0.125))))
    assert run.ready(0) == (), "the sentence waits for the points"
    run.answered(ok(points[1], classes((0, 0.75))))
    assert run.ready(0) == ()
    run.answered(ok(points[0], classes((0, 0.75))))
    (talk,) = run.ready(0)
    assert Turn.decode(talk.inputs[TURN].data).messages[0].content == "At the front door a person: 88 %, 2 of 2."
    assert set(talk.parents) == {digest(each) for each in (*first.values(), *points)}
    assert not run.done
    run.answered(ok(talk, said("Someone is at the door.")))
    assert run.done and run.ready(0) == ()
    outcomes = run.outcomes
    assert {each.state for each in outcomes.values()} == {StageState.DONE}
    assert [answer.result.request_id for answer in outcomes["points"].answers] == [each.request_id for each in points]
    assert outcomes["said"].answers[0].found is not None and outcomes["said"].answers[0].found.text == "Someone is at the door."


def test_a_gate_that_stays_shut_skips_what_is_behind_it_and_says_what_was_seen() -> None:
    run, first = begun()
    run.answered(ok(first["detect_faces"], boxes()))
    run.answered(ok(first["spot_person"], classes((1, 0.75), (0, 0.25))))
    assert run.ready(0) == () and run.done
    outcome = run.outcomes["said"]
    assert (outcome.state, outcome.reason) == (StageState.SKIPPED, "seen found person 0.25, 0.60 is asked for")
    assert run.outcomes["points"].state is StageState.DONE, "no items is no failure"
    assert run.outcomes["points"].reason == "no faces.boxes"


@pytest.mark.parametrize(("score", "opens"), [(0.599, False), (0.6001, True), (1.0, True), (0.0, False)])
def test_a_gate_opens_at_its_score_and_not_before(score: float, opens: bool) -> None:
    run, first = begun()
    run.answered(ok(first["detect_faces"], boxes()))
    run.answered(ok(first["spot_person"], classes((0, score))))
    assert bool(run.ready(0)) is opens


def test_a_gate_of_nothing_found_is_shut_whatever_it_asks_for() -> None:
    open_gate = pipeline_from_mapping(changed("stage/3/when/at_least", 0))
    run, first = begun(open_gate)
    run.answered(ok(first["detect_faces"], boxes()))
    run.answered(ok(first["spot_person"], classes((1, 0.9))))
    assert run.ready(0) == () and run.outcomes["said"].reason == "seen found no person, 0.00 is asked for"


def test_what_is_behind_a_shut_gate_is_told_of_the_gate() -> None:
    echo = {"name": "echo", "task": "chat", "prompt": "{said.text}"}
    told = door(stage=[*BASE["stage"], echo], results=["echo"])
    run, first = begun(told)
    run.answered(ok(first["detect_faces"], boxes()))
    run.answered(ok(first["spot_person"], classes((1, 0.75))))
    assert run.ready(0) == () and run.done
    assert run.outcomes["echo"].reason == "stage said skipped: seen found no person, 0.60 is asked for"


def test_an_item_of_a_stage_with_items_names_the_receipt_of_its_own_run_alone() -> None:
    closer = {"name": "closer", "task": "detect_faces", "for_each": "faces.boxes", "inputs": POINTS["inputs"]}
    points = POINTS | {"for_each": "closer.boxes"}
    told = {"name": "closer", "inputs": {"picture": "picture"}, "results": ["points"], "stage": [FACES, closer, points]}
    run = Run(pipeline_from_mapping(told), {"picture": b"x"}, 0, new_id=ids())
    (wide,) = run.ready(0)
    run.answered(ok(wide, boxes(BOX, OTHER)))
    one, other = run.ready(0)
    run.answered(ok(other, boxes(OTHER)))
    run.answered(ok(one, boxes(BOX, BOX)))
    last = run.ready(0)
    assert [each.parents for each in last] == [(digest(one),), (digest(one),), (digest(other),)]
    assert [struct.unpack("<4f", each.inputs["region"].data) for each in last] == [BOX, BOX, OTHER]


def test_an_empty_fan_out_hands_on_the_receipt_that_said_there_is_nothing() -> None:
    run, first = begun(pipeline_from_mapping(changed("stage/3/prompt", "{place} {points.count} of {points.count}")))
    run.answered(ok(first["detect_faces"], boxes()))
    run.answered(ok(first["spot_person"], classes((0, 0.9))))
    (talk,) = run.ready(0)
    assert "0 of 0" in Turn.decode(talk.inputs[TURN].data).messages[0].content
    assert set(talk.parents) == {digest(each) for each in first.values()}


def test_more_items_than_at_most_are_left_out_and_told() -> None:
    run, first = begun()
    rows = [(float(n), 0.0, n + 1.0, 1.0) for n in range(11)]
    run.answered(ok(first["detect_faces"], boxes(*rows)))
    requests = run.ready(0)
    assert [struct.unpack("<4f", each.inputs["region"].data) for each in requests] == rows[:8], "the best ones, in order"
    assert run.outcomes["points"].left_out == 3


@pytest.mark.parametrize("status", [Status.FAILED, Status.REFUSED, Status.SHED])
def test_a_stage_that_fails_is_named_and_what_needs_it_is_skipped_with_the_reason(status: Status) -> None:
    run, first = begun()
    run.answered(failure(first["detect_faces"].request_id, status, "pi", "the roof fell in"))
    assert run.ready(0) == ()
    assert not run.done, "what is in flight is waited for"
    run.answered(ok(first["spot_person"], classes((0, 0.9))))
    assert run.ready(0) == () and run.done
    told = {name: (outcome.state, outcome.reason) for name, outcome in run.outcomes.items()}
    assert told["faces"] == (StageState.FAILED, "pi: the roof fell in")
    assert told["points"] == (StageState.SKIPPED, "stage faces failed: pi: the roof fell in")
    assert told["said"] == (StageState.SKIPPED, "stage faces failed: pi: the roof fell in")
    assert told["seen"] == (StageState.DONE, "")


def test_one_item_that_fails_fails_its_stage_and_the_others_answers_are_kept() -> None:
    run, first = begun()
    run.answered(ok(first["detect_faces"], boxes(BOX, OTHER)))
    one, other = run.ready(0)
    run.lost(one.request_id, "no agent answers")
    assert not run.done
    run.answered(ok(other, classes((0, 0.9))))
    outcome = run.outcomes["points"]
    assert (outcome.state, outcome.reason) == (StageState.FAILED, "no agent answers")
    assert [answer.result.request_id for answer in outcome.answers] == [other.request_id]


BAD_ANSWERS: dict[str, dict[str, Tensor]] = {
    "nothing": {},
    "no scores": {"boxes": boxes(BOX)["boxes"], "labels": boxes(BOX)["labels"]},
    "one box too few": boxes(BOX, OTHER) | {"boxes": boxes(BOX)["boxes"]},
    "boxes in a row": boxes(BOX) | {"boxes": tensor("float32", (4,), list(BOX))},
    "boxes of five": boxes(BOX) | {"boxes": tensor("float32", (1, 5), [*BOX, 1])},
    "whole boxes": boxes(BOX) | {"boxes": tensor("int32", (1, 4), [1, 2, 3, 4])},
    "NaN": boxes(BOX) | {"boxes": tensor("float32", (1, 4), [1, 2, float("nan"), 4])},
    "an infinite score": boxes(BOX) | {"scores": tensor("float32", (1,), [float("inf")])},
    "an unknown label": boxes(BOX) | {"labels": tensor("int32", (1,), [1])},
    "a label below": boxes(BOX) | {"labels": tensor("int32", (1,), [-1])},
}


@pytest.mark.parametrize("what", list(BAD_ANSWERS))
def test_an_answer_that_is_not_of_its_task_s_form_fails_the_stage(what: str) -> None:
    run, first = begun()
    run.answered(ok(first["detect_faces"], BAD_ANSWERS[what]))
    outcome = run.outcomes["faces"]
    assert outcome.state is StageState.FAILED and outcome.reason.startswith("answer of pi")
    assert outcome.answers[0].found is None


def test_a_talk_s_answer_that_is_no_turn_fails_the_stage() -> None:
    for outputs in ({}, {TURN: tensor("float32", (1,), [1])}, {TURN: Tensor("uint8", (1,), b"\xff")}):
        run = Run(pipeline_from_mapping(ASKING), {"ask": "hm"}, 0)
        (request,) = run.ready(0)
        run.answered(ok(request, outputs))
        assert run.outcomes["reply"].state is StageState.FAILED


ASKING: dict[str, Any] = {
    "name": "asking", "inputs": {"ask": "text"}, "results": ["reply"],
    "stage": [{"name": "reply", "task": "chat", "prompt": "{{{ask}}}", "max_tokens": 7, "model": "smollm2"}],
}  # fmt: skip


def test_a_text_goes_into_a_prompt_as_it_is_and_is_not_read_as_a_template() -> None:
    run = Run(pipeline_from_mapping(ASKING), {"ask": "{seen.label} {0} {{"}, 0)
    (request,) = run.ready(0)
    turn = Turn.decode(request.inputs[TURN].data)
    assert turn.messages[0].content == "{{seen.label} {0} {{}"
    assert (turn.max_tokens, request.answer_tokens, request.model) == (7, 7, "smollm2")


def test_a_result_that_nothing_waits_for_is_refused_and_changes_nothing() -> None:
    run, first = begun()
    answer = ok(first["detect_faces"], boxes())
    run.answered(answer)
    before = run.outcomes
    for late in (answer, replace(answer, request_id="f" * 32)):
        with pytest.raises(RefusedError, match="the one result of a request of this run"):
            run.answered(late)
        with pytest.raises(RefusedError, match="the one result of a request of this run"):
            run.lost(late.request_id, "")
    assert run.outcomes == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"picture": b"x"}, "no input place; allowed: place = a text"),
        (GIVEN | {"sound": b"x"}, "input sound: got unknown to pipeline door; allowed: picture, place"),
        (GIVEN | {"picture": "a path"}, "input picture: got text; allowed: the bytes of a JPEG or PNG"),
        (GIVEN | {"place": b"x"}, "input place: got bytes; allowed: text"),
        (GIVEN | {"place": "x" * 65_537}, "input place, length"),
    ],
)
def test_inputs_that_are_not_the_pipeline_s_are_refused(given: Any, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        Run(door(), given, 0)


# ---- limits


def test_the_time_that_is_left_is_divided_by_the_stages_still_ahead() -> None:
    run, first = begun()
    assert first["detect_faces"].limits.deadline_us == 3 * S, "nine seconds, three stages on the longest way"
    assert first["spot_person"].limits.deadline_us == 9 * S // 2
    run.answered(ok(first["detect_faces"], boxes(BOX)))
    (point,) = run.ready(1 * S)
    assert point.limits.deadline_us == 4 * S
    run.answered(ok(point, classes((0, 0.9))))
    run.answered(ok(first["spot_person"], classes((0, 0.9))))
    (talk,) = run.ready(2 * S)
    assert talk.limits.deadline_us == 7 * S, "the last stage has all that is left"


def test_a_stage_that_comes_after_the_deadline_fails_without_a_request() -> None:
    run, first = begun()
    run.answered(ok(first["detect_faces"], boxes(BOX)))
    assert run.ready(9 * S) == ()
    assert run.outcomes["points"].state is StageState.FAILED
    assert "deadline of 9000 ms: got it is over" in run.outcomes["points"].reason


def test_trust_data_and_quality_hold_for_every_stage() -> None:
    limits = Limits(5 * S, None, 500, TrustTier.WARNING)
    told = pipeline_from_mapping(changed("stage/0/quality", 700))
    run, first = begun(told, limits=limits, data=DataClass.LOCAL)
    run.answered(ok(first["detect_faces"], boxes(BOX)))
    for request in (*first.values(), *run.ready(0)):
        assert (request.limits.trust, request.data) == (TrustTier.WARNING, DataClass.LOCAL)
        assert request.limits.quality_permille == (700 if request.task == "detect_faces" else 500)


def test_the_limits_of_the_file_hold_if_no_others_are_given() -> None:
    limits = {"deadline_ms": 1500, "energy_mj": 70, "quality": 10, "trust": "affirming", "data": "public"}
    told = pipeline_from_mapping(BASE | {"limits": limits})
    assert (told.limits, told.data) == (Limits(1_500_000, 70_000, 10, TrustTier.AFFIRMING), DataClass.PUBLIC)
    _, first = begun(told)
    assert {request.data for request in first.values()} == {DataClass.PUBLIC}


def test_the_energy_granted_and_spent_never_passes_the_ceiling() -> None:
    run, first = begun(limits=Limits(9 * S, 1000))
    assert first["detect_faces"].limits.energy_uj == 250, "four stages to come, a quarter each"
    assert first["spot_person"].limits.energy_uj == 250
    run.answered(ok(first["detect_faces"], boxes(BOX, OTHER), uj=100))
    points = run.ready(0)
    assert [each.limits.energy_uj for each in points] == [216, 216], "(1000 - 100 - 250 in flight) / (2 + the one to come)"
    for each in points:
        run.answered(ok(each, classes((0, 0.9)), uj=216))
    run.answered(ok(first["spot_person"], classes((0, 0.9)), uj=468))
    assert run.ready(0) == ()
    assert run.outcomes["said"].state is StageState.FAILED and "energy" in run.outcomes["said"].reason


# ---- any graph at all


@st.composite
def graphs(draw: st.DrawFn) -> Pipeline:
    """Stages that talk, each after any of those before it, in any order in the file."""
    count = draw(st.integers(1, 9))
    stages = list[Stage]()
    for number in range(count):
        after = draw(st.sets(st.integers(0, number - 1), max_size=4)) if number else set()
        words = " ".join(f"{{s{each}.text}}" for each in sorted(after)) or "{ask}"
        stages.append(Stage(f"s{number}", CHAT, prompt=words))
    used = {reference.name for stage in stages for reference in stage.references}
    ends = tuple(stage.name for stage in stages if stage.name not in used)
    return Pipeline("drawn", {"ask": Kind.TEXT}, tuple(draw(st.permutations(stages))), ends)


@given(graphs(), st.randoms(use_true_random=False), st.sets(st.integers(0, 8), max_size=3))
@settings(max_examples=150, deadline=None)
def test_in_any_graph_a_stage_runs_once_after_all_it_needs_and_is_skipped_if_one_of_them_failed(
    pipeline: Pipeline, random: Any, faulty: set[int]
) -> None:
    run, now_us, waiting = Run(pipeline, {"ask": "?"}, 0, new_id=ids()), 0, list[InferenceRequest]()
    asked, answered = dict[str, InferenceRequest](), dict[str, InferenceRequest]()
    deadlines = list[int]()
    while not run.done:
        for request in run.ready(now_us):
            name = next(name for name, each in run.outcomes.items() if each.state is StageState.RUNNING and name not in asked)
            upstream = pipeline.upstream(pipeline.by_name[name])
            assert set(upstream) <= set(answered), "everything upstream has answered"
            assert set(request.parents) == {digest(answered[each]) for each in upstream}
            asked[name] = request
            waiting.append(request)
            deadlines.append(now_us + request.limits.deadline_us)
        if not waiting:
            continue
        request = waiting.pop(random.randrange(len(waiting)))
        name = next(name for name, each in asked.items() if each is request)
        now_us += 1000
        if int(name[1:]) in faulty:
            run.answered(failure(request.request_id, Status.FAILED, "pi", "no"))
        else:
            answered[name] = request
            run.answered(ok(request, said(name)))
    assert max(deadlines, default=0) <= pipeline.limits.deadline_us
    broken = {name for name in asked if int(name[1:]) in faulty}
    for stage in pipeline.order:
        if any(name in broken for name in pipeline.upstream(stage)):
            broken.add(stage.name)
        state = run.outcomes[stage.name].state
        failed = stage.name in asked and int(stage.name[1:]) in faulty
        wanted = StageState.FAILED if failed else StageState.SKIPPED if stage.name in broken else StageState.DONE
        assert state is wanted
        assert bool(run.outcomes[stage.name].reason) is (state is not StageState.DONE)


@given(graphs(), st.data())
@settings(max_examples=60, deadline=None)
def test_an_edge_back_is_always_found_as_a_cycle(pipeline: Pipeline, data: st.DataObject) -> None:
    chained = [stage for stage in pipeline.stages if pipeline.upstream(stage)]
    if chained:
        late = data.draw(st.sampled_from(chained))
        early = pipeline.by_name[data.draw(st.sampled_from(pipeline.upstream(late)))]
        turned = replace(early, prompt=f"{early.prompt} {{{late.name}.text}}")
        stages = tuple(turned if stage is early else stage for stage in pipeline.stages)
        with pytest.raises(RefusedError, match="a cycle: "):
            Pipeline("turned", pipeline.inputs, stages, pipeline.results)


def test_the_values_are_what_a_file_says() -> None:
    said_stage = door().by_name["said"]
    assert said_stage.when == Gate("seen", "person", 600)
    assert door().by_name["points"].for_each == Reference("faces", "boxes")
    assert door().upstream(said_stage) == ("seen", "points", "faces")


# ---- driven by threads


def test_stages_that_do_not_depend_on_each_other_are_in_flight_at_once() -> None:
    together = threading.Barrier(2, timeout=30)

    def submit(request: InferenceRequest) -> InferenceResult:
        if request.task in ("detect_faces", "spot_person"):
            together.wait()
        answers = {"detect_faces": boxes(BOX), "spot_person": classes((0, 0.9)), "face_landmarks": classes((0, 0.9))}
        return ok(request, answers.get(request.task) or said("Hello."))

    outcomes = drive(Run(door(), GIVEN, 0, limits=Limits(60 * S)), submit, Standing())
    assert [each.state for each in outcomes.values()] == [StageState.DONE] * 4


class Standing:
    """A clock that stands still."""

    def monotonic_us(self) -> int:
        return 0

    def wall_us(self) -> int:
        return 0


def test_at_most_so_many_requests_wait_at_once() -> None:
    waiting, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def submit(request: InferenceRequest) -> InferenceResult:
        nonlocal waiting, most
        if request.task != "face_landmarks":
            return ok(request, boxes(*[BOX] * 20) if request.task == "detect_faces" else classes((1, 0.9)))
        with lock:
            waiting += 1
            most = max(most, waiting)
            if waiting == MAX_AT_ONCE:
                full.set()
        assert full.wait(30)
        with lock:
            waiting -= 1
        return ok(request, classes((0, 0.9)))

    told = pipeline_from_mapping({**BASE, "stage": [FACES, POINTS], "results": ["points"], "inputs": {"picture": "picture"}})
    outcomes = drive(Run(told, {"picture": b"x"}, 0), submit, Standing())
    assert len(outcomes["points"].answers) == 20 and most == MAX_AT_ONCE


def test_an_agent_that_goes_away_or_answers_for_another_fails_the_stage_only() -> None:
    def submit(request: InferenceRequest) -> InferenceResult:
        if request.task == "detect_faces":
            raise UnavailableError("no agent answers", "gone")
        return ok(replace(request, request_id="e" * 32), classes((0, 0.9)))

    outcomes = drive(Run(door(), GIVEN, 0), submit, Standing())
    assert outcomes["faces"].reason == "no agent answers: gone"
    assert "of request " + "e" * 32 in outcomes["seen"].reason
    assert outcomes["said"].state is StageState.SKIPPED


def test_a_proof_holds_every_receipt_once_and_what_was_asked_for_it() -> None:
    def submit(request: InferenceRequest) -> InferenceResult:
        answers = {"detect_faces": boxes(BOX, OTHER), "spot_person": classes((0, 0.9)), "face_landmarks": classes((0, 0.9))}
        return ok(request, answers.get(request.task) or said("Hello."))

    outcomes = drive(Run(door(), GIVEN, 0), submit, Standing())
    result = PipelineResult("door", outcomes, ("said",), 7)
    proof = result.proof()
    assert set(proof.receipts) == {each.result.receipt for each in result.answers} and len(proof.receipts) == 5
    assert {each.request_id: each.receipt for each in proof.asked} == {
        each.request.request_id: sha256(each.result.receipt).digest() for each in result.answers
    }
    assert all(each.asked_for is None for each in proof.asked)
    assert all(each.answer is not None for each in result.proof(whole=True).asked)
    unsigned = drive(Run(door(), GIVEN, 0), lambda request: replace(submit(request), receipt=b""), Standing())
    with pytest.raises(RefusedError, match="no receipt"):
        PipelineResult("door", unsigned, ("said",), 7).proof()
    assert all(answer.request.parents == () for each in unsigned.values() for answer in each.answers)


def test_what_is_offered_is_that_of_boards_that_are_there() -> None:
    report = {"boards": [{"board": s, "standing": s, "models": [s]} for s in ("serving", "online", "offline", "draining")]}
    assert offered_by(report) == {"serving", "online"}
    reports: list[object] = [None, {}, {"boards": 3}, {"boards": [{}]}]
    for strange in reports:
        with pytest.raises(UnavailableError, match="status of the fleet"):
            offered_by(strange)


def test_evidence_that_is_none_is_refused() -> None:
    assert Evidence.read([[b"q", b"q"], []]) == Evidence(frozenset({b"q"}))
    assert Evidence.of([Evidence.read([[b"q"], [b"a"]]), Evidence.read([[b"r"], [b"a"]])]).quotes == {b"q", b"r"}
    assert Evidence.of([]) == Evidence()
    answers: list[object] = [None, [], [[]], [[], [], []], [["q"], []], [[b"q"] * 1025, []]]
    for answer in answers:
        with pytest.raises(RefusedError):
            Evidence.read(answer)


def test_what_a_board_tells_of_evidence_is_what_was_signed_and_of_the_boards_asked_for() -> None:
    async def story(boards: AttestingFleet) -> None:
        boards.run_until(lambda: boards.all_trusted(TrustTier.WARNING), 2 * EPOCH_US, "every board is trusted")
        node = boards.board("a").node
        quotes, appraisals = evidence_of(node, ["b"])
        assert {open_quote(each, boards.key_of).board for each in quotes} == {"b"}
        told = [open_appraisal(each, boards.key_of) for each in appraisals]
        assert {(each.verifier, each.board) for each in told} == {("a", "b"), ("c", "b")}
        assert all(each.tier is TrustTier.WARNING for each in told)
        own = evidence_of(node, ["a"])
        assert own[0] == [boards.last_quote("a")[1]] and len(own[1]) == 2
        assert evidence_of(node, []) == ([], [])

    small = offer("small", 40_000)
    run_attesting(story, ("a", small), ("b", small), ("c", small))


# ---- a real fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Two emulated boards behind a real broker: one detects and looks for persons, the other has the landmarks."""
    folder = tmp_path_factory.mktemp("fleet")
    serves = {"coral": ["blazeface-full", "mobilenet-vww"], "jetson": ["face-landmark"]}
    models = [model_path(name) for names in serves.values() for name in names][0].parent
    broker = Mosquitto(folder / "broker")
    broker.start()
    members = Member("coral", "coral_m2"), Member("jetson", "orin_nano")
    with LocalFleet(folder, members, ["-"], broker.port, models_folder=models) as boards:
        for board, names in serves.items():
            path = folder / board / "agent.toml"
            path.write_text(path.read_text().replace('serve = ["-"]', f"serve = {json.dumps(names)}"))
        boards.start()
        boards.wait_acquainted(boards.members)
        yield boards
    broker.stop()


def test_faces_and_their_landmarks_are_found_on_two_boards_and_the_receipts_are_chained(fleet: LocalFleet) -> None:
    with Client(fleet.socket_of("coral")) as client:
        result = client.run("faces-to-landmarks", picture=picture_path("astronaut"), limits=Limits(60 * S))
    assert result.ok, {name: each.reason for name, each in result.stages.items()}
    (face,), (points,) = result.stages["faces"].answers, result.stages["landmarks"].answers
    assert (face.result.board, points.result.board) == ("coral", "jetson")
    assert points.found is not None and points.found.scores[0] > 0.9
    assert points.result.outputs["points"].shape == (1, 468, 2)
    assert struct.unpack("<4f", points.request.inputs["region"].data) == face.found.boxes[0] if face.found else False
    assert points.request.parents == (sha256(face.result.receipt).digest(),)
    anchors = Anchors(fleet.keys)
    proof = result.proof()
    audit = verify(proof, anchors)
    assert audit.broken is None
    assert "coral" in {open_quote(each, anchors.find_key).board for each in proof.quotes}
    assert {link.receipt.board for link in audit.receipts if link.receipt} == {"coral", "jetson"}


def test_a_board_that_signed_another_answer_is_the_link_that_breaks(fleet: LocalFleet) -> None:
    with Client(fleet.socket_of("jetson")) as client:
        result = client.run("faces-to-landmarks", picture=picture_path("astronaut"), limits=Limits(60 * S))
    proof = result.proof()
    torn = replace(
        proof, receipts=tuple(each for each in proof.receipts if each != result.stages["faces"].answers[0].result.receipt)
    )
    audit = verify(torn, Anchors(fleet.keys))
    assert audit.broken is not None and "is not in the file" in audit.broken.fault


def test_a_stage_that_no_board_can_run_is_told_before_anything_runs(fleet: LocalFleet) -> None:
    with (
        Client(fleet.socket_of("coral")) as client,
        pytest.raises(RefusedError, match="stage sentence: got no board offers chat"),
    ):
        client.run("person-to-sentence", picture=picture_path("astronaut"), place="door")


def test_what_is_no_picture_fails_the_stage_that_looks_and_skips_the_rest(fleet: LocalFleet) -> None:
    with Client(fleet.socket_of("coral")) as client:
        result = client.run("faces-to-landmarks", picture=b"no picture")
    assert not result.ok
    assert result.stages["faces"].state is StageState.FAILED and "picture" in result.stages["faces"].reason
    assert result.stages["landmarks"].state is StageState.SKIPPED


def sly(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_command_runs_draws_and_proves(fleet: LocalFleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("pipeline", "faces-to-landmarks", "--input", f"picture={picture_path('astronaut')}", "--deadline-ms", 60_000)
    where = ("--socket", fleet.socket_of("coral"))
    assert sly(*asked, *where, "--output", tmp_path, "--receipt", tmp_path / "run.proof") == 0
    shown = capsys.readouterr().out
    for word in (
        "faces ",
        "coral",
        "blazeface-full",
        "landmarks ",
        "jetson",
        "face-landmark",
        "faces-to-landmarks done",
        "2 receipts",
    ):
        assert word in shown
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len(decode_proof((tmp_path / "run.proof").read_bytes()).receipts) == 2
    assert sly(*asked, *where, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and [each["stage"] for each in told["stages"]] == ["faces", "landmarks"]
    assert told["stages"][1]["answers"][0]["parents"] == [told["stages"][0]["answers"][0]["receipt"]]
    (tmp_path / "none.jpg").write_bytes(b"none")
    assert sly(*asked[:3], f"picture={tmp_path / 'none.jpg'}", *where) == 2
    assert "none.jpg: got a file that begins with b'none'; allowed: JPEG or PNG" in capsys.readouterr().err
    (tmp_path / "torn.jpg").write_bytes(picture_path("astronaut").read_bytes()[:1000])
    assert sly(*asked[:3], f"picture={tmp_path / 'torn.jpg'}", *where) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "landmarks      skipped: stage faces failed" in lines and max(map(len, lines)) <= WIDTH


def test_the_command_checks_and_lists_without_a_fleet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sly("pipeline", "person-to-sentence", "--check") == 0
    assert "person-to-sentence can be run" in capsys.readouterr().out
    assert sly("pipeline") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(shipped())
    (tmp_path / "bad.toml").write_text("name = 'x'")
    assert sly("pipeline", tmp_path / "bad.toml", "--check") == 2
    for place, told in ((tmp_path, "which is a folder"), (tmp_path / "none" / "run.proof", "mkdir -p")):
        with pytest.raises(SystemExit, match="2"):
            sly("pipeline", "faces-to-landmarks", "--receipt", place)
        assert told in capsys.readouterr().err
    assert sly("pipeline", "faces-to-landmarks", "--input", "picture=x") == 2
    assert "no --socket" in capsys.readouterr().err
    assert sly("pipeline", "faces-to-landmarks", "--socket", tmp_path / "none", "--input", "picture") == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_the_command_checks_against_what_is_offered(fleet: LocalFleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert sly("pipeline", "faces-to-landmarks", "--check", "--socket", fleet.socket_of("jetson"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["after"] == ["faces"]
    assert sly("pipeline", "person-to-sentence", "--check", "--socket", fleet.socket_of("jetson")) == 2
    assert "no board offers chat" in capsys.readouterr().err
