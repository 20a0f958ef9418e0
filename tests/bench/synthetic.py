"""A convolutional model of a chosen size, with its card, in a catalog of its own beside the real ones.

Rule: it is called synthetic wherever its figures are shown; its weights are noise.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models import catalog
from models.card import Card
from tests.tiny_models import DENSE, SAME, Graph, Op, T, floats, options_table, write_model

NAME = "synthetic"
SIDE_PX, CHANNELS, CLASSES = 128, 32, 10
HALVED = options_table("Conv2DOptions", Padding=0, StrideW=2, StrideH=2, DilationWFactor=1, DilationHFactor=1)


def conv_net(layers: int) -> bytes:
    """float32 ``image`` [1, 128, 128, 3] -> ``scores`` [1, 10]: ``layers`` 3x3 convolutions of 37.7 M MACs each."""
    half = SIDE_PX // 2
    hidden = (1, half, half, CHANNELS)
    tensors = [
        T("image", "float32", (1, SIDE_PX, SIDE_PX, 3)),
        T("stem", "float32", (CHANNELS, 3, 3, 3), floats(1, CHANNELS, 3, 3, 3)),
        T("bias", "float32", (CHANNELS,), bytes(4 * CHANNELS)),
        T("w", "float32", (CHANNELS, 3, 3, CHANNELS), bytes(CHANNELS * 9 * CHANNELS * 4)),
        T("last", "float32", (CLASSES, half * half * CHANNELS), bytes(4 * CLASSES * half * half * CHANNELS)),
        T("zeros", "float32", (CLASSES,), bytes(4 * CLASSES)),
        T("scores", "float32", (1, CLASSES)),
        T("h0", "float32", hidden),
        *(T(f"h{i + 1}", "float32", hidden) for i in range(layers)),
    ]
    ops = [Op("CONV_2D", (0, 1, 2), (7,), HALVED)]
    ops += [Op("CONV_2D", (7 + i, 3, 2), (8 + i,), SAME) for i in range(layers)]
    ops.append(Op("FULLY_CONNECTED", (7 + layers, 4, 5), (6,), DENSE))
    return write_model(Graph(tuple(tensors), tuple(ops), (0,), (6,)))


@contextmanager
def hosted(folder: Path, layers: int) -> Iterator[Path]:
    """While the block lasts the catalog has a card for ``NAME`` too; its model file, in ``folder``."""
    model = conv_net(layers)
    path = folder / f"{NAME}.tflite"
    path.write_bytes(model)
    cards = folder / "catalog"
    shutil.copytree(catalog.FOLDER, cards)
    (cards / f"{NAME}.toml").write_text(_toml(card_for(model)))
    before, catalog.FOLDER = catalog.FOLDER, cards
    catalog.catalog.cache_clear()
    try:
        yield path
    finally:
        catalog.FOLDER = before
        catalog.catalog.cache_clear()


def card_for(model: bytes) -> Card:
    return Card.from_mapping(
        {
            "name": NAME, "version": 1, "task": "classify", "summary": "noise", "quality_permille": 0, "quality_source": "none",
            "labels": [f"class {i}" for i in range(CLASSES)],
            "source": {
                "package": NAME, "version": "0", "wheel_tag": "py3-none-any", "wheel_sha256": "0" * 64,
                "member": f"{NAME}.tflite", "sha256": hashlib.sha256(model).hexdigest(), "size_bytes": len(model),
                "licence": "CC0-1.0", "url": "none",
            },
            "inputs": [{"name": "image", "dtype": "float32", "shape": [1, SIDE_PX, SIDE_PX, 3]}],
            "outputs": [{"name": "scores", "dtype": "float32", "shape": [1, CLASSES]}],
            "prepare": {"resize": "stretch", "low": -1, "high": 1},
            "interpret": {"kind": "classes", "scores": "scores", "zero": 0, "one": 1},
        }
    )  # fmt: skip


def _toml(card: Card) -> str:
    """A card as TOML; JSON's texts, numbers and lists are TOML's, too."""
    plain, tables, lists = [], [], []
    for key, value in card.to_mapping().items():
        if isinstance(value, dict):
            tables.append("\n".join([f"[{key}]", *(f"{name} = {json.dumps(item)}" for name, item in value.items())]))
        elif isinstance(value, list) and isinstance(value[0], dict):
            lists += [
                "\n".join([f"[[{key}]]", *(f"{name} = {json.dumps(item)}" for name, item in each.items())]) for each in value
            ]
        else:
            plain.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*plain, *tables, *lists]) + "\n"
