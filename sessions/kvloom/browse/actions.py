"""What the keys do to a session. Nothing here knows of a screen; each may be called from any thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvloom.errors import NothingToDo
from kvloom_store import refs
from kvloom_store.names import MAIN, Ref

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.branch import Branch
    from kvloom.loom import KVLoom
    from kvloom.run import Run
    from kvloom.session import Session

OTHERWISE = 0.8
"""The temperature of another reply where none was asked for: at 0 it would be the same one."""


class Saying:
    """Something to say after a turn (None: at the very beginning), or, without a text, another reply to what is there.

    ``place`` finds the branch to say it on, ``start`` begins the run, ``tidy`` takes the branch away again if it was
    made for a run that left nothing on it. ``fresh``: on a new branch even where one ends that could move on.
    """

    def __init__(
        self, session: Session, at: str | None, text: str | None, sampling: Mapping[str, Any], *, fresh: bool = False
    ) -> None:
        self.session = session
        self.at = at
        self.text = text
        self._sampling = dict(sampling)
        if text is None:
            self._sampling.setdefault("temperature", OTHERWISE)
        self._fresh = fresh or text is None
        self._made: Branch | None = None

    def place(self, loom: KVLoom) -> Branch:
        """The branch that ends at the turn and will move on; a new one where none does. Raises RefNotFound."""
        with loom.database.read() as conn:
            at = _row(conn, self.session, self.at)
        for branch in self.session.branches():
            if branch.row.turn == at and not self._fresh:
                return branch
        self._made = fork(loom, self.session, None, self.at)
        return self._made

    def start(self, branch: Branch, **options: Any) -> Run:
        """The run, to be iterated over in the same thread. Raises what ``Branch.stream`` and ``regenerate`` raise."""
        if self.text is None:
            return branch.regenerate(**options, **self._sampling)
        return branch.stream(self.text, **options, **self._sampling)

    def tidy(self) -> None:
        """Take back what was made for nothing."""
        if self._made is not None:
            self.session.discard(self._made)


def fork(loom: KVLoom, session: Session, name: str | None, at: str | None) -> Branch:
    """A new branch at a turn (None: the very beginning); without a name, the first free one after main.

    Raises:
        RefExists, RefNotFound, InvalidName
    """
    from kvloom.branch import Branch

    with loom.database.write() as conn:
        row = session.row.row
        chosen = refs.free_name(conn, row, MAIN) if name is None else name
        return Branch(loom, session, refs.add_branch(conn, row, chosen, _row(conn, session, at)))


def tag(session: Session, name: str, at: str | None) -> None:
    """Give a turn a name. Raises RefExists, RefNotFound, InvalidName, NothingToDo."""
    if at is None:
        raise NothingToDo("there is no turn to tag here", hint="go to a turn first")
    session.tag(name, at)


def accept(session: Session, at: str | None) -> str | None:
    """Move main to a turn. Where nothing else would lead to its old tip, a new branch does: that one's name.

    Raises:
        NothingToDo: main is there already, or this is the very beginning.
    """
    if at is None:
        raise NothingToDo("main cannot be moved to before the first turn", hint="go to a turn first")
    main = session.branch(MAIN)
    if main.row.turn == session.point(session.ref(at)).turn:
        raise NothingToDo("main is here already", hint="go to the turn that main should be at")
    return main.move_to(at, keep=True)


def remove(session: Session, name: str) -> bool:
    """Delete a branch; its turns stay in the tree. False where it moved meanwhile: then it is kept.

    Raises:
        NothingToDo: it is main.
        RefNotFound
    """
    if name == MAIN:
        raise NothingToDo("main is never deleted", hint="a moves it to another turn")
    return session.discard(session.branch(name))


def _row(conn: sa.Connection, session: Session, at: str | None) -> int | None:
    return None if at is None else refs.resolve(conn, Ref(session.name, at, 0)).turn
