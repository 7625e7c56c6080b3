"""Adding turns whose text is given: their state is computed, and nothing is generated."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from kvloom.commit import Commits, Standing, compute_anew
from kvloom.engine import Cancelled, Progress
from kvloom.report import Added, Tokens
from kvloom.steps import NewTurn, Step, path_of, stretches
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    from kvloom.live import LiveState
    from kvloom.loom import KVLoom


class Append:
    """One run over some steps: adds the turns to the branch that ``commits`` is on, each with its state.

    ``ids`` are the tokens of the path down to ``parent``, whose state is ``tip``. Stopped by ``cancel``, or told not to
    ``compute`` at all, it adds the rest of the turns as tokens that are pending: no turn is lost.
    """

    def __init__(
        self,
        loom: KVLoom,
        commits: Commits,
        parent: Turn | None,
        tip: TurnState | None,
        ids: Sequence[int],
        *,
        compute: bool = True,
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._loom = loom
        self._commits = commits
        self._turn = parent
        self._tip = tip
        self._ids = list(ids)
        self._computes = compute
        self._exact = exact
        self._cancel = cancel
        self._progress = progress
        self._tokens = Tokens()
        self._noted = Tokens()
        self._from = 0
        self._interrupt: KeyboardInterrupt | None = None

    def run(self, session: str, steps: Sequence[Step]) -> Added:
        """Do it, once. A KeyboardInterrupt is raised again when all turns are there."""
        began = time.perf_counter()
        with self._loom.engine.lock:
            for part in stretches(steps):
                live = self._bring_back(part)
                self._from = live.length if live is not None else 0
                for step in part:
                    self._add(step, live, part[-1].end)
        if self._interrupt is not None:
            raise self._interrupt
        return Added(
            session=session,
            branch=self._commits.branch.name,
            turn=self._turn.id if self._turn else "",
            turns=len(steps),
            pending=len(self._ids) - (self._tip.state_end if self._tip else 0),
            tokens=self._tokens,
            seconds=time.perf_counter() - began,
            notices=tuple(dict.fromkeys(self._commits.notices)),
        )

    def _bring_back(self, part: Sequence[Step]) -> LiveState | None:
        """A live state that holds what is held of a stretch's path; None if nothing is to be run, or any more."""
        if not self._computes:
            return None
        tip, first = self._tip, part[0]
        own = tip is not None and isinstance(first.turn, Turn) and tip.turn == first.turn.row
        # Where the template rewrote history, the state before is not a beginning of this path any more.
        rewritten = tip is not None and first.start < tip.state_end and not own
        try:
            live, account = self._loom.resumer.resume(
                path_of(self._ids, part),
                None if rewritten else tip,
                room=1,
                logits=False,
                exact=self._exact,
                cancel=self._cancel,
                progress=self._progress,
            )
            anew = 0
            if tip is not None and self._turn is not None and not (own or rewritten) and first.start >= tip.end:
                there = self._commits.branch
                anew = compute_anew(
                    self._loom, there, self._turn, tip, path_of(self._ids, part), live, cancel=self._cancel
                )
        except (Cancelled, KeyboardInterrupt) as error:
            self._stop(error)
            return None
        self._commits.notices += account.notices
        known = min(first.start, len(self._ids)) if self._tokens != Tokens() else 0  # counted with what came before
        reused = max(0, live.length - account.replayed - anew - known)
        self._tokens = replace(
            self._tokens,
            reused=self._tokens.reused + reused,
            replayed=self._tokens.replayed + account.replayed,
            computed=self._tokens.computed + anew,
        )
        return live

    def _add(self, step: Step, live: LiveState | None, last: int) -> None:
        """Add one turn, computed as far as the run gets; the stretch ends at position ``last``."""
        self._ids[step.start :] = step.tokens
        turn, passes, began = step.turn, [], time.perf_counter()
        if not step.tokens:  # a system turn: its tokens come with the next one
            assert isinstance(turn, NewTurn)
            self._turn, self._tip = self._commits.add_bare(turn, self._turn), None
            return
        stands: Standing | None = None
        if live is None or not self._computes:
            live = None
        elif step.end <= live.length:
            link = next(link for link in live.chain if link.start < step.end <= link.end)
            hidden = live.hidden if step.end == live.length else None
            live, stands = None, Standing(link.handle, step.end, hidden)
        else:
            passes = self._prefill(live, step.end, last)
        if isinstance(turn, NewTurn):
            turn = replace(turn, timings={"prefill": time.perf_counter() - began, "tokens": self._note()})
        elif live is None and stands is None:  # the turn is there, and nothing new is known of it
            return
        self._turn, self._tip = self._commits.add(
            turn, self._turn, self._tip, self._ids, step.start, live, passes, stands=stands
        )

    def _prefill(self, live: LiveState, end: int, last: int) -> list[tuple[int, int]]:
        """Run the tokens up to ``end`` that are not held; the passes that ran, also if it was stopped."""
        start, engine, told = live.length, self._loom.engine, self._progress
        progress = None if told is None else lambda done, _: told(start + done - self._from, last - self._from)
        try:
            engine.prefill(live, self._ids[start:end], cancel=self._cancel, progress=progress)
        except (Cancelled, KeyboardInterrupt) as error:
            self._stop(error)
        self._tokens = replace(self._tokens, computed=self._tokens.computed + live.length - start)
        return [p for p in engine.passes(start, end) if p[1] <= live.length]

    def _stop(self, error: BaseException) -> None:
        self._computes = False
        self._interrupt = error if isinstance(error, KeyboardInterrupt) else None

    def _note(self) -> dict[str, int]:
        """What was not noted with an earlier turn."""
        new = {name: value - getattr(self._noted, name) for name, value in asdict(self._tokens).items()}
        self._noted = self._tokens
        return new
