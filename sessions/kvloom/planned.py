"""A new branch whose turns are given: planned first, so that its cost can be told, and then made."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom.append import Append
from kvloom.binding import check_model
from kvloom.branch import Branch
from kvloom.commit import Commits
from kvloom.passes import KEYFRAME_SPACING
from kvloom.path import merged, path_to, tip_of
from kvloom.report import Added, Cost
from kvloom.steps import Given, cost_of, path_of, steps_of, stretches
from kvloom_store import outlook, refs, trie

if TYPE_CHECKING:
    from kvloom.engine import Progress
    from kvloom.session import Session


class PlannedBranch:
    """A branch that is planned and not made yet: ``cost`` says what ``run`` will have the model do.

    ``role`` is whose message it ends with: after a user's, ``branch.regenerate`` gets a reply.
    """

    def __init__(self, session: Session, at: int | None, given: Sequence[Given], name: str | None, like: str) -> None:
        """Plan to add the messages ``given`` behind the turn ``at`` (its row; None: at the very beginning).

        The branch will be called ``name``, or, if that is None, ``like`` with a number.

        Raises:
            RefExists, InvalidName: ``name`` cannot be had.
            ModelMismatch, ContextOverflow, SessionError: the messages do not go with the model or its template.
        """
        self.session = session
        self._loom = loom = session.loom
        self._like = like
        check_model(session)
        root = loom.root
        loom.flush()  # the cost must not depend on how far the writer has got
        with loom.database.read() as conn:
            self.name = name or refs.free_name(conn, session.row.row, like)
            refs.check_free(conn, session.row.row, self.name)
            path, states = path_to(conn, at, root)
            self._parent, self._tip = tip_of(path, states)
            position = self._tip.position if self._tip else None
            self._ids = trie.tokens_to(conn, position.node, position.offset) if position else []
        history, reply_start = merged(path, states)
        self._steps = steps_of(given, session.template(), loom.engine, history, self._ids, reply_start)
        self.role = str(given[-1].message["role"])
        self.tokens = self._steps[-1].end
        loom.engine.check_ids(path_of(self._ids, self._steps))
        tip = self._tip if self._tip and self._steps[0].start >= self._tip.state_end else None
        with loom.database.read() as conn:
            first = path_of(self._ids, stretches(self._steps)[0])
            seen = outlook.of_tokens(conn, root, first, tip, grid=KEYFRAME_SPACING, logits=False)
        self.cost: Cost = cost_of(self._steps, seen.held, seen.replayed)

    @property
    def branch(self) -> Branch:
        """The branch, once it is made. Raises RefNotFound before."""
        return self.session.branch(self.name)

    def run(
        self,
        *,
        compute: bool = True,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Make the branch: add its turns and compute their state.

        Stopped by ``cancel``, it keeps what was computed; the rest of the tokens is pending then, as all are without
        ``compute``. ``Session.warm`` computes them later.
        """
        with self._loom.database.write() as conn:
            row = refs.add_branch(conn, self.session.row.row, self.name, self._parent.row if self._parent else None)
        commits = Commits(self._loom, row)
        append = Append(
            self._loom, commits, self._parent, self._tip, self._ids, compute=compute, cancel=cancel, progress=progress
        )
        try:
            return append.run(self.session.name, self._steps)
        finally:
            if commits.branch.turn == row.turn:  # it failed before there was a turn
                with self._loom.database.write() as conn:
                    refs.remove_branch(conn, row.row)
