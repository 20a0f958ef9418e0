"""Engines that stand for a model which took its child over: they run inside the real sandbox and try what they are told.

``Probe`` attempts one forbidden thing and says what came of it.  ``Rogue`` dies, hangs, lies or floods.  ``Mutants`` parses and
runs broken variants of a model, one a request, with the real interpreter.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from board_support.work import model_work
from edge_agent.core.cbor import encode
from edge_agent.core.errors import RefusedError
from edge_agent.core.values import TensorSpec
from edge_agent.runtime import doorbell
from edge_agent.runtime.engine import Arrays, Engine, read_whole
from edge_agent.runtime.signature import Signature
from edge_agent.runtime.tflite import TfliteEngine
from tests.mutants import mutant

PROBE, ROGUE, BRIEF = (f"tests.odd_engines:{name}" for name in ("Probe", "Rogue", "Brief"))
WORDS = Signature((TensorSpec("order", "uint8", (-1,)),), (TensorSpec("answer", "uint8", (-1,)),))


class _Told(Engine):
    """Takes an order in words, gives an answer in words."""

    library = "odd 1"

    def open(self, model_fd: int, by_path: bool) -> None:
        self.model_fd = model_fd

    def signature(self) -> Signature:
        return WORDS

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        return {"answer": np.frombuffer(self.obey(bytes(inputs["order"]).decode()).encode(), np.uint8)}

    def obey(self, order: str) -> str:
        raise NotImplementedError


def libc(name: str, *arguments: object) -> int:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result = int(function(*arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def system_call(number: int, *arguments: int) -> int:
    return libc("syscall", *(ctypes.c_long(n) for n in (number, *arguments)))


def by_machine(x86_64: int, aarch64: int) -> int:
    return x86_64 if os.uname().machine == "x86_64" else aarch64


def thread_starts() -> None:
    thread = threading.Thread(target=time.sleep, args=(0,))
    thread.start()
    thread.join()


def channel_fd() -> int:
    return next(fd for fd in range(3, 64) if is_socket(fd))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False


PROBES: dict[str, Callable[[str], object]] = {
    "inet socket": lambda _: socket.socket(socket.AF_INET),
    "unix socket": lambda _: socket.socket(socket.AF_UNIX),
    "socket pair": lambda _: socket.socketpair(),
    "netlink socket": lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "send a descriptor": lambda _: socket.send_fds(socket.socket(fileno=os.dup(channel_fd())), [b"x"], [0]),
    "connect": lambda _: libc("connect", channel_fd(), b"\0" * 16, 16),
    "bind": lambda _: libc("bind", channel_fd(), b"\0" * 16, 16),
    "listen": lambda _: libc("listen", channel_fd(), 1),
    "accept": lambda _: libc("accept", channel_fd(), None, None),
    "exec": lambda _: libc("execv", b"/bin/true", None),
    "exec by descriptor": lambda _: system_call(by_machine(322, 281), 0, 0, 0, 0, 0x1000),
    "fork": lambda _: os.fork() or os._exit(0),
    "vfork": lambda _: system_call(by_machine(58, 1079)),
    "posix_spawn": lambda _: os.posix_spawn("/bin/true", ["true"], {}),
    "clone3": lambda _: system_call(435, 0, 0),
    "open for writing": lambda path: os.open(path, os.O_WRONLY),
    "open for appending": lambda path: os.open(path, os.O_RDWR | os.O_APPEND),
    "truncate by opening": lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
    "create": lambda path: os.open(path + ".new", os.O_RDONLY | os.O_CREAT),
    "create unnamed": lambda path: os.open(os.path.dirname(path), os.O_RDWR | os.O_TMPFILE),  # noqa: PTH120
    "read another's file": lambda path: os.open(path, os.O_RDONLY),
    "list a folder": lambda path: os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY),  # noqa: PTH120
    "openat2": lambda _: system_call(437, -100, 0, 0, 24),
    "the CPU's features": lambda _: os.open("/proc/cpuinfo", os.O_RDONLY),
    "own memory as a file": lambda _: os.open("/proc/self/mem", os.O_RDWR),
    "agent's memory as a file": lambda _: os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY),
    "agent's environment": lambda _: os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
    "unlink": lambda path: os.unlink(path),  # noqa: PTH108
    "rename": lambda path: os.rename(path, path + ".moved"),  # noqa: PTH104
    "mkdir": lambda path: os.mkdir(path + ".folder"),  # noqa: PTH102
    "chmod": lambda path: os.chmod(path, 0o777),  # noqa: PTH101
    "symlink": lambda path: os.symlink(path, path + ".link"),  # noqa: PTH211
    "write to the model": lambda _: os.write(os.open(f"/proc/self/fd/{model_descriptor()}", os.O_RDWR), b"x"),
    "grow a file": lambda _: os.ftruncate(model_descriptor(), 1 << 30),
    "memfd": lambda _: os.memfd_create("x"),
    "pipe": lambda _: os.pipe(),
    "ptrace": lambda _: libc("ptrace", 16, os.getppid(), None, None),
    "process_vm_readv": lambda _: libc("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
    "kill the agent": lambda _: os.kill(os.getppid(), 0),
    "signal a thread of the agent": lambda _: system_call(by_machine(234, 131), os.getppid(), os.getppid(), 0),
    "pidfd_open": lambda _: system_call(434, os.getppid(), 0),
    "limits of the agent": lambda _: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "more open files": lambda _: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
    "more memory": lambda _: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
    "mount": lambda _: libc("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "unshare": lambda _: libc("unshare", 0x10000000),
    "setns": lambda _: libc("setns", 0, 0),
    "chroot": lambda path: os.chroot(os.path.dirname(path)),  # noqa: PTH120
    "setuid": lambda _: os.setuid(0),
    "bpf": lambda _: system_call(by_machine(321, 280), 0, 0, 0),
    "perf_event_open": lambda _: system_call(by_machine(298, 241), 0, 0, -1, -1, 0),
    "io_uring": lambda _: system_call(425, 1, 0),
    "userfaultfd": lambda _: system_call(by_machine(323, 282), 0),
    "add_key": lambda _: system_call(by_machine(248, 217), 0, 0, 0, 0, 0),
    "seccomp again": lambda _: system_call(by_machine(317, 277), 1, 0, 0),
    "prctl": lambda _: libc("prctl", 4, 1, 0, 0, 0),
    "ioctl": lambda _: libc("ioctl", 0, 0x5412, b"x"),
    "executable memory": lambda _: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "inotify": lambda _: libc("inotify_init1", 0),
    "shared memory": lambda _: libc("shmget", 0, 4096, 0o1600),
    "quit the session": lambda _: os.setsid(),
}
"""What a confined child must not be able to do. The argument is the path of a file that it has no business with."""

ALLOWED: dict[str, Callable[[str], object]] = {
    "a thread": lambda _: thread_starts(),
    "memory": lambda _: bytearray(8 * 2**20),
    "the clock": lambda _: time.monotonic_ns(),
}


def model_descriptor() -> int:
    return int(sys.argv[2])


class Probe(_Told):
    """Order: ``<probe>|<path>``. Answer: ``denied <errno name>`` or ``done``."""

    def obey(self, order: str) -> str:
        if order == "environment":
            return " ".join(sorted(os.environ))
        if order == "descriptors":
            return " ".join(str(fd) for fd in range(1024) if is_open(fd))
        name, _, path = order.partition("|")
        try:
            (PROBES | ALLOWED)[name](path)
        except OSError as error:
            return f"denied {error.errno}"
        except ValueError as error:  # what resource.setrlimit makes of EPERM
            return f"denied {error}"
        return "done"


def send(body: object, sequence: int) -> None:
    os.write(channel_fd(), doorbell.HEAD.pack(sequence, 0) + encode(body))


def places(place: list[object]) -> list[object]:
    return ["done", [place]]


LIES: dict[str, Callable[[int], object]] = {
    "garbage": lambda n: os.write(channel_fd(), b"\xff" * 40),
    "nothing but a head": lambda n: os.write(channel_fd(), bytes(16)),
    "a huge message": lambda n: os.write(channel_fd(), bytes(100_000)),
    "another request's answer": lambda n: send(places(["answer", "uint8", [1], 0]), n + 1),
    "a place past the arena": lambda n: send(places(["answer", "uint8", [2**20], 2**31]), n),
    "a place before the arena": lambda n: send(places(["answer", "uint8", [1], -64]), n),
    "a shape that overflows": lambda n: send(places(["answer", "uint8", [2**40, 2**40], 0]), n),
    "a negative dimension": lambda n: send(places(["answer", "uint8", [-1], 0]), n),
    "an unknown dtype": lambda n: send(places(["answer", "object", [1], 0]), n),
    "another dtype than announced": lambda n: send(places(["answer", "float32", [1], 0]), n),
    "another name than announced": lambda n: send(places(["reply", "uint8", [1], 0]), n),
    "no outputs": lambda n: send(["done", []], n),
    "a second handshake": lambda n: send(["loaded", 8], n),
    "an unknown word": lambda n: send(["gossip", 1], n),
    "a map": lambda n: send({"done": 1}, n),
    "a float for a place": lambda n: send(places(["answer", "uint8", [1], 0.0]), n),
}


class Rogue(_Told):
    """Order: one word of what to do."""

    requests = 0

    def obey(self, order: str) -> str:
        self.requests += 1
        if order in LIES:
            LIES[order](self.requests)
            time.sleep(3600)
        if order.startswith("signal "):
            os.kill(os.getpid(), 0) if order == "signal 0" else signal.raise_signal(int(order.split()[1]))
        return getattr(self, f"do_{order}", lambda: order)()

    def do_exit(self) -> str:
        print("I am leaving", file=sys.stderr)
        os._exit(7)

    def do_segfault(self) -> str:
        return ctypes.string_at(8).decode()

    def do_hang(self) -> str:
        while True:
            time.sleep(3600)

    def do_spin(self) -> str:
        while True:
            pass

    def do_fail(self) -> str:
        raise RuntimeError("the model says\x1b[31m no")

    def do_refuse(self) -> str:
        raise RefusedError("picture\x1b[2J", "x" * 10_000, "something else", "send it")

    def do_shout(self) -> str:
        return str(os.write(2, b"\x1b[31mshouting" * 300))

    def do_flood(self) -> str:
        while True:
            os.write(2, b"\x1b[31mshouting" * 300)

    def do_close(self) -> str:
        os.close(channel_fd())
        time.sleep(3600)
        return ""

    def do_bomb(self) -> str:
        return str(len(bytearray(1 << 40)))

    def do_scribble(self) -> str:
        """Answer twice: the second answer is to no question."""
        send(places(["answer", "uint8", [1], 0]), self.requests)
        return "twice"

    def do_farewell(self) -> str:
        """Answer well, and be gone."""
        send(places(["answer", "uint8", [1], 0]), self.requests)
        os._exit(7)

    def do_regret(self) -> str:
        """Refuse well, and be gone."""
        send(["refused", "order", "regret", "an engine that stays", "ask another"], self.requests)
        os._exit(0)

    def do_big(self) -> str:
        return "x" * (65 * 2**20)


class Brief(_Told):
    """Dies ``model_bytes[-1]`` milliseconds after it was loaded, whatever anybody wants of it."""

    def signature(self) -> Signature:
        threading.Timer(read_whole(self.model_fd)[-1] / 1000, os._exit, (3,)).start()
        return WORDS

    def obey(self, order: str) -> str:
        return order


class Mutants(TfliteEngine):
    """Request ``seed`` -> parse and run the mutant of that seed; ``outcome`` 0: refused, 1: ran, +2: the work reader took it."""

    def open(self, model_fd: int, by_path: bool) -> None:
        self._original = read_whole(model_fd)

    def signature(self) -> Signature:
        return Signature((TensorSpec("seed", "int64", (1,)),), (TensorSpec("outcome", "int32", (1,)),))

    def invoke(self, inputs: Mapping[str, Any]) -> Arrays:
        model = mutant(self._original, int(inputs["seed"][0]))
        return {"outcome": np.array([self._read(model) + self._run(model)], np.int32)}

    def _read(self, model: bytes) -> int:
        try:
            model_work(model)
        except RefusedError:
            return 0
        return 2

    def _run(self, model: bytes) -> int:
        try:
            self.load(model_content=model)
            signature = super().signature()
            super().invoke({spec.name: zeros(spec) for spec in signature.inputs})
        except (RefusedError, RuntimeError, ValueError, MemoryError):
            return 0
        finally:
            self._interpreter = None
        return 1


def zeros(spec: TensorSpec) -> Any:
    shape = tuple(1 if n < 0 else n for n in spec.shape)
    if struct.calcsize("P") * sum(shape) > 2**34 or np.prod(shape, dtype=float) > 2**26:
        raise ValueError(f"an input of shape {shape}")
    return np.zeros(shape, spec.dtype)
