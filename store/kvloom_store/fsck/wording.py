"""The full-text index against the turns: derived data, which is built again where it differs."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from kvloom_store import fulltext, turns
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.reading import Reader, finding
from kvloom_store.schema import turn


def index(reader: Reader) -> Iterator[Finding]:
    """Whether the index holds the words of every turn, and no others."""
    try:
        there = fulltext.exists(reader.conn)
    except DBAPIError:
        return
    if not there:
        words = "there is no full-text index; the next search builds it"
        yield finding(Kind.INDEX, Severity.NOTE, fulltext.TABLE, None, None, words)
        return
    if reader.damaged.get("turn") or "turn" in reader.torn:
        return  # what they said is not known: it is built anew once they are mended or set aside
    wrong = fulltext.difference(reader.conn, _texts(reader))
    if wrong is not None:
        words = f"the full-text index does not fit the turns ({wrong}): searches may miss some; it is built anew"
        yield finding(Kind.INDEX, Severity.HEALS, fulltext.TABLE, None, None, words)


def _texts(reader: Reader) -> Iterator[tuple[int, str]]:
    for (row,) in reader.ask(sa.select(turn.c.id).order_by(turn.c.id)):
        try:
            yield row, turns.get(reader.conn, row).text
        except CorruptRow:
            continue
