"""Memory for the rows of every layer: what state is restored into, and captured from.

Preallocated for more tokens than there are, so that a forward pass adds its rows in place, and in one block of
huge pages where the system has them: touching fresh memory for the first time costs more than reading the state.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvloom_proto.records import ITEM_BYTES, LayerKind, LayerSpec, TensorSpec

HUGE_PAGE_BYTES = 2 << 20
HUGE_FROM_BYTES = 64 << 20
"""Below this a block of huge pages would waste more memory than it saves time."""

ALIGNED_TOKENS = 64
"""Capacities are multiples of this: 64 rows of any size fill whole cache lines."""

Rows = npt.NDArray[np.unsignedinteger]
"""Elements as unsigned integers of their size: numpy has no bfloat16, and only bits matter here."""


class RowSource(Protocol):
    """Whatever rows can be read from: a RowBuffer, or a live cache on any device."""

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """Rows [start, end) of a layer's tensor: ``spec.shape`` with end - start inserted at its token axis."""
        ...

    def block(self, layer: int, layers: int, start: int, end: int) -> Rows | None:
        """The same rows of all tensors of a run of layers, ``[layers, tensors, ...]``, if they lie so in memory."""
        ...


def element_type(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integer type that holds one element of a dtype name."""
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def shape_with(spec: TensorSpec, tokens: int) -> tuple[int, ...]:
    """A tensor's shape for so many tokens, without the batch."""
    return (*spec.shape[: spec.token_axis], tokens, *spec.shape[spec.token_axis :])


class RowBuffer:
    """Room for ``capacity`` rows of every layer of rows, in one block."""

    def __init__(self, layers: tuple[LayerSpec, ...], capacity: int) -> None:
        self.layers = layers
        # Every head of every tensor begins on a cache line: alignment can change how a kernel sums, and so the bits.
        self.capacity = capacity = -(-capacity // ALIGNED_TOKENS) * ALIGNED_TOKENS
        runs = [spec for spec in layers if spec.kind == LayerKind.ROWS]
        # Each run of layers begins on a cache line of its own.
        sizes = {spec.index: -(-spec.row_bytes * spec.count * capacity // 64) * 64 for spec in runs}
        memory = _allocate(sum(sizes.values()))
        self.tensors: list[list[Rows]] = []
        self._axes: list[list[int]] = []
        self._runs: list[tuple[int, int, int, Rows]] = []  # first layer, layers, token axis, their memory as one array
        at = 0
        for spec in layers:
            kinds = {(tensor.dtype, tensor.shape, tensor.token_axis) for tensor in spec.tensors}
            arrays: list[list[Rows]] = [[] for _ in range(spec.count)]
            if spec.kind == LayerKind.ROWS and len(kinds) == 1:
                tensor = spec.tensors[0]
                shape = (spec.count, len(spec.tensors), *shape_with(tensor, capacity))
                whole = np.frombuffer(memory, element_type(tensor.dtype), math.prod(shape), at).reshape(shape)
                self._runs.append((spec.index, spec.count, tensor.token_axis, whole))
                arrays = [list(layer) for layer in whole]
            elif spec.kind == LayerKind.ROWS:
                arrays = _apart(memory, at, spec, capacity)
            at += sizes.get(spec.index, 0)
            self.tensors += arrays
            self._axes += [[tensor.token_axis for tensor in spec.tensors]] * spec.count

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """A view of rows [start, end); writing to it writes into the buffer."""
        axis = self._axes[layer][tensor]
        return self.tensors[layer][tensor][(slice(None),) * axis + (slice(start, end),)]

    def block(self, layer: int, layers: int, start: int, end: int) -> Rows | None:
        """One view of the rows [start, end) of layers that are alike, so that they are copied in one go."""
        for first, count, axis, whole in self._runs:
            if first <= layer and layer + layers <= first + count:
                some = whole[layer - first : layer - first + layers]
                return some[(slice(None),) * (2 + axis) + (slice(start, end),)]
        return None


def _apart(memory: mmap.mmap, at: int, spec: LayerSpec, capacity: int) -> list[list[Rows]]:
    """The tensors of layers whose tensors differ in shape (MLA's latents, say), one after another."""
    arrays: list[list[Rows]] = []
    for _ in range(spec.count):
        arrays.append([])
        for tensor in spec.tensors:
            count = math.prod(tensor.shape) * capacity
            flat = np.frombuffer(memory, element_type(tensor.dtype), count, at)
            arrays[-1].append(flat.reshape(shape_with(tensor, capacity)))
            at += tensor.row_bytes * capacity
    return arrays


def _allocate(size: int) -> mmap.mmap:
    # Private, not Python's default of shared: shared anonymous memory gets no huge pages.
    rounded = max(-(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, rounded)
    block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
