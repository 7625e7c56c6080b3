"""Taking a session or a branch away, with what nobody else stands on.

Text goes first, then state from the tips down, then the edges of the trie that lead nowhere any more: the reverse
of the order in which they were written.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from kvloom_store import explorations, fulltext, segments, turns
from kvloom_store.checksum import checked, update
from kvloom_store.errors import CorruptRow
from kvloom_store.refs import Branch
from kvloom_store.schema import branch, journal, node, pin, segment, session, tag, turn, turn_state

BATCH = 500
"""Ids in one query."""


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
    and all that was said below them, undone or not."""
    named = [
        sa.select(branch.c.turn).where(branch.c.session == row.session, branch.c.id != row.row),
        sa.select(tag.c.turn).where(tag.c.session == row.session),
    ]
    kept = {each for query in named for each in _path(conn, turn.c.id.in_(query))}
    own = [each for each in _path(conn, turn.c.id == row.turn) if each not in kept]
    below = sa.select(turn.c.id).where(turn.c.id == min(own, default=None)).cte("below", recursive=True)
    below = below.union(sa.select(turn.c.id).where(turn.c.parent == below.c.id))
    return sa.select(below.c.id)


def _path(conn: sa.Connection, ends: sa.ColumnElement[bool]) -> list[int]:
    """The ids of the turns that paths go through; along a path they grow."""
    up = sa.select(turn.c.id, turn.c.parent).where(ends).cte("up", recursive=True)
    up = up.union(sa.select(turn.c.id, turn.c.parent).where(turn.c.id == up.c.parent))
    return list(conn.execute(sa.select(up.c.id)).scalars())


def _remove_turns(conn: sa.Connection, chosen: sa.Select[Any]) -> None:
    mine = sa.select(chosen.subquery().c.id)
    states = turn_state.c.turn.in_(mine)
    nodes = set(conn.execute(sa.select(turn_state.c.node).where(states)).scalars())
    held = set(conn.execute(sa.select(turn_state.c.segment).where(states)).scalars()) - {None}
    # Another session's states may have been computed on top of these; they keep the segment they stand on.
    ids = sa.select(turn_state.c.id).where(states)
    outside = sa.select(turn_state.c.id).where(turn_state.c.base_state.in_(ids), ~states)
    for row in conn.execute(outside).scalars().all():
        _detach(conn, row)
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


def _detach(conn: sa.Connection, row: int) -> None:
    values = checked(turn_state, conn.execute(sa.select(turn_state).where(turn_state.c.id == row)).one())
    update(conn, turn_state, values, base_state=None)


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
    """Delete edges without children, turns or state, from the leaves up; topmost nodes stay."""
    while candidates:
        at = candidates.pop()
        parent = conn.execute(sa.select(node.c.parent).where(node.c.id == at)).scalar_one_or_none()
        if parent is None:
            continue
        uses = [
            sa.select(node.c.id).where(node.c.parent == at),
            sa.select(turn_state.c.id).where(turn_state.c.node == at),
            sa.select(segment.c.id).where(segment.c.node == at),
        ]
        if all(conn.execute(query.limit(1)).first() is None for query in uses):
            conn.execute(node.delete().where(node.c.id == at))
            candidates.add(parent)
