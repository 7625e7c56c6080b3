"""Taking a session away, with what nobody else stands on.

Text goes first, then state from the tips down, then the edges of the trie that lead nowhere any more: the reverse
of the order in which they were written.
"""

from __future__ import annotations

import sqlalchemy as sa

from kvloom_store import explorations, fulltext, segments, turns
from kvloom_store.checksum import checked, update
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import branch, journal, node, pin, segment, session, tag, turn, turn_state

BATCH = 500
"""Ids in one query."""


def remove_session(conn: sa.Connection, session_row: int) -> None:
    """Delete a session's rows, and the segments and nodes only it used (inside a write transaction)."""
    mine = sa.select(turn.c.id).where(turn.c.session == session_row)
    states = turn_state.c.turn.in_(mine)
    nodes = set(conn.execute(sa.select(turn_state.c.node).where(states)).scalars())
    held = set(conn.execute(sa.select(turn_state.c.segment).where(states)).scalars()) - {None}
    # Another session's states may have been computed on top of these; they keep the segment they stand on.
    ids = sa.select(turn_state.c.id).where(states)
    outside = sa.select(turn_state.c.id).where(turn_state.c.base_state.in_(ids), ~states)
    for row in conn.execute(outside).scalars().all():
        _detach(conn, row)
    explorations.remove_all(conn, session_row)
    conn.execute(journal.delete().where(journal.c.turn.in_(mine)))
    _remove_text(conn, session_row)
    for table in (branch, tag):
        conn.execute(table.delete().where(table.c.session == session_row))
    conn.execute(pin.delete().where(pin.c.turn.in_(mine)))
    # Children before parents: foreign keys are checked row by row.
    for table, owned in ((turn_state, states), (turn, turn.c.session == session_row)):
        rows = conn.execute(sa.select(table.c.id).where(owned).order_by(table.c.id.desc())).scalars().all()
        for row in rows:
            conn.execute(table.delete().where(table.c.id == row))
    conn.execute(session.delete().where(session.c.id == session_row))
    nodes |= _remove_segments(conn, held)
    remove_nodes(conn, nodes)


def _remove_text(conn: sa.Connection, session_row: int) -> None:
    try:
        rows = conn.execute(sa.select(turn.c.id).where(turn.c.session == session_row)).scalars().all()
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
