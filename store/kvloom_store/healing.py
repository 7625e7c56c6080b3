"""Mending stored state with recomputed rows, where they are the very bits that were stored."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.errors import FormatError
from kvloom_proto.records import Manifest, expand, pack, read_manifest
from kvloom_store import checksum, segments, trie
from kvloom_store.checksum import checked, digest, update
from kvloom_store.database import Database, now_us
from kvloom_store.errors import CorruptRow
from kvloom_store.rows import Captured
from kvloom_store.schema import chunk, segment


def heal(database: Database, source: Captured, segment_id: int, draft: segments.Draft, *, codec_name: str) -> bool:
    """Put recomputed rows in place of damaged chunks, if they are the very bits that were stored.

    ``draft`` is what was recomputed. If the segment's own row is damaged, it is written anew, under its old number:
    others stand on it. True if the segment is whole again. False if the rows came out with other bits (another
    processor or build), or on another base while its own is still there: it is then marked incomplete, and nobody
    reads it any more.
    """
    with database.write() as conn:
        row = conn.execute(sa.select(segment).where(segment.c.id == segment_id)).one_or_none()
        if row is None:  # it was dropped meanwhile
            return False
        try:
            values = checked(segment, row)
            manifest = read_manifest(values["manifest"])
        except (CorruptRow, FormatError):
            if row.digest == segments.content_digest(draft, segments.plan(source, draft)):
                _rewrite(conn, source, segment_id, draft, row.digest, codec_name)
                return True
            conn.execute(segment.update().where(segment.c.id == segment_id).values(complete=0))
            return False
        if (values["start"], values["end"]) != (draft.start, draft.end):  # several turns' state, of which this is one's
            update(conn, segment, values, complete=0)
            return False
        if values["base_segment"] != draft.base_segment and _is_there(conn, values["base_segment"]):
            update(conn, segment, values, complete=0)
            return False
        if (
            values["lossy"] & segments.CODED
        ):  # its chunks are those of other rows: the digest is still of the exact ones
            if row.digest == segments.content_digest(draft, segments.plan(source, draft)):
                _rewrite(conn, source, segment_id, draft, row.digest, codec_name)
                return True
            update(conn, segment, values, complete=0)
            return False
        layers, whole = expand(manifest.layers), []
        if set(manifest.keyframes) - set(source.frames):  # kept at another spacing
            update(conn, segment, values, complete=0)
            return False
        for spec in manifest.chunks:
            raw = segments.gather(source, layers, spec)
            if digest(raw) != spec.raw_digest:
                update(conn, segment, values, complete=0)
                return False
            spec, stored = segments.encoded(raw, layers, spec, spec.codec)
            whole.append(spec)
            row_now = segments.chunk_row(segment_id, spec, stored)
            key = [c == row_now[c.name] for c in chunk.primary_key.columns]
            conn.execute(chunk.delete().where(*key))
            conn.execute(chunk.insert(), row_now)
        named = {(int(spec.kind), spec.layer, spec.position) for spec in manifest.chunks}
        keys = (chunk.c.kind, chunk.c.layer, chunk.c.position)
        for key_there in conn.execute(sa.select(*keys).where(chunk.c.segment == segment_id)).all():
            if tuple(key_there) not in named:  # a damaged row may say that it is another one
                stray = [column == cell for column, cell in zip(keys, key_there, strict=True)]
                conn.execute(chunk.delete().where(chunk.c.segment == segment_id, *stray))
        # Another version of a compressor may have packed otherwise, and what it stood on may have been stored anew: on
        # that the bits are the same.
        packed = pack(replace(manifest, chunks=tuple(whole)))
        sizes = {"stored_bytes": sum(spec.stored_length for spec in whole)}
        update(conn, segment, values, base_segment=draft.base_segment, manifest=packed, **sizes)
    return True


def give_up(database: Database, segment_id: int) -> None:
    """Mark a segment so that nobody reads it any more; its turns know how their parts of it were computed."""
    with database.write() as conn:
        row = conn.execute(sa.select(segment).where(segment.c.id == segment_id)).one_or_none()
        if row is not None:
            update(conn, segment, checked(segment, row), complete=0)


def _is_there(conn: sa.Connection, base: int | None) -> bool:
    """Whether what a segment stood on (None: nothing) can still be read."""
    if base is None:
        return True
    row = conn.execute(sa.select(segment).where(segment.c.id == base)).one_or_none()
    try:
        return row is not None and bool(checked(segment, row)["complete"])
    except CorruptRow:
        return False


def _rewrite(
    conn: sa.Connection, source: Captured, segment_id: int, draft: segments.Draft, content: bytes, codec_name: str
) -> None:
    """Put a segment's row and chunks down again; whatever was there of them goes."""
    layers = expand(draft.layers)
    conn.execute(chunk.delete().where(chunk.c.segment == segment_id))
    done = []
    for spec in segments.plan(source, draft):
        spec, stored = segments.encoded(segments.gather(source, layers, spec), layers, spec, codec_name)
        conn.execute(chunk.insert(), segments.chunk_row(segment_id, spec, stored))
        done.append(spec)
    manifest = Manifest(draft.start, draft.end, limits.CHUNK_TOKENS, draft.layers, tuple(done))
    values = {
        "id": segment_id,
        "node": trie.just_before(conn, draft.node, draft.end).node,
        "start": draft.start,
        "end": draft.end,
        "base_segment": draft.base_segment,
        "digest": content,
        "schedule": pack(draft.schedule),
        "provenance": draft.provenance,
        "manifest": pack(manifest),
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "complete": 1,
        "created": now_us(),
        "lossy": segments.DERIVED if draft.lossy else 0,
        "merged": 0,  # what it was is lost: its path may be merged a little more than others
    }
    conn.execute(segment.update().where(segment.c.id == segment_id).values(**checksum.sealed(segment, values)))
