"""What repairs have set aside: listing it as it was found, and deleting it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store.checksum import checked, unpacked
from kvloom_store.database import Database
from kvloom_store.schema import quarantine


@dataclass(frozen=True, slots=True)
class PutAside:
    """A row that was taken out of use: the table it was of, its cells as they were found, why and when (microseconds
    since 1970)."""

    id: int
    table: str
    cells: dict[str, Any]
    why: str
    created: int

    @property
    def when(self) -> str:
        """The time, as ISO 8601 has it."""
        return datetime.fromtimestamp(self.created / 1e6, UTC).isoformat(timespec="seconds")

    @property
    def text(self) -> str | None:
        """What was said, if it is a turn whose message can still be read."""
        message = self.cells.get("message")
        if self.table != "turn" or not isinstance(message, bytes):
            return None
        try:
            said = msgpack.unpackb(message)
        except ValueError:
            return None
        content = said.get("content") if isinstance(said, dict) else None
        return content if isinstance(content, str) else None

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints; bytes are hexadecimal."""
        cells = {name: cell.hex() if isinstance(cell, bytes) else cell for name, cell in self.cells.items()}
        return {
            "id": self.id,
            "table": self.table,
            "when": self.when,
            "why": self.why,
            "text": self.text,
            "cells": cells,
        }


def listed(conn: sa.Connection) -> list[PutAside]:
    """All that was set aside, the oldest first. Raises CorruptRow."""
    found = []
    for row in conn.execute(sa.select(quarantine).order_by(quarantine.c.id)):
        values = checked(quarantine, row)
        cells, why = (unpacked(values[name], "quarantine", values["id"]) for name in ("cells", "why"))
        found.append(PutAside(values["id"], values["of"], cells, why, values["created"]))
    return found


def forget(database: Database) -> int:
    """Delete all that was set aside; how many rows that were. Raises StoreUnavailable, StoreLocked."""
    with database.write() as conn:
        return conn.execute(quarantine.delete()).rowcount
