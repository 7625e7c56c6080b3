"""What bringing state back would cost, foretold from rows alone: nothing is run, and no blob read unless asked for.

It follows what a resume does (``kvloom.resume``): from a turn's state down to what it stands on until some can be
loaded, then on to what is held beyond it. What is damaged inside a blob shows only where that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from kvloom_store import held, loading, planner, restore, segments, trie, turns
from kvloom_store.planner import Plan, StateDamaged
from kvloom_store.rows import RowBuffer
from kvloom_store.schema import chunk
from kvloom_store.turns import TurnState


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of some tokens ``known`` ones stand in the trie, ``reused`` ones are loaded, ``replayed`` ones are run again as
    recorded. ``held`` will be there without computing anything new.

    ``one_by_one`` of the replayed ones are run one a pass. ``missing`` are the turn states whose own is not held, the
    newest first. ``gone``: state further down is not held either, and nothing says how it was computed. ``dropped``:
    the state of the tip was dropped, so that what is not held of its tokens is computed anew.
    """

    known: int = 0
    reused: int = 0
    replayed: int = 0
    one_by_one: int = 0
    missing: tuple[int, ...] = ()
    gone: bool = False
    dropped: bool = False
    held: int = 0


def of_tokens(
    conn: sa.Connection,
    root: int,
    ids: Sequence[int],
    tip: TurnState | None,
    *,
    grid: int,
    logits: bool = True,
    verify: bool = False,
    exact: bool = False,
) -> Outlook:
    """What a run over ``ids`` would find, if it went on from ``tip`` (None: from whatever is held of them).

    ``ids`` begin with the tip's tokens, or are the first of them. ``grid`` cuts passes that nobody recorded.
    ``logits``: the run needs those of the last token. ``verify`` reads the state of the tip, and so finds what is
    damaged. ``exact``: what was dropped, or is held with loss only, is to be run again as recorded.
    """
    match = trie.match(conn, root, ids)
    tip = turns.original_of(conn, tip) if exact and tip is not None else tip
    dropped = tip is not None and not exact and turns.must_be_fresh(conn, tip, _wanted(tip, ids, logits))
    tip = None if dropped else tip
    length, plan, gone = 0, None, False
    missing: list[TurnState] = []
    if tip is not None:
        length, plan, missing, gone = _below(conn, tip, _wanted(tip, ids, logits), grid, verify, exact)
    if not missing and not gone and (tip is None or min(len(ids), match.known) > tip.end):
        plan = _beyond(conn, match, ids, length, plan, grid, logits) or plan
        length = plan.position if plan is not None else length
    steps = [(step.start, step.end) for step in plan.replay] if plan is not None else []
    if not gone:
        steps += [each for state in missing for each in state.schedule.each()]
    replayed = sum(end - start for start, end in steps)
    singles = sum(end - start == 1 for start, end in steps)
    lost = tuple(state.row for state in missing)
    # Of a turn that was left in its middle, more is run again than is kept.
    return Outlook(match.known, max(0, length - replayed), replayed, singles, lost, gone, dropped, held=length)


def _wanted(tip: TurnState, ids: Sequence[int], logits: bool) -> int:
    """How much of a tip is brought back: for logits without its last hidden state, its last token is run again."""
    upto = min(tip.state_end, len(ids))
    known = upto == tip.state_end and tip.hidden is not None
    return upto - 1 if logits and upto == len(ids) and not known else upto


def _below(
    conn: sa.Connection, tip: TurnState, upto: int, grid: int, verify: bool, exact: bool
) -> tuple[int, Plan | None, list[TurnState], bool]:
    """From a tip down to state that can be loaded: the length it has then, the plan, what must be run again on it."""
    length = upto
    missing: list[TurnState] = []
    state: TurnState | None = tip
    while state is not None:
        if upto > state.state_start:
            plan = _loadable(conn, state.segment, upto, grid, verify, exact)
            if plan is not None:
                return length, plan, missing, False
            if state.schedule.unknown:
                return 0, None, missing, True
            missing.append(state)
            upto = state.state_start
        below = turns.base_of(conn, state)
        if below is None:
            plan = _loadable(conn, state.base_segment, upto, grid, verify, exact)
            return (length, plan, missing, False) if plan is not None or upto == 0 else (0, None, missing, True)
        state = below
    raise AssertionError("unreachable: the loop ends where there is no base")


def _beyond(
    conn: sa.Connection,
    match: trie.Match,
    ids: Sequence[int],
    length: int,
    plan: Plan | None,
    grid: int,
    logits: bool,
) -> Plan | None:
    """What is held beyond a point: the same words said before, or another session's beginning."""
    on = plan.rows[-1].segment if plan is not None and plan.rows else None
    exact = on is None or not segments.is_lossy(conn, on)
    found = held.longest(conn, match, at_most=len(ids), on=on, on_end=length if on is not None else 0, exact=exact)
    if found is None:
        return None
    end = found.end - (logits and found.end == len(ids) and held.hidden_at(conn, found) is None)
    return _loadable(conn, found.segment, end, grid, exact=exact) if end > length else None


def _loadable(
    conn: sa.Connection, segment: int | None, upto: int, grid: int, verify: bool = False, exact: bool = False
) -> Plan | None:
    """How the first ``upto`` tokens of a segment's chain would be brought back; None if they are not all held."""
    if segment is None:
        return None
    try:
        links = restore.chain(conn, segment)
        layers = links[-1].manifest.layers
        plan = planner.plan(links, upto, layers, grid=grid)
        if exact:
            planner.check_exact(links, plan.rows)
        if verify:
            loading.load(conn, links, plan.rows, plan.windows, RowBuffer(layers, upto))
            if plan.keyframe is not None and plan.keyframe.segment is not None:
                restore.load_keyframe(conn, links, plan.keyframe)
    except StateDamaged:
        return None
    read = [link for link in links if link.id in {each.segment for each in plan.rows}]
    query = sa.select(chunk.c.segment, sa.func.count().label("chunks")).where(
        chunk.c.segment.in_([link.id for link in read])
    )
    there = {row.segment: row.chunks for row in conn.execute(query.group_by(chunk.c.segment))}
    return plan if all(there.get(link.id, 0) >= len(link.manifest.chunks) for link in read) else None
