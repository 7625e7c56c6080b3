"""Taking a session or a branch away, with what nobody else stands on.

Text goes first, then state from the tips down, then the edges of the trie that lead nowhere any more: the reverse
of the order in which they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from kvloom_store import explorations, fulltext, refs, segments, turns
from kvloom_store.checksum import checked, update
from kvloom_store.errors import CorruptRow
from kvloom_store.refs import Branch
from kvloom_store.schema import branch, journal, node, pin, segment, session, tag, turn, turn_state

BATCH = 500
"""Ids in one query."""

_USES: tuple[sa.Column[Any], ...] = (node.c.parent, turn_state.c.node, segment.c.node)
"""What an edge of the trie is needed for."""


def remove_session(conn: sa.Connection, session_row: int) -> None:
    """Delete a session's rows, and the segments and nodes only it used (inside a write transaction)."""
    explorations.remove_all(conn, session_row)
    for table in (branch, tag):
        conn.execute(table.delete().where(table.c.session == session_row))
    _remove_turns(conn, of_session(session_row))
    conn.execute(session.delete().where(session.c.id == session_row))


def remove_branch(conn: sa.Connection, row: Branch) -> None:
    """Delete a branch, the turns that ``only_of_branch`` names, and what only they used; a search that made some of
    them is forgotten, and its other branches stay (inside a write transaction)."""
    mine = only_of_branch(conn, row)
    conn.execute(branch.delete().where(branch.c.id == row.row))
    explorations.remove_of(conn, mine)
    _remove_turns(conn, mine)


def of_session(session_row: int) -> sa.Select[Any]:
    """The ids of a session's turns."""
    return sa.select(turn.c.id).where(turn.c.session == session_row)


def only_of_branch(conn: sa.Connection, row: Branch) -> sa.Select[Any]:
    """The ids of the turns that no other branch and no tag leads to: those of a branch's path from the first such on,
    and all that was said below them, undone or not.

    Raises:
        CorruptRow: a turn of these paths is damaged: it may lead to what somebody else said.
    """
    others = [each.turn for each in refs.branches(conn, row.session) if each.row != row.row]
    kept = _paths(conn, [*others, *refs.tags(conn, row.session).values()])
    own = _paths(conn, [row.turn]) - kept
    below = sa.select(turn.c.id).where(turn.c.id == min(own, default=None)).cte("below", recursive=True)
    below = below.union(sa.select(turn.c.id).where(turn.c.parent == below.c.id))
    return sa.select(below.c.id)


def _paths(conn: sa.Connection, ends: Iterable[int | None]) -> set[int]:
    """The ids of the turns that lead to some; along a path they grow. Raises CorruptRow."""
    wanted, found = sorted({end for end in ends if end is not None}), set[int]()
    for first in range(0, len(wanted), BATCH):
        some = wanted[first : first + BATCH]
        up = sa.select(turn.c.id, turn.c.parent).where(turn.c.id.in_(some)).cte("up", recursive=True)
        up = up.union(sa.select(turn.c.id, turn.c.parent).where(turn.c.id == up.c.parent))
        rows = conn.execute(sa.select(turn).where(turn.c.id.in_(sa.select(up.c.id))))
        parents = {values["id"]: values["parent"] for values in (checked(turn, row) for row in rows)}
        missing = {*some, *parents.values()} - {None, *parents}
        if missing:
            raise CorruptRow(turn.name, tuple(missing))
        found |= set(parents)
    return found


def _remove_turns(conn: sa.Connection, chosen: sa.Select[Any]) -> None:
    mine = sa.select(chosen.subquery().c.id)
    states = turn_state.c.turn.in_(mine)
    nodes = set(conn.execute(sa.select(turn_state.c.node).where(states)).scalars())
    held = set(conn.execute(sa.select(turn_state.c.segment).where(states)).scalars()) - {None}
    # Another session's states may have been computed on top of these; they keep the segment they stand on.
    ids = sa.select(turn_state.c.id).where(states)
    outside = sa.select(turn_state).where(_unindexed(turn_state.c.base_state).in_(ids), ~states)
    for row in conn.execute(outside).all():
        update(conn, turn_state, checked(turn_state, row), base_state=None)
    conn.execute(journal.delete().where(journal.c.turn.in_(mine)))
    _remove_text(conn, mine)
    conn.execute(pin.delete().where(pin.c.turn.in_(mine)))
    # Children before parents: foreign keys are checked row by row.
    for table, owned in ((turn_state, states), (turn, turn.c.id.in_(mine))):
        rows = conn.execute(sa.select(table.c.id).where(owned).order_by(table.c.id.desc())).scalars().all()
        for row in rows:
            conn.execute(table.delete().where(table.c.id == row))
    nodes |= _remove_segments(conn, held)
    remove_nodes(conn, nodes)


def _remove_text(conn: sa.Connection, mine: sa.Select[Any]) -> None:
    try:
        rows = conn.execute(mine).scalars().all()
        texts = {row: turns.get(conn, row).text for row in rows}
    except CorruptRow:  # a turn that cannot be read cannot be taken out of the index
        return fulltext.drop(conn)
    return fulltext.remove(conn, texts)


def _remove_segments(conn: sa.Connection, candidates: set[int]) -> set[int]:
    """Delete segments nobody uses, and then their bases, if nobody uses those either; the nodes they were in."""
    nodes: set[int] = set()
    while candidates:
        chosen = list(candidates)[:BATCH]
        candidates -= set(chosen)
        uses = [
            sa.select(turn_state.c.segment).where(turn_state.c.segment.in_(chosen)),
            sa.select(turn_state.c.base_segment).where(turn_state.c.base_segment.in_(chosen)),
            sa.select(segment.c.base_segment).where(segment.c.base_segment.in_(chosen)),
        ]
        used = {row for query in uses for row in conn.execute(query).scalars()}
        free = [row for row in chosen if row not in used]
        for at, base in conn.execute(sa.select(segment.c.node, segment.c.base_segment).where(segment.c.id.in_(free))):
            nodes.add(at)
            if base is not None:
                candidates.add(base)
        segments.delete(conn, free)
    return nodes


def remove_nodes(conn: sa.Connection, candidates: set[int]) -> None:
    """Delete edges without children, turns or state, from the leaves up; topmost nodes stay.

    Raises:
        CorruptRow: a damaged index says that nobody needs one which somebody does (whoever calls then rolls back).
    """
    gone: list[int] = []
    while candidates:
        at = candidates.pop()
        parent = conn.execute(sa.select(node.c.parent).where(node.c.id == at)).scalar_one_or_none()
        if parent is None:
            continue
        uses = [sa.select(column.table.c.id).where(column == at) for column in _USES]
        if all(conn.execute(query.limit(1)).first() is None for query in uses):
            conn.execute(node.delete().where(node.c.id == at))
            gone.append(at)
            candidates.add(parent)
    _check_unused(conn, gone)


def _check_unused(conn: sa.Connection, gone: Sequence[int]) -> None:
    """Make sure that nobody names edges that were deleted: the tables are read through, each once for some hundred."""
    for first in range(0, len(gone), BATCH):
        for column in _USES:
            query = sa.select(column.table).where(_unindexed(column).in_(gone[first : first + BATCH])).limit(1)
            left = conn.execute(query).one_or_none()
            if left is not None:
                raise CorruptRow(column.table.name, (left.id,))


def _unindexed(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """A column as it is in its rows, where those are selected whole: a sum is in no index."""
    return column + 0
