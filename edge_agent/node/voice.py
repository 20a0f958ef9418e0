"""What this board says to others: every message that leaves it, signed where it must be believed.

Owns the pairing of topic, signature domain and expiry.  Rules: nothing is decided here; a result that does not fit into a
message becomes a failure that says so.
"""

from __future__ import annotations

from edge_agent.attest.appraisal import Appraisal, sign_appraisal
from edge_agent.attest.epoch import Challenge, EpochMark, sign_challenge, sign_epoch
from edge_agent.core import wire
from edge_agent.core.cose import sign1
from edge_agent.core.kv import KvAnswer, KvAsk
from edge_agent.core.values import AnswerPart, InferenceRequest, InferenceResult, Status, failure
from edge_agent.gossip.agreement import BoardDigest, sign_digest
from edge_agent.gossip.presence import Presence, Standing, sign_presence
from edge_agent.gossip.record import BoardRecord, sign_record
from edge_agent.node.settings import NodeSettings
from edge_agent.store.ledger import Owed
from edge_agent.transport.link import MAX_PAYLOAD_BYTES, Message
from edge_agent.transport.topics import Topics

ENVELOPE_BYTES = 72 * 2**10
"""Room for everything in a request's message that is not tensor data: 64 tensors with the longest names there are."""
CLIENT_REPLY_EXPIRY_S = 86_400
"""How long the broker keeps an answer for a client that is away."""


PART_EXPIRY_S = 10
CANCEL_EXPIRY_S = 60
KV_EXPIRY_S = 30
CHALLENGE_EXPIRY_S = 30


class Voice:
    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self.topics = Topics(settings.fleet)

    def presence(self, standing: Standing) -> Message:
        settings = self._settings
        presence = Presence(settings.board, settings.boot_epoch, standing)
        return Message(self.topics.online(settings.board), sign_presence(presence, settings.signer), retain=True)

    def record(self, record: BoardRecord) -> Message:
        return Message(self.topics.record(record.board), sign_record(record, self._settings.signer), retain=True)

    def digest(self, digest: BoardDigest) -> Message:
        return Message(self.topics.digest(digest.board), sign_digest(digest, self._settings.signer), retain=True)

    def quote(self, signed: bytes) -> Message:
        return Message(self.topics.quote(self._settings.board), signed, retain=True)

    def epoch(self, mark: EpochMark) -> Message:
        return Message(self.topics.epoch(mark.verifier), sign_epoch(mark, self._settings.signer), retain=True)

    def challenge(self, challenge: Challenge) -> Message:
        payload = sign_challenge(challenge, self._settings.signer)
        return Message(self.topics.challenge(challenge.board), payload, expiry_s=CHALLENGE_EXPIRY_S)

    def appraisal(self, appraisal: Appraisal) -> Message:
        topic = self.topics.appraisal(appraisal.verifier, appraisal.board)
        return Message(topic, sign_appraisal(appraisal, self._settings.signer), retain=True)

    def dispatch(self, request: InferenceRequest, board: str) -> Message:
        """A placed request for the board that shall run it; the broker drops it when its deadline has passed."""
        payload = sign1(wire.encode_request(request, board), self._settings.signer, wire.AAD_REQUEST)
        return Message(
            self.topics.request(board),
            payload,
            expiry_s=seconds(request.limits.deadline_us),
            response_topic=self.topics.reply(board, self._settings.board),
            correlation=bytes.fromhex(request.request_id),
        )

    def answer(self, result: InferenceResult, addressee: str, key: str, expiry_s: int) -> Owed:
        """The answer that is owed to a client or a board behind the broker."""
        payload = self._signed(result, addressee)
        if len(payload) > MAX_PAYLOAD_BYTES:
            reason = f"its outputs need {len(payload)} bytes, a message holds at most {MAX_PAYLOAD_BYTES}"
            payload = self._signed(failure(result.request_id, Status.FAILED, result.board, reason), addressee)
        topic = self.topics.reply(self._settings.board, addressee)
        return Owed(key, topic, payload, correlation=bytes.fromhex(result.request_id), expiry_s=expiry_s)

    def reply(self, result: InferenceResult, addressee: str) -> Message:
        """An answer that is in no ledger."""
        return self.repeated(self._signed(result, addressee), result.request_id, addressee)

    def part(self, part: AnswerPart, addressee: str) -> Message:
        """Text of an answer that is being made, for the board or the client that waits for it: sent once, and perhaps lost."""
        payload = sign1(wire.encode_part(part, addressee), self._settings.signer, wire.AAD_PART)
        topic = self.topics.reply(self._settings.board, addressee)
        return Message(topic, payload, qos=0, expiry_s=PART_EXPIRY_S, correlation=bytes.fromhex(part.request_id))

    def cancel(self, request_id: str, board: str) -> Message:
        """The request that was given to ``board`` is wanted no more."""
        payload = sign1(wire.encode_cancel(request_id, board), self._settings.signer, wire.AAD_CANCEL)
        return Message(self.topics.cancel(board), payload, expiry_s=CANCEL_EXPIRY_S)

    def kv(self, said: KvAsk | KvAnswer, board: str) -> Message:
        """What is said to ``board`` about the KV of a session that moves."""
        signer = self._settings.signer
        if isinstance(said, KvAsk):
            payload = sign1(wire.encode_kv_ask(said, board), signer, wire.AAD_KV_ASK)
        else:
            payload = sign1(wire.encode_kv_answer(said, board), signer, wire.AAD_KV_ANSWER)
        return Message(self.topics.kv(board, self._settings.board), payload, expiry_s=KV_EXPIRY_S)

    def repeated(self, answer: bytes, request_id: str, addressee: str) -> Message:
        """The answer that was given before, as it was."""
        topic, correlation = self.topics.reply(self._settings.board, addressee), bytes.fromhex(request_id)
        return Message(topic, answer, expiry_s=CLIENT_REPLY_EXPIRY_S, correlation=correlation)

    def _signed(self, result: InferenceResult, addressee: str) -> bytes:
        return sign1(wire.encode_result(result, addressee), self._settings.signer, wire.AAD_RESULT)


def seconds(interval_us: int) -> int:
    """An interval in whole seconds for the broker: rounded up, at least one."""
    return max(1, -(-interval_us // 1_000_000))
