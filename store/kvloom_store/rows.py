"""Memory for the rows of every layer: what state is restored into, and captured from.

Preallocated for more tokens than there are, so that a forward pass adds its rows in place, and in one block of
huge pages where the system has them: touching fresh memory for the first time costs more than reading the state.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvloom_proto.records import ITEM_BYTES, STORED_BY_ROW, LayerSpec, TensorSpec, expand

HUGE_PAGE_BYTES = 2 << 20
HUGE_FROM_BYTES = 64 << 20
"""Below this a block of huge pages would waste more memory than it saves time."""

ALIGNED_TOKENS = 64
"""Capacities are multiples of this: 64 rows of any size fill whole cache lines."""

Rows = npt.NDArray[np.unsignedinteger]
"""Elements as unsigned integers of their size: numpy has no bfloat16, and only bits matter here."""

Frame = Mapping[int, Sequence[Rows]]
"""A keyframe: by layer, a copy of each tensor of the state that is overwritten in place."""


class RowSource(Protocol):
    """Whatever rows can be read from: a RowBuffer, or a live cache on any device."""

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """The rows of positions [start, end) of a layer's tensor, at its token axis: one a token, or a block."""
        ...

    def block(self, layers: Sequence[int], start: int, end: int) -> Rows | None:
        """The same rows of all tensors of some layers, ``[layers, tensors, ...]``, if they lie so in memory."""
        ...


class RowSink(RowSource, Protocol):
    """Rows that can be written through the views it gives."""

    def placed(self) -> None:
        """Told by a thread that what it has asked for is written; where that is its place, nothing is left to do."""
        return


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What a segment is made from: the memory its rows are in, and keyframes by position."""

    rows: RowSource = field(repr=False)
    frames: Mapping[int, Frame] = field(repr=False)


def element_type(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integer type that holds one element of a dtype name."""
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def shape_with(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """A tensor's shape for so many rows, without the batch."""
    return (*spec.shape[: spec.token_axis], rows, *spec.shape[spec.token_axis :])


class RowBuffer(RowSink):
    """Room for ``capacity`` rows of every layer that has rows, in one block; layers that are alike lie together."""

    def __init__(self, layers: tuple[LayerSpec, ...], capacity: int) -> None:
        self.layers = layers
        # Every head of every tensor begins on a cache line: alignment can change how a kernel sums, and so the bits.
        self.capacity = capacity = -(-capacity // ALIGNED_TOKENS) * ALIGNED_TOKENS
        self._specs = expand(layers)
        alike: dict[tuple[int, tuple[TensorSpec, ...]], list[int]] = {}
        for number, spec in enumerate(self._specs):
            if spec.kind in STORED_BY_ROW:
                alike.setdefault((spec.block, spec.tensors), []).append(number)
        # Each group begins on a cache line of its own.
        first = [(self._specs[group[0]], len(group)) for group in alike.values()]
        sizes = [-(-spec.row_bytes * count * spec.rows_before(capacity) // 64) * 64 for spec, count in first]
        memory = _allocate(sum(sizes))
        self.tensors: list[list[Rows]] = [[] for _ in self._specs]
        # By layer: its place in its group, the layers of that, and their memory.
        self._groups: dict[int, tuple[int, list[int], Rows]] = {}
        at = 0
        for group, size in zip(alike.values(), sizes, strict=True):
            self._place(memory, at, group)
            at += size

    def _place(self, memory: mmap.mmap, at: int, group: list[int]) -> None:
        tensors = self._specs[group[0]].tensors
        room = self._specs[group[0]].rows_before(self.capacity)
        if len({(tensor.dtype, tensor.shape, tensor.token_axis) for tensor in tensors}) == 1:
            shape = (len(group), len(tensors), *shape_with(tensors[0], room))
            whole = np.frombuffer(memory, element_type(tensors[0].dtype), math.prod(shape), at).reshape(shape)
            for place, number in enumerate(group):
                self.tensors[number] = list(whole[place])
                self._groups[number] = (place, group, whole)
            return
        for number in group:  # tensors that differ in shape (MLA's latents, say) lie one after another
            for tensor in tensors:
                flat = np.frombuffer(memory, element_type(tensor.dtype), math.prod(tensor.shape) * room, at)
                self.tensors[number].append(flat.reshape(shape_with(tensor, room)))
                at += tensor.row_bytes * room

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """A view of the rows of positions [start, end); writing to it writes into the buffer."""
        spec = self._specs[layer]
        some = slice(spec.rows_before(start), spec.rows_before(end))
        return self.tensors[layer][tensor][(slice(None),) * spec.tensors[tensor].token_axis + (some,)]

    def block(self, layers: Sequence[int], start: int, end: int) -> Rows | None:
        """One view of the rows [start, end) of layers that are alike, so that they are copied in one go."""
        if not layers or layers[0] not in self._groups:
            return None
        place, group, whole = self._groups[layers[0]]
        if group[place : place + len(layers)] != list(layers):
            return None
        spec = self._specs[layers[0]]
        some = slice(spec.rows_before(start), spec.rows_before(end))
        return whole[place : place + len(layers)][(slice(None),) * (2 + spec.tensors[0].token_axis) + (some,)]


def _allocate(size: int) -> mmap.mmap:
    # Private, not Python's default of shared: shared anonymous memory gets no huge pages.
    rounded = max(-(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, rounded)
    block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
