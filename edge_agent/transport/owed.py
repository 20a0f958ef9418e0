"""What one connection delivered with QoS 1 and has not acknowledged.

Rules: a token names one delivery and is never used again, though packet ids are; acknowledgements leave in the order of the
deliveries, as MQTT 5 demands ([MQTT-4.6.0-2]; rumqttd drops a client that does otherwise), so one that is given early waits.
"""

from __future__ import annotations


class Owed:
    """``generation`` tells the tokens of a link's connections apart."""

    def __init__(self, generation: int) -> None:
        self._next_token = (generation << 32) + 1
        self._packets: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        self._given: set[int] = set()

    def __len__(self) -> int:
        return len(self._packets)

    def deliver(self, packet_id: int) -> int:
        """The token of a delivery; the same one while the same packet is still owed (the broker sent it twice)."""
        token = self._tokens.get(packet_id)
        if token is None:
            token, self._next_token = self._next_token, self._next_token + 1
            self._packets[token], self._tokens[packet_id] = packet_id, token
        return token

    def acknowledge(self, token: int) -> list[int]:
        """The packet ids to acknowledge now, in order. A token that is not owed here changes nothing."""
        if token in self._packets:
            self._given.add(token)
        released = []
        while self._packets and (first := next(iter(self._packets))) in self._given:
            self._given.discard(first)
            packet_id = self._packets.pop(first)
            del self._tokens[packet_id]
            released.append(packet_id)
        return released
