"""A link of which the broker keeps something to itself."""

from __future__ import annotations

from edge_agent.transport.link import Message
from edge_agent.transport.loopback import LoopbackLink
from tests.virtual_board import VirtualBoard


class DeafLink(LoopbackLink):
    """The broker lets nothing through whose topic ends with ``lost``, and believes that it did."""

    lost = "\0"

    def take(self, connection: int, packet_id: int, message: Message) -> bool:
        if not message.topic.endswith(self.lost):
            return super().take(connection, packet_id, message)
        self._confirm_delivery(connection, packet_id)
        return True


def make_deaf(board: VirtualBoard, lost: str) -> DeafLink:
    """From now on ``board`` does not hear topics that end with ``lost``, until its link says otherwise or it boots."""
    board.link.__class__ = DeafLink
    assert isinstance(board.link, DeafLink)
    board.link.lost = lost
    return board.link
