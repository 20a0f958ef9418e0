"""A board's judgement of the others: what it heard of each, what it makes of it, what it tells of it.

Owns ``Verifier``: the standing of every board that this one verifies, the appraisals that all verifiers published, and what
operators said.  Rules: no clock, no file, no network: messages come opened and their signatures checked, time is handed in; only
members are remembered, so that memory is bounded by the fleet's size whatever is sent; what is not taken in is said with the
reason; nobody decays unasked; what others say of which quote they hold condemns nobody, only quotes themselves do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from edge_agent.attest.appraisal import Appraisal
from edge_agent.attest.appraise import DEFAULT_POLICY, Endorsed, Policy, appraise
from edge_agent.attest.claims import Verdict
from edge_agent.attest.evidence import Quote, open_quote
from edge_agent.attest.keeping import Keeper, Kept, decode_kept, encode_kept
from edge_agent.attest.opinions import Opinions
from edge_agent.attest.quorum import verifiers_of_all
from edge_agent.attest.receipts import Receipt
from edge_agent.attest.settings import AttestSettings
from edge_agent.attest.standing import UNHEARD, Standing, State, revocation
from edge_agent.attest.telling import Telling
from edge_agent.attest.words import Action, OperatorWord
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TrustTier

ASK_AFTER = 2
"""A board that showed nothing in the first half of an epoch is challenged."""


class Verifier:
    """``members``: every board and its Ed25519 public key; ``ceiling``: the most that a board is trusted, where it is said.

    ``boot_epoch``: of this board; ``endorsed``: checks what hardware says of a quote (``keys.check_endorsement``).
    """

    def __init__(
        self,
        board: str,
        boot_epoch: int,
        members: Mapping[str, bytes],
        settings: AttestSettings,
        endorsed: Endorsed | None = None,
        policy: Policy = DEFAULT_POLICY,
        ceiling: Mapping[str, TrustTier] | None = None,
    ) -> None:
        self._board, self._boot_epoch, self._settings = board, boot_epoch, settings
        self._keys = {each.encode(): key for each, key in members.items()}
        self._endorsed, self._policy = endorsed, policy
        self.verifiers = verifiers_of_all(members, settings)
        self._standings = {each: Standing(settings.missed) for each in self.verifiers if board in self.verifiers[each]}
        self._tellings = {each: self._telling_of(each) for each in self._standings}
        self._words: dict[str, OperatorWord] = {}
        self.opinions = Opinions(self.verifiers, settings.agree, ceiling or {}, self._find_key)
        self._keeper = Keeper()
        self._own = UNHEARD
        self._sequence = 0
        self.epoch = 0
        self._epoch_began_us: int | None = None

    def recast(self, members: Mapping[str, bytes], settings: AttestSettings, ceiling: Mapping[str, TrustTier]) -> None:
        """The fleet has other members, or other references: what is held of those who stay goes on.

        What was kept of the others is for ``recall``; what they showed is for ``appraise_again``.
        """
        self._settings = settings
        self._keys = {each.encode(): key for each, key in members.items()}
        self.verifiers = verifiers_of_all(members, settings)
        self.opinions.recast(self.verifiers, ceiling)
        mine = [each for each in self.verifiers if self._board in self.verifiers[each]]
        kept, told = self._standings, self._tellings
        self._standings = {each: kept[each] if each in kept else self._standing_of(each) for each in mine}
        self._tellings = {
            each: told[each] if each in told and told[each].verifiers == self.verifiers[each] else self._telling_of(each)
            for each in mine
        }
        self._words = {each: word for each, word in self._words.items() if each in self.verifiers}

    def _standing_of(self, board: str) -> Standing:
        standing, word = Standing(self._settings.missed), self._words.get(board)
        if word is not None and word.action is Action.REVOKE:
            standing.revoked(word.operator, word.reason)
        return standing

    def _telling_of(self, board: str) -> Telling:
        return Telling(self._board, board, self.verifiers[board])

    @property
    def boards(self) -> tuple[str, ...]:
        """Whom this board verifies, ascending."""
        return tuple(self._standings)

    # What comes in

    def hear_quote(self, message: bytes, quote: Quote, fresh: bool) -> str:
        """Take in a quote that its board signed; ``fresh``: with a nonce of this verifier that counts now (``Epochs.fresh``).

        Returns why it changes nothing for the better, for the log; empty if it is good fresh evidence, or bad.
        """
        standing = self._standings.get(quote.board)
        if standing is None:
            return f"{quote.board} is verified by others"
        why = standing.hear_quote(message, quote, fresh)
        if not why:
            standing.shown(quote, message, appraise(quote, self._settings, self._endorsed, self._policy))
            self._tellings[quote.board].shown(quote.counter, self.epoch)
        return why

    def hear_boot(self, board: str, bootcount: int) -> None:
        """``board`` signed something in this boot: if it has shown nothing of it, it is asked to, and has this epoch for it."""
        if standing := self._standings.get(board):
            standing.hear_boot(bootcount)

    def hear_receipt(self, message: bytes, receipt: Receipt) -> str:
        """Hold a signed receipt against what else its board signed. Returns what contradicts; empty if nothing does."""
        standing = self._standings.get(receipt.board)
        return standing.hear_receipt(message, receipt) if standing else ""

    def hear_appraisal(self, appraisal: Appraisal) -> bool:
        """Take in what another verifier says; ``False`` if one at least as new is held, or it is not asked.

        Quotes in it are held against those that were shown here; one that was not shown here, of which another is held, is
        answered with that one.
        """
        if not self.opinions.join(appraisal):
            return False
        standing = self._standings.get(appraisal.board)
        if standing is not None and appraisal.verifier != self._board:
            self._compare(standing, appraisal)
        return True

    def hear_word(self, word: OperatorWord) -> bool:
        """An operator clears or revokes a board; ``False`` for a serial that is not higher than the last, and for strangers."""
        held = self._words.get(word.board)
        if word.board not in self.verifiers or (held is not None and held.serial >= word.serial):
            return False
        self._words[word.board] = word
        self.opinions.revoke(word.board, word.action is Action.REVOKE)
        if standing := self._standings.get(word.board):
            if word.action is Action.CLEAR:
                standing.clear()
            else:
                standing.revoked(word.operator, word.reason)
        return True

    def checked(self, board: str) -> None:
        """An answer of ``board`` was run again here, and was right."""
        if standing := self._standings.get(board):
            standing.checked()

    def struck(self, board: str, exact: bool, what: str) -> None:
        """An answer of ``board`` was run again here, and was wrong; ``exact``: where there is no tolerance."""
        if standing := self._standings.get(board):
            standing.struck(exact, what)

    def appraise_again(self, message: bytes, quote: Quote) -> None:
        """The quote that a board showed last may be worth something else by the references that count now."""
        standing = self._standings.get(quote.board)
        if standing is not None:
            standing.appraised_again(message, appraise(quote, self._settings, self._endorsed, self._policy))

    def show_self(self, quote: Quote) -> None:
        """What this board shows of itself, as it would be appraised by others."""
        self._own = appraise(quote, self._settings, self._endorsed, self._policy)

    # Time

    def epoch_over(self, now_us: int, link_was_up: bool) -> None:
        """An epoch of this verifier has ended and the next begins: to be called with each turn of its nonces.

        ``link_was_up``: all the time; an epoch in which it was not counts for nobody.
        """
        self.epoch += 1
        self._epoch_began_us = now_us
        for board, standing in self._standings.items():
            standing.epoch_over(link_was_up)
            self._tellings[board].epoch_over()

    def to_challenge(self, now_us: int) -> tuple[str, ...]:
        """Who should show evidence now, each once an epoch: who showed none in half of it, and at once who is not known, or is in
        a boot of which it has shown nothing."""
        began_us = now_us if self._epoch_began_us is None else self._epoch_began_us
        late = now_us - began_us >= self._settings.epoch_us // ASK_AFTER
        asked = []
        for board, standing in self._standings.items():
            if standing.asked_in_epoch or standing.state is State.CONTRAINDICATED:
                continue
            unknown = standing.overtaken or standing.state in (State.UNKNOWN, State.LAPSED)
            if unknown or (late and not standing.shown_in_epoch):
                standing.asked_in_epoch = True
                asked.append(board)
        return tuple(asked)

    # What outlives a power cut

    def to_keep(self, now_us: int, everything: bool = False) -> dict[str, bytes]:
        """What must be written to the ledger now, a document a board; it counts as written by that.

        At once what is held against a board, what an operator said, and that it booted; how far it came at most once a minute,
        or with ``everything``, before a restart.
        """
        boards = self._standings.keys() | self._words.keys()
        held = {board: Kept(self._standings.get(board), self._words.get(board)) for board in sorted(boards)}
        return {board: encode_kept(kept) for board, kept in held.items() if self._keeper.due(board, kept, now_us, everything)}

    def recall(self, board: str, data: bytes) -> None:
        """Go on from what was kept of ``board``. Raises ``RefusedError`` for bytes that ``to_keep`` does not make."""
        kept = decode_kept(data, board, self._settings.missed)
        self._keeper.written(board, kept)
        if board in self._standings and kept.standing is not None:
            self._standings[board] = kept.standing
        if board in self.verifiers and kept.word is not None:
            self._words[board] = kept.word
            self.opinions.revoke(board, kept.word.action is Action.REVOKE)

    # What comes of it

    def verdict(self, board: str) -> Verdict:
        """What this board thinks of ``board`` by itself; of itself, what others would."""
        if board == self._board:
            word = self._words.get(board)
            if word is not None and word.action is Action.REVOKE:
                return revocation(word.operator, word.reason).joined(self._own)
            return self._own
        standing = self._standings.get(board)
        return standing.verdict() if standing else Verdict(TrustTier.NONE, reasons=("it is verified by others",))

    def agreed_tier(self, board: str, online: Collection[str]) -> TrustTier:
        """How far ``board`` is trusted by what was published by verifiers that are ``online``: for the table."""
        return self.opinions.agreed_tier(board, online)

    def tier(self, board: str, online: Collection[str]) -> TrustTier:
        """How far ``board`` is trusted with a request at this moment: what was agreed, and no more than this board knows itself.

        Of itself a board takes its own word where nobody that is there has said anything.
        """
        if board == self._board:
            own = min(self.verdict(board).tier, self.opinions.ceiling(board))
            return min(own, self.agreed_tier(board, online)) if self.opinions.was_appraised(board, online) else own
        agreed = self.agreed_tier(board, online)
        return min(agreed, self.verdict(board).tier) if board in self._standings else agreed

    def appraisals_due(self, now_us: int, issued_s: int = 0) -> list[Appraisal]:
        """What is to be published now; each counts as published by that."""
        due = []
        for board, standing in self._standings.items():
            if self._tellings[board].is_due(standing, self.epoch, now_us):
                self._sequence += 1
                version = (self._boot_epoch, self._sequence)
                due.append(self._tellings[board].tell(standing, version, self.epoch, now_us, issued_s))
                self.opinions.join(due[-1])
        return due

    def say_again(self) -> None:
        """Everything is to be published anew: the broker may have lost it."""
        for telling in self._tellings.values():
            telling.say_again()

    def standing(self, board: str) -> Standing | None:
        """What is held of ``board``, for who shows it to a person; ``None`` if others verify it."""
        return self._standings.get(board)

    def _compare(self, standing: Standing, appraisal: Appraisal) -> None:
        for message in appraisal.raw:
            try:
                quote = open_quote(message, self._find_key)
            except RefusedError:
                continue
            if quote.board == appraisal.board:
                standing.hear_quote(message, quote, fresh=False)
        place = (appraisal.bootcount, appraisal.counter)
        held = standing.history.digest_at(place)
        if appraisal.evidence and held and held != appraisal.evidence:
            self._tellings[appraisal.board].doubted(standing.history.witness(place))

    def _find_key(self, kid: bytes) -> bytes | None:
        return self._keys.get(kid)
