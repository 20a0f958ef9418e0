"""``sly fleet``: what an operator's commands write and say; real agents join the broker that they configured."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.attest.self_test import Check, SelfTest, Verdict, self_test_map, sign_self_test
from edge_agent.attest.words import Action, open_word
from edge_agent.cli import main
from edge_agent.commands.fleet_view import board_page, trust_lines, watch_line, watch_table
from edge_agent.commands.terminal import WIDTH
from edge_agent.configured import client_id, signer_of
from edge_agent.core.config import AgentConfig
from edge_agent.core.cose import Signer
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.gossip.presence import Presence, Standing, sign_presence
from edge_agent.gossip.record import BoardRecord, sign_record
from edge_agent.steward.enrolling import Enrolment, enroll
from edge_agent.steward.folder import OperatorFolder
from edge_agent.steward.hearing import in_order, timestamp_version
from edge_agent.steward.session import HEARD, OperatorSession
from edge_agent.steward.status import fleet_status
from edge_agent.store.identity import load_seed
from edge_agent.transport.link import Delivered, Message
from edge_agent.transport.topics import Kind, Topics
from ota.chunks import decode_chunk
from ota.orders import sign_report, sign_rollout
from ota.rollout import Plan, Progress, Report, Rollout, SlotReport, Step
from tests.brokers import free_port
from tests.operators import HOST, LIMIT_S, broker_of, clients, new_fleet

TOPICS = Topics("home")


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder that ``sly fleet init`` made; ``--fleet`` is by the variable."""
    path = tmp_path / "fleet"
    assert main(["fleet", "init", str(path), "--broker-host", HOST, "--port", str(free_port()), "--operator", "ann"]) == 0
    monkeypatch.setenv("SLY_FLEET", str(path))
    capsys.readouterr()
    return path


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet with one board, barn, for commands that change nothing."""
    folder = new_fleet(tmp_path_factory.mktemp("untouched") / "fleet")
    enroll(folder, Enrolment("barn"))
    return folder.folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What a command prints with ``--json``."""
    assert main(["fleet", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends with 2 and prints nothing."""
    assert main(["fleet", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("sly: ")
    return captured.err


def every_file(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


# What is written.


def test_a_fleets_folder_is_for_its_operator_alone_and_no_secret_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fleet"
    assert main(["fleet", "init", str(folder), "--broker-host", HOST, "--also", "broker.local"]) == 0
    assert main(["fleet", "enroll", "kitchen", "--fleet", str(folder), "--backend", "jalapeno"]) == 0
    for path in folder.rglob("*"):
        if path.is_dir() and path.parent == folder:
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    secrets = [path for path in every_file(folder) if path.suffix == ".key" or path.parent.name == "keys"]
    assert len(secrets) >= 4 + 6 + 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    captured = capfd.readouterr()
    for path in secrets:
        data = path.read_bytes()
        armoured = data.decode().splitlines()[1:-1] if data.startswith(b"-----BEGIN") else [b64encode(data).decode()]
        for told in (data.hex(), *armoured):
            assert told not in captured.out and told not in captured.err, path


def test_a_folder_with_content_is_never_taken_for_a_new_fleet(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in every_file(fleet)}
    assert "there already" in refused(capsys, "init", str(fleet), "--broker-host", HOST)
    file = tmp_path / "mine" / "file"
    file.parent.mkdir()
    file.write_text("mine")
    for each in (file, file.parent):
        assert "there already" in refused(capsys, "init", str(each), "--broker-host", HOST)
    assert list(file.parent.iterdir()) == [file]
    assert {path: path.read_bytes() for path in every_file(fleet)} == before


def test_what_enrolment_writes_is_all_that_the_board_needs(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "enroll", "barn", "--backend", "jalapeno")
    report = said(
        capsys, "enroll", "kitchen", "--backend", "jalapeno", "--profile", "raspberry_pi_5", "--group", "indoors", "--group", "a",
        "--serve", "blazeface-short", "--out", str(tmp_path / "card"), "--state", "/data/sly",
    )  # fmt: skip
    assert report["published"] is False and "nothing listens there" in report["why"]
    card = tmp_path / "card"
    assert stat.S_IMODE(card.stat().st_mode) == 0o700
    config = AgentConfig.from_mapping(tomllib.loads((card / "agent.toml").read_text()))
    assert config.board.id == "kitchen" and config.board.backend == "jalapeno" and config.models.serve == ("blazeface-short",)
    named = (config.broker.ca_file, config.broker.certificate_file, config.broker.key_file, config.ota.root)
    assert {str(Path(name).parent) for name in named} == {"/data/sly"} and str(config.state.folder) == "/data/sly"
    assert all((card / Path(name).name).exists() for name in named)
    here = replace(config, state=replace(config.state, folder=card))
    key = signer_of(here).public_key
    charter = OperatorFolder(fleet).charter
    assert charter.boards["kitchen"].key == key == bytes.fromhex(config.fleet.members["kitchen"])
    assert charter.boards["kitchen"].groups == ("a", "indoors") and charter.boards["kitchen"].endorser
    assert set(config.fleet.members) == {"kitchen", "barn"} and set(config.fleet.endorsers) == {"kitchen", "barn"}
    assert config.fleet.operators == {"ann": charter.operators["ann"].hex()}
    assert (card / "root.json").read_bytes() == OperatorFolder(fleet).repository.documents()["1.root"]


def test_the_client_id_under_which_a_session_could_be_taken_over_is_told_by_the_boards_key_alone(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids: list[str] = []
    for _ in range(2):
        state = fleet / "boards" / "kitchen"
        said(capsys, "enroll", "kitchen", "--state", str(state), *(["--again"] if ids else []))
        config = AgentConfig.from_mapping(tomllib.loads((state / "agent.toml").read_text()))
        assert client_id(config) == client_id(config)
        ids.append(client_id(config))
    assert ids[0] != ids[1] and all(each.startswith("sly-kitchen-") and len(each) == 28 for each in ids)


def test_a_board_that_made_its_own_keys_is_enrolled_without_its_secret(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, root = Signer(b"shop", b"k" * 32).public_key.hex(), Signer(b"shop", b"r" * 32).public_key.hex()
    said(capsys, "enroll", "shop", "--public-key", key, "--endorser", root)
    assert not list((fleet / "boards" / "shop").glob("*identity*"))
    [board] = said(capsys, "list")["boards"]
    assert (board["key"], board["endorsed"], board["backend"]) == (key, "emulated", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["enroll", "Kitchen!"], "board"),
        (["enroll", "ann"], "an operator's name"),
        (["enroll", "barn"], "enrolled in the fleet home already"),
        (["enroll", "shop", "--backend", "toaster"], "--backend: got toaster; allowed: auto, coral, jalapeno"),
        (["enroll", "shop", "--group", "all"], "every board is in it anyway"),
        (["enroll", "shop", "--group", "a b"], "group"),
        (["enroll", "shop", "--state", "relative"], "--state"),
        (["enroll", "shop", "--public-key", "xyz"], "hexadecimal"),
        (["enroll", "shop", "--public-key", "00" * 32], "public key"),
        (["enroll", "shop", "--endorser", "00"], "endorser"),
        (["enroll", "shop", "--serve", "No Such Model"], "[models] serve"),
        (["show", "nobody"], "allowed: barn"),
        (["group", "add", "nobody", "x"], "allowed: barn"),
        (["group", "remove", "barn", "x"], "none: it is in no group"),
        (["revoke", "nobody", "--reason", "x"], "allowed: barn"),
        (["revoke", "barn", "--reason", ""], "--reason"),
        (["revoke", "barn", "--reason", "two\nlines"], "--reason"),
        (["trust", "clear", "nobody"], "allowed: barn"),
        (["rotate-keys", "timestamp", "--host", "x"], "them with broker"),
        (["rotate-keys", "timestamp", "--new-keys", "x"], "it with root"),
        (["watch"], "nothing listens there"),
        (["trust"], "nothing listens there"),
        (["publish"], "nothing listens there"),
        (["list", "--fleet", "/nowhere/at/all"], "no fleet.toml"),
        (["init", "/proc/nowhere", "--broker-host", "x"], "/proc/nowhere"),
        (["init", "NEW", "--broker-host", "has space"], "broker host"),
        (["init", "NEW", "--broker-host", "not..a.host"], "an IP address, or a host's name"),
        (["init", "NEW", "--broker-host", "192.168.1.300"], "an IP address, or a host's name"),
        (["init", "NEW", "--broker-host", "x", "--port", "0"], "port"),
        (["init", "NEW", "--broker-host", "x", "--name", "Home"], "fleet's name"),
        (["init", "NEW", "--broker-host", "x", "--operator", "A B"], "operator"),
        (["init", "NEW", "--broker-host", "x", "--threshold", "4"], "root keys"),
        (["init", "NEW", "--broker-host", "ü.example"], "ASCII"),
    ],
)  # fmt: skip
def test_every_wrong_input_is_one_clear_line_and_changes_nothing(
    untouched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setenv("SLY_FLEET", str(untouched))
    before = {path: path.read_bytes() for path in every_file(untouched)}
    assert told in refused(capsys, *[str(tmp_path / "new") if each == "NEW" else each for each in arguments])
    assert {path: path.read_bytes() for path in every_file(untouched)} == before


def test_without_a_folder_it_says_how_to_name_or_make_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLY_FLEET", raising=False)
    assert "make one: sly fleet init DIR" in refused(capsys, "list")


def test_groups_come_and_go_and_each_change_is_a_greater_charter(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = said(capsys, "enroll", "barn", "--group", "west")["charter"]
    added = said(capsys, "group", "add", "barn", "north", "east")
    assert added["groups"] == ["east", "north", "west"] and added["charter"] > first
    assert said(capsys, "group", "remove", "barn", "west", "east")["groups"] == ["north"]
    assert OperatorFolder(fleet).charter.group("north") == ("barn",)


def test_new_keys_for_a_board_take_its_old_ones_back(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = said(capsys, "enroll", "barn", "--backend", "jalapeno")["key"]
    certificate = (fleet / "boards" / "barn" / "client.pem").read_bytes()
    assert said(capsys, "enroll", "barn", "--backend", "jalapeno", "--again")["key"] != old
    assert (fleet / "boards" / "barn" / "client.pem").read_bytes() != certificate
    assert OperatorFolder(fleet).authority.revoke("barn", besides=[(fleet / "boards" / "barn" / "client.pem").read_bytes()]) == 0


def test_a_revoked_board_is_out_of_the_charter_the_access_list_and_every_group_and_can_be_let_in_again(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "enroll", "barn", "--group", "west")
    report = said(capsys, "revoke", "barn", "--reason", "stolen")
    assert report["reloaded"] is False
    folder = OperatorFolder(fleet)
    assert folder.charter.boards["barn"].revoked == "stolen" and not folder.charter.members and not folder.charter.group("west")
    assert "user barn\ntopic deny #" in (fleet / "broker" / "acl").read_text()
    word = open_word(folder.words()["barn"], {b"ann": folder.signer.public_key}.get)
    assert (word.action, word.reason, word.board) == (Action.REVOKE, "stolen", "barn")
    assert "revoked: stolen" in refused(capsys, "revoke", "barn", "--reason", "again")
    assert "enroll --again" in refused(capsys, "trust", "clear", "barn")
    said(capsys, "enroll", "barn", "--again")
    assert "user barn" not in (fleet / "broker" / "acl").read_text() and set(OperatorFolder(fleet).charter.members) == {"barn"}


def test_rotated_roles_are_signed_by_new_keys_with_the_root_keys_offline(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = tmp_path / "offline"
    offline.mkdir()
    for key in (fleet / "repository" / "keys").glob("root-*.pem"):
        key.rename(offline / key.name)
    assert "root" in refused(capsys, "rotate-keys", "timestamp")
    keys = [f"--root-key={offline / name}" for name in ("root-1.pem", "root-2.pem")]
    old = OperatorFolder(fleet).repository.documents()
    made = said(capsys, "rotate-keys", "timestamp", *keys)["keys"]
    assert all(stat.S_IMODE(Path(path).stat().st_mode) == 0o600 for path in made)
    new = OperatorFolder(fleet).repository.documents()
    assert "2.root" in new and new["1.root"] == old["1.root"] and timestamp_version(new) > timestamp_version(old)
    (tmp_path / "medium").mkdir()
    roots = said(capsys, "rotate-keys", "root", *keys, "--new-keys", str(tmp_path / "medium"))["keys"]
    assert len(roots) == 3 and {Path(path).parent for path in roots} == {tmp_path / "medium"}


def test_the_brokers_certificate_is_renewed_for_another_place(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = (fleet / "broker" / "broker.pem").read_bytes()
    assert said(capsys, "rotate-keys", "broker", "--host", "10.1.2.3", "--also", "gate.local")["host"] == "10.1.2.3"
    assert (fleet / "broker" / "broker.pem").read_bytes() != old
    assert OperatorFolder(fleet).settings.names == ("10.1.2.3", "gate.local")


# On the wire.


def signer_for(folder: OperatorFolder, board: str) -> Signer:
    return Signer(board.encode(), load_seed(folder.board_folder(board) / "identity.key"))


def two_boards(path: Path) -> OperatorFolder:
    folder = new_fleet(path)
    for board in ("barn", "kitchen"):
        enroll(folder, Enrolment(board, "jalapeno"))
    return folder


def test_what_is_published_is_what_the_broker_lacks_in_an_order_that_boards_can_read_at_any_moment(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    with broker_of(folder):

        async def scene() -> None:
            async with clients(folder, "kitchen") as [kitchen], folder.session(kinds=(Kind.OTA_META, Kind.WORD)) as session:
                assert await folder.publish(session) > 0
                await kitchen.until(lambda: any(topic.endswith("/timestamp") for topic in kitchen.topics))
                said = [each.message for each in kitchen.events if isinstance(each, Delivered)]
                charter = [each.topic for each in said if "/ota/chunk/" in each.topic and each.payload]
                roles = [topic.rsplit(".", 1)[-1].rsplit("/", 1)[-1] for topic in kitchen.topics if "/ota/meta/" in topic]
                assert roles.index("root") < roles.index("targets") < roles.index("snapshot") < roles.index("timestamp")
                assert len(charter) == 1 and kitchen.topics.index(charter[0]) < len(kitchen.topics) - 4
                assert await folder.publish(session) == 0
                folder.repository.renew()
                assert await folder.publish(session) == 1
                folder.put_charter(folder.charter)
                await folder.publish(session)
            async with folder.session() as again, clients(folder, "barn") as [barn]:
                assert again.metadata == dict(folder.repository.documents())
                kept = [each.message for each in barn.events if isinstance(each, Delivered) and "/chunk/" in each.message.topic]
                assert [decode_chunk(each.payload)[0] for each in kept] == [0], "one charter is kept, the newest"

        asyncio.run(scene())


def test_an_old_copy_of_the_folder_does_not_publish_over_a_newer_one(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    before = dict(folder.repository.documents())
    folder.repository.renew()

    class OldCopy:
        def documents(self) -> dict[str, bytes]:
            return before

    with broker_of(folder):

        async def scene() -> None:
            async with folder.session() as session:
                await session.publish_repository(folder.repository)
                with pytest.raises(RefusedError, match="another copy of this folder"):
                    await session.publish_repository(OldCopy())
                await session.publish_repository(OldCopy(), over=True)

        asyncio.run(scene())


def test_what_the_broker_lost_is_said_again_words_on_boards_too(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    folder.say_of("barn", Action.CLEAR, "new card")
    for _ in range(2):
        (folder.broker_folder / "data" / "mosquitto.db").unlink(missing_ok=True)
        with broker_of(folder) as broker:

            async def scene() -> None:
                async with folder.session(kinds=(Kind.OTA_META, Kind.WORD)) as session:
                    assert not session.words and not session.metadata
                    await folder.publish(session)
                async with folder.session(kinds=(Kind.OTA_META, Kind.WORD)) as session:
                    assert session.words == folder.words() and session.metadata == dict(folder.repository.documents())

            asyncio.run(scene())
            broker.stop(signal.SIGKILL)


def test_the_session_believes_boards_of_the_charter_about_themselves_and_nobody_else(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    kitchen_key, barn_key = signer_for(folder, "kitchen"), signer_for(folder, "barn")
    forged = [
        Message(TOPICS.record("kitchen"), sign_record(BoardRecord("barn", 1, 1), barn_key), retain=True),
        Message(TOPICS.online("kitchen"), sign_presence(Presence("kitchen", 9, Standing.STOPPED), Signer(b"kitchen", b"x" * 32))),
        Message(TOPICS.report("kitchen"), b"\0" * 100),
    ]
    with broker_of(folder):

        async def scene() -> None:
            async with clients(folder, "kitchen") as [kitchen], folder.session() as session:
                assert not await kitchen.says(
                    Message(TOPICS.record("kitchen"), sign_record(BoardRecord("kitchen", 1, 1), kitchen_key))
                )
                for message in forged:
                    assert not await kitchen.says(message)
                assert await session.wait_for(lambda: len(session.refused) == len(forged), LIMIT_S)
                assert [each.board for each in session.fleet.all_records()] == ["kitchen"]
                assert session.fleet.presence("kitchen") is None and not session.heard.reports

        asyncio.run(scene())


def test_a_session_outlives_a_broker_that_is_killed_and_says_what_it_was_saying(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    with broker_of(folder) as broker:

        async def scene() -> None:
            async with folder.session() as session:
                await folder.publish(session)
                broker.freeze()
                under_way = asyncio.create_task(session.say(Message(TOPICS.word("barn"), b"x", retain=True)))
                await asyncio.sleep(0)
                broker.stop(signal.SIGKILL)
                assert await session.wait_for(lambda: bool(session.down), LIMIT_S)
                waiting = asyncio.create_task(session.say(Message(TOPICS.word("kitchen"), b"x", retain=True)))
                await asyncio.to_thread(broker.start)
                await asyncio.gather(under_way, waiting)

        asyncio.run(scene())


def test_a_broker_that_does_not_take_it_from_this_operator_is_an_error_that_says_where_to_look(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    with broker_of(folder):

        async def scene() -> None:
            async with folder.session() as session:
                with pytest.raises(UnavailableError, match="not authorized; its access list"):
                    await session.say(Message(TOPICS.record("barn"), b"x"))

        asyncio.run(scene())


def test_the_status_of_a_fleet_has_releases_steps_notes_and_waves(tmp_path: Path) -> None:
    folder = two_boards(tmp_path / "fleet")
    plan = Plan(1, "smollm2", 4, b"m" * 32, ("kitchen", "barn"), canary=1, wave=1)
    report = Report(
        "kitchen",
        1,
        1,
        "0.6.0",
        (Progress("smollm2", 1, Step.FETCHING, 370),),
        (SlotReport("smollm2", 3, 4, "staging"),),
        "disk is full",
    )
    with broker_of(folder):

        async def scene() -> dict[str, Any]:
            async with clients(folder, "kitchen") as [kitchen], folder.session() as session:
                key = signer_for(folder, "kitchen")
                await session.say(
                    Message(TOPICS.rollout("smollm2"), sign_rollout(Rollout(plan, "ann"), folder.signer), retain=True)
                )
                presence = sign_presence(Presence("kitchen", 1, Standing.ONLINE), key)
                assert not await kitchen.says(Message(TOPICS.online("kitchen"), presence, retain=True))
                assert not await kitchen.says(Message(TOPICS.report("kitchen"), sign_report(report, key), retain=True))
                assert await session.wait_for(lambda: bool(session.heard.reports and session.heard.rollouts), LIMIT_S)
            async with folder.session(kinds=(*HEARD, Kind.APPRAISAL)) as later:
                return fleet_status(later)

        status = asyncio.run(scene())
    table = watch_table(status)
    assert all(len(line) <= WIDTH for line in table.splitlines())
    assert "smollm2 3 > 4 staging" in table and "smollm2 4 fetching 37 %; disk is full" in table
    assert "rollout of smollm2 4: running; canaries: 0 of 1 done" in table and "37 % here, 0 of 1 confirmed" in table
    barn = next(line for line in table.splitlines() if line.startswith("barn"))
    assert "not heard of" in barn and "smollm2 4 waiting" in barn
    assert json.loads(json.dumps(status)) == status
    assert "0.6.0" in board_page(status["boards"][1])


BOARD: dict[str, Any] = {
    "board": "barn", "backend": "coral", "groups": ["west"], "key": "ab" * 32, "endorsed": "", "revoked": "",
    "standing": "online", "boot_epoch": 1, "hardware": "Coral", "emulated": False, "queue_us": 0, "temperature_mdegc": None,
    "offers": ["m"], "agent": "1",
    "models": [{"model": "m", "running": 0, "candidate": 2, "state": "trial", "why": ""}],
    "updates": [{"model": "m", "number": 2, "step": "failed", "permille": 1000, "why": "it hung\x1b[2J" + "!" * 300}], "note": "",
    "trust": {"tiers": {"contraindicated": 2, "warning": 1}, "said": [
        {"verifier": v, "tier": "contraindicated", "reasons": ["other bytes are mapped"]} for v in ("a", "b")]},
}  # fmt: skip


def test_what_boards_say_is_shown_in_its_line_and_not_obeyed_and_what_is_bad_is_loud() -> None:
    status = {
        "fleet": "home",
        "charter": 1,
        "broker": "connected",
        "boards": [BOARD, BOARD | {"revoked": "stolen"}],
        "rollouts": [],
    }
    table = watch_table(status)
    assert "\x1b" not in table + watch_line(BOARD) + board_page(BOARD) and all(len(line) <= WIDTH for line in table.splitlines())
    assert "CONTRAINDICATED 2, warn" in table and "m 2 FAILED: it hung" in table and "m factory > 2 trial" in table
    assert "fleet home: 1 of 2 boards online" in table and watch_line(BOARD | {"revoked": "stolen"}).split(" | ")[1] == "revoked"
    assert "- other bytes are mapped (says a, b)" in trust_lines([BOARD])


def test_a_self_test_is_a_table_with_what_to_do_and_of_an_earlier_boot_is_no_note_any_more() -> None:
    checks = [
        {"name": "clock", "verdict": "fail", "what": "1970-01-01\x1b[2J" + " and" * 50, "remedy": "set a time server " * 9},
        {"name": "disk", "verdict": "pass", "what": "12 MiB free", "remedy": ""},
    ]
    test = {"verdict": "fail", "boot_epoch": 4, "current": True, "agent": "1", "checks": checks}
    for width in (WIDTH, 60):
        page = board_page(BOARD | {"self_test": test}, width)
        assert "\x1b" not in page and all(len(line) <= width for line in page.splitlines())
        assert "self-test: FAIL, of boot 4" in page and "-> set a time server" in page and "    PASS disk" in page
    assert "self-test: clock: 1970-01-01" in watch_line(BOARD | {"self_test": test})
    old = BOARD | {"self_test": test | {"current": False}}
    assert "self-test" not in watch_line(old) and "an earlier one" in board_page(old)
    assert "self-test" not in watch_line(BOARD) + board_page(BOARD | {"self_test": None})


def test_metadata_is_ordered_by_what_refers_to_what() -> None:
    names = ["timestamp", "10.root", "2.root", "3.snapshot", "2.snapshot", "7.targets"]
    assert list(in_order(names)) == ["2.root", "10.root", "7.targets", "2.snapshot", "3.snapshot", "timestamp"]
    assert (
        timestamp_version({"timestamp": b"[[["})
        == timestamp_version({})
        == timestamp_version({"timestamp": b'{"signed": 1}'})
        == 0
    )


# Real agents.


class Fleet:
    """The command line against a running broker, and agents that were started from what ``enroll`` wrote."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self._capsys = path, capsys
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, *arguments: str, code: int = 0) -> Any:
        return said(self._capsys, *arguments, "--fleet", str(self.path), code=code)

    def enroll(self, board: str) -> Any:
        state = self.path / "boards" / board
        return self.command("enroll", board, "--backend", "jalapeno", "--profile", "raspberry_pi_5", "--state", str(state))

    def start(self, board: str) -> None:
        folder = self.path / "boards" / board
        command = [sys.executable, "-m", "edge_agent.cli", "agent", "--config", str(folder / "agent.toml")]
        with (folder / "agent.log").open("ab") as log:
            self.agents[board] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self, board: str) -> str:
        return (self.path / "boards" / board / "agent.log").read_text("utf-8", "replace")

    def until(self, predicate: Callable[[OperatorSession], bool]) -> None:
        """Return when what the fleet says is so."""

        async def scene() -> bool:
            async with OperatorFolder(self.path).session(kinds=(*HEARD, Kind.APPRAISAL)) as session:
                return await session.wait_for(lambda: predicate(session), LIMIT_S)

        assert asyncio.run(scene()), {board: self.log(board) for board in self.agents}

    def stop(self) -> None:
        for agent in self.agents.values():
            agent.terminate()
        for agent in self.agents.values():
            agent.wait(LIMIT_S)


@pytest.fixture
def running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Fleet]:
    new_fleet(tmp_path / "fleet")
    fleet = Fleet(tmp_path / "fleet", capsys)
    with broker_of(OperatorFolder(fleet.path)):
        try:
            yield fleet
        finally:
            fleet.stop()


def test_agents_join_with_what_enrolment_wrote_hear_of_a_later_one_by_the_charter_and_drop_one_that_is_revoked(
    running: Fleet,
) -> None:
    assert running.enroll("kitchen")["published"] is True
    running.start("kitchen")
    running.until(lambda session: session.fleet.presence("kitchen") is not None)
    assert running.enroll("barn")["published"] is True
    running.start("barn")
    running.until(lambda session: {("kitchen", "barn"), ("barn", "kitchen")} <= session.appraisals.keys())
    status = running.command("watch", "--once")
    assert [(each["board"], each["standing"]) for each in status["boards"]] == [("barn", "online"), ("kitchen", "online")]
    assert running.command("show", "kitchen")["hardware"].startswith("emulated")
    assert running.command("trust")["boards"][0]["trust"]["said"][0]["verifier"] == "kitchen"
    report = running.command("revoke", "barn", "--reason", "stolen")
    assert report["reloaded"] and report["published"]
    running.until(lambda session: session.appraisals["kitchen", "barn"].tier == 0)
    assert "not believed" not in running.log("barn")


def test_watch_prints_a_line_for_each_change_where_there_is_no_terminal_and_ends_with_ctrl_c(running: Fleet) -> None:
    running.enroll("kitchen")
    command = [sys.executable, "-m", "edge_agent.cli", "fleet", "watch", "--fleet", str(running.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("kitchen | not heard of")
        running.start("kitchen")
        while not (line := watch.stdout.readline()).startswith("kitchen | online"):
            assert line
        watch.send_signal(signal.SIGINT)
        assert watch.wait(LIMIT_S) == 0


def test_a_real_boards_self_test_is_shown_and_what_is_not_signed_by_that_board_never_is(running: Fleet) -> None:
    running.enroll("kitchen")
    running.enroll("barn")
    running.start("kitchen")
    running.until(lambda session: "kitchen" in session.self_tests)
    shown = running.command("show", "kitchen")
    test = shown["self_test"]
    checks = {each["name"]: each for each in test["checks"]}
    sound = {"inference", "models", "board", "identity", "certificate", "broker"}
    assert set(checks) == sound | {"sandbox", "clock", "user", "disk"}
    assert {checks[name]["verdict"] for name in sound} == {"pass"}, checks
    assert test["boot_epoch"] == shown["boot_epoch"] == 1 and test["current"]
    page = board_page(shown)
    assert "PASS inference" in page and "gives the known answer" in page
    assert all(f"-> {each['remedy']}"[:40] in page for each in test["checks"] if each["remedy"])

    folder = OperatorFolder(running.path)
    known, key = SelfTest("kitchen", 9, 9, "1", (Check("clock", Verdict.FAIL, "1970", "set it"),)), signer_for(folder, "kitchen")
    forged = [
        sign_self_test(known, Signer(b"kitchen", b"x" * 32)),
        sign_self_test(replace(known, board="barn"), signer_for(folder, "kitchen")),
        sign_self_test(replace(known, board="barn"), signer_for(folder, "barn")),
        self_test_map(known).__repr__().encode(),
    ]

    async def scene() -> OperatorSession:
        async with clients(folder, "kitchen") as [kitchen], folder.session() as session:
            for message in forged:
                assert not await kitchen.says(Message(TOPICS.self_test("kitchen"), message))
            assert await session.wait_for(lambda: len(session.refused) == len(forged), LIMIT_S)
            assert session.self_tests["kitchen"].boot_epoch == 1
            assert not await kitchen.says(Message(TOPICS.self_test("kitchen"), sign_self_test(known, key)))
            assert await session.wait_for(lambda: session.self_tests["kitchen"].boot_epoch == 9, LIMIT_S)
            old = replace(known, boot_epoch=8)
            assert not await kitchen.says(Message(TOPICS.self_test("kitchen"), sign_self_test(old, key)))
            assert not await kitchen.says(Message(TOPICS.self_test("kitchen"), forged[0]))
            assert await session.wait_for(lambda: len(session.refused) == len(forged) + 1, LIMIT_S)
            assert session.self_tests["kitchen"].boot_epoch == 9, "an older boot's does not count"
            return session

    status = fleet_status(asyncio.run(scene()))
    kitchen = next(each for each in status["boards"] if each["board"] == "kitchen")
    assert "self-test: clock: 1970; set it" in watch_line(kitchen) and "self-test: clock: 1970; set it" in watch_table(status)
