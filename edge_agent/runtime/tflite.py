"""TFLite models on ``ai_edge_litert``, or on ``tflite_runtime``, which it was renamed from.

Rules: both libraries have the same ``Interpreter`` and are used in the same way, through its public methods.  A tensor is
known by its name in the model's signature if it has exactly one that covers the main graph, else by its own name.  After a
failed invocation the interpreter is built anew: tflite-runtime 2.14 keeps the shapes of an allocation that failed.
"""

from __future__ import annotations

import base64
import importlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.values import TensorSpec
from edge_agent.runtime.engine import Arrays, Engine, path_of, read_whole
from edge_agent.runtime.settings import RUNTIMES, EngineSettings
from edge_agent.runtime.signature import Signature

READ_ERRORS = (ValueError, RuntimeError, MemoryError, TypeError, LookupError, ArithmeticError)
WARM_UP_MODEL = zlib.decompress(
    base64.b85decode(
        b"c-mc&u?oU45QhJ1C_#e;bZ~I!=-{TKvy-EPn-r{4ur0Jv>^nL5Fg}9sQ7`FLf`yOVUGBf+Pv-#k+udr4IcAtbLqWoRf-+!DJPA#_"
        b"i5Jl)?4C*UI?9Sua*fVK8JVOql~o4Z4-9yopa>L!P60N=n5dHSp5~Y1DLKctt8qHpBUvMPmf*GKRk_)r>j}O62d~oA#ILTMMq$Xl"
        b"tbXEROak@-j6DB>vbMe?W_<4jpOwXF-udk4a@*G<4y?6r(0Xd$K=S?nwV$SGwC5%8JS*>?DE9N;XT5&`R9zjy"
    )
)
"""``y = RELU(x)`` of one float, 460 bytes: running it before the child is confined lets XNNPACK read what the CPU can do."""

DELEGATE_NODE = "DELEGATE"
"""What the library calls a node that a delegate runs."""

INSTALL = {
    "auto": "ai-edge-litert",
    "ai_edge_litert": "ai-edge-litert",
    "tflite_runtime": "'slyos-edge[tflite-runtime]' (Python 3.11 at most)",
}


def interpreter_module(runtime: str) -> tuple[str, ModuleType]:
    """The name and the ``interpreter`` module of ``runtime``; of the first that is there for "auto".

    Raises ``UnavailableError`` with what to install.
    """
    reasons = []
    for name in RUNTIMES[1:] if runtime == "auto" else (runtime,):
        try:
            return name, importlib.import_module(f"{name}.interpreter")
        except ImportError as error:
            reasons.append(str(error))
    raise UnavailableError("TFLite runtime", "; ".join(reasons), f"pip install {INSTALL[runtime]}")


class TfliteEngine(Engine):
    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        super().__init__(settings, delegate)
        self._runtime, self._module = interpreter_module(settings.runtime)
        self._delegate_name = delegate.library if delegate else ""
        self._delegates = [self._load_delegate(delegate)] if delegate else []
        self._interpreter: Any = None
        self._delegated_permille: int | None = None
        self._model: dict[str, object] = {}
        self._spoiled = False
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._module.Interpreter(model_content=WARM_UP_MODEL).allocate_tensors()

    def _load_delegate(self, delegate: Delegate) -> object:
        try:
            return self._module.load_delegate(delegate.library, dict(delegate.options))
        except (ValueError, OSError) as error:
            raise UnavailableError(f"delegate {delegate.library}", str(error) or "its library refused the options") from error

    @property
    def library(self) -> str:
        return f"{self._runtime} {importlib.import_module(self._runtime).__version__}"

    @property
    def delegate(self) -> str:
        return self._delegate_name

    @property
    def delegated_permille(self) -> int | None:
        return self._delegated_permille

    def open(self, model_fd: int, by_path: bool) -> None:
        if by_path:
            self.load(model_path=path_of(model_fd))
        else:
            self.load(model_content=read_whole(model_fd))

    def load(self, **model: object) -> None:
        """Parse and allocate the ``model_path`` or ``model_content`` given. Raises ``RefusedError`` if it does not load."""
        self._model, self._interpreter = model, None
        with _refusing():
            self._interpreter = self._module.Interpreter(
                **model, num_threads=self.threads, experimental_delegates=self._delegates or None
            )
            if self._delegates:
                self._delegated_permille = delegated_permille(self._interpreter)
            self._interpreter.allocate_tensors()

    def signature(self) -> Signature:
        with _refusing():
            return self._read_signature()

    def _read_signature(self) -> Signature:
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        names = self._signature_names(inputs, outputs)
        self._inputs = {names.get(("in", each["index"]), each["name"]): each["index"] for each in inputs}
        self._outputs = {names.get(("out", each["index"]), each["name"]): each["index"] for each in outputs}
        signature = Signature(_specs(inputs, names, "in"), _specs(outputs, names, "out"))
        self._shapes = {name: tuple(map(int, each["shape"])) for name, each in zip(self._inputs, inputs, strict=True)}
        return signature

    def _signature_names(self, inputs: list[Any], outputs: list[Any]) -> dict[tuple[str, int], str]:
        """Names by kind and tensor index, if the one signature of the model covers just these tensors."""
        if len(self._interpreter.get_signature_list()) != 1:
            return {}
        runner = self._interpreter.get_signature_runner()
        names: dict[tuple[str, int], str] = {}
        for kind, named, tensors in (
            ("in", runner.get_input_details(), inputs),
            ("out", runner.get_output_details(), outputs),
        ):
            if {each["index"] for each in named.values()} != {each["index"] for each in tensors}:
                return {}
            names |= {(kind, each["index"]): name for name, each in named.items()}
        return names

    def invoke(self, inputs: Mapping[str, NDArray[np.generic]]) -> Arrays:
        if self._spoiled:
            self.load(**self._model)
            self.signature()
        self._spoiled = True
        self._resize(inputs)
        interpreter = self._interpreter
        for name, array in inputs.items():
            interpreter.set_tensor(self._inputs[name], array)
        interpreter.invoke()
        self._spoiled = False
        return {name: interpreter.tensor(index)() for name, index in self._outputs.items()}

    def _resize(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        """Make room for inputs whose dynamic dimensions differ from the last request's."""
        changed = [name for name, array in inputs.items() if array.shape != self._shapes[name]]
        for name in changed:
            self._interpreter.resize_tensor_input(self._inputs[name], inputs[name].shape)
        if changed:
            self._shapes |= {name: inputs[name].shape for name in changed}
            self._interpreter.allocate_tensors()


def delegated_permille(interpreter: Any) -> int | None:
    """How many of a graph's operators its delegate took on, before ``allocate_tensors`` adds the library's own (XNNPACK).

    A delegate puts a node of its own in the place of the operators between that node's inputs and its outputs, and leaves those
    in the list.  No public method gives the list; ``None`` where ``_get_ops_details`` is not there or says something else.
    """
    try:
        nodes = interpreter._get_ops_details()
        taking = [node for node in nodes if node["op_name"] == DELEGATE_NODE]
        own = [node for node in nodes if node["op_name"] != DELEGATE_NODE]
        maker = {int(index): number for number, node in enumerate(own) for index in node["outputs"]}
        taken: set[int] = set()
        for node in taking:
            taken |= _between(own, maker, set(map(int, node["inputs"])), list(map(int, node["outputs"])))
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return len(taken) * 1000 // len(own) if own else 0


def _between(nodes: list[Any], maker: Mapping[int, int], inputs: set[int], wanted: list[int]) -> set[int]:
    """The operators that make the ``wanted`` tensors of ``inputs``."""
    found: set[int] = set()
    while wanted:
        number = maker.get(wanted.pop())
        if number is not None and number not in found:
            found.add(number)
            wanted += [int(index) for index in nodes[number]["inputs"] if int(index) not in inputs]
    return found


def _specs(details: Iterable[Any], names: Mapping[tuple[str, int], str], kind: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            names.get((kind, each["index"]), each["name"]),
            np.dtype(each["dtype"]).name,
            tuple(map(int, each["shape_signature"])),
        )
        for each in details
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """What the library raises while it reads a model is the model's fault."""
    try:
        yield
    except READ_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError("model file", said, "a TFLite model that this runtime loads") from error
