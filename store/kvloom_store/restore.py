"""How state comes back: the chain of segments that a segment stands on, what is stored of one, checked, and keyframes.

The rows that a plan names (``planner``) are brought back by ``loading``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from kvloom_proto.codecs import LOSSY, RAW
from kvloom_proto.errors import ChecksumMismatch, FormatError
from kvloom_proto.records import (
    ChunkSpec,
    LayerKind,
    Layers,
    covered,
    dtype_of,
    expand,
)
from kvloom_store import codec, quantized
from kvloom_store.checksum import checked, digest, row_checksum
from kvloom_store.errors import CorruptRow
from kvloom_store.planner import Keyframe, Link, StateDamaged
from kvloom_store.rows import Frame, Rows, element_type
from kvloom_store.schema import chunk, segment
from kvloom_store.segments import item_bytes

# As text: a process's first restore would wait 2 ms for it to be put together and compiled.
# A union without duplicates, here and wherever a path is walked: rows that name each other in a circle end it.
_CHAIN = sa.text(
    "WITH RECURSIVE up (id, base) AS (SELECT id, base_segment FROM segment WHERE id = :id "
    "UNION SELECT segment.id, segment.base_segment FROM segment JOIN up ON segment.id = up.base) "
    "SELECT {} FROM segment WHERE id IN (SELECT id FROM up)".format(
        ", ".join(f'"{each.name}"' for each in segment.columns)
    )
)


def chain(conn: sa.Connection, segment_id: int) -> list[Link]:
    """The segments that a segment stands on, from the snapshot up to itself, in one query.

    Raises:
        StateDamaged: a segment is missing, incomplete or damaged.
    """
    rows: dict[int, dict[str, Any]] = {}
    try:
        for row in conn.execute(_CHAIN, {"id": segment_id}):
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


def checked_raw(values: Mapping[str, Any], layers: Layers, segment_id: int, spec: ChunkSpec) -> codec.Buffer:
    """The raw bytes of a chunk's row, if it is what was written. Raises FormatError, ChecksumMismatch among them."""
    raw = raw_of(values["blob"], layers, segment_id, spec)
    row = {**values, "blob": spec.stored_digest}
    checksum = row.pop("checksum")
    actual = row_checksum(chunk, row)
    if checksum != actual:
        raise ChecksumMismatch(_named(spec, segment_id), checksum, actual)
    return raw


def raw_of(stored: object, layers: Layers, segment_id: int, spec: ChunkSpec) -> codec.Buffer:
    """The raw bytes of a chunk, if its blob is what the manifest says. Raises FormatError (ChecksumMismatch)."""
    found = digest(stored) if isinstance(stored, bytes) else b""
    if not isinstance(stored, bytes) or found != spec.stored_digest:
        raise ChecksumMismatch(_named(spec, segment_id), spec.stored_digest, found)
    if spec.codec == RAW:
        return codec.decode(stored, 1, spec.raw_length, RAW)
    if spec.codec in LOSSY:
        raw = quantized.decode(stored, dtype_of(layers, spec), spec.raw_length, spec.codec)
    else:
        raw = codec.decode(stored, item_bytes(layers, spec), spec.raw_length, spec.codec)
    if digest(raw) != spec.raw_digest:
        raise ChecksumMismatch(_named(spec, segment_id), spec.raw_digest, digest(raw))
    return raw


def _named(spec: ChunkSpec, segment_id: int) -> str:
    return f"chunk {spec.layer} at {spec.position} of segment {segment_id}"
