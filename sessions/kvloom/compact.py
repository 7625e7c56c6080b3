"""Going on shorter: a new branch of the system prompt and a summary, or the last exchanges. The old branch stays.

The summary is asked for, and written, on a scratch branch that goes on from the stored conversation. The new branch
begins with that request and its answer, as an exchange like any other: every chat template takes it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from kvloom.binding import check_model
from kvloom.edit import again
from kvloom.errors import ContextOverflow, NothingToDo, SessionError
from kvloom.path import Said, path_to, said
from kvloom.planned import PlannedBranch
from kvloom.report import Added, Cost
from kvloom.steps import Given
from kvloom_store import refs
from kvloom_store.names import MAIN, Ref

if TYPE_CHECKING:
    from kvloom.engine import Progress
    from kvloom.run import Run
    from kvloom.session import Session

KEEP = 4
"""Exchanges that are kept where nothing else is said."""

SUMMARY_TOKENS = 400
"""The longest a summary may be, where nothing else is said."""

REQUEST = (
    "Summarise our conversation so far, for yourself: you will go on from your summary alone. "
    "Keep names, numbers, decisions and open questions. Write only the summary."
)


class Compaction:
    """A shorter branch that is planned: ``cost`` is what making it costs at most.

    With a summary, ``summarise`` first has it written; ``run`` makes the branch.
    """

    def __init__(
        self, session: Session, ref: Ref, *, keep: int, summary: bool, branch: str | None, max_tokens: int
    ) -> None:
        """Plan to go on from a ref with a ``summary`` of at most ``max_tokens`` and with the last ``keep`` exchanges.

        Raises:
            NothingToDo: there is nothing that would be left out.
            ContextOverflow: the request for a summary does not fit any more.
            and what ``PlannedBranch`` raises.
        """
        check_model(session)
        loom, root = session.loom, session.loom.root
        self._session = session
        self._branch = branch
        self._max_tokens = max_tokens
        with loom.database.read() as conn:
            point = refs.resolve(conn, ref)
            path, self._states = path_to(conn, point.turn, root)
            self._like = ref.point if point.branch is not None and ref.point else MAIN
            scratch = refs.free_name(conn, session.row.row, f"summary-of-{self._like}", itself=True)
        messages = said(path)
        self._system = messages.pop(0).turns[-1].row if messages and messages[0].message["role"] == "system" else None
        self._kept = _last(messages, keep)
        self._summary: Given | None = None
        self.request: PlannedBranch | None = None
        self.cost = Cost()
        if summary:
            self.request = self._ask(path[-1].row, scratch)
            max_tokens = self._max_tokens = min(max_tokens, loom.engine.context_limit - self.request.tokens)
            self.cost = self.request.cost + Cost(generated=max_tokens)
            stand_in = loom.engine.tokenizer(".", add_special_tokens=False)["input_ids"][-1:]
            self._summary = Given({"role": "assistant", "content": "."}, tuple(stand_in * max_tokens))
        plan = self._plan()
        self.tokens = plan.tokens
        self.cost += plan.cost
        self._summary = None

    def summarise(
        self, *, cancel: threading.Event | None = None, progress: Progress | None = None, **sampling: Any
    ) -> Run:
        """Have the summary written: iterate over the result for its pieces. Only where there is a ``request``."""
        if self.request is None:
            raise NothingToDo("no summary was asked for")
        self.request.run(cancel=cancel, progress=progress)
        sampling.setdefault("max_tokens", self._max_tokens)
        return self.request.branch.regenerate(cancel=cancel, progress=progress, **sampling)

    def run(self, *, cancel: threading.Event | None = None, progress: Progress | None = None) -> Added:
        """Make the shorter branch, with the summary that was written.

        Raises:
            SessionError: there is no summary yet, or it was interrupted.
        """
        if self.request is not None:
            self._summary = self._written(self.request.name)
        return self._plan().run(cancel=cancel, progress=progress)

    def _written(self, name: str) -> Given:
        """The summary, which is the last message of the scratch branch. Raises SessionError where it has no end yet."""
        loom, root = self._session.loom, self._session.loom.root
        with loom.database.read() as conn:
            tips = {branch.name: branch.turn for branch in refs.branches(conn, self._session.row.row)}
            path, states = path_to(conn, tips.get(name), root)
        last = said(path)[-1] if path else None
        if last is None or last.message["role"] != "assistant" or last.turns[-1].finish_reason == "interrupted":
            hint = f"kvloom continue {self._session.name}@{name} goes on with it" if last else "summarise() writes it"
            raise SessionError("the summary was not written to its end", hint=hint)
        return again(last, states)

    def _ask(self, at: int, name: str) -> PlannedBranch:
        try:
            return PlannedBranch(self._session, at, [Given({"role": "user", "content": REQUEST})], name, name)
        except ContextOverflow as error:
            error.hint = "leave out --summary, or summarise up to an earlier turn: SESSION@BRANCH~2"
            raise

    def _plan(self) -> PlannedBranch:
        """The shorter branch, with the summary (a stand-in for it, as long as it can be, before it is written)."""
        given = [again(each, self._states) for each in self._kept]
        if self._summary is not None:
            given = [Given({"role": "user", "content": REQUEST}), self._summary, *given]
        return PlannedBranch(self._session, self._system, given, self._branch, self._like)


def _last(messages: list[Said], keep: int) -> list[Said]:
    """The last exchanges: a user's message and all that follows it. Raises NothingToDo where none is left out."""
    begins = [number for number, each in enumerate(messages) if each.message["role"] == "user"]
    if len(begins) <= keep:
        what = f"there are {len(begins)} exchanges" if begins else "nothing was said yet"
        raise NothingToDo(f"{what}: there is nothing to leave out", hint="--keep says how many are kept")
    return messages[begins[-keep] :] if keep else []
