"""Which tokens of a path belong to which turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from kvloom_store import trie, turns
from kvloom_store.turns import Turn, TurnState


@dataclass(frozen=True, slots=True)
class Span:
    """A turn, what a model made of it, and the tokens [start, end) of the path that are its own.

    ``end`` lies before the state's own where a later turn's template rewrote history.
    """

    turn: Turn
    state: TurnState
    start: int
    end: int


def of_path(conn: sa.Connection, path: Sequence[Turn], root: int | None = None) -> list[Span]:
    """The turns of a path that have tokens on it, from its first token to its last.

    The tokens are those of the model of ``root``, if the last of these turns has any there; else those of the model
    that said that turn (or was the first to read it). Turns without a state of their own are left out: a system turn's
    tokens come with the next one.
    """
    states: dict[int, list[TurnState]] = {}
    for each in turns.states_of(conn, [turn.row for turn in path]):
        states.setdefault(each.turn, []).append(each)
    found: list[Span] = []
    last = next((states[turn.row] for turn in reversed(path) if turn.row in states), [])
    tries = [each.root for each in last]
    chosen = root if root in tries else tries[0] if tries else None
    for turn in reversed(path):
        state = turns.best_state(states.get(turn.row, ()), chosen) if chosen is not None else None
        if state is None:
            continue
        end = found[-1].start if found else state.end
        if state.start < end:
            found.append(Span(turn, state, state.start, end))
    return found[::-1]


def tokens_of(conn: sa.Connection, found: Sequence[Span]) -> list[int]:
    """All token ids of the path that spans are of."""
    return trie.tokens_to(conn, found[-1].state.position.node, found[-1].state.position.offset) if found else []


def containing(spans: Sequence[Span], token: int) -> Span:
    """The span that holds the token before the point where ``token`` tokens are kept."""
    return next(span for span in spans if span.start < token <= span.end)
