"""Stored state put down again with another codec: the segments of a path, a few megabytes at a time.

A lossless codec leaves the bits of the state, and so their digests, as they are. A lossy one leaves other rows: the
segment says so from the first transaction on, and keeps the digest of the exact ones, by which a replay can mend it.

Each transaction swaps some chunks and their entries in the manifest, so that a reader sees either form, and a process
that dies, or is stopped, leaves a good store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from kvloom_proto.codecs import LOSSY
from kvloom_proto.errors import FormatError
from kvloom_proto.records import (
    ChunkSpec,
    Layers,
    Manifest,
    dtype_of,
    expand,
    may_be_lossy,
    pack,
    read_manifest,
)
from kvloom_store import quantized, quota, segments
from kvloom_store.checksum import checked, digest, update
from kvloom_store.codec import Buffer
from kvloom_store.database import Database
from kvloom_store.errors import CorruptRow
from kvloom_store.restore import checked_raw
from kvloom_store.schema import branch, chunk, segment, session, turn, turn_state

Progress = Callable[[int, int], None]
"""Called with the bytes of state (uncompressed) that are done, and those there are."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the state of a path takes: ``raw`` bytes uncompressed, ``stored`` ones in the file, by codec.

    ``segments`` are its segments, in the order in which they stand on one another. ``shared`` of them are those of the
    branches ``others`` (``session@branch``), too; ``lossy`` ones are not exact. ``damaged`` ones cannot be read, and
    are left out of the figures.
    """

    segments: tuple[int, ...]
    raw: int
    stored: Mapping[str, int]
    shared: frozenset[int]
    others: tuple[str, ...]
    lossy: frozenset[int]
    damaged: int


@dataclass(frozen=True, slots=True)
class Recoded:
    """Bytes of some segments in the file before and after, how many of their ``chunks`` were put down again, and how
    many ``damaged`` ones were left alone; ``stopped``: some were not come to."""

    before: int
    after: int
    chunks: int
    damaged: int
    stopped: bool


def survey(conn: sa.Connection, tip: int | None, branch_row: int | None) -> Survey:
    """The state that the turns down to ``tip`` stand on; ``branch_row`` is the branch that is not another one."""
    own = _segments(conn, tip)
    shared: set[int] = set()
    others = []
    for row in _branches_on(conn, own):
        theirs = set(own) & set(_segments(conn, row.turn))
        if row.id != branch_row and theirs:
            shared |= theirs
            others.append(f"{row.session}@{row.branch}")
    stored: dict[str, int] = {}
    raw = damaged = 0
    lossy = set()
    for number in own:
        found = _read(conn, number)
        if found is None:
            damaged += 1
            continue
        if found[0]["lossy"]:
            lossy.add(number)
        for spec in found[1].chunks:
            raw += spec.raw_length
            stored[spec.codec] = stored.get(spec.codec, 0) + spec.stored_length
    return Survey(tuple(own), raw, stored, frozenset(shared), tuple(others), frozenset(lossy), damaged)


def recode(
    database: Database,
    rows: Sequence[int],
    codec_name: str,
    *,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> Recoded:
    """Put the chunks of some segments down with a codec (one of ``codecs.SETTINGS``, or of ``codecs.LOSSY``).

    A lossy one takes rows of floating-point numbers, and leaves all else; what is lossy already stays so. Stopped by
    ``cancel`` it keeps what was done, and can be run again. Chunks that are damaged stay as they are.

    Raises:
        UnknownCodec, StoreUnavailable, StoreLocked
        NoRoom: it would take more than the store's quota; what was done stays.
    """
    before = after = chunks = damaged = done = 0
    stopped = False
    with database.read() as conn:
        manifests = {row: found[1] for row in rows if (found := _read(conn, row)) is not None}
    total = sum(manifest.raw_bytes for manifest in manifests.values())
    for row, manifest in manifests.items():
        before += manifest.stored_bytes
        after += manifest.stored_bytes
        for batch in segments.batches(manifest.chunks):
            stopped = cancel is not None and cancel.is_set()
            if stopped:
                break
            swaps, unread = _encoded(database, row, manifest, batch, codec_name)
            damaged += unread
            if swaps:
                after += _swap(database, row, swaps)
                chunks += len(swaps)
            done += sum(spec.raw_length for spec in batch)
            if progress is not None:
                progress(done, total)
    return Recoded(before, after, chunks, damaged + len(rows) - len(manifests), stopped)


_Swap = tuple[ChunkSpec, ChunkSpec, bytes]
"""A chunk as it is, and as it is to be: its spec, and its bytes."""


def _encoded(
    database: Database, row: int, manifest: Manifest, batch: Sequence[ChunkSpec], codec_name: str
) -> tuple[list[_Swap], int]:
    """Those of some chunks that a codec would store otherwise; and how many cannot be read."""
    layers, swaps, unread = expand(manifest.layers), [], 0
    for spec in batch:
        lossy = codec_name in LOSSY
        if spec.codec == codec_name or spec.codec in LOSSY or (lossy and not may_be_lossy(layers, spec)):
            continue
        with database.read() as conn:
            found = conn.execute(sa.select(chunk).where(*_key(row, spec))).one_or_none()
        try:
            if found is None:
                raise FormatError("a chunk is missing")
            raw = checked_raw(dict(found._mapping), layers, row, spec)
        except FormatError:
            unread += 1
            continue
        new = _quantized(raw, layers, spec, codec_name) if lossy else segments.encoded(raw, layers, spec, codec_name)
        if new is not None and new[0] != spec:
            swaps.append((spec, *new))
    return swaps, unread


def _quantized(raw: Buffer, layers: Layers, spec: ChunkSpec, codec_name: str) -> tuple[ChunkSpec, bytes] | None:
    """A chunk as a lossy codec stores it, with the digest of what it decodes to; None if it cannot store these rows."""
    dtype = dtype_of(layers, spec)
    stored = quantized.encode(raw, dtype, codec_name)
    if stored is None:
        return None
    decoded = quantized.decode(stored, dtype, spec.raw_length, codec_name)
    spec = replace(spec, codec=codec_name, stored_length=len(stored), raw_digest=digest(decoded))
    return replace(spec, stored_digest=digest(stored)), stored


def _swap(database: Database, row: int, swaps: Sequence[_Swap]) -> int:
    """Put chunks in place of those they were made from, where these are still there; the bytes the segment grew by."""
    with database.write(background=True) as conn:
        found = _read(conn, row)
        if found is None:  # it was removed meanwhile, or replaced
            return 0
        values, manifest = found
        chunks = {spec: spec for spec in manifest.chunks}
        for old, new, stored in swaps:
            if old in chunks:
                chunks[old] = new
                sealed = segments.chunk_row(row, new, stored)
                changed = {name: sealed[name] for name in ("blob", "length", "checksum")}
                conn.execute(chunk.update().where(*_key(row, new)).values(**changed))
        after = replace(manifest, chunks=tuple(chunks.values()))
        lossy = values["lossy"] | segments.CODED * any(spec.codec in LOSSY for spec in after.chunks)
        update(conn, segment, values, manifest=pack(after), stored_bytes=after.stored_bytes, lossy=lossy)
        if after.stored_bytes > manifest.stored_bytes:
            quota.check(conn, database.path)
        return after.stored_bytes - manifest.stored_bytes


def _key(row: int, spec: ChunkSpec) -> tuple[sa.ColumnElement[bool], ...]:
    c = chunk.c
    return c.segment == row, c.kind == int(spec.kind), c.layer == spec.layer, c.position == spec.position


def _read(conn: sa.Connection, row: int) -> tuple[dict[str, Any], Manifest] | None:
    """A segment's row and manifest; None if it is not whole."""
    found = conn.execute(sa.select(segment).where(segment.c.id == row, segment.c.complete == 1)).one_or_none()
    try:
        values = checked(segment, found) if found is not None else None
        return None if values is None else (values, read_manifest(values["manifest"]))
    except (CorruptRow, FormatError):
        return None


def _segments(conn: sa.Connection, tip: int | None) -> list[int]:
    """The complete segments that the turns down to one stand on, bases first."""
    path = sa.select(turn.c.id, turn.c.parent).where(turn.c.id == tip).cte("path", recursive=True)
    path = path.union(sa.select(turn.c.id, turn.c.parent).where(turn.c.id == path.c.parent))
    mine = turn_state.c.turn.in_(sa.select(path.c.id))
    held = [
        sa.select(column.label("id")).where(mine, column.is_not(None))
        for column in (turn_state.c.segment, turn_state.c.base_segment)
    ]
    up = sa.select(sa.union(*held).subquery().c.id).cte("up", recursive=True)
    up = up.union(sa.select(segment.c.base_segment).where(segment.c.id == up.c.id, segment.c.base_segment.is_not(None)))
    whole = sa.select(segment.c.id).where(segment.c.id.in_(sa.select(up.c.id)), segment.c.complete == 1)
    return list(conn.execute(whole.order_by(segment.c.id)).scalars())  # a base was there before what stands on it


def _branches_on(conn: sa.Connection, own: Sequence[int]) -> list[Any]:
    """The branches on whose paths some turn stands on one of these segments, or on what stands on one."""
    down = sa.select(segment.c.id).where(segment.c.id.in_(own)).cte("down", recursive=True)
    down = down.union(sa.select(segment.c.id).where(segment.c.base_segment == down.c.id))
    on = sa.or_(turn_state.c.segment.in_(sa.select(down.c.id)), turn_state.c.base_segment.in_(sa.select(down.c.id)))
    below = sa.select(turn_state.c.turn.label("id")).where(on).cte("below", recursive=True)
    below = below.union(sa.select(turn.c.id).where(turn.c.parent == below.c.id))
    named = sa.select(session.c.name.label("session"), branch.c.name.label("branch"), branch.c.turn, branch.c.id)
    query = named.join(session, session.c.id == branch.c.session).where(branch.c.turn.in_(sa.select(below.c.id)))
    return list(conn.execute(query.order_by(branch.c.id)))
