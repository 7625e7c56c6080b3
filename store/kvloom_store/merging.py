"""Small segments of a path that were written one by one, put down again as one: a restore is sooner by it.

What is merged is written a second time, so a path does so with half of its bytes at most. Bits, keyframes and recorded
passes stay as they are. Who reads sees the small segments or the large one: the transaction that completes this one
takes the others away, and has everything stand on it that stood on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from kvloom_proto.codecs import LOSSLESS
from kvloom_proto.records import LayerSpec, Schedule
from kvloom_store import loading, quota, restore, segments
from kvloom_store.checksum import checked, update
from kvloom_store.database import Database
from kvloom_store.errors import RemovedMeanwhile
from kvloom_store.gathered import FEW_SEGMENTS, MOST_TOKENS, SMALL_TOKENS
from kvloom_store.planner import Keyframe, Link, Read
from kvloom_store.rows import Captured, RowBuffer, Rows, RowSink
from kvloom_store.schema import journal, segment, turn_state

LEAST_TOKENS = MOST_TOKENS - SMALL_TOKENS
"""A run of small segments is merged when it has so many tokens: what is merged is not small, and never merged again."""

REWRITTEN = 0.5
"""Bytes of a path that may be written again, as a part of all its bytes."""


def merge_small(database: Database, tip: int, *, most_bytes: int) -> int:
    """Merge runs of small segments on the path to a segment, those first that begin it, ``most_bytes`` at most;
    the bytes written.

    Raises:
        StateDamaged: what was to be merged is not what was written; it stays as it is.
        RemovedMeanwhile: another process has taken some of it away, or was first.
        StoreUnavailable, StoreLocked: nothing is lost.
    """
    written = 0
    while run := _next(database, tip):
        size = sum(link.manifest.raw_bytes for link in run)
        if written + size > most_bytes:
            break
        made = _merge(database, run)
        tip = made if tip == run[-1].id else tip
        written += size
    return written


def now_in(conn: sa.Connection, row: int, state: int) -> int:
    """The segment that holds what ``row`` did, which a turn's state is in, if that was merged with others; else
    ``row``."""
    if not segments.missing(conn, [row]):
        return row
    query = sa.select(segment.c.id).join(turn_state, turn_state.c.segment == segment.c.id)
    found = conn.execute(query.where(turn_state.c.id == state, segment.c.merged > 0)).scalar_one_or_none()
    return row if found is None else int(found)


def _next(database: Database, tip: int) -> list[Link]:
    """The first run of a path that may be merged, as far as the path's bytes allow it; nothing if there is none."""
    with database.read() as conn:
        links = restore.chain(conn, tip)
        if sum(_is_small(link) for link in links) < 2 * FEW_SEGMENTS:
            return []
        query = sa.select(segment.c.id, segment.c.raw_bytes, segment.c.merged).where(
            segment.c.id.in_([link.id for link in links])
        )
        sizes = {row.id: (row.raw_bytes, row.merged) for row in conn.execute(query)}
        left = sum(raw for raw, _ in sizes.values()) * REWRITTEN - sum(merged for _, merged in sizes.values())
        fitting = (run for run in _together(links) if sum(sizes[link.id][0] for link in run) <= left)
        return next((run for run in fitting if not _shared(conn, run)), [])


def _is_small(link: Link) -> bool:
    return link.end - link.start < SMALL_TOKENS and not link.lossy


def _together(links: Sequence[Link]) -> Iterator[list[Link]]:
    """Runs of small segments, each on the end of the one before, of as many tokens as one should have."""
    run: list[Link] = []
    for link in [*links, None]:
        goes_on = link is not None and _is_small(link) and (not run or _follows(link, run[-1]))
        if run and (link is None or not goes_on or link.end - run[0].start > MOST_TOKENS):
            if len(run) > 1 and run[-1].end - run[0].start >= LEAST_TOKENS:
                yield run
            run = []
        if link is not None and _is_small(link):
            run.append(link)


def _follows(link: Link, before: Link) -> bool:
    known = not link.schedule.unknown and not before.schedule.unknown
    alike = (link.provenance, link.manifest.layers) == (before.provenance, before.manifest.layers)
    return known and alike and link.start == before.end


def _shared(conn: sa.Connection, run: Sequence[Link]) -> bool:
    """Whether another path stands on a part of it: that part could not be dropped by itself any more."""
    inner = [link.id for link in run[:-1]]
    return len(conn.execute(sa.select(segment.c.id).where(segment.c.base_segment.in_(inner))).all()) > len(inner)


def _merge(database: Database, run: Sequence[Link]) -> int:
    """Put a run down as one segment; its row id."""
    first, last, layers = run[0], run[-1], run[0].manifest.layers
    source = _read(database, run)
    passes = tuple(each for link in run for each in link.schedule.passes)
    frames = tuple(sorted(source.frames))
    draft = segments.Draft(
        last.node, first.start, last.end, first.base_segment, layers, Schedule(passes), first.provenance, frames
    )
    with database.read() as conn:
        quota.check_disk(conn, database.path, sum(link.manifest.raw_bytes for link in run))
    return segments.write(
        database, source, draft, codec_name=_codec(run), finish=lambda conn, made: _take_over(conn, run, made)
    )


def _read(database: Database, run: Sequence[Link]) -> Captured:
    """The rows of a run, and its keyframes, checked."""
    layers = run[0].manifest.layers
    # Rows of blocks of tokens are counted from the first token on: the buffer begins with a whole block of each.
    whole = math.lcm(*(spec.block for spec in layers if spec.block))
    begins = run[0].start // whole * whole
    buffer = _Part(RowBuffer(layers, run[-1].end - begins), layers, begins)
    reads = [Read(link.id, link.start, link.end) for link in run]
    with database.read() as conn:
        loading.load(conn, run, reads, reads, buffer)
        frames = {
            position: restore.load_keyframe(conn, run, Keyframe(link.id, position))[0]
            for link in run
            for position in link.manifest.keyframes
        }
    return Captured(buffer, frames)


@dataclass(frozen=True, eq=False)
class _Part(RowSink):
    """A buffer for the rows behind position ``begins`` alone."""

    buffer: RowBuffer = field(repr=False)
    layers: tuple[LayerSpec, ...]
    begins: int

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        return self.buffer.rows(layer, tensor, start - self.begins, end - self.begins)

    def block(self, layers: Sequence[int], start: int, end: int) -> Rows | None:
        return self.buffer.block(layers, start - self.begins, end - self.begins)


def _codec(run: Sequence[Link]) -> str:
    """The codec that most of it is stored with."""
    used = [chunk.codec for link in run for chunk in link.manifest.chunks]
    return max(LOSSLESS, key=used.count)


def _take_over(conn: sa.Connection, run: Sequence[Link], made: int) -> None:
    """Put the segment in the place of those it was made from, in the transaction in which it becomes complete.

    Raises:
        RemovedMeanwhile: they are not what they were any more.
    """
    ids = [link.id for link in run]
    rows = {row.id: checked(segment, row) for row in conn.execute(sa.select(segment).where(segment.c.id.in_(ids)))}
    standing = [rows[each]["base_segment"] for each in ids if each in rows and rows[each]["complete"]]
    if standing != [run[0].base_segment, *ids[:-1]] or _shared(conn, run):
        raise RemovedMeanwhile
    for table, column in (
        (segment, segment.c.base_segment),
        (turn_state, turn_state.c.segment),
        (turn_state, turn_state.c.base_segment),
        (journal, journal.c.base_segment),
    ):
        for row in conn.execute(sa.select(table).where(column.in_(ids))).all():
            if table is not segment or row.id not in ids:
                update(conn, table, checked(table, row), **{column.name: made})
    segments.delete(conn, ids[::-1])
    values = checked(segment, conn.execute(sa.select(segment).where(segment.c.id == made)).one())
    update(conn, segment, values, merged=values["raw_bytes"])
