"""The contract of an engine: what runs a model inside the sandboxed child.

Life of an engine, in this order:

1. built: libraries and the delegate are loaded; the process is not confined yet, and no byte of the model was read;
2. ``open``: the model is parsed and its tensors allocated; the process is confined now;
3. ``signature``, ``invoke``: any number of times.

Must override: all that is abstract.  A new engine is one new file that names its class in ``EngineSettings.engine``.
NumPy lives here and below, so the agent process never imports this file.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from board_support.board import Delegate
from edge_agent.core.errors import RefusedError
from edge_agent.runtime.settings import EngineSettings
from edge_agent.runtime.signature import Signature

Arrays = dict[str, NDArray[np.generic]]


class Engine(ABC):
    """Raises ``UnavailableError`` when built without a library or delegate that ``settings`` and ``delegate`` ask for."""

    def __init__(self, settings: EngineSettings, delegate: Delegate | None) -> None:
        self.threads = settings.threads

    @property
    @abstractmethod
    def library(self) -> str:
        """Name and version of what runs the model, e.g. ``ai_edge_litert 2.3.0``."""

    @property
    def delegate(self) -> str:
        """What the model was handed to besides the library's own kernels; "" for nothing."""
        return ""

    @property
    def delegated_permille(self) -> int | None:
        """How many of the opened model's operators the delegate took on; ``None`` without one, or if nothing tells."""
        return None

    @abstractmethod
    def open(self, model_fd: int, by_path: bool) -> None:
        """Load the model in ``model_fd``: mapped through its path if ``by_path``, else from a private copy.

        Raises ``RefusedError`` for a model that this engine cannot run.
        """

    @abstractmethod
    def signature(self) -> Signature:
        """What the model takes and gives."""

    @abstractmethod
    def invoke(self, inputs: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """One inference. ``inputs`` fit the signature. The outputs may be views, valid until the next call.

        Raises ``RuntimeError``, ``ValueError`` or ``MemoryError`` if the model cannot be run on these inputs.
        """


def path_of(fd: int) -> str:
    """The path that opens the very file that ``fd`` has open, renamed or unlinked since."""
    return f"/proc/self/fd/{fd}"


def read_whole(fd: int) -> bytes:
    """Every byte of the file, whatever its offset."""
    size = os.fstat(fd).st_size
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise RefusedError("model file", f"{len(data)} bytes", f"{size} bytes")
    return data


def engine_class(name: str) -> type[Engine]:
    """The class that ``module:class`` names. Raises ``RefusedError`` if it is not an ``Engine``."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RefusedError("engine", name, "module:class of an Engine", str(error)) from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise RefusedError("engine", name, "a subclass of Engine")
    return found
