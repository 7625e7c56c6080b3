"""Cut turns: a turn as it would be if it had ended at one of its tokens.

A cut turn is a sibling of the turn it was cut from, with the first tokens of that one. It adds no state: it stands
on the other's, up to where it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from kvloom_proto.records import Schedule
from kvloom_proto.scores import pack_scores, read_scores
from kvloom_store import fulltext, trie, turns
from kvloom_store.schema import branch, pin, tag, turn, turn_state
from kvloom_store.turns import Turn, TurnState

CUT_FROM = "cut_from"
"""The setting of a cut turn that names the turn it was cut from."""

CUT = "cut"
"""The finish reason of a cut reply."""


def is_cut(cut: Turn) -> bool:
    """Whether a turn was cut from another one."""
    return CUT_FROM in cut.settings


def add(
    conn: sa.Connection, original: Turn, state: TurnState, token: int, text: str, settings: Mapping[str, Any]
) -> Turn:
    """The turn ``original``, cut where ``token`` tokens of its path are kept (inside a write transaction).

    ``text`` is what it says up to there. If it was cut there before, that turn is found again.
    """
    if not state.start < token < state.end:
        raise ValueError(f"token {token} is not inside a turn of tokens {state.start} to {state.end}")
    known = _find(conn, original, state, token)
    if known is not None:
        return known
    made = turns.add_turn(
        conn,
        original.session,
        turns.get(conn, original.parent) if original.parent is not None else None,
        {"role": original.role, "content": text},
        continues=original.continues,
        finish_reason=CUT if original.role == "assistant" else None,
        settings={CUT_FROM: original.id, **settings},
    )
    state_end = min(token, state.state_end)
    turns.add_state(
        conn,
        made.row,
        state.root,
        state.tokens[: token - state.start],
        state.start,
        trie.position_at(conn, state.position, token),
        state_start=state_end,
        state_end=state_end,
        base_state=state.row,
        base_segment=state.segment if state.segment is not None else state.base_segment,
        schedule=Schedule(),
        provenance=state.provenance,
        hidden=None,
        hidden_dtype=None,
        scores=_first_scores(state, token - state.start),
    )
    return made


def _first_scores(state: TurnState, count: int) -> bytes | None:
    return None if state.scores is None else pack_scores(read_scores(state.scores, state.tokens)[:count])


def _find(conn: sa.Connection, original: Turn, state: TurnState, token: int) -> Turn | None:
    """The turn that was cut there from the same state before: other state of the same tokens has other bits."""
    where = (turn_state.c.base_state == state.row) & (turn_state.c.start == state.start) & (turn_state.c.end == token)
    for row in conn.execute(sa.select(turn_state.c.turn).where(where).order_by(turn_state.c.id)).scalars():
        found = turns.get(conn, row)
        if found.settings.get(CUT_FROM) == original.id:
            return found
    return None


def discard(conn: sa.Connection, row: int) -> None:
    """Take a cut turn away again, if nothing was said on it and no name points at it (inside a write transaction)."""
    uses = [
        sa.select(turn.c.id).where(turn.c.parent == row),
        sa.select(branch.c.id).where(branch.c.turn == row),
        sa.select(tag.c.id).where(tag.c.turn == row),
        sa.select(pin.c.id).where(pin.c.turn == row),
        sa.select(turn_state.c.id).where(
            turn_state.c.base_state.in_(sa.select(turn_state.c.id).where(turn_state.c.turn == row))
        ),
    ]
    found = turns.get(conn, row)
    if is_cut(found) and all(conn.execute(query.limit(1)).first() is None for query in uses):
        fulltext.remove(conn, {row: found.text})
        conn.execute(turn_state.delete().where(turn_state.c.turn == row))
        conn.execute(turn.delete().where(turn.c.id == row))
