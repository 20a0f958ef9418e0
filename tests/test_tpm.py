"""A TPM 2.0 vouches for a board: the real tpm2-tools against a real software TPM, and what happens when it fails.

Rules: each test has a TPM of its own; programs that misbehave are scripts in place of the real ones; what must not hang is given
a limit and its process is looked for afterwards.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any, ClassVar, TypeVar

import pytest

from board_support.device_root import DeviceRoot
from edge_agent import cli
from edge_agent.agent import Agent
from edge_agent.attest.evidence import KeyKind, ModelMeasurement, Quote, endorsed_digest
from edge_agent.attest.keys import MAX_LOG, check_endorsement, decode_endorsement, encode_endorsement
from edge_agent.attest.tpm import open_attest
from edge_agent.core.config import AgentConfig, AttestSection
from edge_agent.core.errors import ConfigError, RefusedError, SlyError, UnavailableError
from edge_agent.core.values import InferenceRequest, Status, Tensor
from edge_agent.node.events import Endorsed, Event
from edge_agent.shell import endorsers
from edge_agent.shell.endorsers import RootEndorser, TpmEndorser, open_endorser
from edge_agent.shell.endorsing import MAX_ON_THEIR_WAY, Endorsing
from edge_agent.shell.tasks import Tasks
from edge_agent.shell.tpm_tools import KEY_HANDLE, PROGRAMS, TpmTools
from tests.attested import MEASURED, a_quote, digest
from tests.brokers import Mosquitto, mosquitto
from tests.needs import needs_module
from tests.swtpm import Swtpm
from tests.test_agent import MODEL, configuration, daemon, toml
from tests.test_keys import SEED

WAIT_S = 60.0
PCR = 23
LOADED = tuple(model.mapped for model in MEASURED.models)
QUOTE = a_quote(key_kind=KeyKind.TPM)
CHALLENGE = endorsed_digest(QUOTE)

T = TypeVar("T")


@pytest.fixture
def tpm() -> Iterator[Swtpm]:
    needs_module("cryptography", "tpm")
    running = Swtpm()
    try:
        running.start()
        yield running
    finally:
        running.close()


def tools(tpm: Swtpm, command_s: float = WAIT_S) -> TpmTools:
    return TpmTools(tpm.tcti, command_s)


def endorser_by(tpm: Swtpm, *loaded: bytes, pcr: int = PCR, endorse_s: float = WAIT_S) -> TpmEndorser:
    made = TpmEndorser(tools(tpm), pcr, endorse_s)
    made.loaded(loaded or LOADED)
    return made


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def within_limit() -> T:
        async with asyncio.timeout(WAIT_S):
            return await work()

    return asyncio.run(within_limit())


def why_not(endorsement: bytes, key: bytes, quote: Quote = QUOTE) -> str:
    return check_endorsement(replace(quote, endorsement=endorsement), key)


# what it vouches for


def test_a_tpm_vouches_for_a_quote_and_for_no_other(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE)

    key, endorsement = run(play)
    assert why_not(endorsement, key) == ""
    assert "that of another quote" in why_not(endorsement, key, replace(QUOTE, counter=3))
    assert decode_endorsement(endorsement).log == LOADED


def test_the_nonce_in_the_tpms_statement_is_the_challenge(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        return await endorser.public_key(), await endorser.endorse(digest("another challenge"))

    key, endorsement = run(play)
    assert open_attest(decode_endorsement(endorsement).statement).extra_data == digest("another challenge")
    assert "that of another quote" in why_not(endorsement, key)


def test_another_tpms_statement_is_refused(tpm: Swtpm) -> None:
    async def play(by: Swtpm) -> tuple[bytes, bytes]:
        endorser = endorser_by(by)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE)

    other = Swtpm()
    try:
        other.start()
        (key, mine), (other_key, theirs) = run(lambda: play(tpm)), run(lambda: play(other))
    finally:
        other.close()
    assert key != other_key
    assert "signature" in why_not(theirs, key) and "signature" in why_not(mine, other_key)
    assert why_not(theirs, other_key) == ""


def test_a_forged_signature_is_refused(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes, bytes]:
        endorser = endorser_by(tpm)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE), await endorser.endorse(digest("other"))

    key, endorsement, other = run(play)
    swapped = replace(decode_endorsement(endorsement), signature=decode_endorsement(other).signature)
    assert "signature" in why_not(encode_endorsement(swapped), key)


def test_a_model_that_is_loaded_later_is_in_the_next_endorsement(tpm: Swtpm) -> None:
    later = ModelMeasurement("later", digest("later"), digest("later"))
    quote = replace(QUOTE, measurements=replace(MEASURED, models=(*MEASURED.models, later)))

    async def play() -> tuple[bytes, bytes, bytes]:
        endorser = endorser_by(tpm)
        key, before = await endorser.public_key(), await endorser.endorse(endorsed_digest(quote))
        endorser.loaded([*LOADED, later.mapped])
        return key, before, await endorser.endorse(endorsed_digest(quote))

    key, before, after = run(play)
    assert "nothing of later" in why_not(before, key, quote)
    assert why_not(after, key, quote) == ""


def test_a_model_that_somebody_else_loaded_shows(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        key, honest = await endorser.public_key(), decode_endorsement(await endorser.endorse(CHALLENGE))
        await tools(tpm).extend(PCR, [digest("hidden")])
        with pytest.raises(UnavailableError, match="something else than this agent put there.*16 or 23"):
            await endorser.endorse(CHALLENGE)
        quoted = await tools(tpm).quote(PCR, CHALLENGE)
        return key, encode_endorsement(replace(honest, statement=quoted.statement, signature=quoted.signature))

    key, lie = run(play)
    assert "other digests than the register" in why_not(lie, key)


def test_a_quote_of_another_pcr_is_refused(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes, bytes]:
        endorser, other = endorser_by(tpm), endorser_by(tpm, pcr=16)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE), await other.endorse(CHALLENGE)

    key, endorsement, other = run(play)
    assert why_not(other, key) == ""
    assert "register" in why_not(encode_endorsement(replace(decode_endorsement(other), register=PCR)), key)
    assert decode_endorsement(endorsement).register == PCR


def test_endorsements_that_are_asked_for_together_wait_for_each_other(tpm: Swtpm) -> None:
    quotes = [replace(QUOTE, counter=number) for number in range(1, 7)]

    async def play() -> tuple[bytes, list[bytes]]:
        endorser = endorser_by(tpm)
        made = await asyncio.gather(*(endorser.endorse(endorsed_digest(quote)) for quote in quotes))
        return await endorser.public_key(), made

    key, made = run(play)
    assert [why_not(endorsement, key, quote) for endorsement, quote in zip(made, quotes, strict=True)] == [""] * 6


def test_a_log_that_is_full_begins_anew_with_what_still_runs(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm, *(digest(str(number)) for number in range(MAX_LOG)))
        assert len(decode_endorsement(await endorser.endorse(CHALLENGE)).log) == MAX_LOG
        endorser.loaded(LOADED)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE)

    key, endorsement = run(play)
    assert why_not(endorsement, key) == ""
    assert decode_endorsement(endorsement).log == LOADED


# the key


def test_the_key_stays_with_the_tpm_over_restarts_of_both(tpm: Swtpm) -> None:
    first = run(lambda: endorser_by(tpm).public_key())
    assert run(lambda: endorser_by(tpm).public_key()) == first
    tpm.stop()
    tpm.start()
    assert run(lambda: endorser_by(tpm).public_key()) == first
    tpm.run("tpm2_evictcontrol", "-C", "o", "-c", f"{KEY_HANDLE:#x}")
    assert run(lambda: endorser_by(tpm).public_key()) == first


def test_a_key_that_is_taken_away_while_the_agent_runs_is_made_again(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        key, _ = await endorser.public_key(), await endorser.endorse(CHALLENGE)
        tpm.run("tpm2_evictcontrol", "-C", "o", "-c", f"{KEY_HANDLE:#x}")
        with pytest.raises(UnavailableError):
            await endorser.endorse(CHALLENGE)
        return key, await endorser.endorse(CHALLENGE)

    key, endorsement = run(play)
    assert why_not(endorsement, key) == ""


def test_a_verifier_says_when_it_starts_whose_endorsements_it_cannot_check(
    tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = run(lambda: endorser_by(tpm).public_key())
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    said: list[str] = []

    async def play() -> None:
        async with Agent(
            AgentConfig.from_mapping(configuration(tmp_path, fleet={"endorsers": {"barn": key.hex()}})), said.append
        ):
            pass

    run(play)
    assert [line for line in said if "endorsements of barn cannot be checked here" in line and "slyos-edge[tpm]" in line]


def test_making_the_key_leaves_nothing_behind_in_the_tpms_memory(tpm: Swtpm) -> None:
    for _ in range(5):
        run(lambda: endorser_by(tpm).public_key())
        tpm.run("tpm2_evictcontrol", "-C", "o", "-c", f"{KEY_HANDLE:#x}")


def test_another_programs_key_in_its_place_is_neither_used_nor_removed(tpm: Swtpm, tmp_path: Path) -> None:
    context = str(tmp_path / "key")
    tpm.run("tpm2_createprimary", "-C", "o", "-G", "ecc256", "-c", context)
    tpm.run("tpm2_evictcontrol", "-C", "o", "-c", context, f"{KEY_HANDLE:#x}")
    tpm.run("tpm2_flushcontext", "-t")
    for _ in range(2):
        with pytest.raises(RefusedError, match="another program's key.*tpm2_evictcontrol -C o -c 0x81025359"):
            run(lambda: endorser_by(tpm).endorse(CHALLENGE))


def test_an_agent_that_starts_anew_begins_its_pcr_anew(tpm: Swtpm) -> None:
    run(lambda: endorser_by(tpm, digest("of the agent before")).endorse(CHALLENGE))

    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        return await endorser.public_key(), await endorser.endorse(CHALLENGE)

    key, endorsement = run(play)
    assert why_not(endorsement, key) == ""
    assert decode_endorsement(endorsement).log == LOADED


def test_a_pcr_that_cannot_be_reset_is_said_by_the_tpm_too(tpm: Swtpm) -> None:
    with pytest.raises(UnavailableError, match=r"bad locality.*choose \[attest\] pcr = 23 or 16"):
        run(lambda: endorser_by(tpm, pcr=10).endorse(CHALLENGE))


# a TPM that fails


def test_a_tpm_that_is_gone_is_told_and_vouches_again_when_it_is_back(tpm: Swtpm) -> None:
    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        key, _ = await endorser.public_key(), await endorser.endorse(CHALLENGE)
        tpm.stop()
        for _ in range(2):
            with pytest.raises(UnavailableError, match=r"TPM swtpm:path.*socket"):
                await endorser.endorse(CHALLENGE)
        tpm.start()
        return key, await endorser.endorse(CHALLENGE)

    key, endorsement = run(play)
    assert why_not(endorsement, key) == ""


def scripted(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, script: str) -> None:
    """``script`` stands where ``program`` stood; the others stay."""
    folder.mkdir(exist_ok=True)
    path = folder / program
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("limited", ["the command", "the endorsement"])
def test_a_tpm_that_hangs_costs_its_limit_and_leaves_no_process(
    tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: str
) -> None:
    endorser, pids = endorser_by(tpm), tmp_path / "pids"

    async def play() -> None:
        await endorser.endorse(CHALLENGE)
        scripted(tmp_path / "bin", monkeypatch, "tpm2_quote", f"echo $$ > {pids}; sleep 1000 & echo $! >> {pids}; wait")
        limit(endorser, command_s=0.5) if limited == "the command" else limit(endorser, endorse_s=0.5)
        with pytest.raises(UnavailableError, match="tpm2_quote took longer than 0.5 s|not answered within 0.5 s"):
            await endorser.endorse(CHALLENGE)
        monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
        limit(endorser)
        await endorser.endorse(CHALLENGE)

    run(play)
    for line in pids.read_text().split() if pids.exists() else []:
        assert not _runs(int(line)), line


def limit(endorser: TpmEndorser, command_s: float = WAIT_S, endorse_s: float = WAIT_S) -> None:
    """From now on: what ran before has had all the time that it wanted."""
    endorser._tools._command_s, endorser._endorse_s = command_s, endorse_s


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hang_while_the_pcr_is_extended_begins_it_anew(tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = which("tpm2_pcrextend")
    model = ModelMeasurement("later", digest("later"), digest("later"))
    later = replace(QUOTE, measurements=replace(MEASURED, models=(*MEASURED.models, model)))

    async def play() -> tuple[bytes, bytes]:
        endorser = endorser_by(tpm)
        key, _ = await endorser.public_key(), await endorser.endorse(CHALLENGE)
        endorser.loaded([*LOADED, model.mapped])
        scripted(tmp_path / "bin", monkeypatch, "tpm2_pcrextend", f'{real} "$@"; exec sleep 1000')
        limit(endorser, command_s=1.0)
        with pytest.raises(UnavailableError, match="tpm2_pcrextend took longer"):
            await endorser.endorse(endorsed_digest(later))
        monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
        limit(endorser)
        return key, await endorser.endorse(endorsed_digest(later))

    key, endorsement = run(play)
    assert why_not(endorsement, key, later) == ""


WRITES = 'while [ $# -gt 0 ]; do case "$1" in -m) m=$2;; -s) s=$2;; esac; shift; done;'
NONSENSE = {
    "nothing at all": ("exit 0", "message was not written"),
    "an empty statement": (f'{WRITES} : > "$m"; : > "$s"', "TPM signature"),
    "a statement without end": (f'{WRITES} head -c 9999 /dev/zero > "$m"; : > "$s"', "more than 1024 bytes"),
    "complaints without end": ("yes complaint >&2", "took longer than"),
    "a complaint in colours": (r"printf 'ERROR: \033[31mred\033[0m\n' >&2; exit 3", "red"),
    "an end without a word": ("exit 3", "exit status 3"),
    "an end by a signal": ("kill -SEGV $$", "exit status -11"),
}


@pytest.mark.parametrize(("script", "why"), NONSENSE.values(), ids=NONSENSE.keys())
def test_programs_that_talk_nonsense_are_reported_in_one_line(
    tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    async def play() -> None:
        endorser = endorser_by(tpm)
        await endorser.endorse(CHALLENGE)
        scripted(tmp_path, monkeypatch, "tpm2_quote", script)
        limit(endorser, command_s=1.0 if "took longer" in why else WAIT_S)
        await endorser.endorse(CHALLENGE)

    with pytest.raises(SlyError, match=why) as raised:
        run(play)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def test_without_the_programs_one_message_says_what_to_install(tpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match="not installed; run: apt-get install tpm2-tools"):
        run(lambda: endorser_by(tpm).endorse(CHALLENGE))
    with pytest.raises(UnavailableError, match=f"not installed: {', '.join(PROGRAMS)}; run: apt-get install tpm2-tools"):
        open_endorser(AttestSection(key="tpm"), None, pytest.fail)


# who vouches


def test_what_vouches_is_chosen_by_the_setting_and_never_by_accident(tpm: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endorsers, "RESOURCE_MANAGER", Path("/nowhere/tpmrm0"))
    root = DeviceRoot(SEED)
    for attest, given, kind in (
        (AttestSection(), None, type(None)),
        (AttestSection(), root, RootEndorser),
        (AttestSection(tcti=tpm.tcti), None, TpmEndorser),
        (AttestSection(tcti=tpm.tcti), root, RootEndorser),
        (AttestSection(key="software", tcti=tpm.tcti), root, type(None)),
        (AttestSection(key="tpm", tcti=tpm.tcti), root, TpmEndorser),
        (AttestSection(key="tpm"), None, TpmEndorser),
        (AttestSection(on=False, key="tpm"), root, type(None)),
    ):
        assert type(open_endorser(attest, given, pytest.fail)) is kind, attest


def test_a_tpm_that_is_there_and_cannot_be_used_is_told_and_the_key_file_alone_vouches(
    tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, said = tmp_path / "tpmrm0", list[str]()
    device.touch()
    monkeypatch.setattr(endorsers, "RESOURCE_MANAGER", device)
    assert isinstance(open_endorser(AttestSection(), None, pytest.fail), TpmEndorser)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert open_endorser(AttestSection(), None, said.append) is None
    assert "group tss" in said.pop()
    monkeypatch.undo()
    monkeypatch.setattr(endorsers, "RESOURCE_MANAGER", device)
    monkeypatch.setenv("PATH", "")
    assert open_endorser(AttestSection(), None, said.append) is None
    assert "apt-get install tpm2-tools" in said.pop() and not said


@pytest.mark.parametrize("pcr", [0, 7, 10, 15, 17, 22])
def test_a_pcr_that_an_agent_cannot_begin_anew_is_refused_by_name(tpm: Swtpm, pcr: int) -> None:
    with pytest.raises(ConfigError, match=r"\[attest\] pcr: got \d+; allowed: 16 or 23"):
        open_endorser(AttestSection(key="tpm", pcr=pcr), None, pytest.fail)


def test_a_root_tells_when_its_log_is_full_and_extends_each_model_once() -> None:
    root, before = DeviceRoot(SEED), DeviceRoot(SEED)
    endorser = RootEndorser(root)
    for _ in range(3):
        endorser.loaded(LOADED)
    for each in LOADED:
        before.extend(0, each)
    assert root.sign(CHALLENGE) == before.sign(CHALLENGE)
    endorser.loaded(digest(str(number)) for number in range(MAX_LOG - len(LOADED)))
    assert decode_endorsement(run(lambda: endorser.endorse(CHALLENGE)))
    endorser.loaded([digest("one too many")])
    with pytest.raises(UnavailableError, match="start the agent anew"):
        run(lambda: endorser.endorse(CHALLENGE))


# on the way


class Slow:
    """An endorser that answers when it is let."""

    kind: ClassVar[KeyKind] = KeyKind.TPM

    def __init__(self) -> None:
        self.let = asyncio.Event()

    async def public_key(self) -> bytes:
        raise UnavailableError("TPM", "away")

    def loaded(self, digests: Any) -> None:
        pass

    async def endorse(self, challenge: bytes) -> bytes:
        await self.let.wait()
        if challenge == b"bad":
            raise UnavailableError("TPM", "away")
        return b"made of " + challenge


def test_few_quotes_wait_at_once_and_each_is_answered() -> None:
    fed: list[Event] = []

    async def play() -> None:
        slow, tasks = Slow(), Tasks(pytest.fail)
        endorsing = Endorsing(slow, tasks, fed.append)
        endorsing.prepare()
        for number in range(MAX_ON_THEIR_WAY):
            endorsing.begin(b"%d" % number if number else b"bad")
        assert fed == []
        endorsing.begin(b"more")
        assert fed == [Endorsed(b"more", refusal="4 quotes wait for it already")]
        slow.let.set()
        while len(fed) < MAX_ON_THEIR_WAY + 1:
            await asyncio.sleep(0)
        endorsing.begin(b"next")
        while len(fed) < MAX_ON_THEIR_WAY + 2:
            await asyncio.sleep(0)
        await tasks.close()

    run(play)
    assert fed[1:] == [
        Endorsed(b"bad", refusal="TPM: away"), *(Endorsed(each, b"made of " + each) for each in (b"1", b"2", b"3", b"next"))
    ]  # fmt: skip


def test_without_hardware_every_challenge_is_refused_at_once() -> None:
    fed: list[Event] = []
    Endorsing(None, Tasks(pytest.fail), fed.append).begin(b"c")
    assert fed == [Endorsed(b"c", refusal="no hardware here vouches for this board")]


# a whole agent


def latest_quote(agent: Agent) -> Quote | None:
    attestation = agent.node.trust.attestation
    assert attestation is not None
    return attestation.attester.latest[0] if attestation.attester.latest else None


async def first_quote(agent: Agent) -> Quote:
    await agent.work.until(lambda: latest_quote(agent) is not None)
    quote = latest_quote(agent)
    assert quote is not None
    return quote


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The section of a broker that is there: without a link nobody asks for a quote."""
    with mosquitto(tmp_path / "broker") as running:
        yield {"host": "127.0.0.1", "port": running.port}


def test_the_quote_of_an_agent_with_a_tpm_is_endorsed_and_verifies(tpm: Swtpm, tmp_path: Path, broker: dict[str, Any]) -> None:
    async def play() -> tuple[Quote, bytes]:
        attest = {"key": "tpm", "tcti": tpm.tcti}
        config = AgentConfig.from_mapping(configuration(tmp_path, attest=attest, broker=broker))
        async with Agent(config, lambda text: None) as agent:
            return await first_quote(agent), await endorser_by(tpm).public_key()

    quote, key = run(play)
    assert quote.key_kind is KeyKind.TPM and quote.endorsement
    assert check_endorsement(quote, key) == ""
    assert [model.name for model in quote.measurements.models] == [MODEL]
    assert quote.measurements.models[0].mapped in decode_endorsement(quote.endorsement).log


def test_the_quote_of_an_emulated_board_is_endorsed_by_its_root_and_says_emulated(tmp_path: Path, broker: dict[str, Any]) -> None:
    async def play() -> tuple[Quote, bytes]:
        async with Agent(AgentConfig.from_mapping(configuration(tmp_path, broker=broker)), lambda text: None) as agent:
            root = agent.board.device_root()
            assert root is not None
            return await first_quote(agent), root.public_key

    quote, key = run(play)
    assert (quote.key_kind, quote.emulated) == (KeyKind.EMULATED, True)
    assert check_endorsement(quote, key) == ""
    assert run(play)[1] == key


@pytest.mark.parametrize("hangs", [False, True], ids=["away", "hanging"])
def test_an_agent_whose_tpm_is_away_or_hangs_serves_and_quotes_with_the_reason_told(
    tpm: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker: dict[str, Any], hangs: bool
) -> None:
    if hangs:
        monkeypatch.setattr(endorsers, "ENDORSE_S", 0.5)
        for program in PROGRAMS:
            scripted(tmp_path / "bin", monkeypatch, program, f"echo > {tmp_path}/hung; exec sleep 1000")
    else:
        tpm.stop()
    said: list[str] = []

    async def play() -> tuple[Status, Quote]:
        attest = {"key": "tpm", "tcti": tpm.tcti}
        config = AgentConfig.from_mapping(configuration(tmp_path, attest=attest, broker=broker))
        async with Agent(config, said.append) as agent:
            zeros = Tensor("float32", (1, 128, 128, 3), bytes(4 * 128 * 128 * 3))
            answer = await agent.submit(InferenceRequest("0" * 32, "invoke", {"input": zeros}, MODEL))
            return answer.status, await first_quote(agent)

    status, quote = run(play)
    assert status is Status.OK
    assert (tmp_path / "hung").exists() is hangs
    assert (quote.key_kind, quote.endorsement) == (KeyKind.SOFTWARE, b"")
    assert any("hardware does not vouch" in line and tpm.tcti in line for line in said), said


def configured(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "agent.toml"
    path.write_text(toml(configuration(folder / "state", **sections)))
    return path


def test_sly_identity_prints_what_to_enroll(tpm: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configured(tmp_path, attest={"key": "tpm", "tcti": tpm.tcti})
    assert cli.main(["identity", "--config", str(path)]) == 0
    member, words, endorser = capsys.readouterr().out.splitlines()
    key = run(lambda: endorser_by(tpm).public_key())
    assert (words, endorser) == ("# for [fleet.endorsers], tpm:", f'kitchen = "{key.hex()}"')
    fleet = configuration(tmp_path / "state", fleet={"endorsers": {"kitchen": key.hex()}})
    assert AgentConfig.from_mapping(fleet).fleet.endorsers == {"kitchen": key.hex()}
    assert member != endorser


def test_sly_identity_of_an_emulated_board_prints_its_root_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configured(tmp_path)
    lines = []
    for _ in range(2):
        assert cli.main(["identity", "--config", str(path)]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0] == lines[1] and lines[0][1] == "# for [fleet.endorsers], emulated:"
    path = configured(tmp_path, attest={"key": "software"})
    assert cli.main(["identity", "--config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == lines[0][:1]


def test_a_check_of_the_configuration_names_a_tpm_that_is_away(
    tpm: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured(tmp_path, attest={"key": "tpm", "tcti": tpm.tcti})
    assert cli.main(["agent", "--check", "--config", str(path)]) == 0
    tpm.stop()
    assert cli.main(["agent", "--check", "--config", str(path)]) == cli.USAGE_ERROR
    told = capsys.readouterr().err
    assert tpm.tcti in told and told.endswith('see [attest] tcti, or set [attest] key = "software" to go without a TPM\n')


def test_no_secret_is_in_any_log_topic_status_or_file_but_its_own(tmp_path: Path) -> None:
    """Both seeds, raw, in hexadecimal and as Python shows bytes; the broker's file holds all that is retained."""
    state, broker = tmp_path / "state", Mosquitto(tmp_path / "broker")
    broker.start()
    try:
        with daemon(state, broker={"host": "127.0.0.1", "port": broker.port}) as running:
            wait_for_a_quote_on(broker.port)
            status = str(running.status())
            code, log = running.stop()
    finally:
        broker.stop()
    assert code == 0
    keys = {name: (state / name).read_bytes() for name in ("identity.key", "device_root.key")}
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files[Path("log")], files[Path("status")] = log.encode(), status.encode()
    retained = files[tmp_path / "broker" / "mosquitto.db"]
    assert b"board/kitchen/quote" in retained and b"slyos-edge,2026:quote" in retained
    for name, seed in keys.items():
        assert (state / name).stat().st_mode & 0o777 == 0o600
        for form in (seed, seed.hex().encode(), repr(seed)[2:-1].encode()):
            assert {path for path, data in files.items() if form in data} <= {state / name}, (name, form)


def wait_for_a_quote_on(port: int) -> None:
    from paho.mqtt import subscribe

    found = subscribe.simple("sly/1/home/board/kitchen/quote", hostname="127.0.0.1", port=port)  # type: ignore[no-untyped-call]
    assert found.payload


def test_an_endorsers_key_that_is_none_stops_the_start_by_name(tmp_path: Path) -> None:
    sections = {"fleet": {"endorsers": {"kitchen": "ab" * 40}}}

    async def enter() -> None:
        async with Agent(AgentConfig.from_mapping(configuration(tmp_path, **sections)), lambda text: None):
            pytest.fail("it started")

    with pytest.raises(ConfigError, match=r"\[fleet.endorsers\] kitchen.*sly identity"):
        run(enter)
