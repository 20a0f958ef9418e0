"""The self-test of a board: its message, its checks on what is really broken, and how a running agent tells of it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import ssl
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from board_support.board import Delegate
from board_support.sysfs import Tree
from edge_agent.attest.self_test import (
    AAD,
    MAX_CHECKS,
    MAX_SELF_TEST_BYTES,
    MAX_WORDS_CHARS,
    Check,
    SelfTest,
    Verdict,
    open_self_test,
    self_test_map,
    sign_self_test,
    worst,
)
from edge_agent.core.cbor import decode, encode
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import Signer, sign1
from edge_agent.core.errors import RefusedError
from edge_agent.runtime.settings import EngineSettings
from edge_agent.shell import checks, examination, known_answer, looking
from edge_agent.shell.known_answer import Asked, ask_known_answer
from edge_agent.shell.looking import Floor, Room, User
from edge_agent.transport.certificate import Validity, validity
from models.known_answer import known_inputs, known_model, known_outputs
from tests.certificates import Authority
from tests.cramped import file_system_of_1_mb
from tests.needs import needs

SIGNER = Signer(b"b1", b"s" * 32)
LIMIT_S = 60.0
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_WORDS_CHARS)
names = st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True)
found = st.builds(
    lambda name, verdict, what, remedy: Check(name, verdict, what, "" if verdict is Verdict.PASS else remedy),
    names, st.sampled_from(Verdict), texts, texts,
)  # fmt: skip
tests_of_b1 = st.builds(
    SelfTest, st.just("b1"), st.integers(0, 2**53), st.integers(0, 2**53), texts.map(lambda text: text[:64]),
    st.lists(found, min_size=1, max_size=4, unique_by=lambda each: each.name).map(tuple),
)  # fmt: skip
A_TEST = SelfTest("b1", 3, 1, "0.1.0", (Check("clock", Verdict.FAIL, "1970", "set it"), Check("disk", Verdict.PASS, "free")))


def key_of(kid: bytes) -> bytes | None:
    return SIGNER.public_key


# The message.


@given(tests_of_b1)
def test_what_was_signed_is_what_is_read(test: SelfTest) -> None:
    assert open_self_test(sign_self_test(test, SIGNER), key_of) == test


def test_the_longest_self_test_fits_its_bound() -> None:
    longest = "\U0001f525" * MAX_WORDS_CHARS
    every = tuple(Check("c" * 30 + f"{at:02}", Verdict.FAIL, longest, longest) for at in range(MAX_CHECKS))
    message = sign_self_test(SelfTest("b1", 2**53, 2**53, "\U0001f525" * 64, every), SIGNER)
    assert len(message) <= MAX_SELF_TEST_BYTES and open_self_test(message, key_of).checks == every


def test_every_truncation_and_flipped_bit_of_a_self_test_is_refused() -> None:
    message = sign_self_test(A_TEST, SIGNER)
    changed = [message[:at] for at in range(len(message))] + [message + b"\0"]
    for at in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[at // 8] ^= 1 << at % 8
        changed.append(bytes(flipped))
    for each in changed:
        with pytest.raises(RefusedError):
            open_self_test(each, key_of)


@pytest.mark.parametrize(
    "change",
    [
        {5: []},
        {5: [{1: "clock", 2: "pass", 3: "a", 4: "do it"}]},
        {5: [{1: "clock", 2: "fail", 3: "a"}]},
        {5: [{1: "clock", 2: "fail", 3: "a", 4: ""}]},
        {5: [{1: "clock", 2: "FAIL", 3: "a", 4: "b"}]},
        {5: [{1: "clock", 2: "pass", 3: "a"}] * 2},
        {5: [{1: f"c{at}", 2: "pass", 3: "a"} for at in range(MAX_CHECKS + 1)]},
        {5: [{1: "clock", 2: "pass", 3: "a" * (MAX_WORDS_CHARS + 1)}]},
        {2: -1},
        {1: "b2"},
        {6: 1},
    ],
)
def test_a_self_test_of_another_form_or_of_another_board_is_refused(change: dict[int, object]) -> None:
    payload = encode({**self_test_map(A_TEST), **change})
    with pytest.raises(RefusedError):
        open_self_test(sign1(payload, SIGNER, AAD), key_of)


def test_a_signature_made_for_something_else_does_not_make_a_self_test() -> None:
    with pytest.raises(RefusedError):
        open_self_test(sign1(encode(self_test_map(A_TEST)), SIGNER, b"sly/1/report"), key_of)


def test_the_gravest_check_is_the_verdict() -> None:
    warned = replace(A_TEST.checks[0], verdict=Verdict.WARN)
    assert (worst(()), worst(A_TEST.checks), worst((A_TEST.checks[1], warned))) == (Verdict.PASS, Verdict.FAIL, Verdict.WARN)
    assert str(warned) == "WARN clock: 1970; set it" and decode(encode(self_test_map(A_TEST))) == self_test_map(A_TEST)


# The known answer.


def asked(settings: EngineSettings, delegate: Delegate | None = None) -> Asked:
    async def bounded() -> Asked:
        async with asyncio.timeout(LIMIT_S):
            return await ask_known_answer(settings, delegate)

    return asyncio.run(bounded())


def test_a_sound_runtime_gives_the_known_answer_in_its_sandbox() -> None:
    told = asked(EngineSettings())
    assert told.why == "" and told.library and "seccomp" in told.layers
    assert checks.inference(told).verdict is Verdict.PASS
    assert known_model() == known_model() and len(known_outputs()["y"].data) == 16
    values = list(known_outputs()["y"].data)
    assert {127, 128} & set(values) and len(set(values)) > 8, "some saturate, most do not"
    assert len(known_inputs()["x"].data) == 64


@pytest.mark.parametrize(
    ("engine", "why", "remedy"),
    [
        ("Illegal", "SIGILL: the runtime uses instructions", "made for this processor"),
        ("Wrong", "computes wrong numbers", "memory or the processor"),
        ("Hung", "hung: no answer within", "install the runtime anew"),
    ],
)
def test_a_runtime_that_is_wrong_crashes_or_hangs_fails_and_says_which(
    engine: str, why: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "Hung":
        monkeypatch.setattr(known_answer, "INVOKE_LIMIT_US", 200_000)
    check = checks.inference(asked(EngineSettings(engine=f"tests.sick_runtimes:{engine}")))
    assert check.verdict is Verdict.FAIL and why in check.what and remedy in check.remedy


def test_a_runtime_that_is_not_installed_is_named_with_what_to_install() -> None:
    import importlib.util

    missing = [name for name in ("tflite_runtime", "ai_edge_litert") if not importlib.util.find_spec(name)]
    needs(missing, "both runtimes are installed here")
    check = checks.inference(asked(EngineSettings(runtime=missing[0])))
    assert check.verdict is Verdict.FAIL and missing[0] in check.what and "pip install" in check.remedy


def test_a_delegate_at_fault_is_told_from_a_runtime_at_fault(tmp_path: Path) -> None:
    delegate = Delegate("libodd.so")
    check = checks.inference(asked(EngineSettings(engine="tests.sick_runtimes:Unfit"), delegate))
    assert check.verdict is Verdict.FAIL and "with libodd.so: the engine died: exit code 7" in check.what
    assert "the runtime is sound" in check.remedy
    missing = checks.inference(asked(EngineSettings(), Delegate(str(tmp_path / "none.so"))))
    assert missing.verdict is Verdict.FAIL and "none.so" in missing.what and "the runtime is sound" in missing.remedy
    both = checks.inference(asked(EngineSettings(engine="tests.sick_runtimes:Illegal"), delegate))
    assert "SIGILL" in both.what and "libodd" not in both.what


def test_a_kernel_without_seccomp_fails_and_one_without_landlock_is_warned_of() -> None:
    told = asked(EngineSettings(engine="tests.sick_runtimes:Loose"))
    assert checks.sandbox(told.layers, told.why).verdict is Verdict.FAIL
    layers = ("rlimits", "no landlock (Function not implemented): no file can be opened at all", "seccomp")
    assert checks.sandbox(layers).verdict is Verdict.WARN
    assert checks.sandbox((*layers, "no seccomp (x)")).verdict is Verdict.FAIL
    assert checks.sandbox((), "").verdict is Verdict.WARN


# What is seen of the machine.


def configured(folder: Path, **sections: dict[str, Any]) -> AgentConfig:
    folder.mkdir(mode=0o700, exist_ok=True)
    known: dict[str, Any] = {"board": {"id": "kitchen", "backend": "jalapeno"}, "state": {"folder": str(folder)}}
    return AgentConfig.from_mapping(known | sections)


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return configured(tmp_path / "state")


DAY_S = 86_400
NOW_S = 1_800_000_000


@pytest.mark.parametrize(
    ("now_s", "synchronised", "verdict", "words"),
    [
        (0, True, Verdict.FAIL, "1970-01-01"),
        (NOW_S - 1, True, Verdict.FAIL, "cannot be before 2027-01-15"),
        (NOW_S, True, Verdict.PASS, "synchronised"),
        (NOW_S, False, Verdict.WARN, "not synchronised"),
        (NOW_S, None, Verdict.WARN, "cannot be checked"),
    ],
)
def test_a_clock_before_what_was_signed_fails_and_one_that_nobody_set_is_warned_of(
    now_s: int, synchronised: bool | None, verdict: Verdict, words: str
) -> None:
    check = checks.clock(now_s, Floor(NOW_S, "signed then"), synchronised)
    assert check.verdict is verdict and words in check.what
    assert verdict is not Verdict.FAIL or "time server" in check.remedy


def test_what_the_fleet_signed_is_a_floor_under_the_clock(config: AgentConfig) -> None:
    assert looking.clock_floor(config).time_s == looking.WRITTEN_AFTER_S
    kept = config.state.folder / "ota" / "metadata" / "timestamp.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"signed": {"sly_signed_at": NOW_S}}))
    assert looking.clock_floor(config).time_s == NOW_S
    for damaged in (
        "",
        "[[",
        "[]",
        '{"signed": {"sly_signed_at": true}}',
        '{"signed": {"sly_signed_at": 1e99}}',
        "[" * 9999,
    ):
        kept.write_text(damaged)
        assert looking.clock_floor(config).time_s == looking.WRITTEN_AFTER_S


def test_the_time_service_is_believed_that_the_clock_was_set(tmp_path: Path) -> None:
    assert looking.synchronised(Tree(tmp_path)) is None
    (tmp_path / "run/systemd/timesync").mkdir(parents=True)
    (tmp_path / "run/systemd/timesync/synchronized").touch()
    assert looking.synchronised(Tree(tmp_path)) is True
    assert looking.synchronised(Tree(Path("/"))) in (True, False), "the kernel says it (adjtimex)"


def test_a_full_disk_fails_and_one_without_room_for_an_update_is_warned_of(tmp_path: Path) -> None:
    with file_system_of_1_mb(tmp_path / "small") as small:
        config = configured(small)
        check = examination.disk_check(config, looking.takes_a_write(small))
        assert check.verdict is Verdict.FAIL and "the ledger alone needs 11 MiB" in check.what
        (small / "filling").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
        check = examination.disk_check(config, looking.takes_a_write(small))
        assert check.verdict is Verdict.FAIL and "No space left on device" in check.what and check.remedy
        assert [each.name for each in small.iterdir()] == ["filling"], "the probe leaves nothing"
    room = Room(tmp_path, 500, 100, 501, "model cache 1")
    assert (
        checks.disk(room, "").verdict is Verdict.WARN and checks.disk(replace(room, free_bytes=501), "").verdict is Verdict.PASS
    )
    rich = configured(tmp_path / "rich", ota={"root": "/r"}, state={"folder": str(tmp_path / "rich"), "cache_bytes": 2**50})
    assert examination.disk_check(rich, "").verdict is Verdict.WARN, "a cache that can never be full"
    assert looking.room(rich, True).needed_bytes - looking.room(rich, False).needed_bytes == 2 * looking.AGENT_ENVIRONMENT_BYTES


def test_a_disk_that_takes_bytes_and_does_not_keep_them_fails(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert looking.takes_a_write(config.state.folder) == ""
    monkeypatch.setattr(os, "fsync", failing)
    assert "Input/output error" in looking.takes_a_write(config.state.folder)
    assert not list(config.state.folder.iterdir())


def test_a_python_that_this_user_may_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    check = checks.inference(asked(EngineSettings()))
    assert check.verdict is Verdict.FAIL and "no child can be started" in check.what
    assert f"may run {tmp_path / 'python'}" in check.remedy


def test_a_key_that_others_may_read_is_lost_or_is_no_key_fails(config: AgentConfig) -> None:
    key = config.state.folder / "identity.key"

    def verdict() -> tuple[Verdict, str]:
        check = checks.identity(looking.key_files(config))
        return check.verdict, check.what

    assert verdict()[0] is Verdict.WARN, "the first start makes it"
    (config.state.folder / "ledger.db").touch()
    assert verdict()[0] is Verdict.FAIL, "there was one, and it is lost"
    key.write_bytes(bytes(32))
    for mode, expected in ((0o644, Verdict.FAIL), (0o640, Verdict.FAIL), (0o600, Verdict.PASS)):
        key.chmod(mode)
        assert verdict()[0] is expected, oct(mode)
    key.write_bytes(bytes(31))
    assert verdict() == (Verdict.FAIL, f"{key}: no key: 31 bytes")
    if os.geteuid() == 0:
        key.write_bytes(bytes(32))
        os.chown(key, 12345, -1)
        assert verdict() == (Verdict.FAIL, f"{key}: of user 12345, the state folder is of 0")


def test_a_client_key_may_be_roots_for_the_agents_group_and_nobody_elses(tmp_path: Path) -> None:
    key = tmp_path / "client.key"
    config = configured(tmp_path / "state", broker={"key_file": str(key)})
    (config.state.folder / "identity.key").write_bytes(bytes(32))
    (config.state.folder / "identity.key").chmod(0o600)
    key.write_text("key")
    roots = os.geteuid() == 0
    for mode, expected in ((0o600, Verdict.PASS), (0o644, Verdict.FAIL), (0o640, Verdict.PASS if roots else Verdict.FAIL)):
        key.chmod(mode)
        assert checks.identity(looking.key_files(config)).verdict is expected, oct(mode)


def test_a_certificate_that_has_ended_fails_one_that_ends_soon_is_warned_of(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    spans = {"20200101000000Z": "20210101000000Z", "20250101000000Z": "21250101000000Z"}
    read = {}
    for start, end in spans.items():
        path, _ = authority.issue("kitchen", start, end)
        read[start] = looking.certificate(configured(tmp_path / "state", broker={"certificate_file": str(path)}))
    ended, long = read.values()
    assert ended == Validity(1_577_836_800, 1_609_459_200) and long == Validity(1_735_689_600, 4_891_363_200)
    assert isinstance(ended, Validity)
    assert checks.certificate(NOW_S, ended, "c.pem").verdict is Verdict.FAIL
    assert checks.certificate(ended.not_after_s - 10 * DAY_S, ended, "c.pem").what.startswith("c.pem: it ends in 10 days")
    assert checks.certificate(NOW_S, long, "c.pem").verdict is Verdict.PASS
    assert checks.certificate(0, long, "c.pem", clock_is_right=False).verdict is Verdict.WARN
    assert checks.certificate(NOW_S, "", "").verdict is Verdict.PASS
    missing = configured(tmp_path / "state", broker={"certificate_file": str(tmp_path / "none.pem")})
    check = checks.certificate(NOW_S, looking.certificate(missing), "none.pem")
    assert check.verdict is Verdict.FAIL and "No such file" in check.what and "sly fleet enroll" in check.remedy


def test_the_end_of_a_damaged_certificate_is_refused_and_never_a_crash(tmp_path: Path) -> None:
    path, _ = Authority(tmp_path / "ca").issue("kitchen")
    pem = path.read_bytes()
    for at in range(0, len(pem), 7):
        damaged = [pem[:at], pem[:at] + b"!" + pem[at + 1 :], pem[:at] + b"A" + pem[at + 1 :]]
        for each in damaged:
            with suppress(RefusedError):
                assert isinstance(validity(each), Validity)
    der = ssl.PEM_cert_to_DER_cert(pem[pem.find(b"-----BEGIN") :].decode())
    for at in range(len(der)):
        with pytest.raises(RefusedError):
            validity(ssl.DER_cert_to_PEM_cert(der[:at]).encode())
    for nothing in (b"", b"x" * 10, pem[:200], pem * 200):
        with pytest.raises(RefusedError):
            validity(nothing)


@pytest.mark.parametrize(
    ("seen", "emulated", "verdict"),
    [
        (User(0, 0), False, Verdict.WARN),
        (User(1000, 1 << 12), False, Verdict.WARN),
        (User(1000, 0), False, Verdict.PASS),
        (User(0, 1 << 12), True, Verdict.PASS),
        (User(1000, 0, "unreadable"), True, Verdict.WARN),
    ],
)
def test_root_and_capabilities_are_warned_of_outside_of_emulation(seen: User, emulated: bool, verdict: Verdict) -> None:
    assert checks.user(seen, emulated).verdict is verdict


def test_capabilities_are_read_where_the_kernel_tells_them(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t0000000000001000\n")
    assert looking.user(Tree(tmp_path)) == User(os.geteuid(), 0x1000)
    (tmp_path / "proc/self/status").write_text("Name:\tx\n")
    assert looking.user(Tree(tmp_path)).why


def test_a_check_that_cannot_be_made_is_a_warning_with_its_reason_and_stops_no_other() -> None:
    def unreadable() -> Check:
        raise PermissionError(13, "Permission denied", "/state")

    check = examination.made("disk", unreadable)
    assert check.verdict is Verdict.WARN and check.what == "cannot be checked: /state Permission denied"
