"""Computing state that is missing, before somebody waits for it: tokens that are pending, state that was never stored,
was dropped or is damaged."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.passes import KEYFRAME_SPACING
from kvloom.path import path_to
from kvloom.report import Added, Cost, Tokens
from kvloom.steps import Step, cost_of, path_of, stretches
from kvloom.translated import root_of, taken, written
from kvloom_store import outlook, refs, trie, turns
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.engine import Progress, TransformersEngine
    from kvloom.known_model import KnownModel
    from kvloom.loom import KVLoom
    from kvloom.session import Session
    from kvloom.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Missing:
    """What of a path's state is missing: the tokens to ``replay`` and to ``compute`` (``cost``), and ``unwritten``, the
    turns that are there as text alone: how many tokens they have is known when the template has written them."""

    cost: Cost
    unwritten: int

    def __bool__(self) -> bool:
        return bool(self.cost.to_run or self.unwritten)


@dataclass(frozen=True, slots=True)
class _Cold:
    """A path as far as warming is concerned: its ``pending`` turns, whose state does not reach their end, and the turns
    ``before`` them. ``tip`` is the state to go on from, ``ids`` are the tokens of the path before those turns.

    Of the pending turns, ``known`` are the steps; the others are there as text alone. ``again``: the one that is
    pending has a state, which was dropped.
    """

    before: list[Turn]
    pending: list[Turn]
    states: Mapping[int, TurnState]
    tip: TurnState | None
    ids: list[int]
    known: list[Step]
    again: bool


def missing(session: Session, turn: int | None, *, verify: bool = False, exact: bool = False) -> Missing:
    """What is missing of the state down to a turn (its row). It needs no model.

    ``verify`` reads what is stored, and so finds what is damaged. ``exact``: what is lossy counts as missing, and what
    was dropped is to be as it was.
    """
    with session.loom.database.read() as conn:
        root = root_of(conn, session.settings)
        if root is None:
            return Missing(Cost(), sum(each.role != "system" for each in turns.path_to(conn, turn)))
        return _missing(conn, root, _cold(conn, session, root, turn, exact), verify, exact)


def warm(
    session: Session,
    turn: int | None,
    name: str,
    *,
    exact: bool = False,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> Added:
    """Compute what is missing of the state down to a turn, and store it; returns when it is stored.

    ``name`` is how the report calls the point. What was dropped is computed anew. ``exact``: it is run again as it was,
    and what is lossy is replayed, and stored exactly again.
    Stopped by ``cancel``, it keeps every turn that was replayed and every pass of those that were computed.

    Raises:
        ModelMismatch: the model is not the session's own.
        EngineError: state is gone whose passes nobody knows.
        StoreError: it could not be stored.
    """
    from kvloom.append import Append
    from kvloom.binding import check_model
    from kvloom.commit import Commits

    began, loom = time.perf_counter(), session.loom
    check_model(session)
    root = loom.root
    loom.flush()
    with loom.database.read() as conn:
        cold = _cold(conn, session, root, turn, exact)
        branch = refs.branches(conn, session.row.row)[0]  # none is moved: the turns are there
    steps, parent = _steps(cold, session.template(), loom.engine), cold.before[-1] if cold.before else None
    added = Added(session.name, name, parent.id if parent else "", 0, 0, Tokens(), 0.0)
    with loom.engine.lock:
        loom.resumer.forget()  # everything is read, and so checked
        if cold.tip is not None and (exact or not steps):
            added = replace(added, **_brought_back(loom, cold.ids, cold.tip, exact, cancel, progress))
        if steps:
            commits = Commits(loom, branch, again=cold.again)
            append = Append(loom, commits, parent, cold.tip, cold.ids, exact=exact, cancel=cancel, progress=progress)
            replayed, added = added.tokens.replayed, append.run(session.name, steps)
            added = replace(added, tokens=replace(added.tokens, replayed=added.tokens.replayed + replayed))
    loom.flush()
    left = missing(session, turn, exact=exact).cost
    return replace(added, branch=name, pending=left.to_run, seconds=time.perf_counter() - began)


def unread(
    conn: sa.Connection,
    session: Session,
    root: int,
    turn: int | None,
    template: ChatTemplate,
    model: TransformersEngine | KnownModel,
) -> tuple[TurnState | None, list[int], int | None]:
    """Of a path whose last turns a model has not read: the last state it has there, the tokens that the whole path will
    have, and where those of the reply it ends with will begin. Nothing is run."""
    cold = _cold(conn, session, root, turn, False)
    steps = _steps(cold, template, model)
    last = steps[-1] if steps else None
    is_reply = last is not None and isinstance(last.turn, Turn) and last.turn.role == "assistant"
    return cold.tip, path_of(cold.ids, steps), last.start if last is not None and is_reply else None


def _brought_back(
    loom: KVLoom,
    ids: Sequence[int],
    tip: TurnState,
    exact: bool,
    cancel: threading.Event | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Load the state of a turn, replaying what is not there: what that cost, and what the user should be told."""
    from kvloom.engine import Cancelled

    try:
        live, account = loom.resumer.resume(
            ids[: tip.state_end], tip, room=0, logits=False, exact=exact, cancel=cancel, progress=progress
        )
    except Cancelled:
        return {}
    return {"tokens": Tokens(live.length - account.replayed, account.replayed), "notices": tuple(account.notices)}


def _cold(conn: sa.Connection, session: Session, root: int, turn: int | None, exact: bool) -> _Cold:
    path, states = path_to(conn, turn, root)
    count = next((n for n in range(len(path), 0, -1) if _is_whole(path[n - 1], states)), 0)
    tip = states[path[count - 1].row] if count else None
    ids = trie.tokens_to(conn, tip.position.node, tip.position.offset) if tip is not None else []
    pending = [each for each in path[count:] if each.role != "system"]
    own = states.get(pending[0].row) if pending else None
    if own is not None and own.state_end > own.state_start:  # it was stopped on its way
        tip = own
    own_steps = itertools.takewhile(lambda each: each.row in states, pending)
    known = [Step(each, states[each.row].start, tuple(states[each.row].tokens)) for each in own_steps]
    known += taken(conn, session.row.settings, root, pending[len(known) :], path_of(ids, known))
    again = tip is not None and not pending and not exact and turns.must_be_fresh(conn, tip, tip.state_end)
    if again and tip is not None:
        pending, known = path[-1:], [Step(path[-1], tip.start, tuple(tip.tokens))]
    elif exact and tip is not None:
        tip = turns.original_of(conn, tip)
    return _Cold([each for each in path if each not in pending], pending, states, tip, ids, known, again)


def _is_whole(turn: Turn, states: Mapping[int, TurnState]) -> bool:
    """Whether a turn's state reaches its end; the last token of a reply is always pending."""
    state = states.get(turn.row)
    return state is not None and state.state_end >= state.end - (turn.role == "assistant")


def _missing(conn: sa.Connection, root: int, cold: _Cold, verify: bool, exact: bool) -> Missing:
    first = stretches(cold.known)[:1]
    if not first and not cold.ids:
        return Missing(Cost(), len(cold.pending))
    ids = path_of(cold.ids, first[0]) if first else cold.ids
    seen = outlook.of_tokens(conn, root, ids, cold.tip, grid=KEYFRAME_SPACING, logits=False, verify=verify, exact=exact)
    return Missing(cost_of(cold.known, seen.held, seen.replayed), len(cold.pending) - len(cold.known))


def _steps(cold: _Cold, template: ChatTemplate, model: TransformersEngine | KnownModel) -> list[Step]:
    """What is to be computed: the tokens that turns have, or, where there is only text, as the template writes it."""
    rest = cold.pending[len(cold.known) :]
    if not rest:
        return cold.known
    ids, before = path_of(cold.ids, cold.known), [*cold.before, *cold.pending[: len(cold.known)]]
    begun = {step.turn.row: step.start for step in cold.known if isinstance(step.turn, Turn)}
    starts = {row: state.start for row, state in cold.states.items()} | begun
    return [*cold.known, *written(before, rest, starts, ids, template, model)]
