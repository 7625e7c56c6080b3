"""Stores of older schema versions, brought to this one: forward only, in one transaction when they are opened."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store import scan, sqlite
from kvloom_store.checksum import digest, row_checksum
from kvloom_store.schema import SCHEMA_VERSION, segment

BATCH = 500
"""Rows that are written at once."""


def migrate(engine: sa.Engine, path: Path) -> None:
    """Bring a store to the version after its own, and so on, unless another process was first.

    Whatever happens meanwhile, the file is of one version or of the other. Rows that are damaged stay so, for a check
    to find; of a page that cannot be read nothing is taken over.
    """
    with sqlite.in_any_order(engine) as conn:
        for version in range(sqlite.identify(conn, path), SCHEMA_VERSION):
            _STEPS[version](conn)
        sqlite.mark(conn, SCHEMA_VERSION)


def _merged(conn: sa.Connection) -> None:
    """1 to 2: segments say how much of them was stored before, in smaller ones. Until now nothing was."""
    aside = sqlite.put_aside(conn, segment)
    columns = [column for column in segment.columns if column.name != "merged"]
    before = sa.Table(aside, sa.MetaData(), *(sa.Column(each.name, each.type) for each in columns))
    segment.create(conn)
    readable = (found[1] for found in scan.scan(conn, before) if not isinstance(found, scan.Gap))
    while batch := [_unmerged(row) for row in itertools.islice(readable, BATCH)]:
        scan.add(conn, segment, *batch)
    before.drop(conn)


def _unmerged(row: dict[str, Any]) -> dict[str, Any]:
    """A row of version 1 in version 2; if it was damaged, it is."""
    was = row.pop("checksum")
    try:
        sound = was == digest(msgpack.packb([segment.name, *row.values()]))
    except (TypeError, ValueError, OverflowError):  # a damaged cell may be anything
        sound = False
    row["merged"] = 0
    return {**row, "checksum": row_checksum(segment, row) if sound else was}


_STEPS: dict[int, Callable[[sa.Connection], None]] = {1: _merged}
"""What brings a store of a version to the next one."""
