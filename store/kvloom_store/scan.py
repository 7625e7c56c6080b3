"""Rows as they lie in the file, by SQLite's own row ids: for reading and mending a store that may be damaged.

Values are what is there, whatever a column should hold. Everything else in the store asks for rows by their keys, and
believes them only once they are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError


@dataclass(frozen=True, slots=True)
class Gap:
    """Rows of a table that cannot be read: those with row ids above ``after``, and below ``before`` (None: to its end).

    ``why`` is what SQLite says of it.
    """

    after: int
    before: int | None
    why: str


def scan(
    conn: sa.Connection, table: sa.Table, *, lengths: Collection[str] = (), only: int | None = None
) -> Iterator[tuple[int, Any] | Gap]:
    """Every row of a table that can be read (or the ``only`` one with a row id), with its row id and as a dictionary.

    Values are what is in the file, whatever a column should hold; text that is not UTF-8 is given as bytes. Of the
    columns in ``lengths`` only the length is read.
    """
    quote = conn.dialect.identifier_preparer.quote
    cells = []
    for column in table.columns:
        name = quote(column.name)
        plain = f"CASE WHEN typeof({name}) IN ('text', 'blob') THEN CAST({name} AS BLOB) ELSE {name} END"
        cells += [f"typeof({name})", f"length({name})" if column.name in lengths else plain]
    sql = f"SELECT rowid, {', '.join(cells)} FROM {quote(table.name)} WHERE rowid > ? ORDER BY rowid"
    names = [column.name for column in table.columns]
    last = -(1 << 63) if only is None else only - 1
    if only is not None:
        sql = sql.replace("ORDER BY", f"AND rowid <= {only:d} ORDER BY")
    while True:
        try:
            for row in conn.exec_driver_sql(sql, (last,)):
                last = row[0]
                yield last, {name: _value(*row[1 + 2 * n : 3 + 2 * n]) for n, name in enumerate(names)}
            return
        except DBAPIError as error:
            beyond = _readable_beyond(conn, quote(table.name), last)
            yield Gap(last, beyond, str(error.orig))
        if beyond is None or only is not None:
            return
        last = max(beyond - 1, last + 1)


def _value(kind: str, value: Any) -> Any:
    if kind == "text" and isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _readable_beyond(conn: sa.Connection, table: str, last: int) -> int | None:
    """The first row id behind a row that cannot be read from which SQLite finds rows again; None if there is none."""
    last = max(last, 0)

    def first_beyond(row: int) -> int | None:
        found = conn.exec_driver_sql(f"SELECT rowid FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT 1", (row,))
        return found.scalar()

    for power in range(1, 62):
        try:
            found = first_beyond(last + (1 << power) - 1)
        except DBAPIError:
            continue
        if found is None and power == 1:
            return None
        low, high = last + (1 << (power - 1)) - 1, last + (1 << power) - 1
        while low + 1 < high:  # it fails at low, and not at high
            middle = (low + high) // 2
            try:
                first_beyond(middle)
                high = middle
            except DBAPIError:
                low = middle
        return first_beyond(high)
    return None


def row_at(conn: sa.Connection, table: sa.Table, rowid: int) -> dict[str, Any] | None:
    """One row by its row id, as ``scan`` gives it; None if there is none, or it cannot be read."""
    for found in scan(conn, table, only=rowid):
        return None if isinstance(found, Gap) else found[1]
    return None


def rowids(conn: sa.Connection, table: sa.Table, column: str, value: int) -> list[int]:
    """The row ids of the rows in which a column has a value."""
    quote = conn.dialect.identifier_preparer.quote
    sql = f"SELECT rowid FROM {quote(table.name)} WHERE {quote(column)} = ? ORDER BY rowid DESC"
    return list(conn.exec_driver_sql(sql, (value,)).scalars())


def put_at(conn: sa.Connection, table: sa.Table, rowid: int, cells: Mapping[str, Any]) -> None:
    """Write some cells of the row with a row id."""
    quote = conn.dialect.identifier_preparer.quote
    changes = ", ".join(f"{quote(name)} = ?" for name in cells)
    sql = f"UPDATE {quote(table.name)} SET {changes} WHERE rowid = ?"
    conn.exec_driver_sql(sql, (*cells.values(), rowid))


def delete_at(conn: sa.Connection, table: sa.Table, rowid: int) -> None:
    """Take away the row with a row id."""
    quote = conn.dialect.identifier_preparer.quote
    conn.exec_driver_sql(f"DELETE FROM {quote(table.name)} WHERE rowid = ?", (rowid,))


def add(conn: sa.Connection, table: sa.Table, *rows: Mapping[str, Any]) -> None:
    """Add rows of the same columns, but for those that cannot stand beside others that are there."""
    quote = conn.dialect.identifier_preparer.quote
    names = ", ".join(quote(name) for name in rows[0])
    marks = ", ".join("?" * len(rows[0]))
    sql = f"INSERT OR IGNORE INTO {quote(table.name)} ({names}) VALUES ({marks})"
    conn.exec_driver_sql(sql, [tuple(row.values()) for row in rows])
