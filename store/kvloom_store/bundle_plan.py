"""What goes into a bundle, decided before anything is written: row ids and numbers, no text and no state.

Only what the chosen turns need is taken. State and edges of the trie may go on behind that, for another branch or
another session: of those the bundle gets their beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.messages import check_limit
from kvloom_store import trie
from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import node, segment, turn_state

BATCH = 500
"""Ids in one query."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The turns of a bundle (rows, parents first), and the names that point at them."""

    session: int
    turns: tuple[int, ...]
    branches: tuple[tuple[str, int | None], ...]
    tags: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class PlannedState:
    """A turn state, and what of the state it stands on is in the bundle, too; ``pending``: nothing is, so it goes
    without its own, as tokens that are to be run."""

    row: int
    root: int
    base_state: int | None
    base_segment: int | None
    segment: int | None
    pending: bool


@dataclass(frozen=True, slots=True)
class PlannedSegment:
    """The rows of a segment up to ``end``, on top of ``base``; the token before ``end`` is in ``node``."""

    row: int
    end: int
    base: int | None
    node: int


@dataclass(slots=True)
class BundlePlan:
    """What goes into a bundle, by row; of nodes how many of their tokens. Each is in the order it is written in."""

    chosen: Chosen
    states: list[PlannedState] = field(default_factory=list)
    segments: list[PlannedSegment] = field(default_factory=list)
    nodes: dict[int, int] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    provenances: list[int] = field(default_factory=list)
    stored_bytes: int = 0


def plan(conn: sa.Connection, chosen: Chosen, *, text_only: bool = False) -> BundlePlan:
    """Decide what goes into a bundle of these turns; ``text_only``: no state. Raises LimitExceeded, CorruptRow."""
    check_limit("turns", len(chosen.turns), limits.MAX_BUNDLE_RECORDS)
    made = BundlePlan(chosen)
    states = _rows(conn, turn_state, turn_state.c.turn, chosen.turns, _STATE)
    held = _Held(conn)
    whole: set[int] = set()
    for row in _bases_first(states, "base_state"):
        planned = _planned_state(held, states, whole, states[row], text_only=text_only)
        made.states.append(planned)
        whole |= set() if planned.pending else {row}
    made.segments = held.planned()
    wanted: dict[int, int] = {}
    for each in made.states:
        _want(wanted, states[each.row]["node"], states[each.row]["offset"])
    starts = _rows(conn, node, node.c.id, {each.node for each in made.segments}, [node.c.id, node.c.start])
    for part in made.segments:
        _want(wanted, part.node, part.end - starts[part.node]["start"])
    made.nodes = _with_parents(conn, wanted)
    for name, some in (("states", made.states), ("nodes", made.nodes), ("segments", made.segments)):
        check_limit(name, len(some), limits.MAX_BUNDLE_RECORDS)
    made.roots = sorted({each.root for each in made.states})
    from_states = {states[each.row]["provenance"] for each in made.states}
    from_segments = {held.rows[each.row]["provenance"] for each in made.segments}
    made.provenances = sorted(from_states | from_segments)
    made.stored_bytes = sum(held.rows[each.row]["stored_bytes"] for each in made.segments)
    return made


_STATE = [
    turn_state.c[name]
    for name in (
        *("id", "root", "node", "offset", "state_start", "state_end"),
        *("base_state", "base_segment", "segment", "provenance"),
    )
]
_SEGMENT = [
    segment.c[name]
    for name in ("id", "node", "start", "end", "base_segment", "complete", "lossy", "provenance", "stored_bytes")
]


class _Held:
    """The segments that are wanted, and up to where."""

    def __init__(self, conn: sa.Connection) -> None:
        self._conn = conn
        self.rows: dict[int, Mapping[str, Any]] = {}
        self._ends: dict[int, int] = {}

    def want(self, row: int | None, upto: int) -> int | None:
        """Take the state up to a position along a segment's chain: the segment that holds the last row of it, or None
        if there is no such state."""
        found = self._below(row, upto)
        at, end = found, upto
        needed: list[tuple[int, int]] = []
        while at is not None:
            needed.append((at, end))
            end = self.rows[at]["start"]
            if end == 0:
                break
            at = self._below(self.rows[at]["base_segment"], end)
        else:
            return None  # the chain is broken
        for each, last in needed:
            self._ends[each] = max(last, self._ends.get(each, 0))
        return found

    def planned(self) -> list[PlannedSegment]:
        """What is wanted, bases first."""
        found = []
        for row in _bases_first({each: self.rows[each] for each in self._ends}, "base_segment"):
            values, end = self.rows[row], self._ends[row]
            base = self._below(values["base_segment"], values["start"]) if values["start"] else None
            found.append(PlannedSegment(row, end, base, trie.just_before(self._conn, values["node"], end).node))
        return found

    def _below(self, row: int | None, upto: int) -> int | None:
        """The segment of a chain that holds the row before a position; those that begin behind it give nothing."""
        while row is not None:
            if row not in self.rows:
                self.rows.update(_rows(self._conn, segment, segment.c.id, [row], _SEGMENT))
            values = self.rows.get(row)
            if values is None or not values["complete"] or values["lossy"] or values["end"] < upto:
                return None  # what is not exact stays behind: there it is computed again
            if values["start"] < upto:
                return row
            row = values["base_segment"]
        return None


def _planned_state(
    held: _Held,
    states: Mapping[int, Mapping[str, Any]],
    whole: set[int],
    values: Mapping[str, Any],
    *,
    text_only: bool,
) -> PlannedState:
    """``whole`` are the states before this one that are not pending."""
    row, start, end = values["id"], values["state_start"], values["state_end"]
    inside = values["base_state"] in whole
    own, below = None, None
    if not text_only:
        own = held.want(values["segment"], end) if end > start else None
        below = held.want(_standing(held, states, values), start) if start else None
    # Without what it stands on, state cannot be brought back, nor computed again as it was.
    pending = start > 0 and not inside and below is None
    if pending:
        return PlannedState(row, values["root"], None, None, None, True)
    return PlannedState(row, values["root"], values["base_state"] if inside else None, below, own, False)


def _standing(held: _Held, states: Mapping[int, Mapping[str, Any]], values: Mapping[str, Any]) -> int | None:
    """The segment in which the state is found that a turn's own stands on."""
    upto = values["state_start"]
    while True:
        base = values["base_state"]
        if base is None:
            return None if values["base_segment"] is None else int(values["base_segment"])
        below = states.get(base) or _rows(held._conn, turn_state, turn_state.c.id, [base], _STATE).get(base)
        if below is None:
            return None
        if below["state_start"] < upto:
            return None if below["segment"] is None else int(below["segment"])
        values = below


def _want(wanted: dict[int, int], row: int, offset: int) -> None:
    wanted[row] = max(offset, wanted.get(row, 0))


def _with_parents(conn: sa.Connection, wanted: dict[int, int]) -> dict[int, int]:
    """How many tokens are needed of each node on the way to some, parents first; topmost ones are left out."""
    columns = [node.c.id, node.c.parent, node.c.parent_offset, node.c.start]
    known: dict[int, Mapping[str, Any]] = {}
    todo = set(wanted)
    while todo:
        some = _rows(conn, node, node.c.id, todo, columns)
        known |= some
        for values in some.values():
            if values["parent"] is not None:
                _want(wanted, values["parent"], values["parent_offset"])
        todo = {values["parent"] for values in some.values() if values["parent"] is not None} - set(known)
    below_top = [row for row, values in known.items() if values["parent"] is not None]
    return {row: wanted[row] for row in sorted(below_top, key=lambda row: (known[row]["start"], row))}


def _rows(
    conn: sa.Connection, table: sa.Table, key: sa.Column[Any], ids: Iterable[int], columns: Sequence[Any]
) -> dict[int, Mapping[str, Any]]:
    """Some columns of rows, by id.

    Raises:
        CorruptRow: one of them is damaged, or not one that was asked for: it could lead in a circle, or anywhere.
    """
    wanted = list(ids)
    found: dict[int, Mapping[str, Any]] = {}
    for first in range(0, len(wanted), BATCH):
        some = set(wanted[first : first + BATCH])
        for row in conn.execute(sa.select(table).where(key.in_(some)).order_by(table.c.id)):
            values = checked(table, row)
            if values[key.name] not in some:
                raise CorruptRow(table.name, (row.id,))
            found[values["id"]] = {column.name: values[column.name] for column in columns}
    return found


def _bases_first(rows: Mapping[int, Mapping[str, Any]], base: str) -> list[int]:
    """Rows in an order in which each comes after the one it stands on."""
    done: dict[int, None] = {}
    for row in sorted(rows):
        way = []
        at: int | None = row
        while at is not None and at in rows and at not in done and at not in way:
            way.append(at)
            at = rows[at][base]
        done.update(dict.fromkeys(reversed(way)))
    return list(done)
