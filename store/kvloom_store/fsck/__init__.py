"""Checking a store: everything that SCHEMA.md says holds is looked at, and nothing is changed.

A check never stops at the first thing that is wrong. What SQLite cannot read is left out and told of, and what is
damaged is believed in nothing else it says, so that one damaged row is one finding. ``repair`` plans and does what can
be done without a model.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvloom_store.database import Database
from kvloom_store.fsck import conversations, leftovers, paths, rows, segments, wording
from kvloom_store.fsck.findings import Finding, Kind, Report, Severity
from kvloom_store.fsck.reading import Progress, Reader

__all__ = ["Finding", "Kind", "Progress", "Report", "Severity", "check"]


def check(database: Database, *, blobs: bool = True, progress: Progress | None = None) -> Report:
    """Look at everything in a store, in one snapshot of it; nothing is written.

    Without ``blobs`` stored state is not read: its rows are held against the digests that the manifests have, and
    SQLite's indexes are left out. ``progress`` is told the bytes of state that were read, and those there are.

    Raises:
        StoreUnavailable, StoreLocked: the file cannot be read at all.
    """
    with database.read() as conn:
        reader = Reader(conn)
        found = tuple(_findings(reader, blobs, progress))
        conn.rollback()  # SQLite looks at a damaged index once more to commit, and refuses
    return Report(found, reader.rows, reader.bytes)


def _findings(reader: Reader, blobs: bool, progress: Progress | None) -> Iterator[Finding]:
    yield from rows.missing_tables(reader)
    yield from rows.pages(reader, quick=not blobs)
    yield from rows.tables(reader)
    yield from rows.chunks(reader, blobs=blobs, progress=progress)
    yield from conversations.values(reader)
    yield from conversations.turns(reader)
    yield from conversations.pointers(reader)
    yield from conversations.numbers(reader)
    yield from paths.nodes(reader)
    yield from paths.states(reader)
    yield from segments.segments(reader)
    yield from wording.index(reader)
    yield from leftovers.orphans(reader)
    yield from leftovers.put_away(reader)
