"""Is a store whole: every row's checksum, the trie, every segment, and what the tables say of each other.

Read table by table, without the code that restores, so that the same mistake is not made twice.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from exact import harness
from kvloom_store import schema, trie
from kvloom_store.checksum import checked, digest, row_checksum
from kvloom_store.schema import branch, chunk, node, segment, tag, turn, turn_state


def check_rows(conn: sa.Connection) -> int:
    """Every row of every table has the checksum of what it says; how many there are."""
    count = 0
    for table in schema.metadata.tables.values():
        for row in conn.execute(sa.select(table)):
            count += 1
            if table is chunk:
                values = {**row._mapping, "blob": digest(row.blob)}
                assert values.pop("checksum") == row_checksum(chunk, values)
            else:
                checked(table, row)
    return count


def check(conn: sa.Connection, *, crashed: bool = False) -> int:
    """All of it; how many rows there are. ``crashed``: state may be missing, and segments may be left half written."""
    count = check_rows(conn)
    nodes = {row.id: row for row in conn.execute(sa.select(node))}
    for row in nodes.values():
        path = trie.tokens_to(conn, row.id, row.length)
        assert digest(trie.pack_tokens(path)) == row.chain_hash
        assert len(path) == row.start + row.length
        if row.parent is not None:
            assert row.first_token == path[row.start]
            assert row.start == nodes[row.parent].start + row.parent_offset
    for row in conn.execute(sa.select(segment)).all():
        assert crashed or row.complete == 1
        if row.complete == 1:
            harness.stored_rows(conn, row.id)
        at = nodes[row.node]
        assert at.start < row.end <= at.start + at.length, "a segment's last token is in its node"
    complete = set(conn.execute(sa.select(segment.c.id).where(segment.c.complete == 1)).scalars())
    for row in conn.execute(sa.select(turn_state)).all():
        assert trie.tokens_to(conn, row.node, row.offset)[row.start :] == trie.unpack_tokens(row.tokens)
        assert row.segment is None or row.segment in complete, "a turn waits for the whole of its segment"
        assert crashed or row.dropped or (row.segment is None) == (row.state_start == row.state_end)
    _check_names(conn)
    return count


def _check_names(conn: sa.Connection) -> None:
    """Names lead to turns of their session, and a turn's parent is an older one of the same."""
    turns: dict[int, Any] = {row.id: row for row in conn.execute(sa.select(turn.c.id, turn.c.session, turn.c.parent))}
    for row in turns.values():
        assert row.parent is None or (row.parent < row.id and turns[row.parent].session == row.session)
    for table in (branch, tag):
        for row in conn.execute(sa.select(table.c.session, table.c.turn)):
            assert row.turn is None or turns[row.turn].session == row.session
