"""Turns as they are listed: with what points at them, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvloom_store import cut, explorations, pins, refs, turns
from kvloom_store.turns import Turn

if TYPE_CHECKING:
    import sqlalchemy as sa


@dataclass(frozen=True, slots=True)
class TreeTurn:
    """A turn as ``log`` and ``tree`` show it; ``branches`` and ``tags`` are the names that point at it.

    ``score`` is what a search gave it; ``cut``: it is the beginning of another turn, up to a token that was named;
    ``pinned``: its state is never dropped.
    """

    id: str
    parent: str | None
    role: str
    text: str
    finish_reason: str | None
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    tokens: int
    score: float | None
    continues: bool
    created: int
    cut: bool = False
    pinned: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


def listed(conn: sa.Connection, session: int, shown: Sequence[Turn]) -> list[TreeTurn]:
    """Some turns of a session (by its row) as they are listed."""
    ids = {turn.row: turn.id for turn in shown}
    scores, pinned = explorations.scores(conn, session), pins.pinned(conn, session)
    lengths: dict[int, int] = {}
    for row, start, end in turns.token_counts(conn, session):
        lengths.setdefault(row, end - start)
    pointing: dict[int, list[str]] = {}
    for branch in refs.branches(conn, session):
        if branch.turn is not None:
            pointing.setdefault(branch.turn, []).append(branch.name)
    tagged: dict[int, list[str]] = {}
    for name, at in refs.tags(conn, session).items():
        tagged.setdefault(at, []).append(name)
    return [
        TreeTurn(
            id=turn.id,
            parent=ids.get(turn.parent) if turn.parent is not None else None,
            role=turn.role,
            text=turn.text,
            finish_reason=turn.finish_reason,
            branches=tuple(pointing.get(turn.row, ())),
            tags=tuple(tagged.get(turn.row, ())),
            tokens=lengths.get(turn.row, 0),
            score=scores.get(turn.row),
            continues=turn.continues,
            created=turn.created,
            cut=cut.is_cut(turn),
            pinned=turn.row in pinned,
        )
        for turn in shown
    ]
