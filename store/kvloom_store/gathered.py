"""State of several small turns in a row that waits to be written: it becomes one segment.

A segment of ten tokens costs a restore as much beside its bytes as one of a thousand. What waits together is written
together, which costs no byte more; ``merging`` does the same for what was written by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvloom_proto.records import LayerSpec, Schedule, expand
from kvloom_store.rows import Captured, Rows, RowSource

FEW_SEGMENTS = 16
"""So many segments of a path cost a restore nothing to speak of: below that each turn keeps its own, which can be
dropped, shared and stored otherwise by itself."""

SMALL_TOKENS = 64
"""A segment of fewer tokens is small. Of larger ones the bytes are what counts, and each can be dropped by itself."""

MOST_TOKENS = 256
"""Small segments in a row become ones of at most so many tokens: a chunk of most models."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, end) of ``source``, computed by ``schedule``."""

    source: Captured = field(repr=False)
    start: int
    end: int
    schedule: Schedule


def joined(parts: Sequence[Part], layers: tuple[LayerSpec, ...]) -> Part:
    """Parts, each of which begins where the one before ends, as one."""
    if len(parts) == 1:
        return parts[0]
    start, end = parts[0].start, parts[-1].end
    sources = {id(part.source.rows): part.source.rows for part in parts}
    rows = parts[0].source.rows if len(sources) == 1 else _Joined(tuple(parts), layers)
    frames = {position: frame for part in parts for position, frame in part.source.frames.items()}
    passes = tuple(each for part in parts for each in part.schedule.passes)
    return Part(Captured(rows, frames), start, end, Schedule(passes))


@dataclass(frozen=True, eq=False)
class _Joined(RowSource):
    """Rows that lie in several places: of paths that were decoded together, or of buffers that have grown."""

    parts: tuple[Part, ...] = field(repr=False)
    layers: tuple[LayerSpec, ...]

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        axis = expand(self.layers)[layer].tensors[tensor].token_axis
        found = [
            part.source.rows.rows(layer, tensor, max(start, part.start), min(end, part.end))
            for part in self.parts
            if part.start < end and start < part.end
        ]
        return np.concatenate(found, axis)

    def block(self, layers: Sequence[int], start: int, end: int) -> Rows | None:
        within = (part for part in self.parts if part.start <= start and end <= part.end)
        part = next(within, None)
        return None if part is None else part.source.rows.block(layers, start, end)
