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

from kvloom_proto.records import ITEM_BYTES, LayerKind, LayerSpec, TensorSpec, expand

HUGE_PAGE_BYTES = 2 << 20
HUGE_FROM_BYTES = 64 << 20
"""Below this a block of huge pages would waste more memory than it saves time."""

Rows = npt.NDArray[np.unsignedinteger]
"""Elements as unsigned integers of their size: numpy has no bfloat16, and only bits matter here."""


class RowSource(Protocol):
    """Whatever rows can be read from: a RowBuffer, or a live cache on any device."""

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """Rows [start, end) of a layer's tensor: ``spec.shape`` with end - start inserted at its token axis."""
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
        self.capacity = capacity
        specs = [s.tensors if s.kind == LayerKind.ROWS else () for s in expand(layers)]
        # Each tensor begins on a cache line of its own.
        sizes = [[-(-t.row_bytes * capacity // 64) * 64 for t in tensors] for tensors in specs]
        block = _allocate(sum(map(sum, sizes)))
        self.tensors: list[list[Rows]] = []
        at = 0
        for tensors, lengths in zip(specs, sizes, strict=True):
            arrays = []
            for spec, length in zip(tensors, lengths, strict=True):
                count = math.prod(spec.shape) * capacity
                flat = np.frombuffer(block, element_type(spec.dtype), count, at)
                arrays.append(flat.reshape(shape_with(spec, capacity)))
                at += length
            self.tensors.append(arrays)
        self._axes = [[t.token_axis for t in tensors] for tensors in specs]

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """A view of rows [start, end); writing to it writes into the buffer."""
        axis = self._axes[layer][tensor]
        return self.tensors[layer][tensor][(slice(None),) * axis + (slice(start, end),)]


def _allocate(size: int) -> mmap.mmap:
    # Private, not Python's default of shared: shared anonymous memory gets no huge pages.
    rounded = max(-(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, rounded)
    block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
