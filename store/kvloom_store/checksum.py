"""Checksums: XXH3-128 over every blob, and over every row with its keys, checked whenever a row is read.

The bytes a row's checksum covers are the MessagePack array [table name, value, value, ...] of all its columns
in schema order but ``checksum`` itself; in a chunk's row the blob is stood in for by its digest, which is also in
the segment's manifest, so that the large bytes are hashed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgpack
import xxhash
from sqlalchemy import Connection, Row, Table

from kvloom_store.errors import CorruptRow

_NUMBER = frozenset({int})
_NUMBER_OR_NULL = frozenset({int, type(None)})


def digest(data: bytes | memoryview) -> bytes:
    """XXH3-128 of some bytes, in its canonical (big-endian) form: 16 bytes."""
    return xxhash.xxh3_128_digest(data)


def row_checksum(table: Table, values: Mapping[str, Any]) -> bytes:
    """The checksum of a row: ``values`` holds every column but ``checksum``; of a chunk, its blob's digest."""
    return digest(msgpack.packb([table.name, *[values[name] for name in _covered(table)]]))


@cache
def _covered(table: Table) -> list[str]:
    return [column.name for column in table.columns if column.name != "checksum"]


def sealed(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its checksum, ready to be inserted."""
    return {**values, "checksum": row_checksum(table, values)}


def checked(table: Table, row: Row[Any], **asked: object) -> dict[str, Any]:
    """A row of ``select(table)`` as a dictionary without its checksum.

    ``asked``: what the row was looked up by. A damaged index leads to another one, which is sound in itself.

    Raises:
        CorruptRow: the row is not the one that was written, or not the one that was asked for.
    """
    values: dict[str, Any] = dict(row._mapping)
    checksum = values.pop("checksum")
    try:
        actual = row_checksum(table, values)
    except (TypeError, ValueError, KeyError):  # a damaged cell may come back as a value of another type
        actual = b""
    if checksum != actual or any(values[name] != value for name, value in asked.items()):
        raise CorruptRow(table.name, tuple(values[c.name] for c in table.primary_key.columns))
    return values


def check_numbers(table: Table, key: int, cells: Iterable[object], nullable: Iterable[object] = ()) -> None:
    """Of some cells of a row that is not read whole, and whose checksum cannot be checked: that they are numbers.

    Raises:
        CorruptRow: one is not.
    """
    if not (_NUMBER.issuperset(map(type, cells)) and _NUMBER_OR_NULL.issuperset(map(type, nullable))):
        raise CorruptRow(table.name, (key,))


def insert(conn: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert one row, sealed."""
    conn.execute(table.insert(), sealed(table, values))


def update(conn: Connection, table: Table, old: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Write a checked row back with some columns changed, sealed anew; the new values."""
    new = {**old, **changes}
    key = [column == old[column.name] for column in table.primary_key.columns]
    changed = {name: new[name] for name in changes}
    conn.execute(table.update().where(*key).values(**changed, checksum=row_checksum(table, new)))
    return new


def unpacked(data: bytes, table: str, key: object) -> Any:
    """A MessagePack cell, read with bounds.

    Raises:
        CorruptRow: it is not MessagePack.
    """
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptRow(table, key) from error
