"""How rows come back: the chunks of a plan are read, checked, unpacked and copied to their place.

What is small comes with the query that finds it, in the order in which it lies in the file (segment, kind, layer,
position). Of large chunks the index alone is asked where they are, and they are then opened one by one, by a thread for
each core, each through a connection of its own: touching the memory they go to for the first time, and unpacking, take
longer than reading.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.limits import CHUNK_BYTES
from kvloom_proto.records import (
    STORED_BY_ROW,
    ChunkSpec,
    LayerKind,
    Layers,
    LayerSpec,
    Manifest,
    TensorSpec,
    covered,
    expand,
)
from kvloom_store import codec, sqlite
from kvloom_store.planner import Link, Read, StateDamaged
from kvloom_store.restore import checked_raw, raw_of
from kvloom_store.rows import Rows, RowSink, element_type, shape_with
from kvloom_store.schema import chunk

QUERY_SEGMENTS = 500
"""Segments asked for in one query: databases bound the number of parameters."""

SMALL_BYTES = 64 << 10
"""A blob of up to so many bytes comes with its row: to open it by itself would cost as much as to copy it twice."""

READERS = min(os.cpu_count() or 1, 4)
"""Threads that read large chunks, the caller's among them; each holds one at a time, as it is stored and unpacked."""

SHARED_BYTES = 16 << 20
"""With less to read, no other thread is worth its connection (2 ms)."""

LONG_BYTES = 192 << 20
"""Of more than this the pages of the file are let go of while it is read: as long as they are mapped, they count as
the program's memory, which would be twice that of long state. It takes a fifth of the time: of less they are kept."""

PARTS = 32
"""Of long state so many parts are mapped one after another, and no more is read at once: 3 % more memory each."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk to read: the read that it is for, and how it was written."""

    read: Read
    manifest: Manifest
    spec: ChunkSpec

    def put(self, raw: codec.Buffer, sink: RowSink) -> None:
        """Copy the rows that the read is about to their place."""
        start = max(self.spec.position, self.read.start)
        end = min(self.spec.position + self.spec.tokens, self.read.end)
        _scatter(raw, expand(self.manifest.layers), self.spec, start, end, sink)
        sink.placed()


def load(
    conn: sa.Connection, links: Sequence[Link], rows: Sequence[Read], windows: Sequence[Read], sink: RowSink
) -> int:
    """Read rows of a chain into ``sink``, every chunk checked; the bytes read.

    Raises:
        StateDamaged: a chunk is missing or not what was written.
    """
    by_id = {link.id: link for link in links}
    total = 0
    for kind in STORED_BY_ROW:
        reads = windows if kind == LayerKind.WINDOW else rows
        wanted = {
            (read.segment, spec.layer, spec.position): _Wanted(read, by_id[read.segment].manifest, spec)
            for read in reads
            for spec in by_id[read.segment].manifest.chunks
            if spec.kind == kind and read.start < spec.position + spec.tokens and spec.position < read.end
        }
        if not wanted:
            continue
        total += sum(each.spec.stored_length for each in wanted.values())
        try:
            small = {key: each for key, each in wanted.items() if each.spec.stored_length <= SMALL_BYTES}
            large = {key: each for key, each in wanted.items() if key not in small}
            if small:
                _load_small(conn, kind, reads, small, sink)
            if large:
                _load_large(conn, _find_large(conn, kind, reads, large), sink)
        except FormatError as error:
            raise StateDamaged(str(error), min(read.start for read in reads)) from error
    return total


def _load_small(
    conn: sa.Connection,
    kind: LayerKind,
    reads: Sequence[Read],
    wanted: dict[tuple[int, int, int], _Wanted],
    sink: RowSink,
) -> None:
    """Bring back what comes with the query. Raises FormatError."""
    left = dict(wanted)
    # What comes behind a large blob in its row is left out with it: to reach it, all of the blob's pages are walked.
    small = sa.func.length(chunk.c.blob) <= SMALL_BYTES
    columns = [
        sa.case((small, column)).label(column.name) if column.name in ("blob", "checksum") else column
        for column in chunk.columns
    ]
    for row in _rows(conn, kind, reads, wanted, columns):
        found = left.pop((row.segment, row.layer, row.position), None)
        if found is not None:
            values = {column.name: row._mapping[column.name] for column in chunk.columns}
            found.put(checked_raw(values, expand(found.manifest.layers), found.read.segment, found.spec), sink)
    _check_found(left)


def _find_large(
    conn: sa.Connection, kind: LayerKind, reads: Sequence[Read], wanted: dict[tuple[int, int, int], _Wanted]
) -> deque[tuple[int, _Wanted]]:
    """In which rows the other chunks are. Raises FormatError.

    Only the index is read: rows lie far apart, and a disk would bring much of the file along with each, unused.
    """
    left = dict(wanted)
    columns = (sqlite.ROW, chunk.c.segment, chunk.c.layer, chunk.c.position)
    large: deque[tuple[int, _Wanted]] = deque()
    for row in _rows(conn, kind, reads, wanted, columns):
        found = left.pop((row.segment, row.layer, row.position), None)
        if found is not None:
            large.append((row.rowid, found))
    _check_found(left)
    return large


def _check_found(left: Sized) -> None:
    if left:
        raise FormatError(f"{len(left)} chunks are missing", field="chunk")


def _load_large(conn: sa.Connection, large: deque[tuple[int, _Wanted]], sink: RowSink) -> None:
    """Read chunks by themselves, several at once if they are many. Raises FormatError."""
    size = sum(each.spec.stored_length for _, each in large)
    readers = 1
    if size >= SHARED_BYTES:
        readers = min(READERS, len(large))
        _keep_freed_memory()
    mapped = size
    if size > LONG_BYTES:
        readers = min(readers, size // (PARTS * CHUNK_BYTES) + 1)
        mapped = size // PARTS // readers
    helpers = readers - 1
    failed: deque[tuple[int, _Wanted]] = deque()
    with ThreadPoolExecutor(max(helpers, 1), "kvloom-read") as pool:  # it starts no thread before there is work for one
        try:
            helping = [pool.submit(_help, conn.engine, large, failed, sink, mapped) for _ in range(helpers)]
            _take_all(conn, large, sink, mapped)
            for each in helping:
                each.result()
        finally:
            large.clear()  # whoever still reads stops
    # Another connection's snapshot is a little younger: what was stored anew meanwhile is still here as it was.
    _take_all(conn, failed, sink, mapped)


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of chunks that are let go of, from the first one on.

    What is larger than all that was freed before, glibc maps from the system each time, and that touches it for the
    first time again: 2,000 page faults of a process's first restore. Freeing this block, which nobody touches, tells.
    """
    block = bytes(2 * CHUNK_BYTES)
    del block


def _help(
    engine: sa.Engine,
    large: deque[tuple[int, _Wanted]],
    failed: deque[tuple[int, _Wanted]],
    sink: RowSink,
    mapped: int,
) -> None:
    """Take chunks until none is left; if one cannot be had, it is left to the others."""
    try:
        with engine.begin() as conn:
            _take_all(conn, large, sink, mapped, failed)
    except sa.exc.SQLAlchemyError:  # the one that was being read is in ``failed``
        return


def _take_all(
    conn: sa.Connection,
    large: deque[tuple[int, _Wanted]],
    sink: RowSink,
    mapped: int,
    failed: deque[tuple[int, _Wanted]] | None = None,
) -> None:
    """Read, check and place chunks until none is left; after so many ``mapped`` bytes their pages are let go of."""
    read = 0
    while large:
        try:
            row, each = large.popleft()
        except IndexError:  # another thread was first
            return
        try:
            _take(conn, row, each, sink)
        except (FormatError, sa.exc.SQLAlchemyError) as error:
            if failed is None:
                raise
            failed.append((row, each))
            if not isinstance(error, FormatError):
                raise
        read += each.spec.stored_length
        if read > mapped:
            sqlite.unmap(conn)
            read = 0


def _take(conn: sa.Connection, row: int, each: _Wanted, sink: RowSink) -> None:
    """One chunk. A function of its own: what it holds is let go of before the next one is read."""
    stored = sqlite.read_blob(conn, chunk.name, "blob", row, each.spec.stored_length)
    each.put(raw_of(stored, expand(each.manifest.layers), each.read.segment, each.spec), sink)


def _rows(
    conn: sa.Connection,
    kind: LayerKind,
    reads: Sequence[Read],
    wanted: dict[tuple[int, int, int], _Wanted],
    columns: Sequence[sa.ColumnElement[Any]],
) -> Iterator[sa.Row[Any]]:
    """Columns of the rows of a plan's chunks, in the order of the primary key, which is that of the file."""
    order = (chunk.c.segment, chunk.c.kind, chunk.c.layer, chunk.c.position)
    positions: dict[int, list[int]] = {}
    for segment_id, _, position in wanted:
        positions.setdefault(segment_id, []).append(position)
    # Where a branch has left a segment, the segment goes on: that part of it is another path's, and may be long.
    left = {
        each.read.segment: sa.or_(
            chunk.c.segment != each.read.segment, chunk.c.position <= max(positions[each.read.segment])
        )
        for each in wanted.values()
        if each.read.end < each.manifest.end
    }
    for first in range(0, len(reads), QUERY_SEGMENTS):
        some = [read.segment for read in reads[first : first + QUERY_SEGMENTS] if read.segment in positions]
        if not some:
            continue
        query = sa.select(*columns).where(
            chunk.c.segment.in_(some),
            chunk.c.kind == int(kind),
            sa.tuple_(chunk.c.segment, chunk.c.layer, chunk.c.position).between(min(wanted), max(wanted)),
            chunk.c.position >= min(min(positions[each]) for each in some),
            chunk.c.position <= max(max(positions[each]) for each in some),
            *(left[each] for each in some if each in left),
        )
        yield from conn.execute(query.order_by(*order))  # fetched one by one: only one blob is in memory


def _scatter(raw: codec.Buffer, layers: Layers, spec: ChunkSpec, start: int, end: int, sink: RowSink) -> None:
    """Copy rows [start, end) of a chunk to their place."""
    numbers = covered(layers, spec)
    block = sink.block(numbers, start, end)
    if block is not None:  # one copy, and one hold of the interpreter's lock, for all layers of the chunk
        tensor, count, take = _taken(layers[numbers[0]], 0, spec, start, end)
        whole = np.frombuffer(raw, block.dtype).reshape(*block.shape[:2], *shape_with(tensor, count))
        block[...] = whole[(slice(None),) * (2 + tensor.token_axis) + (take,)]
        return
    at = 0
    for number in numbers:
        for index in range(len(layers[number].tensors)):
            tensor, count, take = _taken(layers[number], index, spec, start, end)
            shape = shape_with(tensor, count)
            rows: Rows = np.frombuffer(raw, element_type(tensor.dtype), math.prod(shape), at).reshape(shape)
            at += tensor.row_bytes * count
            sink.rows(number, index, start, end)[...] = rows[(slice(None),) * tensor.token_axis + (take,)]


def _taken(layer: LayerSpec, index: int, spec: ChunkSpec, start: int, end: int) -> tuple[TensorSpec, int, slice]:
    """A tensor of a layer, how many of its rows a chunk holds, and which of those belong to positions [start, end)."""
    first, last = layer.rows_before(spec.position), layer.rows_before(spec.position + spec.tokens)
    return layer.tensors[index], last - first, slice(layer.rows_before(start) - first, layer.rows_before(end) - first)
