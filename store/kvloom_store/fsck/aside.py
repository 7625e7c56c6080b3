"""Setting rows aside: what cannot be mended is taken out of use with all that stands on it, and kept as it was found.

The rest of the store is whole again then: no name points at what is gone, and listing meets no damage. State that
stood on a row is no loss, it is a cache; text is kept in the table ``quarantine``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store import scan
from kvloom_store.checksum import insert, row_checksum
from kvloom_store.database import allocate, now_us
from kvloom_store.fsck.reading import CACHE_OF_STATE, RELEASED, is_intact
from kvloom_store.names import MAIN
from kvloom_store.schema import branch, metadata, quarantine, session, tag, turn

_Row = tuple[sa.Table, int, str]
"""A row by SQLite's own number of it, and why it is taken out of use."""

RECOVERED = "recovered"
"""How a branch is called whose row could not be read."""


def set_aside(conn: sa.Connection, table: sa.Table, rowid: int, why: str) -> int:
    """Take a row out of use, and what stands on it (inside a write transaction); how many rows that were.

    ``rowid`` is SQLite's own number of it: what the row says may be what is damaged.
    """
    values = scan.row_at(conn, table, rowid)
    if values is None:
        return 0
    above = values["parent"] if table is turn else None
    # A turn's parent is older: else it is what is wrong, and may go itself.
    removal = _Removal(conn, above if isinstance(above, int) and above < rowid else None)
    removal.remove(table, rowid, why)
    if table is branch:
        _recover(conn, values)
    return removal.count


class _Removal:
    """A row and all that names it, taken away from the tips down: foreign keys are checked row by row."""

    def __init__(self, conn: sa.Connection, above: int | None) -> None:
        self._conn = conn
        self._above = above  # where branches go whose turn is taken away
        self._begun: set[tuple[str, int]] = set()  # rows that name each other in a circle are met again
        self.count = 0

    def remove(self, table: sa.Table, rowid: int, why: str) -> None:
        """Take a row away, after all that names it; a conversation may be longer than Python's stack is deep."""
        open_rows = [self._taken(table, rowid, why)]
        while open_rows:
            first = next(open_rows[-1], None)
            if first is None:
                open_rows.pop()
            else:
                open_rows.append(self._taken(*first))

    def _taken(self, table: sa.Table, rowid: int, why: str) -> Iterator[_Row]:
        """Take one row away; given are those that must go first. What was said is kept as it was found."""
        values = scan.row_at(self._conn, table, rowid)
        if values is None or (table.name, rowid) in self._begun:
            return
        self._begun.add((table.name, rowid))
        row: Any = values.get("id")
        for child, column in _naming(table) if row is not None else ():
            for number in scan.rowids(self._conn, child, column, row):
                if not self._let_go(child, column, number):
                    yield child, number, f"it stood on {table.name} {row}"
        if table.name not in CACHE_OF_STATE:
            self._keep(table, values, why)
        scan.delete_at(self._conn, table, rowid)
        self.count += 1

    def _let_go(self, child: sa.Table, column: str, rowid: int) -> bool:
        """Have a row name something else, or nothing; False if it must go itself."""
        values = scan.row_at(self._conn, child, rowid)
        if values is None:
            return True
        if child is branch and column == "turn":
            _put(self._conn, child, rowid, values, turn=_at_or_above(self._conn, values, self._above))
        elif (child.name, column) in RELEASED:
            _put(self._conn, child, rowid, values, **{column: None})
        elif (child.name, rowid) in self._begun:
            scan.put_at(self._conn, child, rowid, {column: None})
        else:
            return False
        return True

    def _keep(self, table: sa.Table, values: dict[str, Any], why: str) -> None:
        kept = {
            "id": allocate(self._conn, quarantine),
            "of": table.name,
            "cells": msgpack.packb(values),
            "why": msgpack.packb(why),
            "created": now_us(),
        }
        insert(self._conn, quarantine, kept)


def _naming(table: sa.Table) -> Iterator[tuple[sa.Table, str]]:
    """The tables and columns that name rows of a table."""
    for other in metadata.tables.values():
        for column in other.columns:
            if any(key.column.table is table for key in column.foreign_keys):
                yield other, column.name


def _put(conn: sa.Connection, table: sa.Table, rowid: int, values: dict[str, Any], **changes: Any) -> None:
    """Change some cells of a row; one that was damaged before does not become whole by it."""
    new = {**values, **changes}
    if is_intact(table, values):
        new["checksum"] = row_checksum(table, {name: cell for name, cell in new.items() if name != "checksum"})
    scan.put_at(conn, table, rowid, {name: new[name] for name in (*changes, "checksum")})


def _at_or_above(conn: sa.Connection, values: dict[str, Any], before: int | None) -> int | None:
    """Where a branch goes whose turn is taken away: to the turn above, if that is of its session."""
    query = sa.select(turn.c.id).where(turn.c.id == before, turn.c.session == values["session"])
    found = conn.execute(query).scalar()
    return None if found is None else int(found)


def _recover(conn: sa.Connection, values: dict[str, Any]) -> None:
    """Give the turn that a lost branch pointed at, or, if that is not there, the newest one, a branch again: main if
    there is none, else one that is called recovered."""
    owner, at = values["session"], values["turn"]
    if not isinstance(owner, int) or conn.execute(sa.select(session.c.id).where(session.c.id == owner)).first() is None:
        return
    mine = sa.select(turn.c.id).where(turn.c.session == owner)
    if not isinstance(at, int) or conn.execute(mine.where(turn.c.id == at)).first() is None:
        at = conn.execute(mine.order_by(turn.c.id.desc()).limit(1)).scalar()
    taken = _names(conn, owner)
    numbered = (f"{RECOVERED}-{number}" for number in itertools.count(2))
    free = (name for name in itertools.chain([MAIN, RECOVERED], numbered) if name not in taken)
    _add_branch(conn, owner, next(free), at)


def _names(conn: sa.Connection, owner: int) -> set[object]:
    """The names of a session's branches and tags, damaged ones among them."""
    rows = [found for table in (branch, tag) for found in scan.scan(conn, table)]
    return {found[1]["name"] for found in rows if not isinstance(found, scan.Gap) and found[1]["session"] == owner}


def _add_branch(conn: sa.Connection, owner: int, name: str, at: int | None) -> None:
    now = now_us()
    row = {"id": allocate(conn, branch), "session": owner, "name": name, "turn": at, "created": now, "updated": now}
    insert(conn, branch, row)
