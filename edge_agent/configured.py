"""What a configuration names, brought to hand: the file itself, the key, the broker.

Rules: every fault is one ``SlyError`` that names the setting; nothing is connected to but in ``check`` and ``check_broker``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from secrets import token_bytes

from board_support.board import Board, BoardSettings
from board_support.registry import board_classes, open_board
from edge_agent.attest.evidence import SEED_BYTES, KeyKind
from edge_agent.attest.keys import kind_of_key
from edge_agent.attest.measure import Software, measured_software
from edge_agent.attest.quorum import never_trusted
from edge_agent.attest.settings import AttestSettings, References
from edge_agent.cloud.endpoint import endpoint_of
from edge_agent.core.cbor import encode
from edge_agent.core.config import MAX_CONFIG_BYTES, AgentConfig
from edge_agent.core.cose import Signer, check_public_key
from edge_agent.core.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.core.values import TrustTier
from edge_agent.gateway.access import Access
from edge_agent.hosting import check_there, models_folder
from edge_agent.node.settings import NodeSettings
from edge_agent.placement.facts import rules_digest
from edge_agent.placement.options import Rules
from edge_agent.runtime.settings import EngineSettings
from edge_agent.store.identity import load_or_make_seed
from edge_agent.store.ledger import Ledger
from edge_agent.transport.backoff import BackoffLimits
from edge_agent.transport.endpoint import BrokerAddress, MqttOptions
from edge_agent.transport.tls import TlsFiles
from models.catalog import catalog
from models.language_card import RUNTIMES, built, language_catalog
from ota.charter import Charter

FIRST_RETRY_US = 500_000


def read_config(path: Path) -> AgentConfig:
    """The configuration file as values. Raises ``ConfigError`` in one line for whatever is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"config {path}", error.strerror or str(error), "a readable TOML file") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"config {path}", f"{len(data)} bytes", f"at most {MAX_CONFIG_BYTES} bytes")
    try:
        mapping = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}", str(error), "TOML in UTF-8") from error
    try:
        return AgentConfig.from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error


async def check(config: AgentConfig) -> None:
    """Judge a configuration without serving: models, gateway, cloud, board, identity, broker.

    Raises ``SlyError`` for what is wrong.
    """
    for name in config.models.serve:
        check_there(config, name)
    if config.gateway.on:
        Access(config.gateway)
    if config.cloud.on:
        endpoint_of(config.cloud)
    members = members_of(config, signer_of(config))
    board = open_board(config.board.backend, board_settings(config))
    if config.attest.on:
        delegate = board.delegate()
        software = measured_software(config.engine.runtime)
        rules = Rules(config.policy, release_digests(config))
        attest_settings(config, members, rules, software.with_delegate(delegate.library) if delegate else software)
    if config.broker.host:
        from edge_agent.transport.mqtt import check as check_link

        await check_link(broker_address(config), f"{client_id(config)}-check")


async def check_broker(config: AgentConfig, say: Callable[[str], None]) -> None:
    """Look at a TLS broker once: one that is not there is fine, one with a wrong certificate stops the start.

    Raises ``RefusedError`` for the latter, unless ``[broker] untrusted`` is ``go_on``.
    """
    if not config.broker.ca_file or not config.broker.host:
        return
    from edge_agent.transport.mqtt import check as check_link

    try:
        await check_link(broker_address(config), f"{client_id(config)}-check")
    except UnavailableError as error:
        say(f"{error}; going on alone")
    except RefusedError as error:
        if config.broker.untrusted == "stop":
            raise RefusedError(f'{error}; mend it, or set [broker] untrusted = "go_on" to serve without a broker') from error
        say(f"{error}; going on alone")


def board_settings(config: AgentConfig) -> BoardSettings:
    """The configured board's. An emulated one has its device root's key in the state folder, made at the first start."""
    emulated = {kind.backend for kind in board_classes() if kind.emulated}
    seed = load_or_make_seed(private_folder(config) / "device_root.key") if config.board.backend in emulated else b""
    return BoardSettings(profile=config.board.profile, paced=config.board.paced, root_seed=seed)


def signer_of(config: AgentConfig) -> Signer:
    """The board's key, made at the first start. Raises ``SlyError`` for a folder or a key that cannot be used."""
    return Signer(config.board.id.encode(), load_or_make_seed(private_folder(config) / "identity.key"))


def node_settings(
    config: AgentConfig, signer: Signer, board: Board, ledger: Ledger, software: Software | None = None,
    key_kind: KeyKind = KeyKind.SOFTWARE,
) -> NodeSettings:  # fmt: skip
    """Of the boot that begins now, which the ledger counts; without ``software`` it shows nothing of itself.

    Raises as ``members_of`` and ``attest_settings`` do.
    """
    members = members_of(config, signer)
    rules = Rules(config.policy, release_digests(config))
    attest = replace(attest_settings(config, members, rules, software), key_kind=key_kind) if software else None
    with ledger.transaction():
        boot_epoch = ledger.increment("boot_epoch")
    return NodeSettings(
        board=config.board.id,
        boot_epoch=boot_epoch,
        signer=signer,
        hardware=getattr(board.probe(), "hardware_model", ""),
        emulated=board.emulated,
        fleet=config.fleet.name,
        members=members,
        rules=rules,
        trust={board: TrustTier[tier.upper()] for board, tier in config.fleet.trust.items()},
        queue=config.queue,
        attest=attest,
    )


def chartered(settings: NodeSettings, config: AgentConfig, charter: Charter) -> NodeSettings:
    """What the fleet's charter makes of these settings; what it does not say stays as it is configured.

    Raises ``RefusedError`` for a charter of another fleet, or one in which this board has another key. One that is revoked in it
    goes by it all the same, alone: nobody else has it among its members.
    """
    if charter.fleet != config.fleet.name:
        raise RefusedError("fleet's charter", f"that of fleet {charter.fleet!r}", f"that of {config.fleet.name!r}")
    own = charter.boards.get(settings.board)
    if own is not None and own.key != settings.signer.public_key:
        remedy = "this board was enrolled elsewhere, or lost its identity.key: enroll it anew"
        raise RefusedError(f"fleet's charter, {settings.board}", "another public key", settings.signer.public_key.hex(), remedy)
    policy = charter.policy or config.policy
    rules = Rules(policy, release_digests(config) | charter.references.models)
    members = {**charter.members, settings.board: settings.signer.public_key}
    attest = _chartered_attest(settings.attest, config, charter, rules) if settings.attest else None
    return replace(settings, members=members, rules=rules, attest=attest)


def _chartered_attest(attest: AttestSettings, config: AgentConfig, charter: Charter, rules: Rules) -> AttestSettings:
    said, known = charter.references, attest.references
    references = References(
        code=known.code | said.code,
        libraries=known.libraries | said.libraries,
        models=rules.releases,
        golden={**known.golden, **said.golden},
        policy=known.policy | {placed_by(config, rules)},
    )
    endorsers = {**attest.endorsers, **{board: each.endorser for board, each in charter.boards.items() if each.endorser}}
    return replace(attest, references=references, operators=charter.operators, endorsers=endorsers)


def attest_settings(config: AgentConfig, members: Mapping[str, bytes], rules: Rules, software: Software) -> AttestSettings:
    """What this boot attests and appraises by; its secrets are drawn here. ``software``: what was measured of this board.

    Raises ``ConfigError`` for verifiers that are no members, too few of them for any board, and keys that are none.
    """
    wanted = config.attest
    for name in wanted.verifiers:
        if name not in members:
            raise ConfigError("[attest] verifiers", name, f"a board of [fleet.members]: {', '.join(sorted(members))}")
    settings = AttestSettings(
        secret=token_bytes(SEED_BYTES),
        bootseed=token_bytes(SEED_BYTES),
        epoch_us=wanted.epoch_s * 10**6,
        missed=wanted.missed,
        verifiers=frozenset(wanted.verifiers),
        agree=wanted.agree,
        software_tier=TrustTier[wanted.software_keys.upper()],
        recheck_permille=wanted.recheck_permille,
        references=references(config, rules, software),
        operators=signing_keys("[fleet.operators]", config.fleet.operators),
        endorsers=_endorsers(config),
        version=version("slyos-edge"),
    )
    if alone := never_trusted(members, settings):
        got = f"agree = {wanted.agree}, verifiers: {', '.join(wanted.verifiers) or 'all members'}"
        allowed = "for every board at least agree verifiers besides itself"
        remedy = f"name at least {wanted.agree + 1} verifiers, or lower agree"
        raise ConfigError("[attest]", f"{got}; {alone[0]} can never be trusted", allowed, remedy)
    return settings


def references(config: AgentConfig, rules: Rules, software: Software) -> References:
    """What a board of this fleet should measure: as this one does, the signed releases, and what the operator names."""
    return References(
        code=frozenset({software.code, *map(bytes.fromhex, config.attest.code)}),
        libraries=software.recognized | frozenset(map(bytes.fromhex, config.attest.libraries)),
        models=rules.releases,
        golden={
            (bytes.fromhex(card.source.sha256), library): frozenset({bytes.fromhex(digest)})
            for card in catalog().values()
            for library, digest in card.golden.items()
        },
        policy=frozenset({policy_digest(config, rules)}),
    )


def policy_digest(config: AgentConfig, rules: Rules) -> bytes:
    """SHA-256 of what a board places and appraises by, the same on all boards of a fleet that is configured alike."""
    attest = config.attest
    appraising = [attest.epoch_s, attest.missed, sorted(attest.verifiers), attest.agree, attest.software_keys]
    return sha256(encode([rules_digest(rules), appraising])).digest()


def placed_by(config: AgentConfig, rules: Rules) -> bytes:
    """``policy_digest`` of what is configured here and of the policy in force. The releases that a charter names are signed: they
    come to all boards, not at once, and are no part of what boards must have alike."""
    return policy_digest(config, Rules(rules.policy, release_digests(config)))


def _endorsers(config: AgentConfig) -> dict[str, bytes]:
    keys = _keys("[fleet.endorsers]", config.fleet.endorsers)
    for name, key in keys.items():
        try:
            kind_of_key(key)
        except RefusedError as error:
            raise ConfigError(f"[fleet.endorsers] {name}", error.got, error.allowed, error.remedy) from error
    return keys


def signing_keys(subject: str, keys: Mapping[str, str]) -> dict[str, bytes]:
    """Ed25519 public keys by name. Raises ``ConfigError`` naming whose is none."""
    found = _keys(subject, keys)
    for name, key in found.items():
        try:
            check_public_key(key)
        except RefusedError as error:
            remedy = "copy it whole: sly identity prints a board's, sly trust key an operator's"
            raise ConfigError(f"{subject} {name}", keys[name], "an Ed25519 public key", remedy) from error
    return found


def _keys(subject: str, keys: Mapping[str, str]) -> dict[str, bytes]:
    try:
        return {name: bytes.fromhex(key) for name, key in keys.items()}
    except ValueError as error:
        raise ConfigError(subject, str(error), "hexadecimal digits, two a byte") from error


def release_digests(config: AgentConfig) -> frozenset[bytes]:
    """The digests of the models that boards may run: the catalog's, those built here, and what the operator names."""
    languages = [*language_catalog().values(), *built(models_folder(config)).values()]
    known = {bytes.fromhex(each.source.sha256) for each in catalog().values()}
    known |= {each.digest(runtime) for each in languages for runtime in RUNTIMES}
    return frozenset(known | {bytes.fromhex(text) for text in config.models.releases})


def members_of(config: AgentConfig, signer: Signer) -> dict[str, bytes]:
    """Public keys of the fleet, this board's included. Raises ``ConfigError`` for no key, or another than this board's."""
    members = signing_keys("[fleet.members]", config.fleet.members)
    if members.setdefault(config.board.id, signer.public_key) != signer.public_key:
        raise ConfigError(
            f"[fleet.members] {config.board.id}",
            "another public key than this board's own",
            signer.public_key.hex(),
            "give the fleet this key, or the board its identity.key back",
        )
    return members


def engine_settings(config: AgentConfig) -> EngineSettings:
    return EngineSettings(
        runtime=config.engine.runtime,
        threads=config.engine.threads,
        memory_bytes=config.engine.memory_bytes,
        max_deaths=config.engine.max_deaths,
    )


def private_folder(config: AgentConfig) -> Path:
    """The state folder, made with mode 0700 if need be. Raises ``UnavailableError`` if it cannot be."""
    folder = config.state.folder
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnavailableError(f"[state] folder {folder}", reason, "choose a folder that this user may write") from error
    return folder


def client_id(config: AgentConfig) -> str:
    """Of this board at the broker, always the same. Its last part is told by nothing but the board's key: a client that a broker
    lets in can take over the session, and the messages in it, of anyone whose id it knows."""
    secret = signer_of(config).signature(b"sly/1/client-id")
    return f"sly-{config.board.id}-{sha256(secret).hexdigest()[:16]}"


def broker_address(config: AgentConfig) -> BrokerAddress:
    """Where the configured broker is. Raises ``ConfigError`` for a host or files that cannot be used."""
    broker = config.broker
    tls = None
    if broker.ca_file:
        certificate, key = (Path(name) if name else None for name in (broker.certificate_file, broker.key_file))
        tls = TlsFiles(Path(broker.ca_file), certificate, key)
    elif broker.certificate_file or broker.key_file:
        raise ConfigError("[broker] certificate_file", "a client certificate without ca_file", "ca_file beside it")
    return BrokerAddress(broker.host, broker.port, tls)


def mqtt_options(config: AgentConfig) -> MqttOptions:
    cap_us = config.broker.reconnect_max_ms * 1000
    return MqttOptions(config.broker.keepalive_s, backoff=BackoffLimits(min(FIRST_RETRY_US, cap_us), cap_us))
