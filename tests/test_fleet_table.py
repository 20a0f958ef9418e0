"""``sly fleet table`` and ``sly status``: what the boards have agreed on, who differs and why, on a terminal's width."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.client import Client
from edge_agent.commands.fleet import _status_table
from edge_agent.commands.fleet_table import fleet_table, who_differs
from edge_agent.commands.terminal import WIDTH
from edge_agent.core.errors import UnavailableError
from edge_agent.demo.choices import Agreed, agreement
from edge_agent.local_fleet import LocalFleet, Member
from tests.brokers import mosquitto
from tests.fetched import model_path, picture_path
from tests.needs import needs

MODEL = "blazeface-short"
LIMIT_S = 60.0
OPTION = {"board": "coral", "model": MODEL, "share_permille": 700, "cost_us": 12_000}
REPORT: dict[str, Any] = {
    "board": "kitchen", "digest": "3f" * 32, "facts": "81" * 32, "from": "made here", "moves": 12, "move_bound": 340,
    "horizon_us": 10_000_000,
    "entries": [
        {"ingress": "kitchen", "class": "talk, answer <= 255 tokens, 4 KiB, within 8.39 s", "rate_mhz": 12_500, "options": [
            OPTION, OPTION | {"board": "jetson", "share_permille": 300, "cost_us": 13_000},
            OPTION | {"board": "pi", "share_permille": 0}, OPTION | {"board": "barn", "share_permille": 0},
        ]},
    ],
    "bookings": [{"board": "coral", "total_us": 4_500_000, "by_ingress": {"barn": 500_000, "kitchen": 4_000_000, "pi": 0}}],
    "boards": [
        {"board": "kitchen", "standing": "online", "agrees": True, "why": "", "said_ago_us": 1, "digest": "3f" * 32},
        {"board": "coral", "standing": "online", "agrees": True, "why": "", "said_ago_us": 1, "digest": "3f" * 32},
    ],
}  # fmt: skip


def with_board(**word: object) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    report["boards"].append({"board": "barn", "standing": "online", "said_ago_us": 2_000_000, "digest": "aa" * 32} | word)
    return report


# on paper


def test_the_shared_options_and_the_next_one_are_shown_and_the_rest_is_counted() -> None:
    lines = fleet_table(REPORT).splitlines()
    assert lines[0] == f"table {'3f' * 8}, made here from facts {'81' * 8}, settled in 12 moves (bound 340)"
    assert lines[3].split() == ["kitchen", "12.50", *REPORT["entries"][0]["class"].split()]
    ways = " ".join(line.strip() for line in lines[4:6])
    assert ways.startswith(
        f"coral/{MODEL} 70 % (12.00 ms); jetson/{MODEL} 30 % (13.00 ms); else pi/{MODEL} (12.00 ms); and 1 more"
    )


def test_a_board_is_booked_for_a_part_of_the_horizon_by_who_asks_most() -> None:
    assert "  coral             45.0 %: kitchen 40.0 %, barn 5.0 %" in fleet_table(REPORT).splitlines()


@pytest.mark.parametrize(
    ("word", "differs", "line"),
    [
        (
            {"agrees": False, "why": "other rules"},
            ["barn"],
            f"DIFFERS: barn: other rules; it said so 2.0 s ago, table {'aa' * 8}",
        ),
        ({"agrees": False, "why": "other facts", "since_us": 3_500_000}, ["barn"], "DIFFERS: barn: other facts, for 3.5 s;"),
        ({"agrees": None, "why": "", "said_ago_us": None}, ["barn"], "DIFFERS: barn: has not said yet which table it holds"),
        ({"agrees": None, "why": "", "standing": "offline"}, [], "not there: barn (offline)"),
        ({"agrees": True, "why": ""}, [], "hold this table: kitchen, coral, barn"),
    ],
)
def test_who_differs_is_named_with_the_reason_and_since_when(word: dict[str, object], differs: list[str], line: str) -> None:
    report = with_board(**word)
    assert who_differs(report) == differs
    assert any(each.startswith(line) for each in fleet_table(report).splitlines())


def test_a_table_of_nothing_says_so() -> None:
    assert "no requests have come in anywhere yet" in fleet_table(REPORT | {"entries": [], "bookings": []})
    nothing = REPORT["entries"][0] | {"options": []}
    assert "nothing may serve it" in fleet_table(REPORT | {"entries": [nothing]})


def test_tables_fit_a_terminal_however_long_the_names_are() -> None:
    text = json.dumps(with_board(agrees=False, why="other rules")).replace("kitchen", "k" * 32).replace(MODEL, "m" * 64)
    report = json.loads(text)
    report["bookings"][0]["by_ingress"] = {f"board-with-a-long-name-{n:02}": 10**5 for n in range(64)}
    assert max(map(len, fleet_table(report).splitlines())) <= WIDTH


def test_status_shows_warmth_to_come_trust_and_demand_on_one_line_a_board() -> None:
    board = {
        "board": "kitchen", "standing": "serving", "queue_us": 1500, "temperature_mdegc": 41_250,
        "forecast_mdegc": [42_000, 44_000, 47_900], "trust": "affirming", "demand_mhz": 12_345, "hardware": "h" * 128,
        "models": ["m" * 64, "n" * 64],
    }  # fmt: skip
    cold = board | {"board": "b" * 32, "temperature_mdegc": None, "forecast_mdegc": None}
    report = {"boards": [board, cold], "link": "connected", "pending": 0, "withdrawn": {}}
    lines = _status_table(report).splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) == 4
    assert lines[1].split()[:8] == ["kitchen", "serving", "1.5", "41.2", "->", "47.9", "affirming", "12.3"]


# with real agents


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Kitchen and coral place by the same policy, and barn by another."""
    needs(model_path(MODEL), "the model")
    folder = tmp_path_factory.mktemp("fleet")
    members = [Member("kitchen", "raspberry_pi_5"), Member("coral", "coral_m2"), Member("barn", "raspberry_pi_5")]
    with mosquitto(folder / "broker") as broker, LocalFleet(folder, members, [MODEL], broker.port) as fleet:
        config = folder / "barn" / "agent.toml"
        config.write_text(config.read_text() + "\n[policy]\nenergy_us_per_mj = 999\n")
        fleet.start()
        fleet.wait_acquainted(fleet.members)
        yield fleet


def table_of(capsys: pytest.CaptureFixture[str], socket: Path) -> tuple[int, Any]:
    code = cli.main(["fleet", "table", "--socket", str(socket), "--json"])
    return code, json.loads(capsys.readouterr().out)


def awaited(look: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """What ``look`` gives once it ``holds``."""
    until_s = time.monotonic() + LIMIT_S
    while not holds(found := look()):
        assert time.monotonic() < until_s, found
        time.sleep(0.1)
    return found


def test_boards_with_the_same_rules_agree_and_one_with_others_is_named(
    capsys: pytest.CaptureFixture[str], fleet: LocalFleet
) -> None:
    with Client(fleet.socket_of("kitchen")) as client:
        client.look("detect_faces", picture_path("grace_hopper"))

    def settled(found: tuple[int, Any]) -> bool:
        word = {each["board"]: each for each in found[1]["boards"]}
        return bool(found[1]["entries"]) and word["coral"]["agrees"] is True and word["barn"]["why"] == "other rules"

    code, report = awaited(lambda: table_of(capsys, fleet.socket_of("kitchen")), settled)
    assert (code, who_differs(report)) == (1, ["barn"])
    entry = report["entries"][0]
    assert (entry["ingress"], entry["class"]) == ("kitchen", "detect_faces, 64 KiB, within 8.39 s")
    assert sum(option["share_permille"] for option in entry["options"]) == 1000
    assert {option["board"] for option in entry["options"]} == {"kitchen", "coral", "barn"}
    assert cli.main(["fleet", "table", "--socket", str(fleet.socket_of("barn"))]) == 1
    assert "DIFFERS: " in capsys.readouterr().out


def test_once_who_differs_is_gone_the_others_agree(capsys: pytest.CaptureFixture[str], fleet: LocalFleet) -> None:
    fleet.kill("barn")
    code, report = awaited(lambda: table_of(capsys, fleet.socket_of("coral")), lambda found: found[0] == 0)
    standing = {each["board"]: each["standing"] for each in report["boards"]}
    assert (code, standing) == (0, {"coral": "online", "barn": "offline", "kitchen": "online"})


def test_an_answer_is_explained_with_the_share_of_the_agreed_table(capsys: pytest.CaptureFixture[str], fleet: LocalFleet) -> None:
    socket = fleet.socket_of("kitchen")
    with Client(socket) as client:
        asked = client.look("detect_faces", picture_path("grace_hopper")).request_id

    def explained() -> Any:
        assert cli.main(["explain", asked, "--socket", str(socket), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    report = awaited(explained, lambda found: found["options"][0]["share_permille"] is not None)
    assert sum(each["share_permille"] for each in report["options"]) == 1000
    assert cli.main(["status", "--socket", str(socket)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= WIDTH


# as the demo asks


def test_the_demo_sees_boards_agree_or_what_each_of_them_holds(fleet: LocalFleet) -> None:
    found = agreement(fleet, ["kitchen", "coral"], 0.0, LIMIT_S)
    assert found.holds and found.classes == 1 and "1 request classes, after " in str(found)
    unheard = agreement(fleet, ["kitchen", "coral"], time.monotonic() + 1, 0.0)
    assert not unheard.told and not unheard.holds, "what was said before does not count"
    apart = Agreed({"a": "aa" * 32, "b": "bb" * 32}, 1, 0.1, True)
    assert not apart.holds and str(apart) == "a aaaaaaaa, b bbbbbbbb"


def test_a_client_is_told_why_by_the_first_agent_that_remembers(fleet: LocalFleet) -> None:
    with Client(fleet.socket_of("kitchen")) as client:
        asked = client.look("detect_faces", picture_path("grace_hopper")).request_id
    with Client(fleet.folder / "none.sock", fleet.socket_of("coral"), fleet.socket_of("kitchen")) as client:
        report = client.explain(asked)
        assert report["request"] == asked and report["why"]["chosen"]
        with pytest.raises(UnavailableError, match="not remembered"):
            client.explain("0" * 32)
