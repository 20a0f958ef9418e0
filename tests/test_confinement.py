"""A model that took over its child gets nothing by it: every way out is tried from inside the real sandbox."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import re
import struct
import sys
from pathlib import Path

import pytest

from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.runtime import child, confine, landlock, seccomp
from edge_agent.runtime.child import ChildDiedError
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.supervisor import EngineSupervisor
from tests.odd_engines import ALLOWED, PROBE, PROBES, ROGUE
from tests.sandboxes import BUDGET_US, INSTALLED, MODEL, child_pid, each_runtime, filled, load, run, supervised, words
from tests.tiny_models import Graph, Op, T, tiny_model, write_model

PROBING = EngineSettings(engine=PROBE)
DENIALS = {f"denied {code}" for code in (errno.EPERM, errno.EACCES, errno.ENOSYS)} | {"denied not allowed to raise maximum limit"}
"""How the kernel says no; another error would mean that the call got through and only its arguments were wrong."""


async def told(supervisor: EngineSupervisor, order: str) -> str:
    result = await supervisor.invoke(MODEL, {"order": words(order)}, BUDGET_US)
    return bytes(result.outputs["answer"].data).decode()


async def attempts(names: list[str], secret: Path, settings: EngineSettings = PROBING) -> dict[str, str]:
    async with supervised(tiny_model(), settings) as (supervisor, _, _):
        return {name: await told(supervisor, f"{name}|{secret}") for name in names}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "identity.key"
    path.write_text("private")
    return path


def test_a_child_can_do_nothing_but_compute(secret: Path) -> None:
    answers = run(attempts(list(PROBES), secret))
    assert {name: answer for name, answer in answers.items() if answer not in DENIALS} == {}
    assert secret.read_text() == "private"
    assert [path.name for path in secret.parent.iterdir()] == [secret.name]


def test_a_child_can_still_do_what_inference_needs(secret: Path) -> None:
    assert run(attempts(list(ALLOWED), secret)) == dict.fromkeys(ALLOWED, "done")


def test_without_landlock_no_file_can_be_opened_at_all(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_layers(monkeypatch, "landlock")
    denied = ["read another's file", "list a folder", "agent's environment", "open for writing"]
    answers = run(attempts(denied, secret))
    assert all(answer.startswith("denied") for answer in answers.values()), answers


@each_runtime
def test_without_landlock_a_model_runs_from_a_private_copy_as_fast_kernels_do(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def outputs() -> object:
        async with supervised(tiny_model("float"), EngineSettings(runtime=runtime)) as (supervisor, loaded, _):
            held = any(layer.startswith("landlock") for layer in loaded.confinement)
            result = await supervisor.invoke(MODEL, {"image": filled(loaded.signature.inputs[0])}, BUDGET_US)
            return held, bytes(result.outputs["scores"].data)

    with_it = run(outputs())
    without_layers(monkeypatch, "landlock")
    assert with_it == (True, with_it[1])  # type: ignore[index]
    assert run(outputs()) == (False, with_it[1])  # type: ignore[index]


def without_layers(monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    """Start children on a kernel that, as far as they can tell, has no such layer."""
    monkeypatch.setattr(child, "WORKER", f"tests.without_{layer}")


def test_without_seccomp_a_child_refuses_to_read_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    without_layers(monkeypatch, "seccomp")

    async def story() -> None:
        with pytest.raises(UnavailableError, match="seccomp.*unsafe_without_seccomp"):
            async with supervised(tiny_model()):
                pass
        async with supervised(tiny_model(), EngineSettings(unsafe_without_seccomp=True)) as (_, loaded, _):
            assert any(layer.startswith("no seccomp") for layer in loaded.confinement)

    run(story())


def test_the_kernel_agrees_on_every_layer() -> None:
    async def story() -> None:
        async with supervised(tiny_model()) as (supervisor, loaded, _):
            status = Path(f"/proc/{child_pid(supervisor)}/status").read_text()
            assert re.search(r"NoNewPrivs:\s+1\b", status)
            assert re.search(r"Seccomp:\s+2\b", status)
            assert loaded.confinement[:3] == ("rlimits", "no_new_privs", "not_dumpable")
            assert loaded.confinement[-1] == "seccomp"
            limits = Path(f"/proc/{child_pid(supervisor)}/limits").read_text()
            for limit in ("Max core file size", "Max file size"):
                assert re.search(rf"{limit}\s+0\s+0\b", limits)
            assert re.search(rf"Max open files\s+{confine.MAX_OPEN_FILES}\s", limits)
            assert not re.search(r"Max address space\s+unlimited", limits)

    run(story())


def test_control_c_in_the_agents_terminal_does_not_reach_its_children() -> None:
    async def story() -> None:
        async with supervised(tiny_model()) as (supervisor, _, _):
            assert os.getsid(child_pid(supervisor)) == child_pid(supervisor)

    run(story())


def test_a_child_inherits_three_descriptors_and_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLY_SECRET", "private")
    monkeypatch.setenv("LD_PRELOAD", "")

    async def story() -> None:
        held = os.memfd_create("secret", 0)
        os.set_inheritable(held, True)
        try:
            async with supervised(tiny_model(), PROBING) as (supervisor, _, _):
                held_by_child = ("stdin", "stdout", "stderr", "socket", "model", "arena", "arena's mapping")
                assert len((await told(supervisor, "descriptors")).split()) == len(held_by_child)
                names = set((await told(supervisor, "environment")).split())
                assert names <= {*child.PASSED_ON, *child.QUIET, "PYTHONPATH", "LC_CTYPE"}
        finally:
            os.close(held)

    run(story())


def test_a_child_that_hangs_dies_with_its_agent(tmp_path: Path) -> None:
    script = (
        "import asyncio, os\n"
        "from tests.sandboxes import *\nfrom tests.tiny_models import tiny_model\n"
        "async def main():\n"
        "    async with supervised(tiny_model(), EngineSettings(engine='tests.odd_engines:Rogue')) as (supervisor, _, _):\n"
        "        request = asyncio.create_task(supervisor.invoke(MODEL, {'order': words('hang')}, 10**9))\n"
        "        while not supervisor._engines[MODEL]._sandbox.busy:\n"
        "            await asyncio.sleep(0)\n"
        "        print(child_pid(supervisor), flush=True)\n"
        "        await request\n"
        "asyncio.run(main())\n"
    )

    async def story() -> None:
        root = Path(__file__).parents[1]
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, cwd=root, stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": str(root), "CI": ""}
        )
        assert agent.stdout is not None
        child = os.pidfd_open(int(await agent.stdout.readline()))
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, gone.set)
        agent.kill()
        await agent.wait()
        await gone.wait()
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)

    run(story())


def test_a_memory_bomb_fails_cleanly_and_the_child_lives() -> None:
    async def story() -> None:
        async with supervised(tiny_model(), EngineSettings(engine=ROGUE, memory_bytes=256 * 2**20)) as (supervisor, _, reports):
            with pytest.raises(UnavailableError, match="MemoryError"):
                await told(supervisor, "bomb")
            assert await told(supervisor, "hello") == "hello"
            assert reports == []

    run(story())


def bomb_model() -> bytes:
    """A few hundred bytes that ask for 8 GB of tensors."""
    side = 16384
    tensors = (T("x", "float32", (1, side, side, 4)), T("y", "float32", (1, side, side, 4)))
    return write_model(Graph(tensors, (Op("RELU", (0,), (1,)),), (0,), (1,)))


@each_runtime
def test_a_model_that_asks_for_8_gb_ends_at_its_limit_and_the_agent_goes_on(runtime: str) -> None:
    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime, memory_bytes=256 * 2**20))
        with pytest.raises((RefusedError, ChildDiedError)):
            await load(supervisor, bomb_model())
        await load(supervisor, tiny_model(), name="sound")
        await supervisor.close()

    run(story())


@each_runtime
def test_a_request_that_makes_a_model_grow_past_its_limit_fails_and_the_next_one_is_served(runtime: str) -> None:
    async def story() -> None:
        settings = EngineSettings(runtime=runtime, memory_bytes=64 * 2**20)
        async with supervised(tiny_model("two_inputs"), settings) as (supervisor, loaded, _):
            with pytest.raises(UnavailableError):
                rows = {spec.name: filled(spec, rows=2**21) for spec in loaded.signature.inputs}
                await supervisor.invoke(MODEL, rows, BUDGET_US)
            small = {spec.name: filled(spec) for spec in loaded.signature.inputs}
            assert (await supervisor.invoke(MODEL, small, BUDGET_US)).outputs["total"].shape == (1, 4)

    run(story())


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_the_system_call_numbers_are_those_of_the_kernel_headers(machine: str, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not installed (linux-libc-dev)")
    text = path.read_text()
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    numbers.setdefault("newfstatat", numbers.get("fstatat", ""))
    column = seccomp.MACHINES[machine].column
    for name, both in (seccomp.ALWAYS | seccomp.DEVICE | seccomp.GUARDED).items():
        if both[column] is not None:
            assert numbers[name] == str(both[column]), name
    assert numbers["seccomp"] == str(seccomp.MACHINES[machine].seccomp)


def judged(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the filter returns for one system call: seccomp's BPF, run by hand."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(*arguments, *(0,) * 6)[:6])
    accumulator = at = 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == seccomp.RETURN:
            return constant
        if code == seccomp.LOAD_WORD:
            (accumulator,) = struct.unpack_from("=I", data, constant)
            continue
        holds = {
            seccomp.JUMP_EQUAL: accumulator == constant,
            seccomp.JUMP_AT_LEAST: accumulator >= constant,
            seccomp.JUMP_ANY_BIT: bool(accumulator & constant),
        }[code]
        at += if_true if holds else if_false


@pytest.mark.parametrize("machine", list(seccomp.MACHINES))
def test_on_both_machines_the_filter_lets_through_the_list_and_nothing_else(machine: str) -> None:
    spec = seccomp.MACHINES[machine]
    program = seccomp.program(spec, 77, may_open=True, device=False)
    allowed = {both[spec.column] for both in seccomp.ALWAYS.values()}
    guarded = {name: both[spec.column] for name, both in seccomp.GUARDED.items()}
    for number in range(1024):
        verdict = judged(program, spec.audit_arch, number)
        if number in allowed:
            assert verdict == seccomp.RET_ALLOW
        elif number not in guarded.values():
            assert verdict == seccomp.RET_ERRNO | 1

    def verdict_on(name: str, *arguments: int) -> bool:
        return judged(program, spec.audit_arch, guarded[name], *arguments) == seccomp.RET_ALLOW

    assert verdict_on("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC)
    assert not any(verdict_on("openat", 0, 0, flag) for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC))
    assert verdict_on("tgkill", 77, 78, 6) and not verdict_on("tgkill", 1, 1, 6)
    assert verdict_on("clone", 0x3D0F00) and not verdict_on("clone", 17)
    assert verdict_on("prlimit64", 0, 0) and not verdict_on("prlimit64", 0, 7) and not verdict_on("prlimit64", 1, 0)
    assert verdict_on("mmap", 0, 4096, 3) and not verdict_on("mmap", 0, 4096, 7)
    assert judged(program, 0x40000003, 0) == seccomp.RET_KILL_PROCESS
    assert judged(program, spec.audit_arch, 0x40000000 | 41) == seccomp.RET_KILL_PROCESS


def test_a_machine_without_a_table_is_refused_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        seccomp.install(may_open=True, device=False)


@pytest.mark.parametrize("abi", range(1, 9))
def test_every_landlock_abi_gets_the_attributes_it_knows(abi: int) -> None:
    assert len(landlock._ruleset(abi)) == (8 if abi < 4 else 16 if abi < 6 else 24)


def test_the_digest_is_checked_before_a_byte_is_parsed() -> None:
    async def story() -> None:
        supervisor = EngineSupervisor(EngineSettings())
        fd = os.memfd_create("model")
        os.write(fd, tiny_model())
        try:
            with pytest.raises(RefusedError, match="SHA-256"):
                await supervisor.load(MODEL, fd, bytes(32))
        finally:
            os.close(fd)
        await supervisor.close()

    run(story())


assert INSTALLED, "no TFLite runtime is installed"
