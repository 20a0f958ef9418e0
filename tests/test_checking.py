"""The check as the agent makes it: by a child process, within limits, whatever is offered and however the child ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError, SlyError, UnavailableError
from ota import checked
from ota.checked import (
    Checked,
    Question,
    Target,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
    encode_refused,
    encode_unavailable,
)
from ota.checker import MAX_OPEN_FILES, answered, wanted
from ota.checking import check
from ota.trust import MAX_TARGETS_BYTES
from tests.tuf_repository import ONLINE, TIMESTAMP, TufRepository

CHARTER, MANIFEST = "fleet/charter.cbor", "releases/faces/3/release.cbor"
WANT = (CHARTER, "releases/*/*/release.cbor")
NOW_S = int(datetime.now(UTC).timestamp())
LIMIT_S = 60


@pytest.fixture(scope="module")
def repository() -> TufRepository:
    repository = TufRepository()
    for path in (CHARTER, MANIFEST, "releases/faces/12/release.cbor", "releases/faces/3/model.tflite"):
        repository.add(path, path.encode())
    repository.sign_at(NOW_S)
    repository.publish(*ONLINE)
    return repository


def checks(folder: Path, repository: TufRepository, documents: dict[str, bytes] | None = None, **more: object) -> Checked:
    arguments: dict[str, object] = {"want": WANT, "floors": {}, "not_before_s": 0, "limit_s": LIMIT_S} | more
    offered = repository.documents if documents is None else documents
    return asyncio.run(check(folder, repository.documents["1.root"], offered, **arguments))  # type: ignore[arg-type]


def test_a_check_tells_targets_marks_and_time(tmp_path: Path, repository: TufRepository) -> None:
    found = checks(tmp_path / "tuf", repository)
    assert set(found.targets) == {CHARTER, MANIFEST, "releases/faces/12/release.cbor"}
    assert found.targets[CHARTER] == Target(
        CHARTER, len(CHARTER), bytes.fromhex(repository.targets.targets[CHARTER].hashes["sha256"])
    )
    assert found.paths == tuple(sorted(repository.targets.targets))
    assert (found.signed_s, found.root_version, found.notes) == (NOW_S, 1, ())
    again = checks(tmp_path / "tuf", repository, floors=found.marks, not_before_s=found.signed_s)
    assert again == found


def test_the_agent_imports_none_of_what_checks() -> None:
    heavy = "{'tuf', 'securesystemslib', 'cryptography', 'urllib3', 'numpy'} & {name.partition('.')[0] for name in sys.modules}"
    code = f"import sys, ota.checking; found = {heavy}; sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_refusal_reaches_the_agent_in_the_childs_words(tmp_path: Path, repository: TufRepository) -> None:
    marks = checks(tmp_path / "tuf", repository).marks
    with pytest.raises(RefusedError) as caught:
        checks(tmp_path / "tuf", repository, floors={mark: version + 1 for mark, version in marks.items()})
    assert (caught.value.subject, caught.value.allowed) == ("update metadata: root", "2 or later, which this board has seen")


def test_what_is_not_offered_is_unavailable(tmp_path: Path, repository: TufRepository) -> None:
    documents = {name: data for name, data in repository.documents.items() if name != TIMESTAMP}
    with pytest.raises(UnavailableError, match="timestamp is not offered"):
        checks(tmp_path / "tuf", repository, documents)


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path, repository: TufRepository) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError):
        checks(tmp_path / "file" / "tuf", repository)


def test_a_check_that_hangs_is_ended_at_its_limit(tmp_path: Path, repository: TufRepository) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/metadata"
        with pytest.raises(UnavailableError, match="took longer than 2 s"):
            checks(tmp_path / "tuf", repository, url=url, limit_s=2)


def test_a_check_over_http_reaches_what_is_there(tmp_path: Path, repository: TufRepository) -> None:
    from tests.test_tuf_client import Quiet, ThreadingHTTPServer, partial, threading

    repository.write(tmp_path / "served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        found = checks(tmp_path / "tuf", repository, {}, url=f"http://127.0.0.1:{server.server_port}/metadata")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert set(found.targets) == {CHARTER, MANIFEST, "releases/faces/12/release.cbor"}


@pytest.mark.parametrize("bomb", [b"[" * MAX_TARGETS_BYTES, b'{"a":' * 900_000, b"[" + b"[]," * 1_500_000 + b"[]]"])
def test_a_document_made_to_exhaust_the_child_is_refused(tmp_path: Path, repository: TufRepository, bomb: bytes) -> None:
    repository = TufRepository()
    repository.put("targets", bomb)
    repository.publish("snapshot", TIMESTAMP)
    documents = repository.documents | {"1.targets": bomb}
    with pytest.raises(SlyError):
        checks(tmp_path / "tuf", repository, documents)


def test_a_child_killed_at_any_moment_accepts_nothing_and_the_next_one_goes_on(tmp_path: Path, repository: TufRepository) -> None:
    async def killed(after_s: float) -> None:
        running = asyncio.create_task(check(tmp_path / "tuf", repository.documents["1.root"], repository.documents, WANT, {}, 0))
        await asyncio.sleep(after_s)
        for child in _children():
            os.kill(child, signal.SIGKILL)
        try:
            assert set((await running).targets) >= {CHARTER}
        except UnavailableError as error:
            assert "SIGKILL" in error.reason

    for step in range(6):
        asyncio.run(killed(0.06 * step))
        assert CHARTER in checks(tmp_path / "tuf", repository).targets


def _children() -> list[int]:
    """Checkers that this process started."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            if b"ota.checker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_child_that_says_nothing_or_cannot_start_is_told_as_such(
    tmp_path: Path, repository: TufRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ota.checking.CHECKER", "this")
    with pytest.raises(RefusedError, match="answer"):
        checks(tmp_path / "tuf", repository)
    monkeypatch.setattr("ota.checking.CHECKER", "no_such_module")
    with pytest.raises(UnavailableError, match="exit code 1"):
        checks(tmp_path / "tuf", repository)


def test_a_checker_is_limited_and_ends_with_the_agent() -> None:
    """Its question never comes, and the pipe that it would come by stays open."""
    agent = (
        "import subprocess, sys, os, time\n"
        "subprocess.Popen([sys.executable, '-m', 'ota.checker', str(os.getpid()), '60'])\n"
        "time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", agent], cwd=Path(__file__).parents[1], stdin=subprocess.PIPE) as process:
        try:
            child = asyncio.run(_first_child(process.pid))
            asyncio.run(_limits_of(child))
        finally:
            process.kill()
        asyncio.run(_end_of(child))


async def _first_child(pid: int) -> int:
    async with asyncio.timeout(LIMIT_S):
        while True:
            for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"ota.checker" in Path(f"/proc/{text}/cmdline").read_bytes():
                    return int(text)
            await asyncio.sleep(0.01)


async def _limits_of(pid: int) -> None:
    """Until it has given up what it does not need, which it does before it reads."""
    limited = {"Max open files": str(MAX_OPEN_FILES), "Max file size": str(MAX_TARGETS_BYTES), "Max core file size": "0"}
    async with asyncio.timeout(LIMIT_S):
        while True:
            lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
            found = {line[:26].strip(): line[26:].split()[0] for line in lines[1:]}
            if limited.items() <= found.items() and found["Max address space"] != "unlimited" != found["Max cpu time"]:
                return
            await asyncio.sleep(0.01)


async def _end_of(pid: int) -> None:
    stat = Path(f"/proc/{pid}/stat")
    async with asyncio.timeout(LIMIT_S):
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "want, found",
    [
        (("fleet/charter.cbor",), ["fleet/charter.cbor"]),
        (("nowhere",), ["nowhere"]),
        (("releases/*/*/release.cbor",), ["releases/a/1/release.cbor", "releases/b/20/release.cbor"]),
        (("releases/a/*/release.cbor", "fleet/charter.cbor"), ["fleet/charter.cbor", "releases/a/1/release.cbor"]),
        (("*",), ["top"]),
        (("releases/*/release.cbor",), []),
        (("releases/./1/release.cbor*",), []),
    ],
)
def test_a_pattern_stays_between_slashes(want: tuple[str, ...], found: list[str]) -> None:
    paths = ["fleet/charter.cbor", "releases/a/1/m.tflite", "releases/a/1/release.cbor", "releases/b/20/release.cbor", "top"]
    assert wanted(paths, want) == found


QUESTION = Question(
    Path("/var/lib/sly/tuf"), b"root", {"timestamp": b"t", "1.root": b"r"}, WANT, {"tuf/root": 3}, 17, "http://a/"
)
ANSWER = Checked(
    {CHARTER: Target(CHARTER, 5, bytes(32)), MANIFEST: Target(MANIFEST, 0, b"\x07" * 32)},
    {"tuf/root": 1, "tuf/time/ab": NOW_S}, NOW_S, 1, (CHARTER, MANIFEST), ("a note",),
)  # fmt: skip


def test_questions_and_answers_come_back_as_they_were() -> None:
    assert decode_question(encode_question(QUESTION)) == QUESTION
    assert decode_answer(encode_answer(ANSWER)) == ANSWER
    refusal = RefusedError("subject", "got", "allowed", "remedy")
    assert decode_answer(encode_refused(refusal)) == ("subject", "got", "allowed", "remedy")
    assert decode_answer(encode_unavailable("subject", "reason", "")) == ("subject", "reason", "")


def test_every_truncation_and_every_flipped_bit_of_an_answer_is_another_answer_or_refused() -> None:
    for whole in (encode_answer(ANSWER), encode_refused(RefusedError("s", "g", "a", "r")), encode_unavailable("s", "r", "m")):
        mean = decode_answer(whole)
        for end in range(len(whole)):
            with pytest.raises(RefusedError):
                decode_answer(whole[:end])
        with pytest.raises(RefusedError):
            decode_answer(whole + b"\x00")
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                assert decode_answer(bytes(flipped)) != mean
            except RefusedError:
                continue


def test_an_encoded_question_that_is_none_is_answered_with_a_refusal() -> None:
    for data in (b"", b"\xa0", encode({1: "/", 9: b""}), encode_question(QUESTION)[:-1]):
        answer = decode_answer(answered(data))
        assert isinstance(answer, tuple) and len(answer) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"offered": {f"{number}.root": b"" for number in range(checked.MAX_DOCUMENTS + 1)}},
        {"offered": {"1.root": bytes(checked.MAX_OFFERED_BYTES + 1)}},
        {"offered": {"r" * (checked.MAX_NAME_CHARS + 1): b""}},
        {"want": ("a",) * (checked.MAX_WANTED + 1)},
        {"floors": {f"tuf/{number}": 1 for number in range(checked.MAX_MARKS + 1)}},
        {"not_before_s": -1},
        {"not_before_s": checked.MAX_TIME_S + 1},
    ],
)
def test_a_question_past_its_bounds_is_not_asked(changes: dict[str, object]) -> None:
    with pytest.raises(RefusedError):
        replace(QUESTION, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path, size_bytes, digest",
    [("", 1, bytes(32)), ("a\x00b", 1, bytes(32)), ("a" * 513, 1, bytes(32)), ("a", -1, bytes(32)), ("a", 2**33, bytes(32)),
     ("a", 1, bytes(31))],
)  # fmt: skip
def test_a_target_that_cannot_be_is_refused(path: str, size_bytes: int, digest: bytes) -> None:
    with pytest.raises(RefusedError):
        Target(path, size_bytes, digest)
