"""A session: one conversation tree, its branches, tags and turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvloom.branch import Branch
from kvloom.errors import NothingToDo, RefNotFound
from kvloom_store import cut, refs, spans, trie, turns
from kvloom_store.names import MAIN, Ref, parse_ref
from kvloom_store.refs import SessionRow
from kvloom_store.spans import Span
from kvloom_store.turns import Turn

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.loom import KVLoom
    from kvloom.partial import Partial
    from kvloom.tokens import Decoder


@dataclass(frozen=True, slots=True)
class TreeTurn:
    """A turn as ``log`` and ``tree`` show it; ``branches`` and ``tags`` are the names that point at it.

    ``cut``: it is the beginning of another turn, up to a token that was named.
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

        At a token (``"main:1234"``) inside a turn the branch begins with that turn cut there, which is one row more
        and stands on the same state.

        Raises:
            RefExists, RefNotFound, InvalidName
            EngineError, ModelMismatch: a turn would have to be cut, and its tokenizer is not here.
        """
        ref = self._ref(at)
        with self._settled(ref) as (conn, turn):
            row = refs.add_branch(conn, self._row.row, name, turn)
        return Branch(self._loom, self, row)

    def checkout(self, at: str) -> Branch:
        """The branch at a ref; a new one, named after main, where the ref is not a branch."""
        ref = self._ref(at)
        point = self._loom.resolve(ref)
        if point.branch is not None:
            return Branch(self._loom, self, point.branch)
        with self._settled(ref) as (conn, turn):
            name = refs.free_name(conn, self._row.row, MAIN)
            return Branch(self._loom, self, refs.add_branch(conn, self._row.row, name, turn))

    def tag(self, name: str, at: str | None = None) -> None:
        """A name that stays at a turn. Raises RefExists, RefNotFound, NothingToDo."""
        ref = self._ref(at)
        if self._loom.resolve(ref).turn is None:
            raise NothingToDo("there is no turn to tag yet")
        with self._settled(ref) as (conn, turn):
            assert turn is not None
            refs.add_tag(conn, self._row.row, name, turn)

    def tree(self) -> list[TreeTurn]:
        """Every turn, oldest first: parents come before their children."""
        with self._loom.database.read() as conn:
            return self._described(conn, turns.of_session(conn, self._row.row))

    def log(self, at: str | None = None) -> list[TreeTurn]:
        """The turns from the first one down to a ref; the last one ends at its token, if it names one.

        Where that turn's tokenizer is not here (``tokenizer`` is None), its text is told whole.
        """
        ref = self._ref(at)
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, ref)
            shown = self._described(conn, turns.path_to(conn, point.turn))
            if point.token is None:
                return shown
            span = _span(conn, point)
            text = shown[-1].text if self.tokenizer is None else self._partial(conn, span, point.token).text
        tokens, reason = point.token - span.state.start, cut.CUT if span.turn.role == "assistant" else None
        last = replace(
            shown[-1], text=text, tokens=tokens, finish_reason=reason, branches=(), tags=(), cut=True, score=None
        )
        return [*shown[:-1], last]

    @cached_property
    def tokenizer(self) -> Decoder | None:
        """What turns this session's token ids into text; None if it cannot be had without loading the model."""
        from kvloom.tokens import tokenizer_of

        return tokenizer_of(self._loom, self.settings)

    def discard(self, branch: Branch) -> bool:
        """Take a branch away, if it is still where it was when ``branch`` was read; whether it was. Turns stay."""
        with self._loom.database.write() as conn:
            point = refs.resolve(conn, Ref(self.name, branch.name, 0))
            if point.branch is None or point.branch != branch.row:
                return False
            refs.remove_branch(conn, point.branch.row)
            if point.turn is not None:
                cut.discard(conn, point.turn)
            return True

    def rename(self, name: str) -> None:
        """Give the session another name. Raises RefExists, InvalidName."""
        with self._loom.database.write() as conn:
            self._row = refs.rename_session(conn, self.name, name)

    def _ref(self, at: str | None) -> Ref:
        return parse_ref(f"{self.name}@{at}" if at else self.name)

    @contextmanager
    def _settled(self, ref: Ref) -> Iterator[tuple[sa.Connection, int | None]]:
        """A write transaction, and the turn a ref points at, made now if it names a token inside another turn."""
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, ref)
        if point.token is None:
            with self._loom.database.write() as conn:
                yield conn, refs.resolve(conn, ref).turn
            return
        from kvloom.tokens import needed_tokenizer

        if self.tokenizer is None:
            self.tokenizer = needed_tokenizer(self._loom, self.settings)
        with self._loom.database.read() as conn:
            span = _span(conn, point)
            said = self._partial(conn, span, point.token)
        with self._loom.database.write() as conn:
            yield conn, cut.add(conn, span.turn, span.state, point.token, said.text, said.settings).row

    def _partial(self, conn: sa.Connection, span: Span, token: int) -> Partial:
        from kvloom.partial import partial

        assert self.tokenizer is not None
        state = span.state
        before = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.start]
        return partial(self.tokenizer, span.turn, state.tokens, token - state.start, before)

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
                cut=cut.is_cut(turn),
            )
            for turn in shown
        ]


def _span(conn: sa.Connection, point: refs.Point) -> Span:
    """The turn a point is inside of, with its tokens."""
    return spans.of_path(conn, turns.path_to(conn, point.turn))[-1]
