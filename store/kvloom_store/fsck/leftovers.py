"""What nothing refers to any more, or was put away: notes, no errors."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from kvloom_store.database import now_us
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.reading import Key, Reader, finding, key_of
from kvloom_store.schema import chunk, node, provenance, quarantine, segment, turn_state
from kvloom_store.segments import ABANDONED_US


def orphans(reader: Reader) -> Iterator[Finding]:
    """Segments, chunks, edges and provenances that nothing refers to."""
    if reader.torn or any(reader.damaged.get(each.name) for each in (segment, node, turn_state)):
        return  # whoever referred to them may be what is damaged
    for table, key, words in _orphans(reader):
        yield finding(Kind.ORPHAN, Severity.NOTE, table, key, None, words)


def _orphans(reader: Reader) -> Iterator[tuple[sa.Table, Key, str]]:
    above = segment.alias()
    used = (
        sa.exists().where(turn_state.c.segment == segment.c.id),
        sa.exists().where(turn_state.c.base_segment == segment.c.id),
        sa.exists().where(above.c.base_segment == segment.c.id),
    )
    free = sa.select(segment.c.id, segment.c.start, segment.c.end, segment.c.complete, segment.c.created)
    for row, start, end, complete, created in reader.ask(free.where(~sa.or_(*used)).order_by(segment.c.id)):
        if complete:
            words = f"segment {row} (tokens {start} to {end}) holds state of no turn; it is found by its tokens"
            yield segment, (row,), words
        elif created < now_us() - ABANDONED_US:
            yield segment, (row,), f"segment {row} was begun, or given up, and is not read by anybody"
    keys = list(chunk.primary_key.columns)
    stray = sa.select(*keys).where(~sa.exists().where(segment.c.id == chunk.c.segment))
    for each in reader.ask(stray):
        key = key_of(chunk, dict(each._mapping))
        yield chunk, key, f"chunk {key} belongs to no segment"
    child = node.alias()
    ends = (
        sa.exists().where(child.c.parent == node.c.id),
        sa.exists().where(turn_state.c.node == node.c.id),
        sa.exists().where(segment.c.node == node.c.id),
    )
    for (row,) in reader.ask(sa.select(node.c.id).where(node.c.parent.is_not(None), ~sa.or_(*ends))):
        yield node, (row,), f"edge {row} of the trie leads to no turn"
    users = (
        sa.exists().where(segment.c.provenance == provenance.c.id),
        sa.exists().where(turn_state.c.provenance == provenance.c.id),
    )
    for (row,) in reader.ask(sa.select(provenance.c.id).where(~sa.or_(*users))):
        yield provenance, (row,), f"provenance {row} is that of no state"


def put_away(reader: Reader) -> Iterator[Finding]:
    """What earlier repairs took out of use."""
    if quarantine.name in reader.torn:
        return
    query = sa.select(quarantine.c.of, sa.func.count()).group_by(quarantine.c.of).order_by(quarantine.c.of)
    for name, count in reader.ask(query):
        words = f"{count} damaged or dependent rows of {name} were set aside by an earlier repair"
        yield finding(Kind.SET_ASIDE, Severity.NOTE, quarantine, None, None, words)
