"""A session: one conversation tree, its branches, tags and turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvloom.branch import Branch
from kvloom.errors import NothingToDo, RefNotFound
from kvloom_store import refs, turns
from kvloom_store.names import MAIN, Ref, parse_ref
from kvloom_store.refs import SessionRow
from kvloom_store.turns import Turn

if TYPE_CHECKING:
    from kvloom.loom import KVLoom


@dataclass(frozen=True, slots=True)
class TreeTurn:
    """A turn as ``log`` and ``tree`` show it; ``branches`` and ``tags`` are the names that point at it."""

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

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


class Session:
    """One conversation tree. Made by ``KVLoom.session``."""

    def __init__(self, loom: KVLoom, row: SessionRow) -> None:
        self._loom = loom
        self._row = row

    @property
    def name(self) -> str:
        """The session's name."""
        return self._row.name

    @property
    def row(self) -> SessionRow:
        """The session as the store has it."""
        return self._row

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was fixed when the session began: model, dtype, chat template, its options and clock."""
        return self._row.settings

    def branch(self, name: str = MAIN) -> Branch:
        """A branch by name. Raises RefNotFound."""
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, Ref(self.name, name, 0))
        if point.branch is None:
            raise RefNotFound("branch", name, [b.name for b in self.branches()])
        return Branch(self._loom, self, point.branch)

    def branches(self) -> list[Branch]:
        """Every branch, oldest first."""
        with self._loom.database.read() as conn:
            return [Branch(self._loom, self, row) for row in refs.branches(conn, self._row.row)]

    def fork(self, name: str, at: str | None = None) -> Branch:
        """A new branch at a ref (``"main~2"``, a turn id, a tag; None: main): one row, and no state.

        Raises:
            RefExists, RefNotFound, InvalidName
        """
        ref = self._ref(at)
        with self._loom.database.write() as conn:
            row = refs.add_branch(conn, self._row.row, name, refs.resolve(conn, ref).turn)
        return Branch(self._loom, self, row)

    def checkout(self, at: str) -> Branch:
        """The branch at a ref; a new one, named after main, where the ref is not a branch."""
        point = self._resolve(at)
        if point.branch is not None:
            return Branch(self._loom, self, point.branch)
        with self._loom.database.write() as conn:
            name = refs.free_name(conn, self._row.row, MAIN)
            return Branch(self._loom, self, refs.add_branch(conn, self._row.row, name, point.turn))

    def tag(self, name: str, at: str | None = None) -> None:
        """A name that stays at a turn. Raises RefExists, RefNotFound, NothingToDo."""
        point = self._resolve(at)
        if point.turn is None:
            raise NothingToDo("there is no turn to tag yet")
        with self._loom.database.write() as conn:
            refs.add_tag(conn, self._row.row, name, point.turn)

    def tree(self) -> list[TreeTurn]:
        """Every turn, oldest first: parents come before their children."""
        with self._loom.database.read() as conn:
            return self._described(conn, turns.of_session(conn, self._row.row))

    def log(self, at: str | None = None) -> list[TreeTurn]:
        """The turns from the first one down to a ref."""
        point = self._resolve(at)
        with self._loom.database.read() as conn:
            return self._described(conn, turns.path_to(conn, point.turn))

    def rename(self, name: str) -> None:
        """Give the session another name. Raises RefExists, InvalidName."""
        with self._loom.database.write() as conn:
            self._row = refs.rename_session(conn, self.name, name)

    def _ref(self, at: str | None) -> Ref:
        return parse_ref(f"{self.name}@{at}" if at else self.name)

    def _resolve(self, at: str | None) -> refs.Point:
        ref = self._ref(at)
        with self._loom.database.read() as conn:
            return refs.resolve(conn, ref)

    def _described(self, conn: Any, shown: Sequence[Turn]) -> list[TreeTurn]:
        ids = {turn.row: turn.id for turn in shown}
        lengths: dict[int, int] = {}
        for row, start, end in turns.token_counts(conn, self._row.row):
            lengths.setdefault(row, end - start)
        pointing: dict[int, list[str]] = {}
        for branch in refs.branches(conn, self._row.row):
            if branch.turn is not None:
                pointing.setdefault(branch.turn, []).append(branch.name)
        tagged: dict[int, list[str]] = {}
        for name, at in refs.tags(conn, self._row.row).items():
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
                score=None,
                continues=turn.continues,
                created=turn.created,
            )
            for turn in shown
        ]
