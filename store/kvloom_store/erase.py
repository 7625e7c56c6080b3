"""Deleting for good: of what is taken away, no text, no token and no row of state stays in the file or its log.

Deleting rows is not enough for that. An edge of the trie that another path shares the first tokens of goes on with
those of what was deleted, and so does the state that was computed over it; the index still has the words; and the pages
that became free, and the log, hold what stood there. So the shared edges are cut short, state over what they lose is
dropped (what stood on it is computed anew when it is needed, and cannot come back just as it was), and the file is
written anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.records import read_schedule
from kvloom_store import refs, removal, search, segments, sqlite, trie
from kvloom_store.checksum import checked, digest, update
from kvloom_store.database import Database
from kvloom_store.schema import node, quarantine, segment, turn_state
from kvloom_store.trie import TOKEN_BYTES


@dataclass(slots=True)
class Erased:
    """What went with what was erased: the turns of others whose state was ``dropped``, because it was computed over
    tokens that are gone, and the rows that a repair had ``set_aside``: nobody can tell whose they were."""

    dropped: int = 0
    set_aside: int = 0


def session(conn: sa.Connection, row: int) -> Erased:
    """Take a session away so that nothing of it is left in any row (inside a write transaction).

    Raises:
        CorruptRow: a row that says how much of an edge another path needs is damaged.
    """
    sqlite.reindex(conn)  # a damaged one hides what others need; to write the file anew takes longer
    edges = _edges(conn, removal.of_session(row))
    removal.remove_session(conn, row)
    return _cut_short(conn, edges)


def branch(conn: sa.Connection, row: refs.Branch) -> Erased:
    """The same of a branch and the turns that only it leads to."""
    sqlite.reindex(conn)
    edges = _edges(conn, removal.only_of_branch(conn, row))
    removal.remove_branch(conn, row)
    return _cut_short(conn, edges)


def scrub(database: Database) -> None:
    """Write index and file anew, and empty the log: no byte is left of rows that were deleted.

    It takes the room of a second copy meanwhile.

    Raises:
        StoreLocked: another process writes, or still reads what was before; nothing but time is lost.
        StoreUnavailable: there is no room.
    """
    search.rebuild(database)
    with sqlite.translated(database.path), database.queued(background=False):
        sqlite.rewrite(database.engine, database.path)


def _edges(conn: sa.Connection, turns: sa.Select[Any]) -> list[int]:
    """The edges that the paths of some turns go over."""
    mine = sa.select(turns.subquery().c.id)
    ends = sa.select(turn_state.c.node).where(turn_state.c.turn.in_(mine))
    up = sa.select(node.c.id, node.c.parent).where(node.c.id.in_(ends)).cte("up_edges", recursive=True)
    up = up.union(sa.select(node.c.id, node.c.parent).where(node.c.id == up.c.parent))
    return list(conn.execute(sa.select(up.c.id)).scalars())


def _cut_short(conn: sa.Connection, edges: Iterable[int]) -> Erased:
    """Cut edges where the last path leaves them, those farthest from the root first."""
    made = Erased()
    starts = {each: _start(conn, each) for each in edges}
    for each in sorted((e for e, start in starts.items() if start is not None), key=lambda e: -(starts[e] or 0)):
        made.dropped += _cut_edge(conn, each)
    made.set_aside = conn.execute(quarantine.delete()).rowcount
    return made


def _start(conn: sa.Connection, edge: int) -> int | None:
    found = conn.execute(sa.select(node.c.start).where(node.c.id == edge, node.c.parent.is_not(None)))
    return found.scalar_one_or_none()


def _cut_edge(conn: sa.Connection, edge: int) -> int:
    """Cut one edge, and drop state that reaches behind its end; of how many turns that was."""
    values = checked(node, conn.execute(sa.select(node).where(node.c.id == edge)).one())
    used = _used(conn, values)
    if used == values["length"]:
        return 0
    behind = sa.select(segment.c.id).where(segment.c.node == edge, segment.c.end > values["start"] + used)
    dropped = _drop(conn, list(conn.execute(behind).scalars()))
    if not used:
        removal.remove_nodes(conn, {edge})
        return dropped
    path = trie.pack_tokens(trie.tokens_to(conn, edge, used))
    update(conn, node, values, length=used, tokens=values["tokens"][: used * TOKEN_BYTES], chain_hash=digest(path))
    return dropped


def _used(conn: sa.Connection, values: dict[str, Any]) -> int:
    """How many tokens of an edge are of a path that is left, or of somebody's own loop."""
    branches = (each["parent_offset"] for each in _naming(conn, node.c.parent, values["id"]))
    paths = (each["offset"] for each in _naming(conn, turn_state.c.node, values["id"]))
    own = _naming(conn, segment.c.node, values["id"])
    captured = (each["end"] - values["start"] for each in own if _is_captured(each["schedule"]))
    return max(0, *map(int, branches), *map(int, paths), *map(int, captured))


def _naming(conn: sa.Connection, column: sa.Column[Any], edge: int) -> Iterator[dict[str, Any]]:
    for row in conn.execute(sa.select(column.table).where(column == edge)):
        yield checked(column.table, row, **{column.name: edge})


def _is_captured(schedule: bytes) -> bool:
    try:
        return read_schedule(schedule).unknown
    except FormatError:
        return False


def _drop(conn: sa.Connection, first: list[int]) -> int:
    """Drop segments and all that stands on them; how many turn states lost theirs."""
    levels, gone = [first], set(first)
    while levels[-1]:
        above = sa.select(segment.c.id).where(segment.c.base_segment.in_(levels[-1]))
        levels.append(list(set(conn.execute(above).scalars()) - gone))  # a damaged one stands on itself
        gone |= set(levels[-1])
    named = turn_state.c.segment.in_(gone) | turn_state.c.base_segment.in_(gone)
    lost = [checked(turn_state, row) for row in conn.execute(sa.select(turn_state).where(named))]
    for row in lost:
        own: dict[str, Any] = {"segment": None, "dropped": 1} if row["segment"] in gone else {}
        base: dict[str, Any] = {"base_segment": None} if row["base_segment"] in gone else {}
        update(conn, turn_state, row, **own, **base)
    for level in reversed(levels):
        segments.delete(conn, level)
    return len(lost)
