"""Continuous attestation at work: evidence out, evidence in, verdicts out, and what all of them say of a board.

Owns the wiring between this board as attester (``attester``), as verifier of its neighbours (``attest.verifier``), and the
link and the ledger.  Rules: whatever comes is believed by its signature alone; a contraindication is in the ledger by the
very transaction that publishes it; what a broker or a silence can cause never contraindicates; epochs count only while the
link is up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from edge_agent.attest.appraisal import Appraisal, open_appraisal
from edge_agent.attest.epoch import Epochs, open_challenge, open_epoch
from edge_agent.attest.evidence import Measurements, Quote, open_quote
from edge_agent.attest.keys import check_endorsement
from edge_agent.attest.receipts import Receipt
from edge_agent.attest.settings import AttestSettings
from edge_agent.attest.verifier import Verifier
from edge_agent.attest.words import open_word
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier
from edge_agent.gossip.presence import Standing
from edge_agent.gossip.state import FleetState
from edge_agent.node.attester import Attester
from edge_agent.node.events import Effect, Endorsed, Log, Publish
from edge_agent.node.proofs import Proofs
from edge_agent.node.settings import NodeSettings
from edge_agent.node.voice import Voice
from edge_agent.store.ledger import Ledger
from edge_agent.transport.link import Message
from edge_agent.transport.topics import Kind, Topic, Topics

DOCUMENT = "attest/"
"""With the id of a board behind it: what is held of that board."""
LOOK_PERIOD_US = 200_000
"""What gets better is looked at no more often; what gets worse, at once."""
REPEAT_PERIOD_US = 1_000_000
"""A link that takes nothing is tried no more often."""
MAX_SAID_BYTES = 4 * 2**20
"""Of all appraisals as they were signed."""
CONTRAINDICATED = TrustTier.CONTRAINDICATED


@dataclass(frozen=True, slots=True)
class Shown:
    """The last fresh evidence of a board, when it came in, and as it was signed."""

    quote: Quote
    at_us: int
    message: bytes


class Attestation:
    """``changes`` moves whenever an agreed tier does."""

    def __init__(
        self, settings: NodeSettings, attest: AttestSettings, fleet: FleetState, ledger: Ledger, voice: Voice, proofs: Proofs
    ) -> None:
        self._settings, self._attest, self._fleet, self._ledger, self._voice = settings, attest, fleet, ledger, voice
        self._board, self._proofs = settings.board, proofs
        members = self._members()
        self._keys = {board.encode(): key for board, key in members.items()}
        self.verifier = Verifier(settings.board, settings.boot_epoch, members, attest, check_endorsement, ceiling=settings.trust)
        self._verified = frozenset(self.verifier.boards)
        self.attester = Attester(settings, attest, proofs.chain, frozenset(self.verifier.verifiers[settings.board]))
        self.epochs = Epochs(settings.board, settings.boot_epoch, attest.secret, attest.epoch_us)
        self.shown: dict[str, Shown] = {}
        self.heard_us: dict[tuple[str, str], int] = {}
        """When the newest appraisal came in, by (verifier, board)."""
        self.said: dict[tuple[str, str], bytes] = {}
        """The newest appraisals as they were signed, by (verifier, board)."""
        self._said_bytes = 0
        self.changes = 0
        self.link_up = self._link_was_up = self._owes_mark = self._owes_all = False
        self._repeated_us: int | None = None
        self.online = frozenset({settings.board})
        self._online_of = -1
        self._agreed: dict[str, TrustTier] = {}
        self._outcast: frozenset[str] = frozenset()
        """Who is contraindicated, as of the last look."""
        self._cast_out: list[str] = []
        self._stale, self._urgent, self._looked_us = True, True, -LOOK_PERIOD_US
        self._notes: list[str] = []
        self._recall(self.verifier.verifiers)

    def recharter(self, now_us: int) -> None:
        """The settings have other members or references: what is known of those who stay goes on, what was kept of newcomers is
        taken up, and what was shown is appraised anew. Raises ``UnavailableError`` as the ledger does."""
        assert self._settings.attest is not None
        self.keep(now_us, everything=True)
        known, verified = frozenset(self.verifier.verifiers), self._verified
        measured, members = self.attester.measurements, self._members()
        self._attest = _also(self._settings.attest, measured.policy) if measured else self._settings.attest
        self._keys = {board.encode(): key for board, key in members.items()}
        self.verifier.recast(members, self._attest, self._settings.trust)
        self._verified = frozenset(self.verifier.boards)
        self._recall((self.verifier.verifiers.keys() - known) | (self._verified - verified))
        self.attester.verifiers = frozenset(self.verifier.verifiers[self._board])
        self.shown = {board: shown for board, shown in self.shown.items() if board in self._verified}
        for key in [key for key in self.heard_us if not members.keys() >= {*key}]:
            self._said_bytes -= len(self.said.pop(key, b""))
            del self.heard_us[key]
        for shown in self.shown.values():
            self.verifier.appraise_again(shown.message, shown.quote)
        if measured is not None:
            self.measured(measured, now_us)
        self._online_of = -1
        self._owes_all = True
        self._turned(urgent=True)

    def _members(self) -> dict[str, bytes]:
        return {self._board: self._settings.signer.public_key, **self._settings.members}

    # how far boards are trusted

    def tier(self, board: str) -> TrustTier:
        return self.verifier.tier(board, self.online)

    def agreed_tier(self, board: str) -> TrustTier:
        """By what was published alone; a board that is alone has nobody to agree with."""
        if board == self._board and len(self.online) == 1:
            return self.tier(board)
        return self.verifier.agreed_tier(board, self.online)

    def why(self, board: str) -> str:
        """What is held against ``board``: what this board found itself, else what the verifiers say who think worst of it."""
        own = self.verifier.verdict(board)
        if (board in self._verified or board == self._board) and own.reasons and own.tier <= self.tier(board):
            return own.reasons[0]
        said = [each for each in self.verifier.opinions.of(board) if each.verifier in self.online and each.reasons]
        worst = min(said, key=lambda each: (each.tier, each.verifier), default=None)
        return f"{worst.reasons[0]} (says {worst.verifier})" if worst else "no verifier that is there has said anything of it"

    @property
    def receipts(self) -> int:
        """How many receipts this board has signed, ever."""
        return self._proofs.chain.count

    def take_contraindicated(self) -> list[str]:
        """Boards that are contraindicated since this was last asked."""
        cast_out, self._cast_out = self._cast_out, []
        return cast_out

    # what is heard

    def topic_filters(self) -> Iterator[str]:
        """What this board wants to hear, and no more than that where the fleet is large."""
        topics = self._voice.topics
        yield topics.challenge(self._board)
        yield topics.every(Kind.APPRAISAL)
        yield topics.every(Kind.WORD)
        yield from _filters(topics, Kind.QUOTE, self._verified, len(self._keys))
        yield from _filters(topics, Kind.EPOCH, self.attester.verifiers, len(self._keys))

    def hear(self, topic: Topic, message: Message, now_us: int) -> Iterator[Effect]:
        """A message on one of those topics. Raises ``RefusedError`` for what is not to be believed."""
        match topic.kind:
            case Kind.QUOTE if topic.board in self._verified:
                yield from self._hear_quote(message.payload, topic.board, now_us)
            case Kind.EPOCH if topic.verifier in self.attester.verifiers:
                mark = open_epoch(message.payload, self._key_of)
                _must_agree("epoch's verifier", mark.verifier, topic.verifier)
                self.attester.hear_epoch(mark)
            case Kind.CHALLENGE:
                challenge = open_challenge(message.payload, self._key_of)
                _must_agree("challenged board", challenge.board, topic.board)
                self.attester.hear_challenge(challenge)
            case Kind.APPRAISAL:
                self._hear_appraisal(message.payload, topic, now_us)
            case Kind.WORD:
                yield from self._hear_word(message.payload, topic.board)

    def hear_receipt(self, message: bytes, receipt: Receipt) -> str:
        """A receipt is evidence too. Returns what contradicts it; empty if nothing does."""
        why = self.verifier.hear_receipt(message, receipt)
        if why:
            self._turned_of(receipt.board)
        return why

    def checked(self, board: str) -> None:
        """An answer of ``board`` was run again here, and stands."""
        self.verifier.checked(board)

    def struck(self, board: str, exact: bool, what: str) -> None:
        """An answer of ``board`` was run again here, and does not stand."""
        self.verifier.struck(board, exact, what)
        self._turned_of(board)

    def is_like(self, board: str) -> bool:
        """Does ``board`` run the same interpreter library and delegate as this one, byte for byte, by its last evidence?"""
        own, shown = self.attester.measurements, self.shown.get(board)
        if own is None or shown is None:
            return False
        measured = shown.quote.measurements
        return (measured.library, measured.delegate) == (own.library, own.delegate)

    # this board's own

    def measured(self, measurements: Measurements, now_us: int) -> None:
        self.attester.measured(measurements)
        latest = self.attester.latest
        is_shown = latest is not None and latest[0].measurements == measurements
        self.verifier.show_self(latest[0] if latest and is_shown else self.attester.draft(now_us, self._issued_s(now_us)))
        self._turned(urgent=True)

    def endorsed(self, event: Endorsed, now_us: int) -> Iterator[Effect]:
        for each in self.attester.endorsed(event):
            yield from self._say(each)

    def connected(self) -> None:
        self.link_up, self._link_was_up = True, False
        self._owes_all, self._repeated_us = True, None

    def disconnected(self) -> None:
        self.link_up = self._link_was_up = False

    def repeat(self) -> None:
        """Something of this was not sent: all of it is said again, when a second has passed since the last time."""
        self._owes_all = True

    def go_on(self, now_us: int) -> Iterator[Effect]:
        """What time and news have made due."""
        self._look_who_is_there()
        while self._notes:
            yield Log(self._notes.pop(0))
        if self._owes_all and self.link_up:
            self._say_again(now_us)
        if self._verified and (self.link_up or self.epochs.mark):
            yield from self._turn(now_us)
        if self.link_up:
            for board in self.verifier.to_challenge(now_us):
                if (challenge := self.epochs.challenge(board)) is not None:
                    yield Publish(self._voice.challenge(challenge))
            if self.attester.due(now_us):
                for each in self.attester.next(now_us, self._issued_s(now_us)):
                    yield from self._say(each)
            yield from self._tell(now_us)
        self._look(now_us)

    def _tell(self, now_us: int) -> Iterator[Effect]:
        """The appraisals that are due; what they hold against a board is in the ledger before they are out."""
        due = self.verifier.appraisals_due(now_us, self._issued_s(now_us))
        if due:
            self.keep(now_us)
        for appraisal in due:
            told = self._voice.appraisal(appraisal)
            self._remember(appraisal, told.payload, now_us)
            yield Publish(told)

    def _say_again(self, now_us: int) -> None:
        if self._repeated_us is not None and now_us - self._repeated_us < REPEAT_PERIOD_US:
            return
        self._owes_all, self._repeated_us, self._owes_mark = False, now_us, True
        self.attester.repeat()
        self.verifier.say_again()

    def _turn(self, now_us: int) -> Iterator[Effect]:
        mark = self.epochs.turn(now_us)
        if mark is not None:
            self.verifier.epoch_over(now_us, self._link_was_up)
            self._link_was_up, self._owes_mark = self.link_up, True
            self._turned(urgent=True)
        if self._owes_mark and self.link_up and (mark := self.epochs.mark) is not None:
            self._owes_mark = False
            yield Publish(self._voice.epoch(mark))

    def _say(self, made: Quote | Effect) -> Iterator[Effect]:
        """A quote is signed, is what this board thinks of itself, and goes out; anything else is asked of the shell."""
        if not isinstance(made, Quote):
            yield made
            return
        message = self.attester.signed(made)
        self.verifier.show_self(made)
        self._turned(urgent=True)
        yield Publish(self._voice.quote(message))

    def _issued_s(self, now_us: int) -> int:
        return self._proofs.wall_us(now_us) // 1_000_000

    # what was heard

    def _hear_quote(self, message: bytes, board: str, now_us: int) -> Iterator[Effect]:
        quote = open_quote(message, self._key_of)
        _must_agree("quote", quote.board, board)
        why = self.verifier.hear_quote(message, quote, self.epochs.fresh(quote))
        if why:
            yield Log(f"quote {quote.counter} of boot {quote.bootcount} of {board}: {why}")
        else:
            self.shown[board] = Shown(quote, now_us, message)
        self._turned_of(board)

    def _hear_appraisal(self, message: bytes, topic: Topic, now_us: int) -> None:
        """Also this board's own of an earlier boot, by which the others go until there is a newer one."""
        if self.said.get((topic.verifier, topic.board)) == message:
            return
        appraisal = open_appraisal(message, self._key_of)
        _must_agree("appraisal's verifier", appraisal.verifier, topic.verifier)
        _must_agree("appraised board", appraisal.board, topic.board)
        if self.verifier.hear_appraisal(appraisal):
            self._remember(appraisal, message, now_us)

    def _remember(self, appraisal: Appraisal, message: bytes, now_us: int) -> None:
        """An appraisal counts from now on; as it was signed it is kept for who wants proof, as long as there is room."""
        key = (appraisal.verifier, appraisal.board)
        self.heard_us[key] = now_us
        self._said_bytes -= len(self.said.pop(key, b""))
        if self._said_bytes + len(message) <= MAX_SAID_BYTES:
            self.said[key] = message
            self._said_bytes += len(message)
        self._turned_of(appraisal.board)

    def _hear_word(self, message: bytes, board: str) -> Iterator[Effect]:
        word = open_word(message, lambda kid: self._attest.operators.get(kid.decode("utf-8", "replace")))
        _must_agree("operator's word", word.board, board)
        if self.verifier.hear_word(word):
            yield Log(f"operator {word.operator}: {word.action.value} {word.board}{': ' * bool(word.reason)}{word.reason}")
            self._turned(urgent=True)

    def _key_of(self, kid: bytes) -> bytes | None:
        return self._keys.get(kid)

    # what follows

    def _turned(self, *, urgent: bool) -> None:
        self._stale = True
        self._urgent |= urgent

    def _turned_of(self, board: str) -> None:
        """Something was heard of ``board``. What makes it contraindicated is urgent, and nothing else: who floods this board with
        words that are good, or that it has heard, does not have it look at all boards each time."""
        self._turned(urgent=board not in self._outcast and self.tier(board) is CONTRAINDICATED)

    def _look(self, now_us: int) -> None:
        """Has anything changed in how far boards are trusted?"""
        if not self._stale or not (self._urgent or now_us - self._looked_us >= LOOK_PERIOD_US):
            return
        self._stale, self._urgent, self._looked_us = False, False, now_us
        agreed = {board: self.agreed_tier(board) for board in self.verifier.verifiers}
        if agreed != self._agreed:
            self._agreed = agreed
            self.changes += 1
        outcast = frozenset(board for board in self.verifier.verifiers if self.tier(board) is CONTRAINDICATED)
        if outcast != self._outcast:
            self._cast_out += sorted(outcast - self._outcast)
            self._outcast = outcast
        self.keep(now_us)

    def _look_who_is_there(self) -> None:
        """Has anything changed in which boards are there, and in which boot of theirs?"""
        if self._fleet.changes == self._online_of:
            return
        self._online_of = self._fleet.changes
        there = (each.board for each in self._fleet.records() if self._fleet.standing(each.board) is Standing.ONLINE)
        for board in self._verified:
            presence = self._fleet.presence(board)
            self.verifier.hear_boot(board, max(self._fleet.version(board)[0], presence.boot_epoch if presence else 0))
        online = frozenset(there) | {self._board}
        if online != self.online:
            self.online = online
            self._turned(urgent=True)

    # the ledger

    def keep(self, now_us: int, *, everything: bool = False) -> None:
        """Put what must outlive this boot into the ledger; ``everything``: how far each board came, too."""
        for board, kept in self.verifier.to_keep(now_us, everything).items():
            self._ledger.put_document(DOCUMENT + board, kept)

    def _recall(self, boards: Iterable[str]) -> None:
        for board in sorted(boards):
            kept = self._ledger.document(DOCUMENT + board)
            if kept is None:
                continue
            try:
                self.verifier.recall(board, kept)
            except RefusedError as error:
                self._notes.append(f"what the ledger holds against {board} is left out: {error}")


def _filters(topics: Topics, kind: Kind, boards: frozenset[str], fleet_size: int) -> Iterator[str]:
    """Each of ``boards`` by itself, or one filter for all where they are most of the fleet."""
    if 2 * len(boards) >= fleet_size:
        yield topics.every(kind)
    else:
        build = topics.quote if kind is Kind.QUOTE else topics.epoch
        yield from (build(board) for board in sorted(boards))


def _also(attest: AttestSettings, policy: bytes) -> AttestSettings:
    """With the rules that were in force here until now: not all boards change them at one moment."""
    return replace(attest, references=replace(attest.references, policy=attest.references.policy | {policy}))


def _must_agree(subject: str, inside: str, outside: str) -> None:
    if inside != outside:
        raise RefusedError(subject, f"{inside!r} inside, {outside!r} outside", "one and the same")
