"""``sly verify``: one look says whether a proof is sound; what cannot be judged is told in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.attest.proof import write_proof
from edge_agent.core.values import TrustTier
from tests.proofs import MEMBERS, MODELS, PaperFleet, request, result


@pytest.fixture
def fleet() -> PaperFleet:
    """A detector's answer on the hall, and what the desk made of it."""
    fleet = PaperFleet(("desk", "hall", "porch"))
    for board in fleet.boards:
        fleet.quote(board, TrustTier.WARNING)
    found = fleet.run("hall")
    fleet.run("desk", wanted=False)
    fleet.run("desk", [found], "landmarks")
    return fleet


@pytest.fixture
def file(tmp_path: Path, fleet: PaperFleet) -> Path:
    write_proof(tmp_path / "drive.proof", fleet.proof())
    return tmp_path / "drive.proof"


def known(**fleet: Any) -> dict[str, dict[str, Any]]:
    return {
        "fleet": {"members": {board: key.hex() for board, key in MEMBERS.items()}, **fleet},
        "models": {"releases": [digest.hex() for digest in MODELS.values()]},
    }


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return written(tmp_path / "keys.toml", known())


def written(path: Path, config: dict[str, dict[str, Any]]) -> Path:
    lines = []
    for name, section in config.items():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in section.items())]
    path.write_text("\n".join(lines))
    return path


def toml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml(each)}' for key, each in value.items())} }}"
    return json.dumps(value)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["verify", *map(str, arguments)])
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_sound_proof_is_told_on_one_page(capsys: pytest.CaptureFixture[str], file: Path, keys: Path) -> None:
    code, out, err = run(capsys, file, "--keys", keys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("2 receipts, 2 requests, 3 quotes, 6 appraisals; held against 5 keys and ")
    assert [line.split()[1:4] for line in lines[3:5]] == [["hall", "#1", "detector"], ["desk", "#2", "landmarks"]]
    assert all(line.split()[-2:] == ["warning", "sound"] for line in lines[3:5])
    assert lines[-1] == "SOUND: every link holds"
    assert max(map(len, lines)) <= 130


def test_a_broken_proof_names_the_first_broken_link_and_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fleet: PaperFleet, keys: Path
) -> None:
    proof = fleet.proof()
    (hall,) = (message for said, message in fleet.boards["hall"].receipts)
    write_proof(tmp_path / "cut.proof", replace(proof, receipts=tuple(each for each in proof.receipts if each != hall)))
    code, out, err = run(capsys, tmp_path / "cut.proof", "--keys", keys)
    assert (code, err) == (1, "")
    assert "BROKEN at receipt desk #2: parents: receipt " in out and "is not in the file" in out
    assert f"and after it: asked {1:032x}" in out


def test_a_forged_receipt_is_shown_as_one_that_nobody_signed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fleet: PaperFleet, keys: Path
) -> None:
    proof = fleet.proof()
    (hall,) = (message for said, message in fleet.boards["hall"].receipts)
    forged = hall[:-1] + bytes((hall[-1] ^ 1,))
    receipts = tuple(sorted({*proof.receipts, forged} - {hall}))
    write_proof(tmp_path / "forged.proof", replace(proof, receipts=receipts))
    code, out, _ = run(capsys, tmp_path / "forged.proof", "--keys", keys)
    assert code == 1
    assert "BROKEN at receipt hall #1: signature: signed message: signature: got one that does not fit" in out
    (row,) = (line for line in out.splitlines() if "hall #1?" in line)
    assert row.split()[-3:] == ["?", "BROKEN:", "signature"]


@pytest.mark.parametrize(("floor", "code"), [("none", 0), ("warning", 0), ("affirming", 1)])
def test_a_floor_under_the_boards_status_can_be_asked_for(
    capsys: pytest.CaptureFixture[str], file: Path, keys: Path, floor: str, code: int
) -> None:
    got, out, _ = run(capsys, file, "--keys", keys, "--trust", floor)
    assert got == code
    assert ("status: warning (desk warning, porch warning); wanted: affirming or better" in out) == bool(code)


def test_json_has_every_check_of_every_link(capsys: pytest.CaptureFixture[str], file: Path, keys: Path) -> None:
    code, out, _ = run(capsys, file, "--keys", keys, "--json")
    report = json.loads(out)
    assert code == 0 and report["sound"] and report["broken"] is None
    kinds = [link["kind"] for link in report["links"]]
    assert kinds == ["quote"] * 3 + ["appraisal"] * 6 + ["receipt"] * 2 + ["asked"] * 2
    hall, desk = (link for link in report["links"] if link["kind"] == "receipt")
    assert desk["receipt"]["parents"] == [hall["digest"]] and desk["said_by"] == {"hall": "warning", "porch": "warning"}
    assert [check["what"] for check in desk["checks"]] == [
        "signature", "request", "parents", "chain", "quotes", "model", "status",
    ]  # fmt: skip
    code, out, _ = run(capsys, file, "--keys", keys, "--json", "--trust", "affirming")
    assert code == 1 and json.loads(out)["broken"]["name"] == "hall #1"


def test_an_agents_configuration_is_believed_and_no_state_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path
) -> None:
    config = {**known(), "board": {"id": "reader"}, "state": {"folder": str(tmp_path / "state")}}
    code, out, _ = run(capsys, file, "--config", written(tmp_path / "agent.toml", config))
    assert code == 0 and "SOUND" in out
    assert not (tmp_path / "state").exists()


def test_the_operators_word_is_a_ceiling(capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path) -> None:
    keys = written(tmp_path / "keys.toml", known(trust={"hall": "contraindicated"}))
    code, out, _ = run(capsys, file, "--keys", keys)
    assert code == 1
    assert "BROKEN at receipt hall #1: status: contraindicated" in out and "the operator trusts it no more than that" in out


@pytest.mark.parametrize(
    ("attest", "status"),
    [({}, "warning"), ({"agree": 2}, "warning"), ({"agree": 3}, "none"), ({"verifiers": ["cellar"]}, "none")],
)
def test_whose_word_counts_and_how_many_must_agree_is_the_readers_to_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path, attest: dict[str, Any], status: str
) -> None:
    keys = written(tmp_path / "keys.toml", {**known(), "attest": attest})
    _, out, _ = run(capsys, file, "--keys", keys, "--json")
    assert {link["status"] for link in json.loads(out)["links"] if link["kind"] == "receipt"} == {status}


def test_a_board_that_the_reader_does_not_know_breaks_the_proof(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path
) -> None:
    config = known()
    del config["fleet"]["members"]["hall"]
    code, out, _ = run(capsys, file, "--keys", written(tmp_path / "keys.toml", config))
    assert code == 1 and "BROKEN at quote" in out and "the key id of an enrolled board" in out


def test_what_cannot_be_judged_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path, keys: Path
) -> None:
    (tmp_path / "empty.proof").write_bytes(b"")
    (tmp_path / "cut.proof").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "broken.toml").write_text("[fleet")
    nobody = written(tmp_path / "nobody.toml", {"fleet": {"name": "home"}})
    slip = written(tmp_path / "slip.toml", {"fleet": {"members": {"hall": "ef" * 32}}})
    typo = written(tmp_path / "typo.toml", {"fleet": {"member": {}}})
    whole = written(tmp_path / "whole.toml", {"board": {"id": "desk"}})
    for arguments, wanted in (
        ((tmp_path / "none.proof", "--keys", keys), "No such file"),
        ((tmp_path, "--keys", keys), "Is a directory"),
        ((tmp_path / "empty.proof", "--keys", keys), "the end of the data"),
        ((tmp_path / "cut.proof", "--keys", keys), "cut.proof: proof at byte"),
        ((keys, "--keys", keys), "a proof is what --receipt FILE wrote"),
        ((file, "--keys", tmp_path / "none.toml"), "No such file"),
        ((file, "--keys", tmp_path / "broken.toml"), "TOML in UTF-8"),
        ((file, "--keys", file), "TOML in UTF-8"),
        ((file, "--keys", nobody), "no keys"),
        ((file, "--keys", slip), "slip.toml [fleet.members] hall: got efef"),
        ((file, "--keys", typo), "[fleet] member: got an unknown key"),
        ((file, "--keys", whole), "allowed: [fleet], [models], [attest]; or use --config"),
        ((file, "--config", whole), "[state] folder"),
        ((file,), "one of the arguments --config --keys is required"),
        ((file, "--keys", keys, "--config", keys), "not allowed with"),
        ((file, "--keys", keys, "--trust", "contraindicated"), "invalid choice"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "") and err.startswith("sly: ") and err.count("\n") == 1, err
        assert wanted in err


def test_what_others_wrote_does_not_reach_the_terminal_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fleet: PaperFleet, keys: Path
) -> None:
    for verifier in ("desk", "porch"):
        fleet.appraise(verifier, "hall", TrustTier.WARNING, reasons=("\x1b[2J\x1b[Hall is well\n",))
    write_proof(tmp_path / "odd.proof", fleet.proof())
    code, out, _ = run(capsys, tmp_path / "odd.proof", "--keys", keys)
    assert code == 0 and "\x1b" not in out and "all is well" in out.lower()


def test_a_receipt_of_a_day_that_no_calendar_has_is_shown_nevertheless(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, keys: Path
) -> None:
    fleet = PaperFleet(("desk",))
    fleet.wanted.add(fleet.boards["desk"].receipt(request(1), result(request(1), "desk"), started_us=2**63 - 1))
    write_proof(tmp_path / "late.proof", fleet.proof())
    code, out, _ = run(capsys, tmp_path / "late.proof", "--keys", keys)
    assert code == 0 and f"{2**63 - 1} us" in out
