"""Turns that were said under another model, in the tokens of the one in use.

Under a model with the same tokenizer and template they are the very same tokens: those of a reply stay the ones that
were sampled. For another one the template writes the messages anew. A turn's tokens under one model say nothing of
those under another, so every model has its own, in its own trie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.binding import bindings
from kvloom.path import Said, said
from kvloom.steps import Given, Step, path_of, steps_of
from kvloom_store import cut, roots, trie, turns
from kvloom_store.journal import INTERRUPTED
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.engine import TransformersEngine
    from kvloom.known_model import KnownModel
    from kvloom.template import ChatTemplate

UNFINISHED = ("length", INTERRUPTED, cut.CUT)
"""Finish reasons of replies that may be gone on with: no token ends them."""


def root_of(conn: sa.Connection, settings: Mapping[str, Any]) -> int | None:
    """The trie of the model with these settings, if there is one yet."""
    model = roots.find_model(conn, bytes.fromhex(settings["model_digest"]))
    return roots.find_root(conn, model) if model is not None else None


def taken(
    conn: sa.Connection, settings: Mapping[str, Any], root: int, said_turns: Sequence[Turn], ids: Sequence[int]
) -> list[Step]:
    """The leading ones of some turns, after the tokens ``ids``, with the tokens they have under another of a session's
    models that has the tokenizer and the template of the model of ``root``; none where those do not go on from ``ids``.
    """
    if len(models := bindings(settings)) == 1 or not said_turns:
        return []
    tries = {root_of(conn, each): (each["tokenizer"], each["template_digest"]) for each in models}
    found: list[Step] = []
    for other, reads in tries.items():
        if other not in (None, root) and reads == tries.get(root):
            steps = _under(conn, other, said_turns, ids)
            found = max(found, steps, key=len)
    return found


def _under(conn: sa.Connection, root: int | None, said_turns: Sequence[Turn], ids: Sequence[int]) -> list[Step]:
    states: dict[int, list[TurnState]] = {}
    for each in turns.states_of(conn, [turn.row for turn in said_turns]):
        states.setdefault(each.turn, []).append(each)
    path, steps = list(ids), list[Step]()
    for turn in said_turns:
        state = turns.best_state(states.get(turn.row, ()), root) if root is not None else None
        if state is None or state.start > len(path):
            break
        if trie.tokens_to(conn, state.position.node, state.position.offset)[: state.start] != path[: state.start]:
            break
        path[state.start :] = state.tokens
        steps.append(Step(turn, state.start, tuple(state.tokens)))
    return steps


def written(
    before: Sequence[Turn],
    rest: Sequence[Turn],
    starts: Mapping[int, int],
    ids: Sequence[int],
    template: ChatTemplate,
    model: TransformersEngine | KnownModel,
) -> list[Step]:
    """Turns after the path ``before`` (whose tokens are ``ids``) as the template writes their messages; ``starts`` are
    where the tokens of turns begin, by their rows.

    The tokens of a reply that was continued are all in its last turn, as a system message's are in the next one: where
    one ended and the next began, the text is not parted into tokens.
    """
    path, steps, messages = list(ids), list[Step](), said([*before, *rest])
    there = {turn.row for turn in before}
    first = next((n for n, each in enumerate(messages) if each.turns[-1].row not in there), len(messages))
    for number, each in enumerate(messages[first:], first):
        if each.message["role"] == "system":
            continue
        history = [one.message for one in messages[:number]]
        begun = next((starts[turn.row] for turn in each.turns if turn.row in starts), None)
        path = path if begun is None else path[:begun]  # what is written of its beginning is written again, as a whole
        start = _reply_start(messages[number - 1], starts, steps) if number else None
        step = steps_of([Given(each.message)], template, model, history, path, start)[0]
        if each.turns[-1].finish_reason in UNFINISHED and step.tokens[-1:] and step.tokens[-1] in model.eos_ids:
            step = replace(step, tokens=step.tokens[:-1])
        if step.tokens:
            steps.append(replace(step, turn=each.turns[-1]))
            path = path_of(path, steps[-1:])
    return steps


def _reply_start(before: Said, starts: Mapping[int, int], steps: Sequence[Step]) -> int | None:
    """Where the tokens of the message before begin, if that is a reply."""
    if before.message["role"] != "assistant":
        return None
    for step in steps[-1:]:
        if step.turn is before.turns[-1]:
            return step.start
    return next((starts[turn.row] for turn in before.turns if turn.row in starts), None)
