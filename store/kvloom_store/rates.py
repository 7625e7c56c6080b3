"""How fast a model was, from the timings that replies are stored with."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kvloom_store import turns
from kvloom_store.schema import provenance, turn, turn_state
from kvloom_store.segments import provenance_of
from kvloom_store.turns import Turn, TurnState

LAST = 32
"""Replies looked at: enough to even out, few enough to be of late."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of prompts and of replies (None: none was timed), and how many replies say so."""

    prompt: float | None = None
    reply: float | None = None
    replies: int = 0


def of_root(conn: sa.Connection, root: int, cpu: str) -> Rates:
    """The rates of a model's last replies that were computed on a CPU of this kind."""
    query = (
        sa.select(turn_state.c.turn)
        .join(turn, turn.c.id == turn_state.c.turn)
        .where(turn_state.c.root == root, turn.c.role == "assistant")
        .order_by(turn_state.c.id.desc())
        .limit(LAST)
    )
    seen = conn.execute(sa.select(provenance.c.id)).scalars().all()
    here = {row for row in seen if provenance_of(conn, row).cpu_capability == cpu}
    prompt, reply, prompt_seconds, reply_seconds, count = 0, 0, 0.0, 0.0, 0
    for row in conn.execute(query).scalars().all():
        said = turns.get(conn, row)
        state = turns.best_state(turns.states_of(conn, [row]), root)
        timings = said.timings
        if state is None or state.provenance not in here or not {"first_token", "total", "restore"} <= timings.keys():
            continue
        count += 1
        reply += len(state.tokens) - 1
        reply_seconds += timings["total"] - timings["first_token"]
        asked = _asked(conn, said, root)
        if asked:
            prompt += asked
            prompt_seconds += timings["first_token"] - timings["restore"]
    return Rates(_rate(prompt, prompt_seconds), _rate(reply, reply_seconds), count)


def _asked(conn: sa.Connection, reply: Turn, root: int) -> int:
    """How many tokens of the message were run in the same run as the reply; of others it is not known how long."""
    if reply.parent is None or reply.continues:
        return 0
    parent = turns.get(conn, reply.parent)
    state: TurnState | None = turns.best_state(turns.states_of(conn, [parent.row]), root)
    together = parent.created >= reply.created - reply.timings["total"] * 1e6
    return state.state_end - state.state_start if state is not None and together else 0


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
