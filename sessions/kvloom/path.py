"""A path of a conversation: its turns, what a model made of them, and the messages they say. It needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvloom.errors import InvalidText, NothingToDo
from kvloom_store import refs, turns
from kvloom_store.names import MAIN, Ref
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa


def path_to(conn: sa.Connection, turn: int | None, root: int) -> tuple[list[Turn], dict[int, TurnState]]:
    """The turns from the first one down to a turn, and the state of each to go on from, by the turn's row.

    Raises:
        CorruptRow: a damaged index hides one.
    """
    path = turns.path_to(conn, turn)
    states: dict[int, list[TurnState]] = {}
    for state in turns.states_of(conn, [each.row for each in path]):
        states.setdefault(state.turn, []).append(state)
    without = [each.row for each in path if each.row not in states and each.message.get("role") != "system"]
    if without:  # text that no model has read yet, most often: a system message's tokens come with the next one
        turns.check_listed(conn, without)
    best = {row: turns.best_state(some, root) for row, some in states.items()}
    return path, {row: state for row, state in best.items() if state is not None}


def tip_of(path: Sequence[Turn], states: Mapping[int, TurnState]) -> tuple[Turn | None, TurnState | None]:
    """The last turn, and the state to go on from: its own (a system turn has none: its tokens come with the next)."""
    return (path[-1], states.get(path[-1].row)) if path else (None, None)


@dataclass(frozen=True, slots=True)
class Said:
    """One message as the template is given it, and the turns that say it: several where a reply was continued."""

    message: dict[str, Any]
    turns: tuple[Turn, ...]


def said(path: Sequence[Turn]) -> list[Said]:
    """The messages of a path."""
    found: list[Said] = []
    dropped = ""
    for turn in path:
        # A reply stopped within a character ended in a stand-in for it, which the continuation replaces.
        stopped_in, dropped = dropped, turn.settings.get("dropped", "")  # of a cut turn's text it was left out
        if turn.continues and found and found[-1].message["role"] == "assistant":
            last = found[-1]
            earlier = (last.message["content"] + stopped_in).removesuffix(turn.settings.get("reopened", ""))
            found[-1] = Said({**last.message, "content": earlier + turn.text}, (*last.turns, turn))
        else:
            found.append(Said(dict(turn.message), (turn,)))
    return found


def merged(path: Sequence[Turn], states: Mapping[int, TurnState]) -> tuple[list[dict[str, Any]], int | None]:
    """The messages of a path as the template is given them, and where the tokens of the last reply begin (None if
    unknown, or if the path ends otherwise)."""
    messages = said(path)
    if not messages or messages[-1].message["role"] != "assistant":
        return [each.message for each in messages], None
    # Of a reply that was continued under another model, only its last turn has tokens under this one.
    starts = (states[turn.row].start for turn in messages[-1].turns if turn.row in states)
    return [each.message for each in messages], next(starts, None)


@dataclass(frozen=True, slots=True)
class Target:
    """A message that was named, the messages that follow it, and the name of the branch on which they do."""

    message: Said
    later: tuple[Said, ...]
    branch: str

    @property
    def text(self) -> str:
        """What it says now. Raises InvalidText where its content is not text."""
        content = self.message.message.get("content")
        if not isinstance(content, str):
            raise InvalidText("this message holds more than text, and cannot be edited")
        return content


def find(conn: sa.Connection, ref: Ref) -> Target:
    """The message at a ref; a reply that was continued is one, and a ref to a token names the message it is in.

    What follows is read on the branch the ref names, or else on the oldest one that holds the turn.

    Raises:
        NothingToDo: the ref names the very beginning.
        RefNotFound
    """
    point = refs.resolve(conn, ref)
    if point.turn is None:
        raise NothingToDo("there is no turn to edit at the very beginning", hint="kvloom log SESSION shows the turns")
    lines = {branch.name: branch.turn for branch in refs.branches(conn, point.session.row)}
    named = ref.point or MAIN
    names = [named] if named in lines else list(lines)
    for name in names:
        messages = said(turns.path_to(conn, lines[name]))
        for number, each in enumerate(messages):
            if point.turn in {turn.row for turn in each.turns}:
                return Target(each, tuple(messages[number + 1 :]), name)
    return Target(said(turns.path_to(conn, point.turn))[-1], (), MAIN)  # undone, so that no branch holds it
