"""What bringing some tokens back will cost, before it is done: which state will be loaded, and what run again.

The rules are those of whoever brings state back: the state at a turn is the one its own segment holds; what was never
stored, or was damaged, is run again on top of the state it ran on; what is held beyond that must stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from kvloom_store import held, planner, restore, trie, turns
from kvloom_store.planner import Plan, StateDamaged
from kvloom_store.rows import RowBuffer
from kvloom_store.turns import TurnState


@dataclass(frozen=True, slots=True)
class Foreseen:
    """``held`` tokens will be there without computing anything new; ``replayed`` of them are run again."""

    held: int
    replayed: int


def foresee(
    conn: sa.Connection, root: int, ids: Sequence[int], tip: TurnState | None, *, verify: bool = False
) -> Foreseen:
    """What bringing back as much of ``ids`` as can be had will cost; ``tip`` is the state that must be gone on from.

    ``verify`` reads the state of ``tip``, and so finds what is damaged.
    """
    reached = 0 if tip is None else min(tip.state_end, len(ids))
    lost, plan = _down(conn, tip, reached, verify) if tip is not None else (0, None)
    replayed = lost + (plan.replayed if plan is not None else 0)
    if lost or (tip is not None and len(ids) <= tip.end):
        return Foreseen(reached, replayed)
    match = trie.match(conn, root, ids)
    if tip is not None and match.known <= tip.end:
        return Foreseen(reached, replayed)
    on = plan.rows[-1].segment if plan is not None and plan.rows else None
    found = held.longest(conn, match, at_most=len(ids), on=on, on_end=reached if on is not None else 0)
    if found is None or found.end <= reached:
        return Foreseen(reached, replayed)
    more = _loadable(conn, found.segment, found.end, verify=False)
    return Foreseen(reached, replayed) if more is None else Foreseen(found.end, more.replayed)


def _down(conn: sa.Connection, tip: TurnState, upto: int, verify: bool) -> tuple[int, Plan | None]:
    """From a turn down to state that can be loaded: how many tokens are lost on the way, and the plan to load it."""
    lost = 0
    state: TurnState | None = tip
    while state is not None:
        if upto > state.state_start:  # else it added no rows of its own
            plan = _loadable(conn, state.segment, upto, verify)
            if plan is not None:
                return lost, plan
            lost += state.state_end - state.state_start
            upto = state.state_start
        base = turns.base_of(conn, state)
        if base is None and upto:
            return lost, _loadable(conn, state.base_segment, upto, verify)
        state = base
    return lost, None


def _loadable(conn: sa.Connection, segment: int | None, upto: int, verify: bool) -> Plan | None:
    """How the state at ``upto`` of a segment would be loaded; None where it is not there."""
    if segment is None:
        return None
    try:
        links = restore.chain(conn, segment)
        layers = links[-1].manifest.layers
        plan = planner.plan(links, upto, layers)
        if verify:
            restore.load(conn, links, plan.rows, plan.windows, RowBuffer(layers, upto))
            if plan.keyframe is not None and plan.keyframe.segment is not None:
                restore.load_keyframe(conn, links, plan.keyframe)
    except StateDamaged:
        return None
    return plan
