"""llama.cpp through ``llama_cpp``'s low-level calls, as the rival of the language benchmark; an optional environment has it.

Rules: greedy decoding alone is timed: ``llama_decode`` and waiting for its logits.  Q8_0 is made once of the Q4_1 file, by
llama.cpp's own quantizer, so that all have the same weights.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH_TOKENS = 512


class Rival:
    """A model and a context of ``threads`` threads for ``sessions`` sequences of at most ``context_tokens`` each."""

    def __init__(self, gguf: Path, threads: int, context_tokens: int, sessions: int = 1) -> None:
        self._api = api = importlib.import_module("llama_cpp")
        _quiet(api)
        self._model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = context_tokens * sessions, sessions
        if sessions > 1 and hasattr(settings, "kv_unified"):
            settings.kv_unified = True  # else every sequence is a batch of its own
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, sessions)

    def read(self, ids: Sequence[int], session: int = 0) -> None:
        """A prompt from position 0 on."""
        for first in range(0, len(ids), BATCH_TOKENS):
            part = ids[first : first + BATCH_TOKENS]
            self._decode([(each, first + n, session, first + n == len(ids) - 1) for n, each in enumerate(part)])

    def step(self, position: int, sessions: int = 1) -> None:
        """One token of each session at ``position``, which is then taken back."""
        self._decode([(500 + session, position, session, True) for session in range(sessions)])

    def take_back(self, position: int) -> None:
        self._api.llama_memory_seq_rm(self._memory, -1, position, -1)

    def clear(self) -> None:
        self._api.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for n, (each, position, session, wanted) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = each, position, 1, wanted
            batch.seq_id[n][0] = session
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._api.llama_synchronize(self._context)


def q8_0(source: Path, target: Path) -> Path:
    """``target``, made of ``source`` unless it is there."""
    if not target.exists():
        api = importlib.import_module("llama_cpp")
        _quiet(api)
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = api.LLAMA_FTYPE_MOSTLY_Q8_0, True
        part = target.with_suffix(".part")
        if api.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp could not requantize {source}")
        part.rename(target)
    return target


def _quiet(api: Any) -> None:
    if not hasattr(api, "sly_quiet"):
        api.sly_quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(api.sly_quiet, None)
        api.llama_backend_init()
