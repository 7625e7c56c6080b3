"""Pins: turns whose state is never dropped, nor the state that it stands on."""

from __future__ import annotations

import sqlalchemy as sa

from kvloom_store.checksum import checked, insert
from kvloom_store.database import allocate, now_us
from kvloom_store.schema import pin, turn


def add(conn: sa.Connection, turn_row: int) -> bool:
    """Pin a turn (inside a write transaction); False if it was pinned already."""
    if _found(conn, turn_row) is not None:
        return False
    insert(conn, pin, {"id": allocate(conn, pin), "turn": turn_row, "created": now_us()})
    return True


def remove(conn: sa.Connection, turn_row: int) -> bool:
    """Take the pin of a turn away (inside a write transaction); False if there was none."""
    found = _found(conn, turn_row)
    if found is not None:
        conn.execute(pin.delete().where(pin.c.id == found))
    return found is not None


def _found(conn: sa.Connection, turn_row: int) -> int | None:
    row = conn.execute(sa.select(pin).where(pin.c.turn == turn_row)).one_or_none()
    return None if row is None else int(checked(pin, row, turn=turn_row)["id"])


def pinned(conn: sa.Connection, session: int | None = None) -> set[int]:
    """The turns that are pinned: of the whole store, or of one session."""
    query = sa.select(pin)
    if session is not None:
        query = query.join(turn, turn.c.id == pin.c.turn).where(turn.c.session == session)
    return {int(checked(pin, row)["turn"]) for row in conn.execute(query)}
