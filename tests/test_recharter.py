"""A newer charter while boards live: who is heard, trusted and served from that moment on, and by which rules tables are made."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import pytest

from edge_agent.attest.words import Action, OperatorWord, sign_word
from edge_agent.core.config import PolicySection
from edge_agent.core.cose import Signer
from edge_agent.core.values import Status, TrustTier
from edge_agent.node.events import Chartered, Hosted, Subscribe
from edge_agent.placement.options import Rules
from edge_agent.sim.shell import TICK_US
from edge_agent.transport.link import Message
from tests.attesting import EPOCH_US, OPERATOR, REFERENCES, RTT_US, AttestingBoard, AttestingFleet, measured
from tests.virtual_board import RULES, offer, seed_of

WARNING, AFFIRMING, CONTRAINDICATED = TrustTier.WARNING, TrustTier.AFFIRMING, TrustTier.CONTRAINDICATED
SLOW, FAST = offer("small", 40_000), offer("small", 4_000)
SOON_US = 2 * EPOCH_US + RTT_US


class Home(AttestingFleet):
    """Boards whose members are what they knew at their boot, and what charters said since."""

    def furnish(self, *names: str, **offers: Any) -> None:
        for name in names:
            self.add_board(name, offers.get(name, SLOW))
        for name in names:
            self.start(name)

    def start(self, name: str) -> AttestingBoard:
        board = self.board(name)
        board.boot()
        board.node.settings.members = dict(board.node.settings.members)
        return board

    def __enter__(self) -> Home:
        super().__enter__()
        return self

    @property
    def up(self) -> list[AttestingBoard]:
        return [self.board(name) for name in self.boards if self.boards[name].up]

    def charter(self, members: Collection[str], at: Collection[str] = (), rules: Rules = RULES, **attest: Any) -> None:
        for board in self.up:
            if board.name in at or not at:
                board.feed(self.chartered(board, members, rules, **attest))

    def chartered(self, board: AttestingBoard, members: Collection[str], rules: Rules = RULES, **attest: Any) -> Chartered:
        settings = board.node.settings
        assert settings.attest is not None
        keys = {name: self.keys[name] for name in {*members, board.name}}
        return Chartered(replace(settings, members=keys, rules=rules, attest=replace(settings.attest, **attest)))

    def trust_settles(self, among: Collection[str], tier: TrustTier = WARNING) -> None:
        def settled() -> bool:
            return all(self.tier(of, at) is tier for of in among for at in among)

        self.run_until(settled, SOON_US, f"{', '.join(among)} are {tier.name}")

    def ran(self, ingress: str, count: int = 5) -> set[str]:
        """The boards where requests that come in at ``ingress`` are run."""
        asked = [self.ask(self.request(), ingress) for _ in range(count)]
        self.run_until(lambda: all(each.settled for each in asked), 20_000_000, "every client has its answer")
        return {each.answers[0].board for each in asked if each.answers[0].status is Status.OK}


@pytest.fixture
def home() -> Iterator[Home]:
    with Home("recharter", epoch_us=EPOCH_US, software_tier=WARNING) as fleet:
        fleet.stranger = fleet.link_of("stranger")
        fleet.stranger.open(lambda event: None, None)
        yield fleet


# who belongs to the fleet


def test_a_newcomer_is_neither_heard_nor_trusted_before_the_charter_and_both_after_it(home: Home) -> None:
    home.furnish("a", "b", "c")
    home.trust_settles("abc")
    home.furnish("d", d=FAST)
    home.run_for(SOON_US)
    assert all("d" not in [each.board for each in home.board(name).node.fleet.records()] for name in "abc")
    assert home.ran("a") <= {*"abc"} and home.tier("d", at="a") is TrustTier.NONE
    home.charter("abcd")
    home.trust_settles("abcd")
    home.agree(10_000_000)
    assert home.ran("a") == {"d"}, "what it said before the charter was asked of the broker again"


def test_a_removed_board_gets_nothing_more_and_its_requests_are_refused(home: Home) -> None:
    home.furnish("a", "b", "c", b=FAST, c=offer("small", 2_000))
    home.trust_settles("abc")
    home.run_for(5_000_000)
    assert "c" in home.ran("a", 10)
    home.charter("ab", at="ab")
    home.run_for(RTT_US)
    assert home.ran("a", 10) <= {*"ab"} and home.board("a").said_something_like("c is no board of the fleet")
    assert "c" not in [each.board for each in home.board("a").node.fleet.all_records()]
    dispatched = len(home.executions)
    home.board("c").node.execution.withdraw("small", "so that it must ask others")
    home.ask(home.request(), "c")
    home.run_for(5_000_000)
    assert home.board("b").said_something_like("refused a message on"), "c asked b"
    assert not [each for each in list(home.executions)[dispatched:] if each[0] == "b" and each[1] == "c"]


def test_what_a_removed_board_had_in_hand_is_answered_by_another(home: Home) -> None:
    home.furnish("a", "b", "c", c=offer("small", 8_000_000))
    home.board("a").node.execution.withdraw("small", "so that it must ask others")
    home.board("b").node.execution.withdraw("small", "so that it must ask others")
    home.trust_settles("abc")
    asked = home.ask(home.request(20_000_000), "a")
    home.run_until(lambda: home.executions or home.board("c").node.execution.queue_us(home.now_us), 5_000_000, "c has it")
    home.board("b").feed(Hosted(FAST))
    home.run_for(RTT_US)
    assert not asked.settled
    home.charter("ab", at="ab")
    home.run_until(lambda: asked.settled, 20_000_000, "it is answered")
    assert (asked.answers[0].status, asked.answers[0].board) == (Status.OK, "b")


def test_a_board_with_another_key_is_another_board(home: Home) -> None:
    """It was set up anew and counts its boots from 1 again; what the old key signs is refused."""
    home.furnish("a", "b", "c")
    for _ in range(3):
        home.board("c").kill()
        home.start("c")
    home.trust_settles("abc")
    assert home.board("a").node.fleet.version("c")[0] == 4
    home.keys["c"] = Signer(b"c", seed_of("another c")).public_key
    home.charter("abc", at="ab")
    home.run_for(RTT_US)
    assert home.board("a").node.fleet.version("c") == (-1, -1), "its record was the other's"
    assert home.board("a").said_something_like("its key is another one now")
    home.run_for(2_000_000)
    assert home.board("a").said_something_like("refused a message on") and home.board("a").node.fleet.version("c") == (-1, -1)


# what is held against whom


def test_what_was_found_of_a_board_outlives_that_it_leaves_and_comes_back(home: Home) -> None:
    home.furnish("a", "b", "c")
    home.trust_settles("abc")
    home.board("c").measure(measured(SLOW, mapped="small"))
    home.run_until(lambda: home.all_say(CONTRAINDICATED, "c"), SOON_US, "c is contraindicated")
    home.charter("ab", at="ab")
    home.run_for(RTT_US)
    home.board("c").measure(measured(SLOW))
    home.charter("abc")
    home.run_for(SOON_US)
    assert home.all_say(CONTRAINDICATED, "c"), "sticky, until an operator clears it"


def test_what_was_found_of_a_board_that_only_a_charter_names_outlives_a_reboot(home: Home) -> None:
    home.furnish("a", "b", "c")
    home.trust_settles("abc")
    home.board("c").measure(measured(SLOW, mapped="small"))
    home.run_until(lambda: home.all_say(CONTRAINDICATED, "c"), SOON_US, "c is contraindicated")
    home.board("c").kill()
    configured = {name: key for name, key in home.keys.items() if name != "c"}
    home.keys, everybody = configured, home.keys
    home.board("a").kill()
    home.start("a")
    home.keys = everybody
    assert home.board("a").attestation.verifier.standing("c") is None
    home.charter("abc", at="a")
    assert home.tier("c", at="a") is CONTRAINDICATED, "at once, by the ledger"


def test_a_revocation_holds_for_a_board_that_comes_back(home: Home) -> None:
    home.furnish("a", "b", "c")
    home.trust_settles("abc")
    home.operator_says("c", Action.REVOKE, "stolen")
    home.run_until(lambda: home.all_say(CONTRAINDICATED, "c"), SOON_US, "c is revoked")
    home.charter("ab", at="ab")
    home.charter("abc", at="ab")
    assert home.tier("c", at="a") is home.tier("c", at="b") is CONTRAINDICATED


def test_an_operator_that_the_charter_does_not_name_any_more_is_not_heeded(home: Home) -> None:
    home.furnish("a", "b")
    home.trust_settles("ab")
    ann = Signer(b"ann", seed_of("ann"))
    home.charter("ab", operators={"ann": ann.public_key})
    home.operator_says("b", Action.REVOKE, "by somebody who left")
    home.run_for(RTT_US)
    assert home.tier("b", at="a") is WARNING
    word = OperatorWord("ann", "b", 1, Action.REVOKE, "by somebody who is there")
    home.stranger.publish(Message(home.topics.word("b"), sign_word(word, ann), retain=True))
    home.run_for(RTT_US)
    assert home.tier("b", at="a") is CONTRAINDICATED
    assert OPERATOR.public_key != ann.public_key


# references and rules


def test_references_for_a_new_release_count_at_once_and_trust_of_who_stays_does_not_drop() -> None:
    """For what was shown before the charter came, too: not with the next epoch, which is a minute away here."""
    fresh = offer("fresh", 30_000)
    with Home("references", epoch_us=60_000_000, software_tier=AFFIRMING) as home:
        home.furnish("a", "b", "c")
        home.run_until(lambda: home.all_trusted(AFFIRMING), 70_000_000, "everybody is affirming")
        home.board("c").measure(measured(SLOW, fresh))
        home.run_until(lambda: home.all_say(WARNING, "c"), 5_000_000, "a model that nobody knows costs c its best tier")
        home.charter("abc", references=replace(REFERENCES, models=REFERENCES.models | {fresh.digest}))
        assert home.tier("c", at="a") >= WARNING and home.board("a").attestation.verifier.verdict("c").tier is AFFIRMING
        for _ in range(5_000_000 // TICK_US):
            home.run_for(TICK_US)
            assert {home.tier(of, at) for of in "ab" for at in "abc"} == {AFFIRMING}
        assert home.all_trusted(AFFIRMING)


def test_a_release_that_the_charter_withdraws_is_unknown_at_once() -> None:
    with Home("withdrawn", epoch_us=60_000_000, software_tier=AFFIRMING) as home:
        home.furnish("a", "b", "c")
        home.run_until(lambda: home.all_trusted(AFFIRMING), 70_000_000, "everybody is affirming")
        home.charter("abc", references=replace(REFERENCES, models=frozenset()))
        home.run_until(lambda: home.all_trusted(WARNING), 5_000_000, "nobody shows a release that counts")


def test_a_change_of_policy_makes_the_table_anew_and_the_same_on_all_boards(home: Home) -> None:
    home.furnish("a", "b", "c", b=FAST)
    home.trust_settles("abc")
    home.ran("a", 10)
    home.agree(10_000_000)
    before = {board.node.agreement.digest for board in home.up}
    rules = Rules(replace(PolicySection(), link_latency_us=50_000), RULES.releases)
    home.charter("abc", at="ab", rules=rules)
    home.run_for(RTT_US)
    assert home.board("c").said_something_like("other rules"), "who has the older charter is told apart, by name"
    home.charter("abc", at="c", rules=rules)
    home.agree(10_000_000)
    assert {board.node.agreement.digest for board in home.up} != before
    assert {board.node.agreement._rules for board in home.up} == {home.board("a").node.agreement._rules}
    assert {home.tier(of, at) for of in "abc" for at in "abc"} == {WARNING}


def test_verifiers_listen_to_the_boards_that_they_verify_since_others_left(home: Home) -> None:
    """In a larger fleet a board listens to its neighbours in the ring alone, and those are others now."""
    names = [f"b{number:02d}" for number in range(20)]
    for name in names:
        home.add_board(name, SLOW)
    board = home.start("b00")
    home.run_for(RTT_US)
    verified = frozenset(board.attestation.verifier.boards)
    left = sorted(verified)[-1]
    with board.ledger.transaction():
        effects = board.node.handle(home.chartered(board, [name for name in names if name != left]), home.now_us)
    new = frozenset(board.attestation.verifier.boards) - verified
    listened = {effect.topic_filter for effect in effects if isinstance(effect, Subscribe)}
    assert len(new) == 1 and {home.topics.quote(name) for name in new} <= listened
