"""The audit of a proof: is every link of it sound, from what was asked back to the first receipt, and if not, which is not?

Owns ``verify``: pure, offline, of bytes and the reader's anchors alone.  Rules: evidence is judged before the receipts that lean
on it, a receipt after those that its inputs came from, what was asked last; so the first broken link is where it broke.  A link
is sound only if every check of it is; what a file does not show is said, and is no fault unless the file claims to show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from edge_agent.attest.appraisal import Appraisal
from edge_agent.attest.evidence import NO_DIGEST, Quote
from edge_agent.attest.links import Audit, Check, Kind, Link
from edge_agent.attest.proof import Asked, Proof
from edge_agent.attest.receipts import Receipt, open_receipt, receipt_digest, unverified_receipt
from edge_agent.attest.testimony import Anchors, Status, Testimony
from edge_agent.core.digests import output_digest, request_digest, tensors_digest
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import InferenceRequest, TrustTier

__all__ = ["Anchors", "Audit", "Check", "Kind", "Link", "verify"]


def verify(proof: Proof, anchors: Anchors, floor: TrustTier = TrustTier.NONE) -> Audit:
    """Judge every link of ``proof``; ``floor``: the least that each board must have been trusted when it signed.

    A contraindicated board's receipt is broken whatever the floor.
    """
    testimony = Testimony(proof.quotes, proof.appraisals, anchors)
    receipts = _Receipts(proof, anchors, testimony, max(floor, TrustTier.NONE))
    return Audit(
        (
            *_evidence_links(proof, testimony),
            *receipts.links(),
            *(_asked_link(each, receipts.signed) for each in proof.asked),
            *(_span_link(board, span, receipts.chains[board], testimony) for board, span in sorted(proof.spans.items())),
        )
    )


def in_order(
    parents: Mapping[bytes, Sequence[bytes]], rank: Callable[[bytes], tuple[Any, ...]]
) -> tuple[list[bytes], set[bytes]]:
    """The nodes of a graph, each after its parents, else by ``rank``; and those on a cycle, which SHA-256 makes impossible."""
    cyclic: set[bytes] = set()
    while True:
        sorter = TopologicalSorter({node: [p for p in ps if p in parents] for node, ps in parents.items() if node not in cyclic})
        try:
            sorter.prepare()
            break
        except CycleError as error:
            cyclic |= set(error.args[1])
    order: list[bytes] = []
    ready = [(rank(node), node) for node in sorter.get_ready()]
    heapify(ready)
    while ready:
        _, node = heappop(ready)
        order.append(node)
        sorter.done(node)
        for following in sorter.get_ready():
            heappush(ready, (rank(following), following))
    return [*(node for node in order if node not in cyclic), *sorted(cyclic)], cyclic


class _Receipts:
    """The receipts of a proof, opened, and what each is held against."""

    def __init__(self, proof: Proof, anchors: Anchors, testimony: Testimony, floor: TrustTier) -> None:
        self._anchors, self._testimony, self._floor = anchors, testimony, floor
        self._unsigned: dict[bytes, str] = {}
        self._said: dict[bytes, Receipt | None] = {}
        self.signed: dict[bytes, Receipt] = {}
        self._by_request: dict[str, list[bytes]] = defaultdict(list)
        self.chains: dict[str, dict[int, list[bytes]]] = defaultdict(lambda: defaultdict(list))
        """By board and counter the digests of what that board did sign."""
        for message in proof.receipts:
            self._open(message)
        self._of_use = self._wanted(proof)
        self._earlier = {
            (board, counter): before for board, chain in self.chains.items() for before, counter in pairwise((0, *sorted(chain)))
        }
        """The counter of the receipt that is before another one of its board in this file, 0 for none."""

    def links(self) -> Iterator[Link]:
        signed = {digest: self.signed[digest].parents if digest in self.signed else () for digest in self._said}
        order, cyclic = in_order(signed, self._rank)
        for digest in order:
            receipt = self._said[digest]
            checks = [Check("signature", self._unsigned.get(digest, ""))]
            status = Status(TrustTier.NONE)
            if receipt is not None and digest not in self._unsigned:
                status = self._testimony.status(receipt.board, receipt.bootcount, receipt.quote)
                checks += self._checks(digest, receipt, status, digest in cyclic)
            name = f"{receipt.board} #{receipt.counter}" if receipt else digest.hex()[:16]
            yield Link(Kind.RECEIPT, name, tuple(checks), digest, receipt, status)

    def _open(self, message: bytes) -> None:
        digest = receipt_digest(message)
        try:
            receipt = open_receipt(message, self._anchors.find_key)
        except RefusedError as error:
            self._unsigned[digest], self._said[digest] = str(error), _claimed(message)
            return
        self._said[digest] = self.signed[digest] = receipt
        self._by_request[receipt.request_id].append(digest)
        self.chains[receipt.board][receipt.counter].append(digest)

    def _rank(self, digest: bytes) -> tuple[Any, ...]:
        """What cannot be believed comes first: what is missing after it may be that."""
        receipt = self._said[digest]
        if receipt is None or digest in self._unsigned:
            return (0, digest)
        return (1, receipt.started_us, receipt.board, receipt.counter, digest)

    def _wanted(self, proof: Proof) -> set[bytes]:
        """What was asked for, all that its inputs came from, and the spans that are shown; everything if nothing was asked."""
        asked = {each.request_id for each in proof.asked}
        spans = {board: range(first, last + 1) for board, (first, last) in proof.spans.items()}
        wanted = {
            digest
            for digest, each in self._said.items()
            if each and (each.request_id in asked or each.counter in spans.get(each.board, ()))
        }
        waiting = list(wanted)
        while waiting:
            receipt = self._said.get(waiting.pop())
            fresh = set(receipt.parents if receipt else ()) - wanted
            wanted |= fresh
            waiting += fresh
        return wanted if asked or spans else set(self._said)

    def _checks(self, digest: bytes, receipt: Receipt, status: Status, cyclic: bool) -> Iterator[Check]:
        yield Check("request", self._why_not_single(digest, receipt))
        yield Check("parents", "it comes from itself" if cyclic else self._why_not_parents(receipt), self._odd_clock(receipt))
        yield self._chain_check(digest, receipt)
        yield Check("quotes", self._testimony.against(receipt, digest))
        yield self._model_check(receipt)
        yield self._status_check(status)

    def _why_not_single(self, digest: bytes, receipt: Receipt) -> str:
        if digest not in self._of_use:
            return "it belongs to nothing that was asked for, or that this came from"
        same = self._by_request[receipt.request_id]
        return f"{len(same)} receipts for request {receipt.request_id}" if len(same) > 1 else ""

    def _why_not_parents(self, receipt: Receipt) -> str:
        for parent in receipt.parents:
            if parent not in self._said:
                return f"receipt {parent.hex()[:16]}, which its inputs came from, is not in the file"
            said = self._said[parent]
            if said and said.board == receipt.board and said.counter >= receipt.counter:
                return f"its inputs came from {said.board} #{said.counter}, which is younger"
        return ""

    def _odd_clock(self, receipt: Receipt) -> str:
        parents = [self._said.get(parent) for parent in receipt.parents]
        late = [each for each in parents if each and each.started_us > receipt.started_us]
        return "; ".join(f"by its own clock {each.board} began #{each.counter} later than this" for each in late)

    def _chain_check(self, digest: bytes, receipt: Receipt) -> Check:
        chain = self.chains[receipt.board]
        if len(chain[receipt.counter]) > 1:
            return Check(
                "chain", f"fork: {receipt.board} signed {len(chain[receipt.counter])} receipts with number {receipt.counter}"
            )
        earlier = self._earlier[receipt.board, receipt.counter]
        before = self._said[chain[earlier][0]] if earlier else None
        if before is None:
            return Check("chain", note="the only one, or the first, of its board here" if receipt.previous != NO_DIGEST else "")
        if fault := self._why_not_after(receipt, before, chain[earlier]):
            return Check("chain", fault)
        left_out = receipt.counter - earlier - 1
        return Check("chain", note=f"{left_out} between #{earlier} and this are not in the file" if left_out else "")

    def _why_not_after(self, receipt: Receipt, before: Receipt, digests: Sequence[bytes]) -> str:
        if (receipt.bootcount, receipt.quote) < (before.bootcount, before.quote):
            return f"reset: boot {receipt.bootcount}, quote {receipt.quote}, after #{before.counter} of boot {before.bootcount}"
        if receipt.counter == before.counter + 1 and receipt.previous not in digests:
            return f"fork: it follows another #{before.counter} than the one in the file"
        named = self._said.get(receipt.previous)
        if named is not None and (named.board, named.counter) != (receipt.board, receipt.counter - 1):
            return f"reset: it follows {named.board} #{named.counter} and calls itself #{receipt.counter}"
        return ""

    def _model_check(self, receipt: Receipt) -> Check:
        releases = self._anchors.releases
        if releases is None:
            return Check("model", note="not held against signed releases: none were given")
        known = receipt.model_digest in releases
        return Check("model", "" if known else f"{receipt.model} {receipt.model_digest.hex()[:16]} is in no signed release")

    def _status_check(self, status: Status) -> Check:
        by = ", ".join(f"{by} {tier.name.lower()}" for by, tier in status.words.items()) or "nobody here says more"
        told = f"{status.tier.name.lower()} ({by})" + (f": {status.why}" if status.why else "")
        if status.tier < self._floor:
            return Check("status", f"{told}; wanted: {self._floor.name.lower()} or better")
        return Check("status", note=told)


def _claimed(message: bytes) -> Receipt | None:
    try:
        return unverified_receipt(message)
    except RefusedError:
        return None


def _evidence_links(proof: Proof, testimony: Testimony) -> Iterator[Link]:
    for kind, messages in ((Kind.QUOTE, proof.quotes), (Kind.APPRAISAL, proof.appraisals)):
        for message in messages:
            match testimony.opened.get(message):
                case Quote() as quote:
                    name = f"{quote.board}, quote {quote.counter} of boot {quote.bootcount}"
                case Appraisal() as word:
                    name = f"{word.verifier} on {word.board}, {word.boot_epoch}.{word.sequence}"
                case _:
                    name = receipt_digest(message).hex()[:16]
            yield Link(kind, name, (Check("evidence", testimony.faults.get(message, "")),), receipt_digest(message))


def _asked_link(asked: Asked, signed: Mapping[bytes, Receipt]) -> Link:
    receipt = signed.get(asked.receipt)
    checks = [Check("receipt", "" if receipt else f"{asked.receipt.hex()[:16]} is not in the file, or not signed by its board")]
    if receipt is not None:
        for what in ("request_id", "request", "inputs", "outputs"):
            same = getattr(receipt, what) == getattr(asked, what)
            checks.append(Check(what, "" if same else f"{receipt.board} #{receipt.counter} is of another one"))
    if (request := asked.asked_for) is not None:
        told = (request.request_id, request_digest(request), tensors_digest(request.inputs))
        same = told == (asked.request_id, asked.request, asked.inputs)
        checks.append(Check("request itself", "" if same else "it has other digests than are told of it"))
        checks.append(Check("parents", _why_not_from(request, receipt)))
        checks.append(Check("answer itself", _why_not_answer(asked)))
    return Link(Kind.ASKED, asked.request_id, tuple(checks), asked.receipt)


def _why_not_from(request: InferenceRequest, receipt: Receipt | None) -> str:
    same = receipt is None or receipt.parents == request.parents
    return "" if same else f"{len(request.parents)} were asked for, the receipt names others"


def _why_not_answer(asked: Asked) -> str:
    if asked.answer is None or asked.asked_for is None:
        return ""
    try:
        digest = output_digest(asked.asked_for.task, asked.answer.outputs)
    except RefusedError as error:
        return str(error)
    return "" if digest == asked.outputs else "it has another digest than is told of it"


def _span_link(board: str, span: tuple[int, int], chain: Mapping[int, Sequence[bytes]], testimony: Testimony) -> Link:
    first, last = span
    shown = sum(first <= counter <= last for counter in chain)
    missing = next((counter for counter in range(first, first + shown + 1) if counter <= last and counter not in chain), 0)
    told = testimony.receipts_of(board)
    checks = (
        Check("gap", f"#{missing} is not in the file, or not signed by {board}" if missing else ""),
        Check("end", f"truncated: a quote of {board} tells of {told} receipts" if told > last else ""),
    )
    return Link(Kind.SPAN, f"{board} #{first} to #{last}", checks)
