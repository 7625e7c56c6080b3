"""Reading a store that may be damaged: every row that can be read, told apart by its checksum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from kvloom_store import scan
from kvloom_store.checksum import digest, row_checksum
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.schema import chunk, metadata, session, turn, turn_state

Progress = Callable[[int, int], None]
"""Called now and then with the bytes of state that were checked, and those there are."""

CACHE_OF_STATE = frozenset({"segment", "chunk", "model_digest"})
"""Tables whose rows can all be made anew from others."""

RELEASED = frozenset({("turn_state", "segment"), ("turn_state", "base_segment"), ("turn_state", "base_state")})
"""Columns that name where state is, or what it stood on: without them it is computed again."""

Key = tuple[int | str, ...]


def key_of(table: sa.Table, values: dict[str, Any]) -> Key:
    """The key of a row, in a form that can be shown."""
    cells = [values[column.name] for column in table.primary_key.columns]
    return tuple(cell.hex() if isinstance(cell, bytes) else cell for cell in cells)


def shown(key: Key) -> str:
    """A key as people read it."""
    return str(key[0]) if len(key) == 1 else str(key)


def is_intact(table: sa.Table, values: dict[str, Any], blob: bytes | None = None) -> bool:
    """Whether a row as ``scan.scan`` gives it is the one that was written; ``blob`` is the digest of a chunk's."""
    covered = {name: value for name, value in values.items() if name != "checksum"}
    if table is chunk:
        covered["blob"] = digest(values["blob"]) if blob is None and isinstance(values["blob"], bytes) else blob
    try:
        return bool(values["checksum"] == row_checksum(table, covered))
    except (TypeError, ValueError):
        return False


@dataclass
class Reader:
    """One check of one snapshot: what was read so far, and which rows are not to be believed.

    ``damaged`` holds the keys of rows whose checksum failed, by table; ``torn`` the tables of which some rows cannot
    be read at all, so that a missing row is no finding of its own.
    """

    conn: sa.Connection
    damaged: dict[str, set[Key]] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)
    rows: int = 0
    bytes: int = 0

    def rows_of(self, table: sa.Table, *, lengths: Collection[str] = ()) -> Iterator[dict[str, Any] | scan.Gap]:
        """Every row of a table that can be read, and the gaps between them."""
        for each in scan.scan(self.conn, table, lengths=lengths):
            yield each if isinstance(each, scan.Gap) else each[1]

    def intact(self, table: sa.Table) -> Iterator[dict[str, Any]]:
        """The rows of a table (not of chunks) that are what was written."""
        for values in self.rows_of(table):
            if not isinstance(values, scan.Gap) and is_intact(table, values):
                yield values

    def is_damaged(self, table: sa.Table, *key: int | str | None) -> bool:
        """Whether a row is known to be damaged."""
        return tuple(key) in self.damaged.get(table.name, ())

    def ask(self, query: sa.Select[Any]) -> Sequence[Any]:
        """The answer to a query, as far as the file can be read: what cannot be is told of elsewhere."""
        try:
            return self.conn.execute(query).all()
        except DBAPIError:
            return []

    # --- whom a row concerns ---

    def at_turn(self, row: int | None) -> str | None:
        """``session@turn`` of a turn's row."""
        query = sa.select(session.c.name, turn.c.public_id).join(session, session.c.id == turn.c.session)
        found = self.ask(query.where(turn.c.id == row)) if row is not None else []
        try:
            return f"{found[0][0]}@{bytes(found[0][1]).hex()[:8]}" if found else None
        except (TypeError, ValueError):
            return None

    def at_segment(self, row: int | None) -> str | None:
        """``session@turn`` of the first turn whose state a segment holds."""
        query = sa.select(turn_state.c.turn).where(turn_state.c.segment == row).order_by(turn_state.c.id).limit(1)
        found = self.ask(query) if row is not None else []
        return self.at_turn(found[0][0]) if found else None

    def at_node(self, row: int | None) -> str | None:
        """``session@turn`` of the first turn that ends in an edge."""
        query = sa.select(turn_state.c.turn).where(turn_state.c.node == row).order_by(turn_state.c.id).limit(1)
        found = self.ask(query) if row is not None else []
        return self.at_turn(found[0][0]) if found else None

    def at(self, table: sa.Table, values: dict[str, Any]) -> str | None:
        """``session@turn`` of any row that concerns one."""
        if table is turn:
            return self.at_turn(values["id"] if isinstance(values["id"], int) else None)
        if table.name == "node":
            return self.at_node(values["id"])
        if table.name in ("segment", "chunk"):
            return self.at_segment(values["id" if table.name == "segment" else "segment"])
        return self.at_turn(values["turn"]) if isinstance(values.get("turn"), int) else None


def finding(
    kind: Kind, severity: Severity, table: sa.Table | str, row: Key | None, at: str | None, words: str
) -> Finding:
    """A finding of a table."""
    return Finding(kind, severity, table if isinstance(table, str) else table.name, row, at, words)


def table_named(name: str) -> sa.Table | None:
    """A table of the schema."""
    return metadata.tables.get(name)
