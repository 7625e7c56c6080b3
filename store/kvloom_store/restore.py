"""How state comes back: which rows are read, in what order, into which memory.

State at position T of a segment is the segment's own rows up to T, its base's rows up to where it starts, and so on
down to the snapshot. ``chain`` finds these segments in one query, ``plan`` says which of their rows are needed (a pure
function), ``load`` reads the chunks in the order they lie in the file (segment, layer, position), checks each one and
copies its rows straight to their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa

from kvloom_proto.errors import ChecksumMismatch, FormatError
from kvloom_proto.records import ITEM_BYTES, ChunkSpec, LayerSpec, Manifest, expand, read_manifest
from kvloom_store import codec
from kvloom_store.checksum import checked, digest, row_checksum
from kvloom_store.errors import CorruptRow, StoreError
from kvloom_store.rows import RowSource, element_type, shape_with
from kvloom_store.schema import chunk, segment

QUERY_SEGMENTS = 500
"""Segments asked for in one query: databases bound the number of parameters."""


class StateDamaged(StoreError):
    """Stored state is not what was written. Rows below ``intact`` are sound; the rest can be recomputed."""

    def __init__(self, what: str, intact: int) -> None:
        super().__init__(f"stored state is damaged: {what}", hint="it is recomputed from the tokens when it is needed")
        self.what = what
        self.intact = intact


@dataclass(frozen=True, slots=True)
class Link:
    """One segment of a chain."""

    id: int
    start: int
    end: int
    base_segment: int | None
    manifest: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Rows [start, end) are taken from this segment."""

    segment: int
    start: int
    end: int


class RowSink(RowSource, Protocol):
    """Rows that can be written through the views it gives."""


def chain(conn: sa.Connection, segment_id: int) -> list[Link]:
    """The segments that a segment stands on, from the snapshot up to itself, in one query.

    Raises:
        StateDamaged: a segment is missing, incomplete or damaged.
    """
    up = sa.select(segment.c.id, segment.c.base_segment).where(segment.c.id == segment_id).cte("up", recursive=True)
    up = up.union_all(sa.select(segment.c.id, segment.c.base_segment).where(segment.c.id == up.c.base_segment))
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
        links.append(Link(at, values["start"], values["end"], values["base_segment"], values["manifest"]))
        at = values["base_segment"]
    if links[-1].start != 0:
        raise StateDamaged("the chain does not reach back to the first token", 0)
    return links[::-1]


def plan(links: list[Link], position: int) -> list[Read]:
    """Which rows of which segment make up the state at ``position``, from the first token on.

    Each segment gives its rows up to where the next one starts: a delta may begin inside its base.
    """
    reads: list[Read] = []
    upto = position
    for link in reversed(links):
        if link.start < upto <= link.end:
            reads.append(Read(link.id, link.start, upto))
            upto = link.start
        elif upto > link.end:
            raise StateDamaged(f"no rows are held between {link.end} and {upto}", link.end)
    return reads[::-1]


def load(conn: sa.Connection, links: list[Link], reads: list[Read], sink: RowSink) -> int:
    """Read the rows of a plan into ``sink``, every chunk checked; the bytes read.

    Raises:
        StateDamaged: a chunk is missing or not what was written.
    """
    manifests = {}
    for link in links:
        if any(read.segment == link.id for read in reads):
            try:
                manifests[link.id] = read_manifest(link.manifest)
            except FormatError as error:
                raise StateDamaged(f"manifest of segment {link.id}: {error}", link.start) from error
    wanted = {
        (read.segment, spec.layer, spec.position): (read, manifests[read.segment], spec)
        for read in reads
        for spec in manifests[read.segment].chunks
        if spec.position < read.end and spec.position + spec.tokens > read.start
    }
    total = 0
    for values in _chunk_rows(conn, reads):
        found = wanted.pop((values["segment"], values["layer"], values["position"]), None)
        if found is None:
            continue
        read, manifest, spec = found
        try:
            _place(values, read, manifest, spec, sink)
        except FormatError as error:
            raise StateDamaged(str(error), read.start) from error
        total += len(values["blob"])
    if wanted:
        missing, (read, _, _) = next(iter(wanted.items()))
        raise StateDamaged(f"chunk {missing} is missing", read.start)
    return total


def _chunk_rows(conn: sa.Connection, reads: list[Read]) -> Iterator[dict[str, Any]]:
    """The chunks of a plan, one at a time, in the order of the primary key, which is that of the file."""
    order = (chunk.c.segment, chunk.c.kind, chunk.c.layer, chunk.c.position)
    # Segments read to their end need no bound; the others get one of their own, so that nothing is read in vain.
    for first in range(0, len(reads), QUERY_SEGMENTS):
        some = reads[first : first + QUERY_SEGMENTS]
        last = max(read.end for read in some)
        query = sa.select(chunk).where(chunk.c.segment.in_([read.segment for read in some]), chunk.c.position < last)
        for row in conn.execute(query.order_by(*order)):  # fetched one by one: only one blob is in memory
            yield dict(row._mapping)


def _place(values: dict[str, Any], read: Read, manifest: Manifest, spec: ChunkSpec, sink: RowSink) -> None:
    """Check one chunk and copy the rows that are wanted of it into the sink."""
    stored = values["blob"]
    found = digest(stored) if isinstance(stored, bytes) else b""
    what = f"chunk {spec.layer} at {spec.position} of segment {read.segment}"
    if found != spec.stored_digest:
        raise ChecksumMismatch(what, spec.stored_digest, found)
    row = {**values, "blob": found}
    checksum = row.pop("checksum")
    actual = row_checksum(chunk, row)
    if checksum != actual:
        raise ChecksumMismatch(what, checksum, actual)
    layers = expand(manifest.layers)[spec.layer : spec.layer + spec.layers]
    items = {ITEM_BYTES[tensor.dtype] for layer in layers for tensor in layer.tensors}
    raw = codec.decode(stored, items.pop() if len(items) == 1 else 1, spec.raw_length, spec.codec)
    if spec.codec != codec.RAW and digest(raw) != spec.raw_digest:
        raise ChecksumMismatch(what, spec.raw_digest, digest(raw))
    _scatter(raw, layers, spec, min(spec.position + spec.tokens, read.end), sink)


def _scatter(raw: codec.Buffer, layers: list[LayerSpec], spec: ChunkSpec, end: int, sink: RowSink) -> None:
    at, take = 0, end - spec.position
    block = sink.block(spec.layer, spec.layers, spec.position, end)
    if block is not None:  # one copy, and one hold of the interpreter's lock, for all layers of the chunk
        tensor = layers[0].tensors[0]
        whole = np.frombuffer(raw, block.dtype).reshape(*block.shape[:2], *shape_with(tensor, spec.tokens))
        block[...] = whole[(slice(None),) * (2 + tensor.token_axis) + (slice(0, take),)]
        return
    for number, layer in enumerate(layers):
        for index, tensor in enumerate(layer.tensors):
            shape = shape_with(tensor, spec.tokens)
            rows = np.frombuffer(raw, element_type(tensor.dtype), math.prod(shape), at).reshape(shape)
            at += tensor.row_bytes * spec.tokens
            place = sink.rows(spec.layer + number, index, spec.position, end)
            place[...] = rows[(slice(None),) * tensor.token_axis + (slice(0, take),)]
