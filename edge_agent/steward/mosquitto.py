"""What Mosquitto is told: who may connect, who may say and hear what, and how much of everything.

Owns the configuration and the access list (mosquitto.conf(5), 2.0).  Rules:

* Nobody connects without a certificate of the fleet's CA; a client is whom its certificate names, whatever it calls itself.
* A board says only what is its own to say; requests, challenges and the like it says to others, as the protocol has it.  What a
  fleet believes is signed besides: the broker keeps out floods and slips, it is not what trust rests on.
* Operators alone say what the fleet trusts and wants (``ota/meta``, ``ota/rollout``, ``fleet/word``).
* A board that was revoked says and hears nothing, at once when the list is read again, and cannot connect.
* Every queue and every packet has a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edge_agent.core.values import BOARD_ID, MAX_BOARDS, checked
from edge_agent.transport.link import MAX_PACKET_BYTES
from edge_agent.transport.topics import PREFIX, TOOL, Kind

CONFIGURATION, ACCESS_LIST = "mosquitto.conf", "acl"
BROKER_CERTIFICATE, BROKER_KEY, BROKER_CA, BROKER_CRL, DATA_FOLDER = "broker.pem", "broker.key", "ca.pem", "crl.pem", "data"
PID_FILE = "mosquitto.pid"
OPERATOR_PREFIX = "operator."
"""Of an operator's name at the broker: no board can be called so."""
MAX_INFLIGHT = 100
"""QoS 1 messages under way to one client, of which it takes as many as it asked for."""
MAX_QUEUED, MAX_QUEUED_BYTES = 4_000, 32 * 2**20
"""For one client that is away or slow."""
MEMORY_BYTES = 2**30
CONNECTIONS = 2 * MAX_BOARDS + 64
SESSION_DAYS = 14

SELF, CLIENT, ANY = "%u", "%c", "+"
SAID_BY_A_BOARD: tuple[tuple[Kind, dict[str, str]], ...] = (
    (Kind.ONLINE, {"board": SELF}),
    (Kind.RECORD, {"board": SELF}),
    (Kind.QUOTE, {"board": SELF}),
    (Kind.REPLY, {"board": SELF, "client": ANY}),
    (Kind.APPRAISAL, {"verifier": SELF, "board": ANY}),
    (Kind.EPOCH, {"verifier": SELF}),
    (Kind.DIGEST, {"board": SELF}),
    (Kind.OTA_WANT, {"board": SELF}),
    (Kind.REPORT, {"board": SELF}),
    (Kind.SELF_TEST, {"board": SELF}),
    (Kind.CHALLENGE, {"board": ANY}),
    (Kind.REQUEST, {"board": ANY}),
    (Kind.CANCEL, {"board": ANY}),
    (Kind.KV, {"board": ANY, "peer": SELF}),
    (Kind.OTA_CHUNK, {"digest": ANY}),
)
HEARD_BY_A_BOARD: tuple[tuple[Kind, dict[str, str]], ...] = (
    (Kind.CHALLENGE, {"board": SELF}),
    (Kind.REQUEST, {"board": SELF}),
    (Kind.CANCEL, {"board": SELF}),
    (Kind.KV, {"board": SELF, "peer": ANY}),
    (Kind.REPLY, {"board": ANY, "client": SELF}),
    (Kind.REPLY, {"board": ANY, "client": f"{SELF}{TOOL}{CLIENT}"}),
    *(
        (kind, {})
        for kind in (
            Kind.ONLINE, Kind.RECORD, Kind.QUOTE, Kind.APPRAISAL, Kind.EPOCH, Kind.WORD, Kind.DIGEST, Kind.OTA_META,
            Kind.OTA_WANT, Kind.OTA_CHUNK, Kind.ROLLOUT, Kind.REPORT,
        )
    ),
)  # fmt: skip
SAID_BY_AN_OPERATOR = (Kind.OTA_META, Kind.ROLLOUT, Kind.WORD, Kind.OTA_CHUNK)
OWN_ECHO = "board/{operator}/reply/+"
"""What an operator says to itself, to learn that it has heard all that was kept."""


def configuration(port: int, folder: Path, user: str) -> str:
    """The text of ``mosquitto.conf`` for a broker whose other files lie in ``folder``, an absolute path on its machine."""
    return f"""\
# The broker of a SlyOS fleet, written by: sly fleet init. Read by: mosquitto -c {folder / CONFIGURATION}
user {user}
listener {port}
cafile {folder / BROKER_CA}
crlfile {folder / BROKER_CRL}
certfile {folder / BROKER_CERTIFICATE}
keyfile {folder / BROKER_KEY}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder / ACCESS_LIST}
pid_file {folder / DATA_FOLDER / PID_FILE}
max_qos 1
max_connections {CONNECTIONS}
set_tcp_nodelay true

max_packet_size {MAX_PACKET_BYTES}
max_inflight_messages {MAX_INFLIGHT}
max_queued_messages {MAX_QUEUED}
max_queued_bytes {MAX_QUEUED_BYTES}
memory_limit {MEMORY_BYTES}
persistent_client_expiration {SESSION_DAYS}d

persistence true
persistence_location {folder / DATA_FOLDER}/
autosave_interval 60
log_dest stderr
connection_messages true
"""


def access_list(fleet: str, operators: Iterable[str], revoked: Iterable[str]) -> str:
    """The text of the access list. ``revoked``: boards that may neither say nor hear anything."""
    root = f"{PREFIX}/{fleet}/"
    lines = [f"# Who may say and hear what in the fleet {fleet}: written by sly fleet, which writes it again.", ""]
    for board in sorted(revoked):
        lines += [f"user {checked(BOARD_ID, 'revoked board', board)}", "topic deny #", ""]
    for operator in sorted(operators):
        checked(BOARD_ID, "operator", operator)
        lines += [f"user {OPERATOR_PREFIX}{operator}", f"topic read {root}#"]
        lines += [f"topic write {root}{topic_filter(kind, {})}" for kind in SAID_BY_AN_OPERATOR]
        lines += [f"topic write {root}{OWN_ECHO.format(operator=operator)}", ""]
    lines += ["# Boards, by the name in their certificate (%u); %c is what a client calls itself, as sly ask does."]
    lines += [f"pattern write {root}{topic_filter(kind, parts)}" for kind, parts in SAID_BY_A_BOARD]
    lines += [f"pattern read {root}{topic_filter(kind, parts)}" for kind, parts in HEARD_BY_A_BOARD]
    return "\n".join(lines) + "\n"


def topic_filter(kind: Kind, parts: dict[str, str]) -> str:
    """The topic filter of a kind; a part that is not given is any."""
    levels = (level if level[0] != "{" else parts.get(level.strip("{}"), ANY) for level in kind.value.split("/"))
    return "/".join(levels)
