"""Mending stored state with recomputed rows, where they are the very bits that were stored."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.errors import FormatError
from kvloom_proto.records import Manifest, expand, pack, read_manifest
from kvloom_store import checksum, codec, segments, trie
from kvloom_store.checksum import checked, digest, update
from kvloom_store.database import Database, now_us
from kvloom_store.errors import CorruptRow
from kvloom_store.rows import Captured
from kvloom_store.schema import chunk, segment


def heal(database: Database, source: Captured, segment_id: int, draft: segments.Draft, *, codec_name: str) -> bool:
    """Put recomputed rows in place of damaged chunks, if they are the very bits that were stored.

    ``draft`` is what was recomputed. If the segment's own row is damaged, it is written anew, under its old number:
    others stand on it. True if the segment is whole again. False if the rows came out with other bits (another
    processor or build), or on another base: it is then marked incomplete, and nobody reads it any more.
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
        if values["base_segment"] != draft.base_segment:  # what it stood on could not be mended
            update(conn, segment, values, complete=0)
            return False
        layers = expand(manifest.layers)
        if set(manifest.keyframes) - set(source.frames):  # kept at another spacing
            update(conn, segment, values, complete=0)
            return False
        for spec in manifest.chunks:
            raw = segments.gather(source, layers, spec)
            if digest(raw) != spec.raw_digest:
                update(conn, segment, values, complete=0)
                return False
            _, stored = codec.encode(raw, segments.item_bytes(layers, spec), spec.codec)
            if digest(stored) != spec.stored_digest:  # another version of the compressor packs otherwise
                update(conn, segment, values, complete=0)
                return False
            row_now = segments.chunk_row(segment_id, spec, stored)
            key = [c == row_now[c.name] for c in chunk.primary_key.columns]
            conn.execute(chunk.delete().where(*key))
            conn.execute(chunk.insert(), row_now)
    return True


def _rewrite(
    conn: sa.Connection, source: Captured, segment_id: int, draft: segments.Draft, content: bytes, codec_name: str
) -> None:
    """Put a segment's row and chunks down again; whatever was there of them goes."""
    layers = expand(draft.layers)
    conn.execute(chunk.delete().where(chunk.c.segment == segment_id))
    done = []
    for spec in segments.plan(source, draft):
        name, stored = codec.encode(
            segments.gather(source, layers, spec), segments.item_bytes(layers, spec), codec_name
        )
        spec = replace(spec, codec=name, stored_length=len(stored), stored_digest=digest(stored))
        conn.execute(chunk.insert(), segments.chunk_row(segment_id, spec, stored))
        done.append(spec)
    manifest = Manifest(draft.start, draft.end, limits.CHUNK_TOKENS, draft.layers, tuple(done))
    values = {
        "id": segment_id,
        "node": trie.node_before(conn, draft.node, draft.end),
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
    }
    conn.execute(segment.update().where(segment.c.id == segment_id).values(**checksum.sealed(segment, values)))
