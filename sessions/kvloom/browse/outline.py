"""What the panes show of a session: read in a fixed number of queries, whatever the session's size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kvloom.picture.layout import Place, layout
from kvloom.shown import short_ids
from kvloom_store import turns

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn
    from kvloom.loom import KVLoom


@dataclass(frozen=True)
class Outline:
    """A session's turns in rows: row 0 is the very beginning, turn ``places[n]`` stands in row n + 1.

    ``empty`` are the branches at the very beginning, ``held`` the ids of the turns whose state is held.
    """

    name: str
    places: Sequence[Place[TreeTurn]]
    short: Callable[[str | None], str]
    empty: Sequence[str] = ()
    held: Collection[str] = ()

    @cached_property
    def rows(self) -> Mapping[str | None, int]:
        """The row of each turn's id."""
        return {None: 0, **{place.node.id: row for row, place in enumerate(self.places, 1)}}

    def __len__(self) -> int:
        return len(self.places) + 1

    def turn(self, row: int) -> TreeTurn | None:
        """The turn in a row; None is the very beginning."""
        return self.places[row - 1].node if row else None

    def id(self, row: int) -> str | None:
        """The id of the turn in a row."""
        return self.places[row - 1].node.id if row else None

    def above(self, row: int) -> int:
        """The row of the parent; the very beginning is its own."""
        above = self.places[row - 1].above if row else None
        return 0 if above is None else above + 1

    def below(self, row: int) -> int:
        """How many rows hang below a row: those that follow it."""
        return self.places[row - 1].below if row else len(self.places)

    def branches(self, row: int) -> Sequence[str]:
        """The branches that end in a row."""
        turn = self.turn(row)
        return turn.branches if turn is not None else self.empty

    def is_held(self, turn: TreeTurn) -> bool:
        """Whether a turn's state is held. One without tokens of its own has none: they come with the next turn."""
        return not turn.tokens or turn.id in self.held

    def path(self, row: int) -> list[TreeTurn]:
        """The turns from the first one down to a row."""
        up = []
        while row:
            up.append(self.places[row - 1].node)
            row = self.above(row)
        return up[::-1]

    def find(self, words: str) -> list[int]:
        """The rows whose turn holds some words, in its text, its role, its id or its names; no case."""
        wanted = words.strip().casefold()
        return [row for row, place in enumerate(self.places, 1) if wanted in _haystack(place.node)] if wanted else []

    def part(self, first: int, second: int) -> tuple[list[TreeTurn], list[TreeTurn], list[TreeTurn]]:
        """What two paths share, and how each of them goes on."""
        one, other = self.path(first), self.path(second)
        same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a.id != b.id), None)
        shared = min(len(one), len(other)) if same is None else same
        return one[:shared], one[shared:], other[shared:]


def _haystack(turn: TreeTurn) -> str:
    return "\n".join([turn.text, turn.role, turn.id, *turn.branches, *turn.tags]).casefold()


def read(loom: KVLoom, name: str) -> Outline:
    """A session as it stands now. Raises StoreError and its kinds."""
    session = loom.find(name)
    found = session.tree()
    tips = {branch for turn in found for branch in turn.branches}
    empty = [branch.name for branch in session.branches() if branch.name not in tips]
    with loom.database.read() as conn:
        short = short_ids(conn, session.row.row)
        held = turns.held(conn, session.row.row)
    return Outline(session.name, layout(found), short, empty, held)
