"""Which files an engine child may still open: the model it was given, and no other. Landlock.

Rules: every access right that the kernel's Landlock knows is handled, so what has no rule here is denied, root included.
Landlock binds the calling thread and those it starts; it is used only while there is one.

Source: landlock(7), ``linux/landlock.h``; the system call numbers are the same on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from edge_agent.runtime.seccomp import system_call

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
READ_FILE = 1 << 2
FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many low bits of the file rights each ABI knows."""
NETWORK_RIGHTS, SCOPES = 0b11, 0b11


def _ruleset(abi: int) -> bytes:
    files = (1 << FILE_RIGHTS_BY_ABI[min(abi, max(FILE_RIGHTS_BY_ABI))]) - 1
    if abi < 4:
        return struct.pack("=Q", files)
    return struct.pack("=QQ", files, NETWORK_RIGHTS) + (struct.pack("=Q", SCOPES) if abi >= 6 else b"")


def _allow(ruleset: int, fd: int, rights: int) -> None:
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
    system_call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(RULE_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint(0))


def restrict(model_fd: int) -> int:
    """Allow reading ``model_fd``'s file, nothing else. Returns the kernel's ABI version.

    Raises ``OSError`` if this kernel has no Landlock, or if other threads run already.
    """
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise OSError(errno.EBUSY, "other threads run already")
    abi = system_call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(RULESET_VERSION))
    attributes = _ruleset(abi)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = system_call(CREATE_RULESET, ctypes.byref(buffer), ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        _allow_model(ruleset, model_fd)
        system_call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)
    return abi


def _allow_model(ruleset: int, model_fd: int) -> None:
    try:
        _allow(ruleset, model_fd, READ_FILE)
    except OSError as error:
        if error.errno != errno.EBADFD:  # a memfd: it has no path, and Landlock leaves it alone
            raise
