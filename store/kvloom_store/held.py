"""Of the tokens that are known, whose state is held: the second length of a trie match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import segment, turn_state
from kvloom_store.trie import Match


@dataclass(frozen=True, slots=True)
class Held:
    """The segment whose state reaches furthest along a path, and how far (``end`` tokens from the root)."""

    segment: int
    end: int


def longest(
    conn: sa.Connection, match: Match, *, at_most: int, on: int | None = None, on_end: int = 0, exact: bool = True
) -> Held | None:
    """The held state that covers most of a matched path, at most ``at_most`` tokens of it.

    With ``on``, only state that goes on from position ``on_end`` of that segment counts: the same tokens
    computed otherwise have other bits, and a conversation never changes over to those. ``exact``: lossy state does not
    count.
    """
    matched = {position.node: position.depth for position in match.path}
    query = sa.select(segment).where(segment.c.node.in_(list(matched)), segment.c.complete == 1)
    if exact:
        query = query.where(segment.c.lossy == 0)
    rows: dict[int, dict[str, Any]] = {}
    for row in conn.execute(query.order_by(segment.c.id)):
        try:
            values = checked(segment, row)
        except CorruptRow:
            continue  # damaged state is as good as none: it is recomputed, and fsck names it
        rows[values["id"]] = values
    best: Held | None = None
    for values in rows.values():
        end = min(values["end"], matched[values["node"]], at_most)
        if end <= values["start"] or (on is not None and not _stands_on(rows, values, on, on_end)):
            continue
        if best is None or end > best.end:
            best = Held(values["id"], end)
    return best


def _stands_on(rows: dict[int, dict[str, Any]], values: dict[str, Any], on: int, on_end: int) -> bool:
    """Whether a segment's chain goes through position ``on_end`` of segment ``on``."""
    while values["id"] != on:
        if values["start"] < on_end or values["base_segment"] not in rows:
            return False
        values = rows[values["base_segment"]]
    return True


def hidden_at(conn: sa.Connection, found: Held) -> tuple[bytes, str] | None:
    """The final hidden state of the last position of some held state, if a turn kept it: its bytes and dtype."""
    query = sa.select(turn_state).where(
        turn_state.c.segment == found.segment,
        turn_state.c.state_end == found.end,
        turn_state.c.hidden.is_not(None),
    )
    for row in conn.execute(query.order_by(turn_state.c.id)):
        values = checked(turn_state, row)
        return values["hidden"], values["hidden_dtype"]
    return None
