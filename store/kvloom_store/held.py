"""Of the tokens that are known, whose state is held: the second length of a trie match."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import segment, turn_state
from kvloom_store.trie import Match

QUERY_NODES = 16
"""Nodes asked for in one query. Most often the state that reaches furthest is in the first ones."""


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
    depth = {position.node: position.depth for position in match.path}
    deepest, rows = list(reversed(match.path)), _Segments(conn)
    best: Held | None = None
    for first in range(0, len(deepest), QUERY_NODES):  # from the end up: what is found there reaches furthest
        if best is not None and min(deepest[first].depth, at_most) < best.end:
            break
        for values, node, reaches in rows.at_nodes([each.node for each in deepest[first : first + QUERY_NODES]]):
            end = min(reaches, depth[node], at_most)
            if end <= values["start"] or (exact and values["lossy"]):
                continue
            if on is not None and not _stands_on(rows, values, on, on_end):
                continue
            if best is None or (-end, values["id"]) < (-best.end, best.segment):
                best = Held(values["id"], end)
    return best


class _Segments:
    """Rows of complete segments, as they are asked for.

    Damaged state is as good as none: it is recomputed, and fsck names it.
    """

    def __init__(self, conn: sa.Connection) -> None:
        self._conn = conn
        self._rows: dict[int, dict[str, Any]] = {}

    def at_nodes(self, nodes: list[int]) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Those that hold state in one of these nodes: the row, the node, and to which position they hold it there.

        Their last token is in the node, or that of a turn whose state is in one with the state of later turns.
        """
        for values in self._read(segment.c.node.in_(nodes)):
            yield values, values["node"], values["end"]
        c = turn_state.c
        inside = (c.state_end > c.state_start) & (c.node != segment.c.node)
        query = sa.select(turn_state).join(segment, segment.c.id == c.segment).where(c.node.in_(nodes), inside)
        for row in self._conn.execute(query).all():
            with contextlib.suppress(CorruptRow):
                state = checked(turn_state, row)
                held = self.get(state["segment"])
                if held is not None and state["node"] in nodes:
                    yield held, state["node"], state["state_end"]

    def get(self, row: int) -> dict[str, Any] | None:
        """The one in a row, if it is there."""
        if row not in self._rows:
            self._read(segment.c.id == row)
        return self._rows.get(row)

    def _read(self, where: sa.ColumnElement[bool]) -> list[dict[str, Any]]:
        found = []
        for row in self._conn.execute(sa.select(segment).where(where, segment.c.complete == 1)):
            with contextlib.suppress(CorruptRow):
                found.append(checked(segment, row))
        self._rows.update((values["id"], values) for values in found)
        return found


def _stands_on(rows: _Segments, values: dict[str, Any], on: int, on_end: int) -> bool:
    """Whether a segment's chain goes through position ``on_end`` of segment ``on``."""
    at: dict[str, Any] | None = values
    while at is not None and at["id"] != on:
        if at["start"] < on_end or at["base_segment"] is None:
            return False
        at = rows.get(at["base_segment"])
    return at is not None


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
