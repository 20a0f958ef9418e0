"""The system calls an engine child may make once its model is about to be read: a seccomp-BPF allow-list.

Rules: what is not listed fails with EPERM; a call made for another architecture kills.  No call here makes a socket, runs
a program, starts a process, opens a file for writing, signals another process or makes memory executable.  Every filter
is installed for all threads (TSYNC).

Numbers: ``asm/unistd_64.h`` (x86-64) and ``asm-generic/unistd.h`` (arm64) of Linux; instruction and data layout:
``linux/filter.h``, ``linux/seccomp.h`` and seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

SECCOMP_SET_MODE_FILTER = 1
TSYNC, SPEC_ALLOW = 1 << 0, 1 << 2
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD_WORD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
X32_BIT = 0x40000000
CLONE_THREAD, PROT_EXEC, RLIMIT_CPU = 0x00010000, 0x4, 0
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Machine(NamedTuple):
    audit_arch: int
    column: int
    seccomp: int


MACHINES = {"x86_64": Machine(0xC000003E, 0, 317), "aarch64": Machine(0xC00000B7, 1, 277)}

ALWAYS: dict[str, tuple[int | None, int | None]] = {
    "recvfrom": (45, 207), "sendto": (44, 206), "futex": (202, 98), "clock_gettime": (228, 113),
    "read": (0, 63), "write": (1, 64), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62), "close": (3, 57),
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "mincore": (27, 232),
    "mbind": (237, 235), "get_mempolicy": (239, 236), "membarrier": (324, 283), "fcntl": (72, 25),
    "fstat": (5, 80), "newfstatat": (262, 79), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "sched_yield": (24, 124),
    "gettimeofday": (96, 169), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179), "getcwd": (79, 17),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getrusage": (98, 165), "getcpu": (309, 168),
    "sched_getaffinity": (204, 123), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
DEVICE: dict[str, tuple[int | None, int | None]] = {"ioctl": (16, 29), "eventfd2": (290, 19)}
GUARDED: dict[str, tuple[int, int]] = {
    "openat": (257, 56), "mmap": (9, 222), "mprotect": (10, 226), "tgkill": (234, 131), "prlimit64": (302, 261),
    "clone": (56, 220), "clone3": (435, 435),
}  # fmt: skip


def instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, constant)


ALLOW = instruction(RETURN, RET_ALLOW)
DENY = instruction(RETURN, RET_ERRNO | errno.EPERM)
ABSENT = instruction(RETURN, RET_ERRNO | errno.ENOSYS)
KILL = instruction(RETURN, RET_KILL_PROCESS)


def _argument(index: int) -> bytes:
    return instruction(LOAD_WORD, ARGUMENTS_AT + 8 * index)


def _if_none_of(index: int, bits: int) -> bytes:
    return _argument(index) + instruction(JUMP_ANY_BIT, bits, 0, 1) + DENY + ALLOW


def _if_any_of(index: int, bits: int) -> bytes:
    return _argument(index) + instruction(JUMP_ANY_BIT, bits, 0, 1) + ALLOW + DENY


def _if_equal(index: int, *numbers: int) -> bytes:
    tests = b"".join(instruction(JUMP_EQUAL, number, 0, 1) + ALLOW for number in numbers)
    return _argument(index) + tests + DENY


def guards(pid: int, may_open: bool, may_map_code: bool) -> dict[str, bytes]:
    """What follows once one of ``GUARDED`` was recognised, by name."""
    own_cpu_limit = _argument(1) + instruction(JUMP_EQUAL, RLIMIT_CPU, 1, 0) + DENY + _if_equal(0, 0, pid)
    return {
        "openat": _if_none_of(2, WRITING) if may_open else DENY,
        "mmap": ALLOW if may_map_code else _if_none_of(2, PROT_EXEC),
        "mprotect": ALLOW if may_map_code else _if_none_of(2, PROT_EXEC),
        "tgkill": _if_equal(0, pid),
        "prlimit64": own_cpu_limit,
        "clone": _if_any_of(0, CLONE_THREAD),
        "clone3": ABSENT,
    }


def program(machine: Machine, pid: int, *, may_open: bool, device: bool) -> bytes:
    """The filter for process ``pid``. ``device`` lets a delegate go on talking to the device it opened before."""
    parts = [instruction(LOAD_WORD, ARCH_AT), instruction(JUMP_EQUAL, machine.audit_arch, 1, 0), KILL]
    parts.append(instruction(LOAD_WORD, NUMBER_AT))
    parts += [instruction(JUMP_AT_LEAST, X32_BIT, 0, 1), KILL]
    for numbers in (ALWAYS | DEVICE if device else ALWAYS).values():
        number = numbers[machine.column]
        if number is not None:
            parts += [instruction(JUMP_EQUAL, number, 0, 1), ALLOW]
    for name, guard in guards(pid, may_open, device).items():
        parts += [instruction(JUMP_EQUAL, GUARDED[name][machine.column], 0, len(guard) // 8), guard]
    return b"".join([*parts, DENY])


def system_call(number: int, *arguments: object) -> int:
    """Raises ``OSError`` with the kernel's errno."""
    call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).syscall
    result = call(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def install(*, may_open: bool, device: bool) -> None:
    """Confine every thread of this process, for good. Needs ``no_new_privs``. Raises ``OSError`` if the kernel cannot."""
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"no system call table for {platform.machine()}; known: {', '.join(MACHINES)}")
    code = program(machine, os.getpid(), may_open=may_open, device=device)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(buffer)))
    system_call(
        machine.seccomp, ctypes.c_ulong(SECCOMP_SET_MODE_FILTER), ctypes.c_ulong(TSYNC | SPEC_ALLOW), ctypes.byref(header)
    )
