"""Writing state: a segment is the rows of positions [start, end), and keyframes between them, cut into chunks.

Order of writing: the segment's row marked incomplete, its chunks in transactions of a few megabytes (the lock is
free between them), and last, in one transaction, the manifest, the mark that it is complete and the turn that
waits for it. A reader sees only complete segments; a crash in between leaves rows that ``sweep`` takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
import sqlalchemy as sa

from kvloom_proto import codecs, limits
from kvloom_proto.records import (
    ITEM_BYTES,
    STORED_BY_ROW,
    ChunkSpec,
    LayerKind,
    Layers,
    LayerSpec,
    Manifest,
    Provenance,
    Schedule,
    covered,
    expand,
    pack,
    read_provenance,
)
from kvloom_store import checksum, codec, trie
from kvloom_store.checksum import checked, digest, insert, update
from kvloom_store.codec import Buffer
from kvloom_store.database import Database, allocate, now_us
from kvloom_store.errors import StateDropped
from kvloom_store.rows import Captured
from kvloom_store.schema import PLACE, chunk, provenance, segment, turn_state

TRANSACTION_BYTES = 4 << 20
"""State written in one transaction: what a turn that commits meanwhile has to wait for."""

ABANDONED_US = 3_600_000_000
"""An incomplete segment older than this was left by a process that died."""


CODED, DERIVED = 1, 2
"""What makes a segment lossy: its rows were stored with loss; it was computed on rows that were not exact."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A segment about to be stored: rows [start, end) on top of ``base_segment``; the last token is in ``node``.

    ``keyframes`` are the positions (start and end may be among them) at which state that is overwritten is stored.
    ``lossy``: the rows were computed on others that are not exact.
    """

    node: int
    start: int
    end: int
    base_segment: int | None
    layers: tuple[LayerSpec, ...]
    schedule: Schedule
    provenance: int
    keyframes: tuple[int, ...] = ()
    lossy: bool = False


def add_provenance(conn: sa.Connection, record: Provenance) -> int:
    """The row of a provenance, added if it is new."""
    packed = pack(record)
    key = digest(packed)
    row = conn.execute(sa.select(provenance).where(provenance.c.digest == key)).one_or_none()
    if row is not None:
        return int(checked(provenance, row, digest=key)["id"])
    new = allocate(conn, provenance)
    insert(conn, provenance, {"id": new, "digest": key, "record": packed})
    return new


def provenance_of(conn: sa.Connection, provenance_id: int) -> Provenance:
    """A stored provenance."""
    row = conn.execute(sa.select(provenance).where(provenance.c.id == provenance_id)).one()
    return read_provenance(checked(provenance, row)["record"])


def is_lossy(conn: sa.Connection, row: int) -> bool:
    """Whether some rows of a segment, or of those it stands on, are not exact."""
    columns = segment.c.id, segment.c.base_segment, segment.c.lossy
    up = sa.select(*columns).where(segment.c.id == row).cte("up", recursive=True)
    up = up.union(sa.select(*columns).where(segment.c.id == up.c.base_segment))  # a damaged one stands on itself
    return bool(conn.execute(sa.select(sa.func.max(up.c.lossy))).scalar_one())


def cut(layers: tuple[LayerSpec, ...], start: int, end: int, keyframes: Sequence[int] = ()) -> Iterator[ChunkSpec]:
    """How rows [start, end) and keyframes are cut into chunks: at multiples of so many tokens, and by runs of layers.

    So many are CHUNK_TOKENS, and WINDOW_CHUNK_TOKENS for all rows of a model that has windows: it needs so few of them
    that the rest of a chunk counts, in its global layers too, at every point where a branch left its path.
    As many layers of a kind share a chunk as fit CHUNK_BYTES: a short turn of a whole model is one row of the table.
    Codec and digests are still empty.
    """
    expanded = expand(layers)
    windows = any(spec.kind == LayerKind.WINDOW for spec in layers)
    width = limits.WINDOW_CHUNK_TOKENS if windows else limits.CHUNK_TOKENS
    for kind in STORED_BY_ROW:
        if any(spec.kind == kind for spec in layers):
            for position in range(start - start % width, end, width):
                first, last = max(start, position), min(end, position + width)
                yield from _runs(expanded, kind, first, last - first)
    for position in keyframes:
        yield from _runs(expanded, LayerKind.KEYFRAME, position, 0)


def _runs(layers: Layers, kind: LayerKind, position: int, tokens: int) -> Iterator[ChunkSpec]:
    run: list[int] = []
    size = 0
    for number in [*(n for n, spec in enumerate(layers) if spec.kind == kind), None]:
        more = _bytes_of(layers[number], position, tokens) if number is not None else 0
        if run and (number is None or size + more > limits.CHUNK_BYTES):
            yield ChunkSpec(kind, position, tokens, run[0], run[-1] - run[0] + 1, codecs.RAW, size, size, b"", b"")
            run, size = [], 0
        if number is not None:
            run.append(number)
            size += more


def _bytes_of(spec: LayerSpec, position: int, tokens: int) -> int:
    """What some tokens add to a layer; what all of its state is, where it is overwritten in place."""
    rows = 1 if spec.kind == LayerKind.KEYFRAME else spec.rows_between(position, position + tokens)
    return spec.row_bytes * rows


def gather(source: Captured, layers: Layers, spec: ChunkSpec) -> bytes:
    """The raw bytes of a chunk: layer after layer, tensor after tensor, each contiguous."""
    numbers = covered(layers, spec)
    if spec.kind == LayerKind.KEYFRAME:
        return b"".join(array.tobytes() for number in numbers for array in source.frames[spec.position][number])
    block = source.rows.block(numbers, spec.position, spec.position + spec.tokens)
    if block is not None:
        return block.tobytes()
    parts = [
        np.ascontiguousarray(source.rows.rows(number, tensor, spec.position, spec.position + spec.tokens)).tobytes()
        for number in numbers
        for tensor in range(len(layers[number].tensors))
    ]
    return b"".join(parts)


def write(
    database: Database,
    source: Captured,
    draft: Draft,
    *,
    codec_name: str,
    finish: Callable[[sa.Connection, int], None],
) -> int:
    """Store a segment, unless one of equal content is there on the same base; its row id.

    ``finish(conn, segment)`` runs in the last transaction, so that whoever waits for the segment is linked to it
    in the moment it becomes visible. Memory: one chunk at a time.

    Raises:
        StateDropped: the segment it stands on is not there any more.
    """
    layers = expand(draft.layers)
    planned = plan(source, draft)
    content = content_digest(draft, planned)
    with database.read() as conn:  # a turn may end in another node than its state does
        draft = replace(draft, node=trie.just_before(conn, draft.node, draft.end).node)
    with database.write(background=True) as conn:
        same = _find_same(conn, draft, content)
        if same is not None:
            finish(conn, same)
            return same
        if draft.base_segment is not None and missing(conn, [draft.base_segment]):
            raise StateDropped(draft.base_segment)
        new = _insert_incomplete(conn, draft, content)
    done = []
    for batch in batches(planned):
        packed = [encoded(gather(source, layers, spec), layers, spec, codec_name) for spec in batch]
        with database.write(background=True) as conn:
            conn.execute(chunk.insert(), [chunk_row(new, spec, stored) for spec, stored in packed])
        done += [spec for spec, _ in packed]
    manifest = Manifest(draft.start, draft.end, limits.CHUNK_TOKENS, draft.layers, tuple(done))
    with database.write(background=True) as conn:
        same = _find_same(conn, draft, content)  # another process may have stored it meanwhile
        if same is not None:
            delete(conn, [new])
            finish(conn, same)
            return same
        row = conn.execute(sa.select(segment).where(segment.c.id == new)).one()
        update(
            conn,
            segment,
            checked(segment, row),
            manifest=pack(manifest),
            raw_bytes=manifest.raw_bytes,
            stored_bytes=manifest.stored_bytes,
            complete=1,
        )
        finish(conn, new)
    return new


def plan(source: Captured, draft: Draft) -> list[ChunkSpec]:
    """The chunks a segment will be cut into, with the digests of their raw bytes."""
    layers = expand(draft.layers)
    return [
        replace(spec, raw_digest=digest(gather(source, layers, spec)))
        for spec in cut(draft.layers, draft.start, draft.end, draft.keyframes)
    ]


def encoded(raw: Buffer, layers: Layers, spec: ChunkSpec, codec_name: str) -> tuple[ChunkSpec, bytes]:
    """A chunk as it is stored: its spec, and its bytes."""
    name, stored = codec.encode(raw, item_bytes(layers, spec), codec_name)
    return replace(spec, codec=name, stored_length=len(stored), stored_digest=digest(stored)), stored


def chunk_row(segment_id: int, spec: ChunkSpec, stored: bytes) -> dict[str, Any]:
    """The sealed row of a chunk."""
    row = {
        "segment": segment_id,
        "kind": int(spec.kind),
        "layer": spec.layer,
        "position": spec.position,
        "place": PLACE,
        "length": len(stored),
        "blob": spec.stored_digest,
    }
    return {**row, "blob": stored, "checksum": checksum.row_checksum(chunk, row)}


def item_bytes(layers: Layers, spec: ChunkSpec) -> int:
    """Bytes of one element of a chunk."""
    sizes = {ITEM_BYTES[tensor.dtype] for number in covered(layers, spec) for tensor in layers[number].tensors}
    return sizes.pop() if len(sizes) == 1 else 1  # mixed element sizes: one plane


def content_digest(draft: Draft, plan: list[ChunkSpec]) -> bytes:
    """Equal for segments whose rows have equal bits, however they are stored or were computed."""
    shapes = [
        [spec.index, spec.count, spec.kind, [[t.name, t.dtype, t.shape, t.token_axis] for t in spec.tensors]]
        for spec in draft.layers
    ]
    chunks = [[c.kind, c.position, c.tokens, c.layer, c.layers, c.raw_digest] for c in plan]
    return digest(msgpack.packb([draft.start, draft.end, shapes, chunks]))


def _find_same(conn: sa.Connection, draft: Draft, content: bytes) -> int | None:
    rows = conn.execute(
        sa.select(segment)
        .where(
            segment.c.node == draft.node,
            segment.c.digest == content,
            segment.c.complete == 1,
            segment.c.lossy.in_([0, DERIVED]),  # not where the digest is that of rows which are gone
            segment.c.base_segment == draft.base_segment
            if draft.base_segment is not None
            else segment.c.base_segment.is_(None),
        )
        .order_by(segment.c.id)
    )
    return next((int(checked(segment, row)["id"]) for row in rows), None)


def _insert_incomplete(conn: sa.Connection, draft: Draft, content: bytes) -> int:
    new = allocate(conn, segment)
    values = {
        "id": new,
        "node": draft.node,
        "start": draft.start,
        "end": draft.end,
        "base_segment": draft.base_segment,
        "digest": content,
        "schedule": pack(draft.schedule),
        "provenance": draft.provenance,
        "manifest": b"",
        "raw_bytes": 0,
        "stored_bytes": 0,
        "complete": 0,
        "created": now_us(),
        "lossy": DERIVED if draft.lossy else 0,
        "merged": 0,
    }
    insert(conn, segment, values)
    return new


def batches(plan: Sequence[ChunkSpec]) -> Iterator[list[ChunkSpec]]:
    """Chunks for one transaction each."""
    batch: list[ChunkSpec] = []
    # By kind, layer, then position: the order in which a restore reads them, and so the order in the file.
    for spec in sorted(plan, key=lambda spec: (spec.kind, spec.layer, spec.position)):
        if batch and sum(s.raw_length for s in batch) + spec.raw_length > TRANSACTION_BYTES:
            yield batch
            batch = []
        batch.append(spec)
    if batch:
        yield batch


def adopt(conn: sa.Connection, draft: Draft, manifest: Manifest) -> tuple[int, bool]:
    """Put down the row of a segment whose chunks are made elsewhere and follow in this very transaction; one of equal
    content is taken instead. Its row id, and whether it is new."""
    order = {kind: place for place, kind in enumerate((*STORED_BY_ROW, LayerKind.KEYFRAME))}
    as_cut = sorted(manifest.chunks, key=lambda spec: (order[spec.kind], spec.position, spec.layer))
    content = content_digest(draft, as_cut)
    same = _find_same(conn, draft, content)
    if same is not None:
        return same, False
    new = _insert_incomplete(conn, draft, content)
    row = conn.execute(sa.select(segment).where(segment.c.id == new)).one()
    sizes = {"raw_bytes": manifest.raw_bytes, "stored_bytes": manifest.stored_bytes}
    update(conn, segment, checked(segment, row), manifest=pack(manifest), complete=1, **sizes)
    return new, True


def add_chunk(conn: sa.Connection, segment_id: int, spec: ChunkSpec, stored: bytes) -> None:
    """A chunk of a segment."""
    conn.execute(chunk.insert(), chunk_row(segment_id, spec, stored))


def delete(conn: sa.Connection, ids: list[int]) -> None:
    """Take segments and their chunks away (whoever calls has made sure that nothing stands on them)."""
    conn.execute(chunk.delete().where(chunk.c.segment.in_(ids)))
    conn.execute(segment.delete().where(segment.c.id.in_(ids)))


def missing(conn: sa.Connection, ids: Sequence[int]) -> set[int]:
    """Which of some segments are not there (any more)."""
    there = conn.execute(sa.select(segment.c.id).where(segment.c.id.in_(ids))).scalars()
    return set(ids) - set(there)


def sweep(conn: sa.Connection) -> None:
    """Take away what a process that died while writing state has left.

    What something names was whole once, and was marked by healing: it stays until nothing does.
    """
    incomplete = segment.c.complete == sa.literal_column("0")  # spelled out: as a parameter it would not find its index
    stale = sa.select(segment.c.id).where(incomplete, segment.c.created < now_us() - ABANDONED_US)
    ids = list(conn.execute(stale).scalars())
    if ids:
        names = (turn_state.c.segment, turn_state.c.base_segment, segment.c.base_segment)
        named = {row for name in names for row in conn.execute(sa.select(name).where(name.in_(ids))).scalars()}
        delete(conn, [each for each in ids if each not in named])
