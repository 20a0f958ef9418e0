"""What vouches for this board's quotes, besides its key file: a TPM 2.0, or the root of an emulated board.

Owns the one contract of both, the log of what their register was extended by, and which of them is taken.  Rules: a model's
digest is in the register before a quote is endorsed that measures it; one command at a time; within ``ENDORSE_S`` there is an
endorsement or a reason; none of them ever stands in for another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, Protocol

from board_support.device_root import DeviceRoot
from board_support.registry import open_board
from edge_agent.attest.evidence import KeyKind
from edge_agent.attest.keys import MAX_LOG, MODEL_REGISTER, Endorsement, encode_endorsement
from edge_agent.attest.tpm import pcr_digest
from edge_agent.configured import board_settings
from edge_agent.core.config import AgentConfig, AttestSection
from edge_agent.core.errors import ConfigError, UnavailableError
from edge_agent.shell.tpm_tools import PACKAGE, RESOURCE_MANAGER, Quoted, TpmTools, missing_programs

ENDORSE_S = 8.0
RESETTABLE_PCRS = (16, 23)
"""What every process that may use the TPM can set to zero (TCG PC Client Platform TPM Profile, PCR attributes)."""


class Endorser(Protocol):
    """Not for two tasks at once, but for ``endorse``, which waits for its turn."""

    kind: ClassVar[KeyKind]

    async def public_key(self) -> bytes:
        """What is enrolled in [fleet.endorsers]. Raises ``UnavailableError`` if the hardware does not say."""

    def loaded(self, digests: Iterable[bytes]) -> None:
        """These models run from now on: they go into the register before the next endorsement."""

    async def endorse(self, challenge: bytes) -> bytes:
        """The endorsement of 32 bytes. Raises ``UnavailableError`` or ``RefusedError`` saying why there is none."""


class RootEndorser:
    """By the device root of an emulated board."""

    kind: ClassVar[KeyKind] = KeyKind.EMULATED

    def __init__(self, root: DeviceRoot) -> None:
        self._root = root
        self._log: dict[bytes, None] = {}
        self._is_full = False

    async def public_key(self) -> bytes:
        return self._root.public_key

    def loaded(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            if digest in self._log:
                continue
            if len(self._log) == MAX_LOG:
                self._is_full = True
                return
            self._root.extend(MODEL_REGISTER, digest)
            self._log[digest] = None

    async def endorse(self, challenge: bytes) -> bytes:
        if self._is_full:
            raise UnavailableError(
                "emulated device root", f"more than {MAX_LOG} models were loaded since it began", "start the agent anew"
            )
        statement, signature = self._root.sign(challenge)
        return encode_endorsement(Endorsement(self.kind, statement, signature, MODEL_REGISTER, tuple(self._log)))


class TpmEndorser:
    """By a TPM 2.0, whose PCR ``pcr`` is this agent's alone. It is set to zero when this agent begins."""

    kind: ClassVar[KeyKind] = KeyKind.TPM

    def __init__(self, tools: TpmTools, pcr: int, endorse_s: float = ENDORSE_S) -> None:
        self._tools, self._pcr, self._endorse_s = tools, pcr, endorse_s
        self._turn = asyncio.Lock()
        self._key = b""
        self._wanted: tuple[bytes, ...] = ()
        self._log: list[bytes] | None = None
        """What the PCR was extended by since it was zero; ``None`` if that is not known."""
        self._age: tuple[int, int] | None = None
        """How often the TPM had been reset and restarted at the last quote."""

    async def public_key(self) -> bytes:
        async with self._turn:
            return await self._found_key()

    def loaded(self, digests: Iterable[bytes]) -> None:
        self._wanted = tuple(dict.fromkeys(digests))[:MAX_LOG]

    async def endorse(self, challenge: bytes) -> bytes:
        try:
            async with asyncio.timeout(self._endorse_s), self._turn:
                await self._found_key()
                return await self._endorsed(challenge)
        except TimeoutError as error:
            reason = f"it has not answered within {self._endorse_s:g} s"
            raise UnavailableError(f"TPM {self._tools.tcti}", reason, "it is asked again for the next quote") from error

    async def _found_key(self) -> bytes:
        if not self._key:
            self._key = await self._tools.find_or_make_key()
        return self._key

    async def _endorsed(self, challenge: bytes) -> bytes:
        log = await self._extended()
        quoted = await self._quoted(challenge)
        if quoted.said.pcr_digest != pcr_digest(log) and self._is_restarted(quoted):
            self._log = None
            log = await self._extended()
            quoted = await self._quoted(challenge)
        self._age = (quoted.said.resets, quoted.said.restarts)
        if quoted.said.pcr_digest != pcr_digest(log):
            raise UnavailableError(
                f"PCR {self._pcr}", "it holds something else than this agent put there: another program uses it",
                f"end that program and start the agent anew, or choose another [attest] pcr of {_either()}",
            )  # fmt: skip
        return encode_endorsement(Endorsement(self.kind, quoted.statement, quoted.signature, self._pcr, tuple(log)))

    async def _quoted(self, challenge: bytes) -> Quoted:
        try:
            return await self._tools.quote(self._pcr, challenge)
        except UnavailableError:
            self._key = b""
            raise

    async def _extended(self) -> list[bytes]:
        """The log, once all that is loaded is in it. What fails half-way begins anew the next time."""
        held, self._log = self._log, None
        missing = [digest for digest in self._wanted if digest not in (held or ())]
        if held is None or len(held) + len(missing) > MAX_LOG:
            await self._tools.reset(self._pcr)
            held, missing = [], list(self._wanted)
        if missing:
            await self._tools.extend(self._pcr, missing)
        self._log = held + missing
        return self._log

    def _is_restarted(self, quoted: Quoted) -> bool:
        """A TPM that was, holds zero: nobody else has touched it."""
        return self._age is not None and self._age != (quoted.said.resets, quoted.said.restarts)


def open_endorser(attest: AttestSection, root: DeviceRoot | None, say: Callable[[str], None]) -> Endorser | None:
    """What vouches for a board with this ``root`` by ``[attest] key``; ``None`` for its key file alone. No command is run here.

    Raises ``ConfigError`` for a PCR that cannot be used, ``UnavailableError`` if a TPM is demanded and its programs are missing.
    """
    if not attest.on or attest.key == "software":
        return None
    if attest.key == "auto" and root is not None:
        return RootEndorser(root)
    if attest.key == "auto" and not attest.tcti and not _usable(RESOURCE_MANAGER, say):
        return None
    if missing := missing_programs():
        error = UnavailableError(f'[attest] key = "{attest.key}"', f"not installed: {missing}", PACKAGE)
        if attest.key == "tpm" or attest.tcti:
            raise error
        say(f"{error}; this board's quotes are vouched for by its key file alone")
        return None
    if attest.pcr not in RESETTABLE_PCRS:
        raise ConfigError("[attest] pcr", attest.pcr, f"{_either()}: an agent that starts anew can reset no other")
    return TpmEndorser(TpmTools(attest.tcti), attest.pcr, ENDORSE_S)


async def vouching_key(config: AgentConfig, say: Callable[[str], None]) -> tuple[KeyKind, bytes] | None:
    """What vouches for the configured board, and its public key, made if need be; ``None`` for the key file alone.

    Raises as ``open_endorser`` does, and ``UnavailableError`` for hardware that does not answer.
    """
    try:
        root = open_board(config.board.backend, board_settings(config)).device_root()
    except UnavailableError:
        root = None
    endorser = open_endorser(config.attest, root, say)
    return (endorser.kind, await endorser.public_key()) if endorser else None


def _usable(device: Path, say: Callable[[str], None]) -> bool:
    if device.exists() and not os.access(device, os.R_OK | os.W_OK):
        say(f"there is a TPM, but this user may not use {device}: let it into the group tss; going on with the key file alone")
        return False
    return device.exists()


def _either() -> str:
    return " or ".join(map(str, RESETTABLE_PCRS))
