"""How state comes back: the chain of segments, and the rows and keyframes that a plan names (``planner``).

``chain`` finds the segments that a segment stands on in one query; ``load`` reads the chunks in the order they lie in
the file (segment, kind, layer, position), checks each one and copies its rows straight to their place. What is packed
is unpacked on other threads, while the next blobs are read.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa

from kvloom_proto.codecs import LOSSY, RAW
from kvloom_proto.errors import ChecksumMismatch, FormatError
from kvloom_proto.records import (
    STORED_BY_ROW,
    ChunkSpec,
    LayerKind,
    LayerSpec,
    Manifest,
    TensorSpec,
    covered,
    dtype_of,
    expand,
)
from kvloom_store import codec, quantized, sqlite
from kvloom_store.checksum import checked, digest, row_checksum
from kvloom_store.errors import CorruptRow
from kvloom_store.planner import Keyframe, Link, Read, StateDamaged
from kvloom_store.rows import Frame, Rows, RowSource, element_type, shape_with
from kvloom_store.schema import chunk, segment
from kvloom_store.segments import item_bytes

QUERY_SEGMENTS = 500
"""Segments asked for in one query: databases bound the number of parameters."""

DECODERS = min(os.cpu_count() or 1, 4)
"""Threads that unpack, and chunks that wait for one: each holds its packed and its raw bytes."""

MAPPED_BYTES = 64 << 20
"""State that is read before the pages of the file are let go of: while they are mapped, they count as the program's
memory, which would be twice that of long state."""

_Wanted = dict[tuple[int, int, int], tuple[Read, Manifest, ChunkSpec]]
"""Chunks to read, by segment, layer and position: the read that each is for, and how it was written."""


class RowSink(RowSource, Protocol):
    """Rows that can be written through the views it gives."""


def chain(conn: sa.Connection, segment_id: int) -> list[Link]:
    """The segments that a segment stands on, from the snapshot up to itself, in one query.

    Raises:
        StateDamaged: a segment is missing, incomplete or damaged.
    """
    up = sa.select(segment.c.id, segment.c.base_segment).where(segment.c.id == segment_id).cte("up", recursive=True)
    # A union without duplicates, here and wherever a path is walked: rows that name each other in a circle end it.
    up = up.union(sa.select(segment.c.id, segment.c.base_segment).where(segment.c.id == up.c.base_segment))
    rows: dict[int, dict[str, Any]] = {}
    try:
        for row in conn.execute(sa.select(segment).where(segment.c.id.in_(sa.select(up.c.id)))):
            values = checked(segment, row)
            rows[values["id"]] = values
    except CorruptRow as error:
        raise StateDamaged(str(error), 0) from error
    links: list[Link] = []
    at: int | None = segment_id
    while at is not None:
        values = rows.pop(at, {})
        if not values or not values["complete"] or (links and values["end"] < links[-1].start):
            raise StateDamaged(f"segment {at} of the chain is missing or incomplete", 0)
        at = values["base_segment"]
        links.append(_link(values))
    if links[-1].start != 0:
        raise StateDamaged("the chain does not reach back to the first token", 0)
    return links[::-1]


def _link(values: Mapping[str, Any]) -> Link:
    names = ("id", "node", "start", "end", "base_segment", "provenance", "manifest", "schedule", "lossy")
    return Link(*(values[name] for name in names))


def link_of(conn: sa.Connection, segment_id: int) -> Link:
    """One segment, complete or not. Raises CorruptRow."""
    row = conn.execute(sa.select(segment).where(segment.c.id == segment_id)).one_or_none()
    if row is None:
        raise CorruptRow("segment", (segment_id,))
    return _link(checked(segment, row))


def read_back(conn: sa.Connection, link: Link, upto: int) -> Iterator[tuple[ChunkSpec, codec.Buffer]]:
    """Every chunk of a segment that holds state before position ``upto``, or at it, checked: its raw bytes, one at a
    time.

    Raises:
        StateDamaged: a chunk is missing or not what was written.
    """
    layers = expand(link.manifest.layers)
    for spec in link.manifest.chunks:
        if spec.position >= upto and not (spec.tokens == 0 and spec.position == upto):
            continue
        key = (chunk.c.segment == link.id) & (chunk.c.kind == int(spec.kind)) & (chunk.c.layer == spec.layer)
        row = conn.execute(sa.select(chunk).where(key, chunk.c.position == spec.position)).one_or_none()
        if row is None:
            raise StateDamaged(f"chunk {spec.layer} at {spec.position} of segment {link.id} is missing", link.start)
        try:
            raw = checked_raw(dict(row._mapping), layers, link.id, spec)
        except FormatError as error:
            raise StateDamaged(str(error), link.start) from error
        yield spec, raw


def load(
    conn: sa.Connection, links: Sequence[Link], rows: Sequence[Read], windows: Sequence[Read], sink: RowSink
) -> int:
    """Read rows of a chain into ``sink``, every chunk checked; the bytes read.

    Raises:
        StateDamaged: a chunk is missing or not what was written.
    """
    by_id = {link.id: link for link in links}
    parts: list[tuple[LayerKind, Sequence[Read], _Wanted]] = []
    for kind in STORED_BY_ROW:
        reads = windows if kind == LayerKind.WINDOW else rows
        wanted = {
            (read.segment, spec.layer, spec.position): (read, by_id[read.segment].manifest, spec)
            for read in reads
            for spec in by_id[read.segment].manifest.chunks
            if spec.kind == kind and read.start < spec.position + spec.tokens and spec.position < read.end
        }
        parts += [(kind, reads, part) for part in _parts(wanted)]
    total = mapped = 0
    for kind, reads, part in parts:
        if mapped >= MAPPED_BYTES:
            sqlite.unmap(conn)
            mapped = 0
        size = _load_wanted(conn, kind, reads, part, sink)
        total, mapped = total + size, mapped + size
    return total


def _parts(wanted: _Wanted) -> Iterator[_Wanted]:
    """The same chunks in the order in which they lie in the file, about MAPPED_BYTES at a time."""
    part: _Wanted = {}
    size = 0
    for key in sorted(wanted):
        part[key] = wanted[key]
        size += wanted[key][2].stored_length
        if size >= MAPPED_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _load_wanted(
    conn: sa.Connection,
    kind: LayerKind,
    reads: Sequence[Read],
    wanted: _Wanted,
    sink: RowSink,
) -> int:
    total, intact = 0, min(read.start for read in reads)
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(DECODERS, "kvloom-decode") as pool:  # it starts no thread before there is work for one
        try:
            for values in _blobs(conn, kind, reads, wanted):
                found = wanted.pop((values["segment"], values["layer"], values["position"]), None)
                if found is None:
                    continue
                read, manifest, spec = found
                total += spec.stored_length
                if spec.codec == RAW:  # checking and one copy: handing it over would cost as much
                    _put(values, read, manifest, spec, sink)
                    continue
                pending.append(pool.submit(_put, values, read, manifest, spec, sink))
                if len(pending) > DECODERS:
                    pending.popleft().result()
            for each in pending:
                each.result()
        except FormatError as error:
            raise StateDamaged(str(error), intact) from error
    if wanted:
        raise StateDamaged(f"{len(wanted)} chunks are missing", intact)
    return total


def _put(values: dict[str, Any], read: Read, manifest: Manifest, spec: ChunkSpec, sink: RowSink) -> None:
    """Check a chunk, and copy the rows of a read to their place. Raises FormatError."""
    layers = expand(manifest.layers)
    raw = checked_raw(values, layers, read.segment, spec)
    _scatter(raw, layers, spec, max(spec.position, read.start), min(spec.position + spec.tokens, read.end), sink)


def load_keyframe(conn: sa.Connection, links: Sequence[Link], keyframe: Keyframe) -> tuple[Frame, int]:
    """Read a stored keyframe, every chunk checked: its tensors by layer, and the bytes read.

    Raises:
        StateDamaged: a chunk is missing or not what was written.
    """
    link = next(link for link in links if link.id == keyframe.segment)
    layers = expand(link.manifest.layers)
    specs = {
        spec.layer: spec
        for spec in link.manifest.chunks
        if spec.kind == LayerKind.KEYFRAME and spec.position == keyframe.position
    }
    query = sa.select(chunk).where(
        chunk.c.segment == link.id,
        chunk.c.kind == int(LayerKind.KEYFRAME),
        chunk.c.position == keyframe.position,
    )
    frame: dict[int, list[Rows]] = {}
    total = 0
    for row in conn.execute(query.order_by(chunk.c.layer)):
        values = dict(row._mapping)
        spec = specs.pop(values["layer"], None)
        if spec is None:
            continue
        try:
            raw = checked_raw(values, layers, link.id, spec)
        except FormatError as error:
            raise StateDamaged(str(error), link.start) from error
        total += spec.stored_length
        at = 0
        for number in covered(layers, spec):
            frame[number] = []
            for tensor in layers[number].tensors:
                array = np.frombuffer(raw, element_type(tensor.dtype), math.prod(tensor.shape), at)
                frame[number].append(array.reshape(tensor.shape))
                at += tensor.row_bytes
    if specs:
        raise StateDamaged(f"{len(specs)} chunks of the keyframe at {keyframe.position} are missing", link.start)
    return frame, total


def _blobs(conn: sa.Connection, kind: LayerKind, reads: Sequence[Read], wanted: _Wanted) -> Iterator[dict[str, Any]]:
    """The chunks of a plan, one at a time, in the order of the primary key, which is that of the file."""
    order = (chunk.c.segment, chunk.c.kind, chunk.c.layer, chunk.c.position)
    positions: dict[int, list[int]] = {}
    for segment_id, _, position in wanted:
        positions.setdefault(segment_id, []).append(position)
    # Where a branch has left a segment, the segment goes on: that part of it is another path's, and may be long.
    left = {
        read.segment: sa.or_(chunk.c.segment != read.segment, chunk.c.position <= max(positions[read.segment]))
        for read, manifest, _ in wanted.values()
        if read.end < manifest.end
    }
    for first in range(0, len(reads), QUERY_SEGMENTS):
        some = [read.segment for read in reads[first : first + QUERY_SEGMENTS] if read.segment in positions]
        if not some:
            continue
        query = sa.select(chunk).where(
            chunk.c.segment.in_(some),
            chunk.c.kind == int(kind),
            sa.tuple_(chunk.c.segment, chunk.c.layer, chunk.c.position).between(min(wanted), max(wanted)),
            chunk.c.position >= min(min(positions[each]) for each in some),
            chunk.c.position <= max(max(positions[each]) for each in some),
            *(left[each] for each in some if each in left),
        )
        for row in conn.execute(query.order_by(*order)):  # fetched one by one: only one blob is in memory
            yield dict(row._mapping)


def checked_raw(values: dict[str, Any], layers: list[LayerSpec], segment_id: int, spec: ChunkSpec) -> codec.Buffer:
    """The raw bytes of a chunk's row, if it is what was written. Raises FormatError, ChecksumMismatch among them."""
    stored = values["blob"]
    found = digest(stored) if isinstance(stored, bytes) else b""
    what = f"chunk {spec.layer} at {spec.position} of segment {segment_id}"
    if found != spec.stored_digest:
        raise ChecksumMismatch(what, spec.stored_digest, found)
    row = {**values, "blob": found}
    checksum = row.pop("checksum")
    actual = row_checksum(chunk, row)
    if checksum != actual:
        raise ChecksumMismatch(what, checksum, actual)
    if spec.codec == RAW:
        return codec.decode(stored, 1, spec.raw_length, RAW)
    if spec.codec in LOSSY:
        raw = quantized.decode(stored, dtype_of(layers, spec), spec.raw_length, spec.codec)
    else:
        raw = codec.decode(stored, item_bytes(layers, spec), spec.raw_length, spec.codec)
    if digest(raw) != spec.raw_digest:
        raise ChecksumMismatch(what, spec.raw_digest, digest(raw))
    return raw


def _scatter(raw: codec.Buffer, layers: list[LayerSpec], spec: ChunkSpec, start: int, end: int, sink: RowSink) -> None:
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
            rows = np.frombuffer(raw, element_type(tensor.dtype), math.prod(shape), at).reshape(shape)
            at += tensor.row_bytes * count
            sink.rows(number, index, start, end)[...] = rows[(slice(None),) * tensor.token_axis + (take,)]


def _taken(layer: LayerSpec, index: int, spec: ChunkSpec, start: int, end: int) -> tuple[TensorSpec, int, slice]:
    """A tensor of a layer, how many of its rows a chunk holds, and which of those belong to positions [start, end)."""
    first, last = layer.rows_before(spec.position), layer.rows_before(spec.position + spec.tokens)
    return layer.tensors[index], last - first, slice(layer.rows_before(start) - first, layer.rows_before(end) - first)
