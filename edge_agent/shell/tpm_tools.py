"""The TPM 2.0 of this machine, through the programs of tpm2-tools.

Owns their command lines, their time limits and what their failures mean.  Rules: no shell, arguments as lists, nothing secret
among them; a program that takes too long is ended; what they write is bounded and parsed strictly (``attest.tpm``); every failure
is an ``UnavailableError`` that says what to do.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from edge_agent.attest.tpm import PcrQuote, open_attest, open_public, open_signature
from edge_agent.core.errors import RefusedError, UnavailableError

RESOURCE_MANAGER = Path("/dev/tpmrm0")
DEFAULT_TCTI = f"device:{RESOURCE_MANAGER}"
PROGRAMS = (
    "tpm2_readpublic", "tpm2_createprimary", "tpm2_evictcontrol", "tpm2_flushcontext", "tpm2_pcrreset", "tpm2_pcrextend",
    "tpm2_quote",
)  # fmt: skip
PACKAGE = "run: apt-get install tpm2-tools"
KEY_HANDLE = 0x81025359
"""Where the attestation key is kept: among the handles that are the owner's to give."""
KEY_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign"
COMMAND_S = 5.0
MAKE_KEY_S = 60.0
"""Chips take seconds for the first key."""
KILLED_S = 2.0
"""Until the end of a program that was killed is seen."""
MAX_FILE_BYTES = 1024
MAX_COMPLAINT_BYTES = 16 * 2**10
MAX_COMPLAINT_CHARS = 200
_NO_SUCH_HANDLE = re.compile(r"0x0*18b\b", re.IGNORECASE)
"""TPM_RC_HANDLE for the first handle: nothing is kept there."""
_COMPLAINT = re.compile(r"ERROR:\s*(?:[a-z]+:\S+:\d+:\S+\(\)\s*)?(.*)")


@dataclass(frozen=True, slots=True)
class Quoted:
    """``statement``: the TPMS_ATTEST as the TPM signed it, ``signature``: 64 bytes, ``said``: what is in it."""

    statement: bytes
    signature: bytes
    said: PcrQuote


def missing_programs() -> str:
    """Which of the programs are not installed; empty if all are."""
    return ", ".join(name for name in PROGRAMS if which(name) is None)


class TpmTools:
    """``tcti`` as in ``TPM2TOOLS_TCTI``. Each call is a few commands; they must not overlap.

    Raises ``UnavailableError`` for a TPM that is away, slow or in the way, ``RefusedError`` for what it should not say.
    """

    def __init__(self, tcti: str = "", command_s: float = COMMAND_S) -> None:
        self.tcti = tcti or DEFAULT_TCTI
        self._command_s = command_s

    async def find_or_make_key(self) -> bytes:
        """The attestation key's public point. It is a primary key of the endorsement hierarchy: one TPM makes it again alike."""
        try:
            return await self._public_key()
        except UnavailableError as error:
            if not _NO_SUCH_HANDLE.search(error.reason):
                raise
        with tempfile.TemporaryDirectory(prefix="sly-tpm-") as folder:
            context = f"{folder}/key"
            kind = ("-C", "e", "-g", "sha256", "-G", "ecc256:ecdsa-sha256:null", "-a", KEY_ATTRIBUTES)
            await self._run(MAKE_KEY_S, "tpm2_createprimary", *kind, "-c", context, "-Q")
            await self._run(self._command_s, "tpm2_evictcontrol", "-C", "o", "-c", context, f"{KEY_HANDLE:#x}", "-Q")
        if "tpmrm" not in self.tcti and "tabrmd" not in self.tcti:
            await self._run(self._command_s, "tpm2_flushcontext", "-t")
        return await self._public_key()

    async def reset(self, pcr: int) -> None:
        await self._run(self._command_s, "tpm2_pcrreset", str(pcr))

    async def extend(self, pcr: int, digests: Sequence[bytes]) -> None:
        await self._run(self._command_s, "tpm2_pcrextend", *(f"{pcr}:sha256={digest.hex()}" for digest in digests))

    async def quote(self, pcr: int, challenge: bytes) -> Quoted:
        """The TPM's statement of ``pcr`` with ``challenge`` as qualifying data. Raises ``RefusedError`` for a strange one too."""
        with tempfile.TemporaryDirectory(prefix="sly-tpm-") as folder:
            message, signature = Path(folder, "message"), Path(folder, "signature")
            what = ("-c", f"{KEY_HANDLE:#x}", "-l", f"sha256:{pcr}", "-q", challenge.hex(), "-g", "sha256")
            where = ("-m", str(message), "-s", str(signature), "-f", "tss", "-Q")
            await self._run(self._command_s, "tpm2_quote", *what, *where)
            statement = _bytes_of(message)
            return Quoted(statement, open_signature(_bytes_of(signature)), open_attest(statement))

    async def _public_key(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="sly-tpm-") as folder:
            path = Path(folder, "public")
            await self._run(self._command_s, "tpm2_readpublic", "-c", f"{KEY_HANDLE:#x}", "-f", "tss", "-o", str(path), "-Q")
            try:
                return open_public(_bytes_of(path))
            except RefusedError as error:
                remedy = f"another program's key is there; if nothing needs it: tpm2_evictcontrol -C o -c {KEY_HANDLE:#x}"
                raise RefusedError(f"{KEY_HANDLE:#x}: {error.subject}", error.got, error.allowed, remedy) from error

    async def _run(self, limit_s: float, program: str, *arguments: str) -> None:
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
        try:
            child = await asyncio.create_subprocess_exec(
                program, "-T", self.tcti, *arguments,
                stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env=environment, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UnavailableError(program, "this program is not installed", PACKAGE) from error
        except OSError as error:
            raise UnavailableError(program, error.strerror or str(error), PACKAGE) from error
        try:
            async with asyncio.timeout(limit_s):
                complaint = await _complaint(child)
                status = await child.wait()
        except TimeoutError as error:
            raise UnavailableError(f"TPM {self.tcti}", f"{program} took longer than {limit_s:g} s") from error
        finally:
            await _ended(child)
        if status != 0:
            raise UnavailableError(f"TPM {self.tcti}", f"{program}: {_in_words(complaint, status)}", _remedy(complaint))


async def _complaint(child: asyncio.subprocess.Process) -> str:
    """What it writes to stderr, until it closes that; what is more than the bound makes it wait until it is ended."""
    if child.stderr is None:
        return ""
    try:
        found = await child.stderr.readexactly(MAX_COMPLAINT_BYTES)
    except asyncio.IncompleteReadError as error:
        found = error.partial
    return found.decode(errors="replace")


async def _ended(child: asyncio.subprocess.Process) -> None:
    """End it and what it started, if it still runs. Its pipe is emptied, or asyncio would not see its end."""
    if child.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILLED_S):
            while child.stderr is not None and await child.stderr.read(MAX_COMPLAINT_BYTES):
                pass
            await child.wait()


def _in_words(complaint: str, status: int) -> str:
    """The transport's first complaint if the TPM was not reached, else the program's own first one."""
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR")]
    chosen = [line for line in errors if line.startswith("ERROR:tcti")] or [line for line in errors if line.startswith("ERROR: ")]
    found = _COMPLAINT.match((chosen or errors or [""])[0])
    words = found[1].strip() if found else ""
    return "".join(each if each.isprintable() else " " for each in words)[:MAX_COMPLAINT_CHARS] or f"exit status {status}"


def _remedy(complaint: str) -> str:
    if "Permission denied" in complaint:
        return "let the agent's user into the group tss"
    if "bad locality" in complaint:
        return "choose [attest] pcr = 23 or 16, which can be reset"
    if "ERROR:tcti" in complaint:
        return 'see [attest] tcti, or set [attest] key = "software" to go without a TPM'
    return ""


def _bytes_of(path: Path) -> bytes:
    """What a program wrote. Raises ``UnavailableError`` if it wrote nothing or too much."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnavailableError("tpm2-tools", f"{path.name} was not written: {error.strerror}", PACKAGE) from error
    if len(data) > MAX_FILE_BYTES:
        raise UnavailableError("tpm2-tools", f"{path.name} of more than {MAX_FILE_BYTES} bytes was written", PACKAGE)
    return data
