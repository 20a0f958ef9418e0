"""What is measured is what is there: digests of code and libraries, the schedule of the re-hash, golden inputs, delegates."""

from __future__ import annotations

import hashlib
import os
import platform
import py_compile
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from board_support.board import Delegate
from edge_agent.attest.evidence import NO_DIGEST
from edge_agent.attest.golden import MAX_GOLDEN_BYTES, golden_inputs
from edge_agent.attest.measure import (
    DISTRIBUTIONS,
    PACKAGES,
    ROOT,
    code_digest,
    delegate_files,
    file_digest,
    library_files,
    measured_software,
    read_into,
    set_digest,
)
from edge_agent.attest.rounds import MIN_ROUND_US, PIECE_BYTES, QUICK_FACTOR, Mark, Pace, Piece, Rounds
from edge_agent.core.errors import UnavailableError
from edge_agent.core.values import DTYPE_BYTES, TensorSpec
from edge_agent.runtime.signature import first_non_finite
from edge_agent.runtime.supervisor import EngineSettings, EngineSupervisor
from tests.fetched import model_path
from tests.needs import needs
from tests.sandboxes import INSTALLED, load, run

RATE = 8 * 2**20


# code


def copied(to: Path) -> Path:
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def test_a_copy_elsewhere_at_another_time_and_with_compiled_files_has_the_same_digest(tmp_path: Path) -> None:
    copy = copied(tmp_path / "elsewhere")
    source = copy / "edge_agent" / "cli.py"
    py_compile.compile(str(source), doraise=True)
    (copy / "edge_agent" / "__pycache__" / "planted.py").write_text("x = 1")
    (copy / "edge_agent" / "notes.txt").write_text("no code")
    os.utime(source, (1, 1))
    assert code_digest(copy) == code_digest(ROOT)


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less", "two files swapped"])
def test_another_file_is_another_digest(tmp_path: Path, change: str) -> None:
    copy = copied(tmp_path)
    before = code_digest(copy)
    one, other = copy / "edge_agent" / "agent.py", copy / "board_support" / "board.py"
    first, second = one.read_bytes(), other.read_bytes()
    match change:
        case "a byte":
            one.write_bytes(first[:99] + bytes([first[99] ^ 1]) + first[100:])
        case "a file more":
            (copy / "models" / "extra.py").write_text("")
        case "a file less":
            other.unlink()
        case _:
            one.write_bytes(second)
            other.write_bytes(first)
    assert code_digest(copy) != before


def test_code_that_cannot_be_read_is_said_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "edge_agent").mkdir()
    (tmp_path / "edge_agent" / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UnavailableError, match=r"gone\.py"):
        code_digest(tmp_path)


# libraries


@pytest.mark.parametrize("runtime", INSTALLED)
def test_the_library_is_found_without_being_imported(runtime: str) -> None:
    code = (
        "import sys; from edge_agent.attest.measure import measured_software; "
        f"s = measured_software({runtime!r}); "
        "print(s.library.name, len(s.library.files), *{'numpy', 'ai_edge_litert', 'tflite_runtime'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert told[0] == runtime
    assert told[2] == platform.machine()
    assert int(told[3]) > 0
    assert told[4:] == []


@pytest.mark.parametrize("runtime", INSTALLED)
def test_the_interpreter_that_children_load_is_among_what_is_measured(runtime: str) -> None:
    assert any("interpreter_wrapper" in name for name in library_files(runtime).files)


def test_a_library_that_is_not_installed_is_no_library() -> None:
    missing = library_files("no_such_runtime")
    assert (missing.name, missing.files) == ("none", {})
    assert set_digest(missing.digests()) == NO_DIGEST
    assert library_files("auto").name.split()[0] in DISTRIBUTIONS


def test_a_librarys_digest_is_of_names_and_bytes() -> None:
    one, two = hashlib.sha256(b"1").digest(), hashlib.sha256(b"2").digest()
    assert set_digest({"a": one, "b": two}) == set_digest({"b": two, "a": one})
    assert len({set_digest(each) for each in ({"a": one, "b": two}, {"a": two, "b": one}, {"a": one}, {"b": one}, {})}) == 5


def test_a_delegate_is_found_where_loaders_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "libodd.so.1.2"
    real.write_bytes(b"delegate")
    (tmp_path / "libodd.so.1").symlink_to(real)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    for library in ("libodd.so.1", str(tmp_path / "libodd.so.1")):
        found = delegate_files(library)
        assert found.name == "libodd.so.1.2"
        assert list(found.digests().values()) == [hashlib.sha256(b"delegate").digest()]
    absent = delegate_files("libnot.so")
    assert (absent.name, absent.digests()) == ("libnot.so", {})
    software = measured_software("none", tmp_path).with_delegate("libodd.so.1")
    assert software.recognized == {set_digest(software.delegate_digests)}


def test_a_file_that_shrinks_while_it_is_read_is_a_short_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(3 * 2**20))
    with path.open("r+b") as file:
        hasher = hashlib.sha256()
        assert read_into(hasher, file.fileno(), 0, 2**20) == 2**20
        file.truncate(2**20 + 5)
        assert read_into(hasher, file.fileno(), 2**20, 2**20) == 5
        assert read_into(hasher, file.fileno(), 2**21, 2**20) == 0
    assert hasher.digest() == file_digest(path)


# the rounds


def mark(size_bytes: int, ctime_ns: int = 0) -> Mark:
    return Mark(1, 1, size_bytes, 0, ctime_ns)


def handed_out(rounds: Rounds, until_us: int, now_us: int = 0, late_us: int = 0) -> list[tuple[int, Piece]]:
    """What is handed out to one who asks whenever something is due, or ``late_us`` after."""
    pieces = []
    while (due_us := rounds.due_us()) is not None and (now_us := max(now_us, due_us) + late_us) < until_us:
        piece = rounds.next(now_us)
        if piece is not None:
            pieces.append((now_us, piece))
    return pieces


@given(
    sizes=st.lists(st.integers(0, 40 * 2**20), min_size=1, max_size=6),
    changes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=12),
    late_us=st.integers(0, 300_000),
)
def test_no_span_of_time_holds_more_than_the_rates_allow(sizes: list[int], changes: list[tuple[int, int]], late_us: int) -> None:
    rounds = Rounds(RATE)
    for number, size in enumerate(sizes):
        rounds.hold(str(number), mark(size), hashed=number % 2 == 0)
    pieces = handed_out(rounds, 2_000_000, late_us=late_us)
    now_us = 2_000_000
    for which, ctime_ns in changes:
        rounds.seen(str(which % len(sizes)), mark(sizes[which % len(sizes)], ctime_ns))
        pieces += handed_out(rounds, now_us + 500_000, now_us, late_us)
        now_us += 500_000
    for pace, rate in ((Pace.SLOW, RATE), (Pace.QUICK, QUICK_FACTOR * RATE)):
        mine = [(at_us, piece.size_bytes) for at_us, piece in pieces if piece.pace is pace]
        for start in range(len(mine)):
            total = 0
            for at_us, size_bytes in mine[start:]:
                total += size_bytes
                assert total <= rate * (at_us - mine[start][0]) // 10**6 + PIECE_BYTES


def test_every_file_is_hashed_whole_and_in_turn() -> None:
    rounds, sizes = Rounds(RATE), {"a": 5 * 2**20 + 1, "b": 1, "c": 30 * 2**20}
    for name, size in sizes.items():
        rounds.hold(name, mark(size), hashed=True)
    assert rounds.round_us == MIN_ROUND_US
    pieces = [piece for _, piece in handed_out(rounds, 5 * MIN_ROUND_US)]
    passes: list[list[Piece]] = [[]]
    for piece in pieces:
        passes[-1].append(piece)
        if piece.last:
            passes.append([])
    for number, each in enumerate(passes[:-1]):
        assert {piece.file for piece in each} == {"abc"[number % 3]}
        assert [piece.offset for piece in each] == [PIECE_BYTES * index for index in range(len(each))]
        assert sum(piece.size_bytes for piece in each) == sizes["abc"[number % 3]]
    assert 4 * 3 <= len(passes) - 1 <= 5 * 3


def test_a_round_of_large_files_takes_what_it_says() -> None:
    rounds = Rounds(RATE)
    rounds.hold("a", mark(100 * 2**20), hashed=True)
    rounds.hold("b", mark(100 * 2**20), hashed=True)
    assert rounds.round_us == 25_000_000
    begun = [at_us for at_us, piece in handed_out(rounds, 100_000_000) if piece.file == "a" and not piece.offset]
    assert [later - earlier for earlier, later in zip(begun, begun[1:], strict=False)] == [25_000_000] * (len(begun) - 1)


def test_what_is_small_rests_between_two_rounds() -> None:
    rounds = Rounds(RATE)
    rounds.hold("a", mark(1000), hashed=True)
    rounds.hold("b", mark(0), hashed=True)
    counts = Counter(piece.file for _, piece in handed_out(rounds, 10 * MIN_ROUND_US))
    assert counts == {"a": 10, "b": 10}


def test_a_file_that_changed_goes_first_and_those_in_the_background_do_not_wait() -> None:
    rounds = Rounds(RATE)
    rounds.hold("large", mark(500 * 2**20), hashed=True)
    rounds.hold("changed", mark(64 * 2**20), hashed=True)
    before = handed_out(rounds, 1_000_000)
    assert {piece.pace for _, piece in before} == {Pace.SLOW}
    assert rounds.seen("changed", mark(64 * 2**20, 7))
    assert not rounds.seen("changed", mark(64 * 2**20, 7))
    after = handed_out(rounds, 3_000_000, 1_000_000)
    quick = [(at_us, piece) for at_us, piece in after if piece.pace is Pace.QUICK]
    assert [piece.last for _, piece in quick] == [False] * 63 + [True]
    assert quick[-1][0] - quick[0][0] <= 500_000
    slow_bytes = sum(piece.size_bytes for _, piece in after if piece.pace is Pace.SLOW)
    assert slow_bytes >= 2 * RATE - 2 * PIECE_BYTES


def test_who_touches_a_file_without_end_hides_neither_it_nor_another() -> None:
    rounds = Rounds(RATE)
    for name in ("touched", "other"):
        rounds.hold(name, mark(300 * 2**20), hashed=True)
    finished = Counter[str]()
    for second in range(1, 30):
        rounds.seen("touched", mark(300 * 2**20, second))
        if second == 3:
            rounds.seen("other", mark(300 * 2**20, second))
        pieces = [piece for _, piece in handed_out(rounds, (second + 1) * 10**6, second * 10**6)]
        finished.update(piece.file for piece in pieces if piece.last and piece.pace is Pace.QUICK)
    assert finished["touched"] >= 5
    assert finished["other"] == 1


def test_a_change_during_a_quick_pass_brings_another_one_after_it() -> None:
    rounds = Rounds(RATE)
    rounds.hold("a", mark(3 * 2**20), hashed=True)
    rounds.seen("a", mark(3 * 2**20, 1))
    first = rounds.next(0)
    assert first is not None
    rounds.seen("a", mark(3 * 2**20, 2))
    rest = [piece for _, piece in handed_out(rounds, 1_000_000)]
    assert [piece.offset for piece in (first, *rest) if piece.pace is Pace.QUICK] == [0, 2**20, 2**21] * 2


def test_a_file_that_is_let_go_is_handed_out_no_more() -> None:
    rounds = Rounds(RATE)
    for name in "abc":
        rounds.hold(name, mark(3 * 2**20), hashed=False)
    with pytest.raises(ValueError, match="held already"):
        rounds.hold("a", mark(1), hashed=True)
    assert handed_out(rounds, 1)[0][1].file == "a"
    rounds.drop("a")
    rounds.drop("a")
    rest = [piece for _, piece in handed_out(rounds, 60_000_000, 1_000_000)]
    assert {piece.file for piece in rest} == {"b", "c"}
    assert next(piece for piece in rest if piece.pace is Pace.QUICK).offset == 0
    for name in "bc":
        rounds.drop(name)
    assert rounds.due_us() is None
    assert rounds.next(10**12) is None
    assert rounds.round_us == 0


# golden inputs


@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_golden_inputs_fit_their_signature_on_every_machine(dtype: str) -> None:
    specs = [TensorSpec("x", dtype, (2, -1, 100)), TensorSpec("y", dtype, (1,))]
    inputs = golden_inputs(specs)
    assert {name: each.shape for name, each in inputs.items()} == {"x": (2, 1, 100), "y": (1,)}
    assert inputs == golden_inputs(list(reversed(specs)))
    assert all(first_non_finite(each) is None for each in inputs.values())
    if dtype.startswith("float"):
        import array

        code = {"float32": "f", "float64": "d"}.get(dtype)
        values = array.array(code, bytes(inputs["x"].data)) if code else []
        assert all(-1 < value < 1 for value in values)
        assert not code or len(set(values)) > 190
    elif dtype not in ("int8", "uint8", "int16", "uint16"):
        assert {bytes(inputs["x"].data)[i] for i in range(0, 200, DTYPE_BYTES[dtype])} == {0, 1}
    else:
        assert len(set(bytes(inputs["x"].data))) > 100


def test_golden_inputs_never_change() -> None:
    data = golden_inputs([TensorSpec("input", "float32", (1, 4))])["input"].data
    assert bytes(data).hex() == PINNED


PINNED = "80e4173f84ed2abefd0d373fb8c243bf"


def test_a_model_with_enormous_inputs_has_no_golden_input() -> None:
    assert golden_inputs([TensorSpec("x", "uint8", (MAX_GOLDEN_BYTES,)), TensorSpec("y", "uint8", (1,))]) == {}


# what a delegate took on

DELEGATE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int size; int data[]; } Ints;
typedef struct Context Context;
typedef struct Delegate Delegate;
typedef struct {
  void* (*init)(Context*, const char*, size_t);
  void (*free)(Context*, void*);
  int (*prepare)(Context*, void*);
  int (*invoke)(Context*, void*);
  const char* (*profiling)(const Context*, const void*);
  int32_t builtin_code;
  const char* custom_name;
  int version;
  void *external, *async_kernel;
  uint64_t inplace_operator;
} Registration;
struct Context {
  size_t tensors_size;
  int (*GetExecutionPlan)(Context*, Ints**);
  void *tensors, *impl;
  int (*ResizeTensor)(Context*, void*, Ints*);
  void (*ReportError)(Context*, const char*, ...);
  int (*AddTensors)(Context*, int, int*);
  int (*GetNodeAndRegistration)(Context*, int, void**, Registration**);
  int (*ReplaceNodeSubsetsWithDelegateKernels)(Context*, Registration, const Ints*, Delegate*);
};
struct Delegate {
  void* data;
  int (*Prepare)(Context*, Delegate*);
  void *copy_from, *copy_to, *free_handle;
  int64_t flags;
  void* opaque;
  int most;
};
static int nothing(Context* context, void* node) { return 0; }
static int prepare(Context* context, Delegate* delegate) {
  Ints* plan;
  if (context->GetExecutionPlan(context, &plan)) return 1;
  int count = plan->size < delegate->most ? plan->size : delegate->most;
  Ints* taken = malloc(sizeof(Ints) + sizeof(int) * (count + 1));
  taken->size = count;
  memcpy(taken->data, plan->data, sizeof(int) * count);
  Registration kernel = {.prepare = nothing, .invoke = nothing, .custom_name = "Idle", .version = 1};
  int status = count ? context->ReplaceNodeSubsetsWithDelegateKernels(context, kernel, taken, delegate) : 0;
  free(taken);
  return status;
}
Delegate* tflite_plugin_create_delegate(char** keys, char** values, size_t count, void (*report)(const char*)) {
  Delegate* made = calloc(1, sizeof(Delegate));
  made->Prepare = prepare;
  made->most = count ? atoi(values[0]) : 0;
  return made;
}
void tflite_plugin_destroy_delegate(Delegate* delegate) { free(delegate); }
"""
"""A whole external delegate: it takes on the first operators, as many as its option says, and does nothing for them.

Layouts: TensorFlow Lite's ``core/c/common.h``, versions 2.14 to 2.20."""


def idle_delegate(folder: Path) -> str:
    compiler = shutil.which("cc")
    needs(compiler, "a C compiler is not installed (apt-get install gcc)")
    source, made = folder / "idle.c", folder / "libidle.so"
    source.write_text(DELEGATE)
    subprocess.run([str(compiler), "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return str(made)


@pytest.mark.parametrize("runtime", INSTALLED)
def test_how_much_a_real_delegate_took_on_is_told(tmp_path: Path, runtime: str) -> None:
    library, model = idle_delegate(tmp_path), model_path("resnet8-cifar10").read_bytes()

    async def share(delegate: Delegate | None) -> int | None:
        supervisor = EngineSupervisor(EngineSettings(runtime=runtime), delegate)
        try:
            return (await load(supervisor, model)).delegated_permille
        finally:
            await supervisor.close()

    assert run(share(None)) is None
    shares = [run(share(Delegate(library, {"most": str(most)}))) for most in (0, 4, 99)]
    assert shares == [0, 250, 1000], "of its 16 operators"


def node(name: str, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
    return {"op_name": name, "inputs": inputs, "outputs": outputs}


class Listed:
    def __init__(self, nodes: object) -> None:
        self.nodes = nodes

    def _get_ops_details(self) -> object:
        return self.nodes


CHAIN = [node("CONV_2D", [0, 9], [1]), node("RELU", [1], [2]), node("CONV_2D", [2, 8], [3]), node("SOFTMAX", [3], [4])]


@pytest.mark.parametrize(
    ("nodes", "permille"),
    [
        (CHAIN, 0),
        ([*CHAIN, node("DELEGATE", [0, 9], [2])], 500),
        ([*CHAIN, node("DELEGATE", [0, 9], [2]), node("DELEGATE", [3], [4])], 750),
        ([*CHAIN, node("DELEGATE", [0, 9, 8], [4])], 1000),
        ([node("CONV_2D", [1], [1]), node("DELEGATE", [], [1])], 1000),
        ([], 0),
        ([{"op_name": "DELEGATE"}], None),
        (None, None),
    ],
)
def test_the_operators_behind_a_delegates_node_are_counted(nodes: object, permille: int | None) -> None:
    from edge_agent.runtime.tflite import delegated_permille

    assert delegated_permille(Listed(nodes)) == permille


def test_a_library_without_the_list_tells_nothing() -> None:
    from edge_agent.runtime.tflite import delegated_permille

    assert delegated_permille(object()) is None
