"""The card of a language model that was built here: its source, its shape, and the files that were made of it.

Rules: no NumPy; frozen and validated when built; ``to_mapping`` gives plain values as a perception model's card does.  A built
model lies in the models folder as ``NAME.card.toml`` beside the files that it names; the catalog's own card of the same name,
``catalog/NAME.language.toml``, holds the digests that the build must give.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType

from edge_agent.core.chat import CHAT
from edge_agent.core.errors import RefusedError, UnavailableError
from edge_agent.core.model_shape import ModelShape
from edge_agent.core.values import MODEL_NAME, bounded, checked
from models.card import MAX_TEXT_CHARS, SHA256_HEX, Source, checked_texts, source_from_mapping, typed
from models.catalog import FOLDER, LANGUAGE
from models.toml_text import toml_text

CARD_SUFFIX = ".card.toml"
MAX_CARD_BYTES = 2**16
MAX_BUILT_BYTES = 2**31
MAX_STATIC_ROWS = 4096
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SHAPE = tuple(each.name for each in fields(ModelShape))
RUNTIMES = ("ai_edge_litert", "tflite_runtime")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the models folder."""

    filename: str
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        checked(FILE_NAME, "card filename", self.filename)
        checked(SHA256_HEX, f"SHA-256 of {self.filename}", self.sha256)
        bounded(f"size of {self.filename}", self.size_bytes, 1, MAX_BUILT_BYTES, "bytes")

    def is_in(self, folder: Path) -> bool:
        """Whether the file is there with this size and hash. Raises ``UnavailableError`` when it cannot be read."""
        path = folder / self.filename
        try:
            if path.stat().st_size != self.size_bytes:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UnavailableError(f"model folder {folder}", str(error), "set SLY_MODELS to a folder that can be read") from error


def language_digest(stages: bytes, tokenizer: bytes) -> bytes:
    """What a language model is called, of the SHA-256 of its two files."""
    return hashlib.sha256(b"sly/1/language" + stages + tokenizer).digest()


@dataclass(frozen=True, slots=True)
class LanguageCard:
    """A language model.

    ``gguf`` is what it was built from, ``source`` where that came from (None: a file of the user's own); ``files`` the stages for
    each runtime; ``static_rows`` the rows a call of the ``tflite_runtime`` file, the last of them its prefill variant.

    Raises ``RefusedError`` naming the field for a value outside its bounds.
    """

    name: str
    version: int
    summary: str
    quality_permille: int
    quality_source: str
    source: Source | None
    gguf: FileEntry
    shape: ModelShape
    static_rows: tuple[int, ...]
    files: Mapping[str, FileEntry]
    tokenizer: FileEntry

    def __post_init__(self) -> None:
        checked(MODEL_NAME, "card name", self.name)
        bounded("card version", self.version, 1, 10**6)
        bounded("card quality_permille", self.quality_permille, 0, 1000)
        checked_texts("card text", (self.summary, self.quality_source), 2, MAX_TEXT_CHARS)
        bounded("card static_rows, count", len(self.static_rows), 1, 8)
        for rows in self.static_rows:
            bounded("card static_rows", rows, 1, MAX_STATIC_ROWS)
        if set(self.files) != set(RUNTIMES):
            raise RefusedError("card files", ", ".join(self.files), ", ".join(RUNTIMES))

    @property
    def task(self) -> str:
        return CHAT

    def entries(self) -> tuple[FileEntry, ...]:
        """Every file of the model, in a fixed order."""
        return (*(self.files[runtime] for runtime in RUNTIMES), self.tokenizer)

    def digest(self, runtime: str) -> bytes:
        """What placement and receipts call the model on a board with ``runtime``: SHA-256 over the stages' and the
        tokenizer's digests, for both decide what the model says. Raises ``RefusedError`` for an unknown runtime."""
        if runtime not in self.files:
            raise RefusedError("runtime", runtime, ", ".join(self.files))
        return language_digest(bytes.fromhex(self.files[runtime].sha256), bytes.fromhex(self.tokenizer.sha256))

    def to_mapping(self) -> dict[str, object]:
        """The card as plain values that CBOR and TOML can hold."""
        source = {} if self.source is None else {"source": {key: getattr(self.source, key) for key in Source.__slots__}}
        return {
            "name": self.name, "version": self.version, "task": self.task, "summary": self.summary,
            "quality_permille": self.quality_permille, "quality_source": self.quality_source,
            "static_rows": list(self.static_rows),
            **source,
            "gguf": _entry_mapping(self.gguf),
            "shape": asdict(self.shape),
            "tokenizer": _entry_mapping(self.tokenizer),
            "files": {runtime: _entry_mapping(self.files[runtime]) for runtime in RUNTIMES},
        }  # fmt: skip

    @classmethod
    def from_mapping(cls, mapping: object) -> LanguageCard:
        """Inverse of ``to_mapping``; raises ``RefusedError`` for anything else."""
        with_source = isinstance(mapping, Mapping) and "source" in mapping
        entry = typed("card", mapping, _CARD | ({"source": dict} if with_source else {}))
        if entry.pop("task") != CHAT:
            raise RefusedError("card task", "another task", CHAT)
        rows = entry.pop("static_rows")
        if any(type(each) is not int for each in rows):
            raise RefusedError("card static_rows", rows, "whole numbers")
        shape = typed("card shape", entry.pop("shape"), dict.fromkeys(SHAPE, int))
        files = typed("card files", entry.pop("files"), dict.fromkeys(RUNTIMES, dict))
        return cls(
            **{key: entry[key] for key in ("name", "version", "summary", "quality_permille", "quality_source")},
            source=source_from_mapping(entry["source"]) if with_source else None,
            gguf=_entry(entry["gguf"]),
            shape=ModelShape(**shape),
            static_rows=tuple(rows),
            files=MappingProxyType({runtime: _entry(files[runtime]) for runtime in RUNTIMES}),
            tokenizer=_entry(entry["tokenizer"]),
        )

    def to_toml(self) -> str:
        """The card as a TOML file that ``read_language_card`` reads."""
        return toml_text(self.to_mapping())


_CARD = {
    "name": str, "version": int, "task": str, "summary": str, "quality_permille": int, "quality_source": str,
    "static_rows": list, "gguf": dict, "shape": dict, "tokenizer": dict, "files": dict,
}  # fmt: skip
_FILE = {"filename": str, "sha256": str, "size_bytes": int}


def _entry_mapping(entry: FileEntry) -> dict[str, object]:
    return {key: getattr(entry, key) for key in _FILE}


def _entry(mapping: object) -> FileEntry:
    return FileEntry(**typed("card file", mapping, _FILE))


def read_language_card(path: Path) -> LanguageCard:
    """The card in a TOML file. Raises ``RefusedError`` naming the file, ``UnavailableError`` when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
        if len(data) > MAX_CARD_BYTES:
            raise RefusedError("length", "more", f"at most {MAX_CARD_BYTES} bytes")
        return LanguageCard.from_mapping(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"card {path}", str(error), "a TOML file in UTF-8") from error
    except RefusedError as error:
        raise RefusedError(f"card {path}: {error}") from error
    except OSError as error:
        raise UnavailableError(f"card {path}", error.strerror or str(error)) from error


@cache
def language_catalog() -> Mapping[str, LanguageCard]:
    """The language models that come with the product, by name. Raises ``RefusedError`` naming the file that breaks a rule."""
    cards = [read_language_card(path) for path in sorted(FOLDER.glob(f"*{LANGUAGE}"))]
    return MappingProxyType({each.name: each for each in cards})


def built(folder: Path) -> Mapping[str, LanguageCard]:
    """The language models that were built into ``folder``, by name; raises as ``read_language_card``."""
    cards = [read_language_card(path) for path in _card_files(folder)]
    return MappingProxyType({each.name: each for each in cards})


def _card_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(CARD_SUFFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnavailableError(f"model folder {folder}", str(error), "set SLY_MODELS to a folder that can be read") from error


def find(name: str, folder: Path) -> LanguageCard:
    """The card of a language model: the built one in ``folder``, or the catalog's.

    Raises ``RefusedError`` listing the names that there are.
    """
    path = folder / f"{checked(MODEL_NAME, 'model', name)}{CARD_SUFFIX}"
    if path.is_file():
        return read_language_card(path)
    if name in language_catalog():
        return language_catalog()[name]
    known = sorted({*language_catalog(), *(each.name.removesuffix(CARD_SUFFIX) for each in _card_files(folder))})
    raise RefusedError("language model", name, ", ".join(known), "see: sly models list")


def is_language_model(name: str, folder: Path) -> bool:
    return name in language_catalog() or (folder / f"{name}{CARD_SUFFIX}").is_file()
