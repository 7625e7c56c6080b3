"""State of every kind for the tests of the store: random bits, and a store to put them into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from kvloom_proto.records import (
    ITEM_BYTES,
    LayerKind,
    LayerSpec,
    Manifest,
    Pass,
    Provenance,
    Schedule,
    TensorSpec,
    expand,
    read_manifest,
)
from kvloom_store import healing, loading, planner, restore, roots, segments, trie
from kvloom_store.database import Database
from kvloom_store.planner import Keyframe
from kvloom_store.rows import Captured, Frame, RowBuffer, element_type
from kvloom_store.schema import chunk, segment

WINDOW = 100
PAIR = (TensorSpec("keys", "bfloat16", (2, 4), 1), TensorSpec("values", "bfloat16", (2, 4), 1))
STATE = (TensorSpec("conv_states.0", "bfloat16", (6, 3), 0), TensorSpec("recurrent_states.0", "float32", (2, 3, 5), 0))
MIXED = (
    LayerSpec(0, 1, LayerKind.ROWS, PAIR),
    LayerSpec(1, 2, LayerKind.KEYFRAME, STATE),
    LayerSpec(3, 2, LayerKind.WINDOW, PAIR, window=WINDOW),
    LayerSpec(5, 1, LayerKind.EMPTY, ()),
    LayerSpec(6, 1, LayerKind.KEYFRAME, STATE[1:]),
)
"""Keyframes of mixed element sizes, cut by layers of other kinds."""

ROW = 2 * 2 * 4 * 2
"""Bytes that a token adds to a layer of rows or of a window."""
FRAME = 2 * (36 + 120) + 120


def bits(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Any:
    """Random bits, half of them zeros, so that compression has something to do."""
    count = int(np.prod(shape)) * ITEM_BYTES[dtype]
    data = rng.integers(0, 256, count, np.uint8) * rng.integers(0, 2, count, np.uint8)
    return data.view(element_type(dtype)).reshape(tuple(shape))


def filled(layers: tuple[LayerSpec, ...], capacity: int, keyframes: Sequence[int] = (), seed: int = 0) -> Captured:
    rng = np.random.default_rng(seed)
    buffer = RowBuffer(layers, capacity)
    for spec, tensors in zip(expand(layers), buffer.tensors, strict=True):
        for tensor, array in zip(spec.tensors, tensors, strict=False):
            array[...] = bits(rng, tensor.dtype, array.shape)
    frames = {
        position: {
            number: [bits(rng, tensor.dtype, tensor.shape) for tensor in spec.tensors]
            for number, spec in enumerate(expand(layers))
            if spec.kind == LayerKind.KEYFRAME
        }
        for position in keyframes
    }
    return Captured(buffer, frames)


def same_frame(a: Frame, b: Frame) -> bool:
    return list(a) == list(b) and all(
        [x.tobytes() for x in a[n]] == [y.tobytes() for y in b[n]]
        and [x.shape for x in a[n]] == [y.shape for y in b[n]]
        for n in a
    )


def same_rows(a: Any, b: Any, layers: Sequence[int], start: int, end: int) -> bool:
    return all(
        np.array_equal(a.rows(layer, number, start, end), b.rows(layer, number, start, end))
        for layer in layers
        for number in range(len(expand(a.layers)[layer].tensors))
    )


class Store:
    """A store with one trie, and a path of tokens in it."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        with self.database.write() as conn:
            model = roots.add_model(conn, b"m" * 16, "test", {})
            root = roots.root_for(conn, model)
            self.node = trie.extend(conn, root, list(range(4096))).node
            self.provenance = segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "sdpa", "test"))

    def draft(self, source: Captured, start: int, end: int, base: int | None = None) -> segments.Draft:
        layers = source.rows.layers  # type: ignore[attr-defined]
        keyframes = tuple(sorted(source.frames))
        schedule = Schedule((Pass(start, end - start),))
        return segments.Draft(self.node, start, end, base, layers, schedule, self.provenance, keyframes)

    def write(self, source: Captured, start: int, end: int, base: int | None = None, codec: str = "raw") -> int:
        draft = self.draft(source, start, end, base)
        return segments.write(self.database, source, draft, codec_name=codec, finish=lambda *_: None)

    def heal(self, source: Captured, segment_id: int, start: int, end: int) -> bool:
        draft = self.draft(source, start, end)
        return healing.heal(self.database, source, segment_id, draft, codec_name="lz4")

    def manifest(self, segment_id: int) -> Manifest:
        with self.database.read() as conn:
            return read_manifest(conn.execute(sa.select(segment.c.manifest).where(segment.c.id == segment_id)).scalar())

    def load(self, segment_id: int, position: int, layers: tuple[LayerSpec, ...]) -> tuple[RowBuffer, int]:
        """Rows as a plan wants them, and the bytes that were read."""
        sink = RowBuffer(layers, max(position, 1))
        with self.database.read() as conn:
            links = restore.chain(conn, segment_id)
            plan = planner.plan(links, position, layers, in_memory=True)
            return sink, loading.load(conn, links, plan.rows, plan.windows, sink)

    def frame(self, segment_id: int, position: int) -> tuple[Frame, int]:
        with self.database.read() as conn:
            links = restore.chain(conn, segment_id)
            return restore.load_keyframe(conn, links, Keyframe(segment_id, position))


def at(made: int, kind: LayerKind, position: int) -> Any:
    """The chunks of a segment of one kind at one position."""
    return (chunk.c.segment == made) & (chunk.c.kind == int(kind)) & (chunk.c.position == position)
