"""A board notices what becomes of the files that it runs, whoever changed them and however: real agents, real files.

What changed has to be *told* (``Measured``), and soon; what did not, not.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from board_support.board import BoardSettings
from board_support.faults import BitFlips
from board_support.jalapeno import Jalapeno
from edge_agent import configured
from edge_agent.agent import Agent
from edge_agent.attest import rounds
from edge_agent.attest.evidence import Measurements, ModelMeasurement
from edge_agent.core.config import AgentConfig
from edge_agent.core.errors import ConfigError
from edge_agent.core.values import InferenceRequest, Status, TrustTier
from edge_agent.node.events import Event, Measured
from edge_agent.placement.facts import rules_digest
from edge_agent.placement.options import Rules
from edge_agent.runtime.supervisor import EngineState
from edge_agent.shell.goldens import PERIOD_US
from edge_agent.shell.watched_file import WatchedFile
from edge_agent.speaking import HostedLanguage
from edge_agent.store.blobs import ASIDE_PREFIX
from models.catalog import card
from tests.fetched import model_path
from tests.needs import needs
from tests.sandboxes import until_state
from tests.speaking import tiny

MODEL = "resnet8-cifar10"
LIMIT_S = 60.0


class Board(Agent):
    """An agent that keeps what it is told it measured."""

    def __init__(self, config: AgentConfig, **given: Any) -> None:
        super().__init__(config, lambda text: None, **given)
        self.told: list[Measurements] = []

    def _feed(self, event: Event) -> None:
        if isinstance(event, Measured):
            self.told.append(event.measurements)
        super()._feed(event)

    def model(self, name: str = MODEL) -> ModelMeasurement:
        return next(each for each in self.told[-1].models if each.name == name)

    def file(self) -> Path:
        return self.host._blobs.path_of(bytes.fromhex(card(MODEL).source.sha256))

    def watched(self) -> WatchedFile:
        assert self.measuring is not None
        return next(each for name, each in self.measuring._files.items() if MODEL in name)


def configuration(folder: Path, serve: list[str] | None = None, **sections: dict[str, Any]) -> AgentConfig:
    return AgentConfig.from_mapping(
        {
            "board": {"id": "kitchen", "backend": "jalapeno", "profile": "raspberry_pi_5", "paced": False},
            "state": {"folder": str(folder)},
            "models": {"serve": [MODEL] if serve is None else serve, "folder": str(model_path(MODEL).parent)},
            **sections,
        }
    )


@asynccontextmanager
async def board(folder: Path, config: AgentConfig | None = None, **given: Any) -> AsyncIterator[Board]:
    running = Board(config or configuration(folder), **given)
    async with running:
        yield running


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await story

    asyncio.run(bounded())


def change(path: Path, offset: int = 5000) -> bytes:
    """Turn one bit over in place and set the times back; the digest of what is there now."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return hashlib.sha256(path.read_bytes()).digest()


def test_what_is_told_first_is_what_was_loaded(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            told, digest = kitchen.told[0], bytes.fromhex(card(MODEL).source.sha256)
            assert [(each.name, each.offered, each.mapped) for each in told.models] == [(MODEL, digest, digest)]
            attest = kitchen.node.settings.attest
            assert attest is not None
            assert {told.code} == attest.references.code
            assert told.library in attest.references.libraries
            assert {told.policy} == attest.references.policy
            assert digest in attest.references.models

    run(story())


def test_one_bit_changed_in_place_is_told_although_size_and_times_are_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            changed = change(kitchen.file())
            await until(lambda: kitchen.model().mapped == changed)
            assert kitchen.model().offered == bytes.fromhex(card(MODEL).source.sha256)
            change(kitchen.file())
            await until(lambda: kitchen.model().mapped == kitchen.model().offered)

    run(story())


def test_a_copy_that_rotted_is_set_aside_at_the_next_start_and_made_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            changed = change(kitchen.file())
            bad = kitchen.file().with_name(f"{ASIDE_PREFIX}{kitchen.file().name}")
        async with board(tmp_path) as kitchen:
            assert kitchen.told[0].models[0].mapped == bytes.fromhex(card(MODEL).source.sha256)
            assert not kitchen.node.execution.withdrawn and hashlib.sha256(bad.read_bytes()).digest() == changed

    run(story())


def test_a_change_that_leaves_no_mark_is_found_by_the_background_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shm = Path("/dev/shm")
    needs(os.access(shm, os.W_OK), "no tmpfs at /dev/shm, where a write through a mapping leaves no mark")
    monkeypatch.setattr(rounds, "MIN_ROUND_US", 200_000)
    folder = shm / f"sly-{os.getpid()}"
    folder.mkdir()

    async def story() -> None:
        config = configuration(folder, attest={"rehash_bytes_per_s": 2**30})
        async with board(folder, config) as kitchen:
            kitchen.file().chmod(0o644)
            with kitchen.file().open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[5000] ^= 0
                watched = kitchen.watched()
                kitchen.measuring.look()  # type: ignore[union-attr]
                before = watched._mark
                mapped[5000] ^= 1
                assert rounds.Mark.of(kitchen.file().stat()) == before, "it does leave a mark here"
                changed = hashlib.sha256(mapped).digest()
            await until(lambda: kitchen.model().mapped == changed)

    try:
        run(story())
    finally:
        shutil.rmtree(folder)


def test_a_file_put_in_its_place_by_rename_is_told_and_so_is_the_right_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            right = kitchen.file().read_bytes()
            for content, expected in ((b"another model", hashlib.sha256(b"another model").digest()), (right, None)):
                other = tmp_path / "other"
                other.write_bytes(content)
                other.rename(kitchen.file())
                wanted = expected or kitchen.model().offered
                await until(lambda wanted=wanted: kitchen.model().mapped == wanted)  # type: ignore[misc]
            kitchen.file().unlink()
            count = len(kitchen.told)
            kitchen.measuring.look()  # type: ignore[union-attr]
            assert len(kitchen.told) == count, "the engine runs on from what it maps"

    run(story())


def test_what_is_mapped_counts_before_what_lies_at_the_path(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            mapped = tmp_path / "mapped"
            os.link(kitchen.file(), mapped)
            other = tmp_path / "other"
            other.write_bytes(mapped.read_bytes())
            other.rename(kitchen.file())
            changed, watched = change(mapped), kitchen.watched()
            await until(lambda: kitchen.model().mapped == changed and len(watched._digests) == 2)
            kitchen.measuring.tell()  # type: ignore[union-attr]
            assert kitchen.model().mapped == changed

    run(story())


def test_a_file_that_was_only_touched_is_hashed_again_and_nothing_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            await until(lambda: kitchen.model().golden)
            count, watched = len(kitchen.told), kitchen.watched()
            watched._digests.clear()
            kitchen.file().touch()
            await until(lambda: watched._digests)
            assert list(watched._digests.values()) == [kitchen.model().offered]
            assert len(kitchen.told) == count

    run(story())


def test_a_model_truncated_while_it_is_mapped_costs_its_child_at_most_and_is_told(tmp_path: Path) -> None:
    """A child that reads a page that is gone dies of SIGBUS; one whose kernels packed their weights runs on for its lifetime."""

    async def story() -> None:
        async with board(tmp_path) as kitchen:
            await until(lambda: kitchen.model().golden)
            engine = kitchen.host._supervisor._engines[MODEL]
            assert engine._signature is not None
            inputs = {spec.name: _zeros(spec) for spec in engine._signature.inputs}
            kitchen.file().chmod(0o644)
            os.truncate(kitchen.file(), 0)
            short = hashlib.sha256(kitchen.file().read_bytes()).digest()
            answer = await kitchen.submit(InferenceRequest("0" * 31 + "1", "classify", inputs, MODEL))
            assert answer.status in (Status.OK, Status.FAILED)
            if engine.state is EngineState.READY and engine._sandbox is not None:
                engine._sandbox.kill("told to")
            await until_state(kitchen.host._supervisor, EngineState.QUARANTINED, MODEL)
            await until(lambda: kitchen.model().mapped == short)
            assert not kitchen.faulty

    run(story())


def _zeros(spec: Any) -> Any:
    from tests.sandboxes import filled

    return filled(spec)


def test_a_model_that_was_unloaded_is_told_of_no_more_and_measured_anew_when_it_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            await until(lambda: kitchen.model().golden)
            watched = kitchen.watched()
            held = list(watched.fds.values())
            await kitchen.host._supervisor.unload(MODEL)
            await until(lambda: not kitchen.told[-1].models)
            assert not watched.fds
            for fd in held:
                assert "resnet8" not in _path_of(fd)
            await kitchen.host.load(MODEL)
            await until(lambda: kitchen.told[-1].models and kitchen.model().golden)
            changed = change(kitchen.file())
            await until(lambda: kitchen.model().mapped == changed)

    run(story())


def _path_of(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""


def test_descriptors_of_what_was_measured_are_closed_in_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path):
            pass

    run(story())
    before = _open_files()
    run(story())
    assert _open_files() == before


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# golden inputs


def test_the_golden_answer_is_that_of_the_catalog_and_flipped_bits_show_in_it(tmp_path: Path) -> None:
    async def golden(folder: Path, *faults: BitFlips) -> tuple[bytes, str]:
        emulated = Jalapeno(BoardSettings(profile="raspberry_pi_5", paced=False))
        emulated.inject(faults)
        async with board(folder, board=emulated) as kitchen:
            await until(lambda: kitchen.model().golden)
            return kitchen.model().golden, kitchen.told[-1].library_name

    async def story() -> None:
        sound, library = await golden(tmp_path / "sound")
        assert await golden(tmp_path / "again") == (sound, library)
        faulty, _ = await golden(tmp_path / "faulty", BitFlips(seed=3))
        assert faulty != sound
        known = card(MODEL).golden.get(library)
        if known is None:
            pytest.skip(f"the catalog has no golden answer for {library}")
        assert sound.hex() == known

    run(story())


def test_a_golden_input_waits_until_nothing_else_runs(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            assert kitchen.measuring is not None
            await until(lambda: kitchen.model().golden)
            goldens = kitchen.measuring.goldens
            engine = kitchen.host._supervisor._engines[MODEL]
            assert engine._signature is not None
            assert engine._sandbox is not None
            inputs = {spec.name: _zeros(spec) for spec in engine._signature.inputs}
            os.kill(engine._sandbox.pid, signal.SIGSTOP)
            request = asyncio.create_task(kitchen.submit(InferenceRequest("0" * 31 + "1", "classify", inputs, MODEL)))
            await until(lambda: not engine.idle)
            goldens.digests.clear()
            for due_us in (0, -2 * PERIOD_US):
                goldens._due_us[MODEL] = due_us
                await goldens.run_due()
                assert not goldens.digests
            os.kill(engine._sandbox.pid, signal.SIGCONT)
            assert (await request).status is Status.OK
            await until(lambda: goldens.digests)

    run(story())


def test_a_golden_input_that_kills_its_engine_costs_what_every_death_costs(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path) as kitchen:
            assert kitchen.measuring is not None
            await until(lambda: kitchen.model().golden)
            goldens, engine = kitchen.measuring.goldens, kitchen.host._supervisor._engines[MODEL]
            before = kitchen.model().golden
            assert engine._sandbox is not None
            os.kill(engine._sandbox.pid, signal.SIGSTOP)
            goldens._due_us.clear()
            running = asyncio.create_task(goldens.run_due())
            await until(lambda: not engine.idle)
            os.kill(engine._sandbox.pid, signal.SIGKILL)
            await running
            assert len(engine._record.deaths) == 1
            assert goldens.digests[MODEL] == before
            await until(lambda: engine.idle)

    run(story())


# language models


def test_of_a_language_model_stages_and_tokenizer_are_measured_through_every_child(tmp_path: Path) -> None:
    language, built = tiny()
    folder = tmp_path / "models"
    shutil.copytree(built, folder)
    (folder / f"{language.name}.card.toml").write_text(language.to_toml())

    async def story() -> None:
        models = {"serve": [language.name], "folder": str(folder)}
        config = configuration(tmp_path / "state", models=models, language={"window_tokens": 256})
        async with board(tmp_path, config) as kitchen:

            def measured() -> ModelMeasurement:
                return kitchen.model(language.name)

            assert measured().mapped == measured().offered
            assert measured().golden == b""
            attest = kitchen.node.settings.attest
            assert attest is not None
            assert measured().offered in attest.references.models
            service = cast(HostedLanguage, kitchen.host.speakers[language.name]).service
            stages, tokenizer = (each.path for each in service.files)
            change(tokenizer, 100)
            await until(lambda: measured().mapped != measured().offered)
            change(tokenizer, 100)
            await until(lambda: measured().mapped == measured().offered)
            copy, kept, old = tmp_path / "copy", tmp_path / "kept", service.pump.child
            shutil.copy(stages, copy)
            os.link(copy, kept)
            copy.rename(stages)
            assert old is not None
            old.kill("told to")
            await until(lambda: service.pump.child is not old and not service.pump.why)
            stages.unlink()
            change(kept)
            await until(lambda: measured().mapped != measured().offered)
            change(kept)
            await until(lambda: measured().mapped == measured().offered)
            stages.write_bytes(b"no stages")
            await until(lambda: measured().mapped != measured().offered)

    run(story())


# settings


def test_a_board_that_does_not_attest_measures_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with board(tmp_path, configuration(tmp_path, attest={"on": False})) as kitchen:
            assert kitchen.measuring is None
            assert kitchen.told == []
            assert kitchen.node.settings.attest is None

    run(story())


def test_secrets_are_drawn_anew_in_each_boot(tmp_path: Path) -> None:
    async def drawn() -> tuple[bytes, bytes]:
        async with board(tmp_path, configuration(tmp_path, [])) as kitchen:
            attest = kitchen.node.settings.attest
            assert attest is not None
            return attest.secret, attest.bootseed

    async def story() -> None:
        assert len({*await drawn(), *await drawn()}) == 4

    run(story())


KEY = "58" + 31 * "66"
"""The base point of Ed25519 (RFC 8032, section 5.1): a public key."""
TWO: dict[str, dict[str, Any]] = {"fleet": {"members": {"cellar": KEY}}}


def checked(folder: Path, **sections: dict[str, Any]) -> None:
    asyncio.run(configured.check(configuration(folder, [], **sections)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"attest": {"verifiers": ["cellar"]}}, r"verifiers.*cellar.*kitchen"),
        (TWO | {"attest": {"verifiers": ["kitchen"]}}, r"verifiers: kitchen; kitchen can never.*name at least 2 verifiers"),
        (TWO | {"attest": {"verifiers": ["cellar", "kitchen"], "agree": 2}}, r"agree = 2.*cellar can never be trusted"),
        (TWO | {"attest": {"agree": 2}}, r"agree = 2, verifiers: all members; cellar can never be trusted"),
        ({"fleet": {"endorsers": {"cellar": "0" * 65}}}, r"endorsers.*hexadecimal"),
        ({"fleet": {"members": {"cellar": "ef" * 32}}}, r"\[fleet.members\] cellar.*an Ed25519 public key; copy it whole"),
        ({"fleet": {"operators": {"ann": "00" * 32}}}, r"\[fleet.operators\] ann.*an Ed25519 public key"),
    ],
)
def test_settings_that_contradict_each_other_are_found_by_the_check(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    checked(tmp_path)
    checked(tmp_path, **TWO, attest={"verifiers": ["cellar", "kitchen"]})
    checked(tmp_path, attest={"verifiers": ["kitchen"]})
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, **sections)


def test_settings_reach_the_node(tmp_path: Path) -> None:
    async def story() -> None:
        sections: dict[str, dict[str, Any]] = {
            "attest": {
                "epoch_s": 7, "missed": 9, "verifiers": ["kitchen"], "software_keys": "affirming", "recheck_permille": 5,
                "code": ["ab" * 32], "libraries": ["cd" * 32],
            },
            "fleet": {"operators": {"ann": KEY}, "endorsers": {"kitchen": "01" * 32}},
        }  # fmt: skip
        async with board(tmp_path, configuration(tmp_path, [], **sections)) as kitchen:
            attest = kitchen.node.settings.attest
            assert attest is not None
            assert (attest.epoch_us, attest.missed, attest.recheck_permille) == (7_000_000, 9, 5)
            assert (attest.verifiers, attest.software_tier) == (frozenset({"kitchen"}), TrustTier.AFFIRMING)
            assert (attest.operators, attest.endorsers) == ({"ann": bytes.fromhex(KEY)}, {"kitchen": b"\x01" * 32})
            assert b"\xab" * 32 in attest.references.code
            assert b"\xcd" * 32 in attest.references.libraries
            assert len(attest.references.code) == len(attest.references.libraries) == 2

    run(story())


def test_what_a_charter_releases_is_no_part_of_what_boards_must_have_alike_and_its_policy_is(tmp_path: Path) -> None:
    """Boards hear of a charter one after the other: till then they differ in releases, and are none the worse for it."""
    config = configuration(tmp_path, [])
    own = Rules(config.policy, configured.release_digests(config))
    with_release = replace(own, releases=own.releases | {b"1" * 32})
    other_policy = replace(own, policy=replace(own.policy, energy_us_per_mj=1))
    assert configured.placed_by(config, with_release) == configured.placed_by(config, own)
    assert configured.placed_by(config, other_policy) != configured.placed_by(config, own)


def test_the_policy_is_what_a_board_places_and_appraises_by(tmp_path: Path) -> None:
    config = configuration(tmp_path, [])
    rules = Rules(config.policy, frozenset({b"1" * 32}))
    others = [
        (replace(config, attest=replace(config.attest, missed=4)), rules),
        (replace(config, attest=replace(config.attest, agree=2)), rules),
        (config, replace(rules, releases=frozenset())),
    ]
    digests = {configured.policy_digest(*each) for each in [(config, rules), *others]}
    assert len(digests) == 4
    assert rules_digest(rules) not in digests
    same = replace(config, attest=replace(config.attest, rehash_bytes_per_s=4096, key="software"))
    assert configured.policy_digest(same, rules) == configured.policy_digest(config, rules)
