"""How fast a model was, from the timings that turns are stored with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from kvloom_store import turns
from kvloom_store.schema import provenance, turn, turn_state
from kvloom_store.segments import provenance_of
from kvloom_store.turns import Turn

LAST = 64
"""Turns looked at: enough to even out, few enough to be of late."""

LONG_ENOUGH = 64
"""Tokens of a prefill from which its speed is that of the long ones that reuse stands in for."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Prefill on this machine, as this store's turns have timed it: tokens a second, over so many measurements of at
    least so many tokens each; None without any."""

    tokens_per_second: float | None = None
    measurements: int = 0
    at_least: int = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """The speed of prefill, tokens a second of replies (None: none was timed), and how many replies say so."""

    prefill: Speed = field(default_factory=Speed)
    reply: float | None = None
    replies: int = 0


def prefill(timed: Iterable[Turn]) -> Speed:
    """Prefill as it was timed: by long ones if there are any, since short ones take as long as a few more tokens do."""
    pairs = [(turn.timings["tokens"]["computed"], turn.timings["prefill"]) for turn in timed if _is_timed(turn)]
    at_least = LONG_ENOUGH if any(tokens >= LONG_ENOUGH for tokens, _ in pairs) else 1
    pairs = [pair for pair in pairs if pair[0] >= at_least]
    taken = sum(seconds for _, seconds in pairs)
    return Speed(sum(tokens for tokens, _ in pairs) / taken if taken else None, len(pairs), at_least)


def _is_timed(turn: Turn) -> bool:
    record = turn.timings.get("tokens", {})
    return bool(record.get("computed") and turn.timings.get("prefill"))


def of_root(conn: sa.Connection, root: int, cpu: str) -> Rates:
    """The rates of a model's last turns that were computed on a CPU of this kind."""
    seen = conn.execute(sa.select(provenance.c.id)).scalars().all()
    here = [row for row in seen if provenance_of(conn, row).cpu_capability == cpu]
    query = (
        sa.select(turn_state.c.turn)
        .join(turn, turn.c.id == turn_state.c.turn)
        .where(turn_state.c.root == root, turn_state.c.provenance.in_(here))
        .order_by(turn_state.c.id.desc())
        .limit(LAST)
    )
    said = [turns.get(conn, row) for row in dict.fromkeys(conn.execute(query).scalars())]
    # A reply that was chosen from some, or decoded beside others, was not generated one token after another.
    spoken = [pair for pair in map(_spoken, said) if pair[0] and pair[1] > 0]
    tokens, taken = sum(pair[0] for pair in spoken), sum(pair[1] for pair in spoken)
    return Rates(prefill(said), tokens / taken if taken else None, len(spoken))


def _spoken(said: Turn) -> tuple[int, float]:
    """How many tokens a turn generated after its first one, and in how many seconds."""
    timings = said.timings
    generated = timings.get("tokens", {}).get("generated", 0)
    return max(0, generated - 1), timings.get("total", 0.0) - timings.get("first_token", 0.0)
