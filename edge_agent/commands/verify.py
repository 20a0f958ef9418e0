"""``sly verify``: is a proof file sound? Offline. Exit code 0: every link holds, 1: one is broken, 2: it cannot be judged.

Rules: what is believed is the reader's own configuration, nothing in the file; no state is made and no key is; what others wrote
is printed without what a terminal would obey.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.commands.terminal import wrapped

if TYPE_CHECKING:
    from edge_agent.attest.audit import Anchors, Audit, Link
    from edge_agent.attest.proof import Proof
    from edge_agent.core.config import AgentConfig

DIGEST_CHARS = 12
READ_OF_KEYS = ("fleet", "models", "attest")
MORE = """\
Reads a proof file (docs/receipts.md) and says of every link whether it is sound: who signed it, its place in
its board's chain, where its inputs came from, whether its model is in a signed release, and how far its board was trusted when it
ran. The keys are those of [fleet.members]; the releases those of the catalog, built here, or named in [models] releases.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a proof file offline: who ran what, and is every link sound?", description=MORE
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the proof file")
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument("--config", type=Path, metavar="FILE", help="believe whom this agent's configuration believes")
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="or a TOML file with the sections [fleet], [models] and [attest] of one"
    )
    parser.add_argument(
        "--trust",
        choices=("none", "warning", "affirming"),
        default="none",
        help="each board must have been trusted at least so far when it ran (default: none; contraindicated never passes)",
    )
    parser.add_argument("--json", action="store_true", help="JSON, with every check of every link")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from edge_agent.attest.audit import verify
    from edge_agent.core.values import TrustTier

    anchors = _anchors(arguments)
    proof = _proof(arguments.file)
    audit = verify(proof, anchors, TrustTier[arguments.trust.upper()])
    if arguments.json:
        print(json.dumps(_report(audit), indent=2))
    else:
        print("\n".join(_lines(proof, anchors, audit)))
    return 1 if audit.broken else 0


def _proof(path: Path) -> Proof:
    from edge_agent.attest.proof import read_proof
    from edge_agent.core.errors import RefusedError

    try:
        return read_proof(path)
    except RefusedError as error:
        raise RefusedError(f"{error}; a proof is what --receipt FILE wrote") from error


def _anchors(arguments: argparse.Namespace) -> Anchors:
    """What the reader believes. Raises ``ConfigError`` for a file that cannot be used, or one without keys."""
    from edge_agent.attest.audit import Anchors
    from edge_agent.configured import read_config, release_digests, signing_keys
    from edge_agent.core.errors import ConfigError
    from edge_agent.core.values import TrustTier

    config = read_config(arguments.config) if arguments.config else _read_keys(arguments.keys)
    members = signing_keys(f"{arguments.config or arguments.keys} [fleet.members]", config.fleet.members)
    if arguments.config:
        members |= _own_key(config)
    if not members:
        raise ConfigError(
            f"{arguments.config or arguments.keys} [fleet.members]", "no keys", "each board's, as sly identity prints it"
        )
    return Anchors(
        members,
        release_digests(config),
        frozenset(config.attest.verifiers),
        config.attest.agree,
        {board: TrustTier[tier.upper()] for board, tier in config.fleet.trust.items()},
    )


def _read_keys(path: Path) -> AgentConfig:
    """The sections that a reader needs, in a file that may lack the others."""
    import tomllib

    from edge_agent.core.config import MAX_CONFIG_BYTES, AgentConfig
    from edge_agent.core.errors import ConfigError

    try:
        with path.open("rb") as file:
            mapping = tomllib.loads(file.read(MAX_CONFIG_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"keys {path}", error.strerror or str(error), "a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys {path}", str(error), "TOML in UTF-8") from error
    for section in mapping:
        if section not in READ_OF_KEYS:
            allowed = ", ".join(f"[{each}]" for each in READ_OF_KEYS)
            raise ConfigError(f"keys {path}, {section}", "what a reader does not need", allowed, "or use --config")
    try:
        return AgentConfig.from_mapping({"board": {"id": "reader"}, "state": {"folder": "."}, **mapping})
    except ConfigError as error:
        raise ConfigError(f"keys {path}: {error}") from error


def _own_key(config: AgentConfig) -> dict[str, bytes]:
    """This board's own key, if it has one and this user may read it."""
    from edge_agent.configured import signer_of
    from edge_agent.core.errors import SlyError

    if config.board.id in config.fleet.members or not (config.state.folder / "identity.key").exists():
        return {}
    try:
        return {config.board.id: signer_of(config).public_key}
    except SlyError:
        return {}


def _report(audit: Audit) -> dict[str, Any]:
    broken = audit.broken
    return {
        "sound": broken is None,
        "broken": {"kind": broken.kind.value, "name": broken.name, "fault": broken.fault} if broken else None,
        "links": [_link_report(link) for link in audit.links],
    }


def _link_report(link: Link) -> dict[str, Any]:
    told: dict[str, Any] = {
        "kind": link.kind.value,
        "name": link.name,
        "digest": link.digest.hex(),
        "fault": link.fault,
        "checks": [{"what": check.what, "fault": check.fault, "note": check.note} for check in link.checks],
    }
    if (receipt := link.receipt) is not None:
        told["receipt"] = {
            "board": receipt.board, "bootcount": receipt.bootcount, "quote": receipt.quote, "counter": receipt.counter,
            "request_id": receipt.request_id, "model": receipt.model, "model_digest": receipt.model_digest.hex(),
            "parents": [parent.hex() for parent in receipt.parents], "started_us": receipt.started_us,
            "busy_us": receipt.busy_us, "energy_uj": receipt.energy_uj, "energy_kind": receipt.energy_kind.value,
        }  # fmt: skip
        told["status"] = link.status.tier.name.lower()
        told["said_by"] = {by: tier.name.lower() for by, tier in link.status.words.items()}
    return told


def _lines(proof: Proof, anchors: Anchors, audit: Audit) -> Iterator[str]:
    releases = "no releases" if anchors.releases is None else f"{len(anchors.releases)} releases"
    what = [(len(proof.receipts), "receipt"), (len(proof.asked), "request"), (len(proof.quotes), "quote")]
    counted = ", ".join(_counted(*each) for each in (*what, (len(proof.appraisals), "appraisal")))
    yield f"{counted}; held against {_counted(len(anchors.members), 'key')} and {releases}"
    yield ""
    yield from _table(
        ["link", "board", "model", "when (its clock)", "status", "verdict"], [_row(link) for link in audit.receipts]
    )
    notes = [f"{link.name}, {check.what}: {check.note}" for link in audit.links for check in link.checks if check.note]
    if notes:
        yield from ("", "also known:", *(line for note in notes for line in wrapped(note, "  ", "  ")))
    checks = dict.fromkeys(check.what for link in audit.receipts for check in link.checks)
    yield from ("", f"checked of each receipt: {', '.join(checks)}")
    faulty = [link for link in audit.links if link.fault]
    if not faulty:
        yield "SOUND: every link holds"
        return
    yield from wrapped(f"BROKEN at {faulty[0].kind.value} {faulty[0].name}: {faulty[0].fault}", below="  ")
    if len(faulty) > 1:
        yield from wrapped(f"and after it: {', '.join(f'{link.kind.value} {link.name}' for link in faulty[1:])}", below="  ")


def _row(link: Link) -> list[str]:
    receipt = link.receipt
    verdict = "sound" if not link.fault else f"BROKEN: {link.fault.split(':')[0]}"
    digest = link.digest.hex()[:DIGEST_CHARS]
    if receipt is None:
        return [digest, "?", "?", "?", "?", verdict]
    unsigned = link.checks[0].fault
    board = f"{receipt.board} #{receipt.counter}" + ("?" if unsigned else "")
    return [digest, board, receipt.model, _when(receipt.started_us), "?" if unsigned else link.status.tier.name.lower(), verdict]


def _when(time_us: int) -> str:
    try:
        return f"{datetime.fromtimestamp(time_us // 1_000_000, UTC):%Y-%m-%d %H:%M:%S}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_us} us"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
