"""One run of the model on a branch: bring state back, run the new tokens, generate, commit.

Turns commit at once, each with its schedule; their state is handed to the writer afterwards. The user's turn
commits when its tokens have been run, the reply when it has ended, however it ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvloom.commit import Addition, Commits, commit_all, compute_anew
from kvloom.engine import Cancelled, Progress
from kvloom.errors import SessionError
from kvloom.journal import Journal
from kvloom.passes import schedule_of
from kvloom.reading import Account
from kvloom.report import Added, Reply, Restored, Seconds, Tokens
from kvloom.sampling import SamplingSettings, fresh_seed
from kvloom.scores import TokenScore
from kvloom.steps import NewTurn
from kvloom.textstream import TextStream
from kvloom_store.journal import INTERRUPTED
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import torch

    from kvloom.live import LiveState
    from kvloom.loom import KVLoom


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run, apart from how to sample. ``before`` is what was computed of the path for this run already."""

    reuse: bool = True
    require_reuse: bool = False
    exact: bool = False
    cancel: threading.Event | None = None
    progress: Progress | None = None
    before: Added | None = None


class Run:
    """Iterate over it for the pieces of text; afterwards ``reply`` says how it went. It runs once.

    ``parent`` is the turn to go on from and ``tip`` its state; ``ids`` are the tokens of the whole path, of which
    ``kept`` are the parent's own. ``message`` is the new turn to add before the reply, None to add only the reply.
    """

    def __init__(
        self,
        loom: KVLoom,
        branch: BranchRow,
        session_name: str,
        parent: Turn | None,
        tip: TurnState | None,
        ids: Sequence[int],
        kept: int,
        message: Mapping[str, Any] | None,
        settings: SamplingSettings,
        options: RunOptions,
        *,
        continues: bool = False,
    ) -> None:
        self._loom = loom
        self._engine = loom.engine
        self._commits = Commits(loom, branch, reuse=options.reuse)
        self._session_name = session_name
        self._parent = parent
        self._tip = tip
        self._ids = list(ids)
        self._kept = kept
        self._message = message
        self._settings = settings
        self._options = options
        self._continues = continues
        self._seed = settings.seed if settings.seed is not None else fresh_seed() if settings.temperature else 0
        self._reply: Reply | None = None
        self._computed = 0
        self._prefilled = 0.0
        self._has_noted = False
        self._begun = False

    @property
    def reply(self) -> Reply:
        """How the run went; runs it first if that was not done."""
        if self._reply is None:
            for _ in self:
                continue
        assert self._reply is not None
        return self._reply

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            raise SessionError("this run is over, or going on", hint="call say or stream again")
        self._begun = True
        with self._engine.lock:
            try:
                yield from self._run()
            finally:
                if not self._options.reuse:
                    self._loom.resumer.forget()

    def _run(self) -> Iterator[str]:
        before = self._options.before
        began = time.perf_counter() - (before.seconds if before else 0.0)
        try:
            resumed = time.perf_counter()
            live, account = self._bring_back()
            # Waiting for what is read ahead counts, too; computing anew what was dropped does not.
            account.seconds = time.perf_counter() - resumed - self._prefilled
        except (Cancelled, KeyboardInterrupt) as error:
            turn = self._keep_message()
            self._finish(turn, "", INTERRUPTED, Account(), (), began, None, 0.0)
            if isinstance(error, KeyboardInterrupt):
                raise
            return
        self._commits.notices += account.notices
        if before is not None:
            self._count_before(before, account)
        passes: list[tuple[int, int]] = []
        logits, interrupted = None, None
        try:
            if live.length < len(self._ids):
                logits = self._prefill(live, passes)
            elif live.hidden is not None:
                logits = self._engine.logits_of(live.hidden)
        except (Cancelled, KeyboardInterrupt) as error:
            interrupted = error if isinstance(error, KeyboardInterrupt) else None
        turn, state = self._parent, self._tip
        if self._message is not None:
            turn, state = self._add_message(live, account, passes)
            passes = []
        if logits is None or interrupted is not None:
            self._finish(turn, "", INTERRUPTED, account, (), began, None, 0.0)
            if interrupted is not None:
                raise interrupted
            return
        yield from self._reply_from(live, logits, turn, state, account, passes, began)

    def _reply_from(
        self,
        live: LiveState,
        logits: torch.Tensor,
        turn: Turn | None,
        state: TurnState | None,
        account: Account,
        passes: list[tuple[int, int]],
        began: float,
    ) -> Iterator[str]:
        """Generate until the reply ends; however it ends, what was generated is committed."""
        pieces: list[str] = []
        tokens: list[int] = []
        scores: list[TokenScore] = []
        stream, first, last, reason, rest = self._stream(), None, 0.0, INTERRUPTED, ""
        journal = Journal(self._loom)
        budget = min(self._settings.max_tokens, self._engine.context_limit - len(self._ids))
        started = live.length
        source = self._engine.generate(
            live, logits, self._settings, seen=self._ids, seed=self._seed, cancel=self._options.cancel, scores=scores
        )
        try:
            for token in source:
                last = time.perf_counter()
                first = first or last
                tokens.append(token)
                piece = stream.push(token)
                if piece:
                    pieces.append(piece)
                if journal.is_due(len(tokens)):
                    shown = "".join([*pieces, stream.copy().finish()])
                    counts = {"tokens": self._counts(account, len(tokens))}
                    new = self._reply_turn(shown, INTERRUPTED, stream, counts, scores)
                    journal.note((self._commits, self._as_it_is(new, turn, state, tokens, live, passes, started)))
                if piece:
                    yield from self._paused(piece)
                if token in self._engine.eos_ids or stream.stopped is not None:
                    reason = "stop"
                    break
                if len(tokens) >= budget:
                    reason = "length"
                    break
        finally:  # also where the caller stops iterating
            try:
                source.close()
                rest = stream.finish()
                text = "".join([*pieces, rest])
                if tokens:
                    timings = {
                        "first_token": (first or last) - began,
                        "total": time.perf_counter() - began,
                        "restore": account.seconds,
                        **self._noted(account, len(tokens)),
                    }
                    new = self._reply_turn(text, reason, stream, timings, scores)
                    addition = self._as_it_is(new, turn, state, tokens, live, passes, started)
                    turn, state = commit_all(self._loom, [(self._commits, addition)], journal.ended)[0]
            finally:
                journal.over()
            self._finish(turn, text, reason, account, tokens, began, first, last)
        if rest:
            yield rest

    def _paused(self, piece: str) -> Iterator[str]:
        """Give a piece away. Until the next one is asked for, nobody else may use the live state in this thread."""
        resumer = self._loom.resumer
        resumer.suspended = True
        try:
            yield piece
        finally:
            resumer.suspended = False

    def _reply_turn(
        self,
        text: str,
        reason: str,
        stream: TextStream,
        timings: Mapping[str, Any],
        scores: Sequence[TokenScore],
    ) -> NewTurn:
        return NewTurn(
            {"role": "assistant", "content": text},
            finish_reason=reason,
            settings={**self._settings.to_plain(), "seed": self._seed, "reopened": stream.reopened},
            timings=timings,
            continues=self._continues,
            scores=scores,
        )

    def _as_it_is(
        self,
        new: NewTurn,
        turn: Turn | None,
        state: TurnState | None,
        tokens: Sequence[int],
        live: LiveState,
        passes: Sequence[tuple[int, int]],
        started: int,
    ) -> Addition:
        """The reply behind all that was said: the passes are those before it, and one for each token that was run."""
        ran = schedule_of([*passes, *((at, at + 1) for at in range(started, live.length))])
        return Addition(new, turn, state, [*self._ids, *tokens], len(self._ids), live, ran)

    def _bring_back(self) -> tuple[LiveState, Account]:
        resumer = self._loom.resumer
        room = self._settings.max_tokens
        if not self._options.reuse:
            return resumer.start_anew(len(self._ids) + room), Account()
        # Where the template rewrote history, the parent's state is not a beginning of this path any more.
        tip = self._tip if self._tip is None or self._kept >= self._tip.state_end else None
        options = self._options
        live, account = resumer.resume(
            self._ids,
            tip,
            room=room,
            require_reuse=options.require_reuse,
            exact=options.exact,
            cancel=options.cancel,
            progress=options.progress,
        )
        if tip is not None and self._parent is not None and self._kept >= tip.end:
            began, there = time.perf_counter(), self._commits.branch
            self._computed = compute_anew(
                self._loom,
                there,
                self._parent,
                tip,
                self._ids,
                live,
                cancel=options.cancel,
                progress=options.progress,
            )
            self._prefilled = time.perf_counter() - began if self._computed else 0.0
        return live, account

    def _count_before(self, before: Added, account: Account) -> None:
        """What was run of the path for this run is no state that was there: it is told as what it was."""
        account.replayed += before.tokens.replayed
        account.reused = max(0, account.reused - before.tokens.replayed - before.tokens.computed)
        self._computed += before.tokens.computed
        self._prefilled += before.seconds if before.tokens.computed else 0.0
        self._commits.notices += before.notices

    def _keep_message(self) -> Turn | None:
        """Stopped while state was being replayed: the message is kept, its tokens are pending."""
        return self._parent if self._message is None else self._add_message(None, Account(), ())[0]

    def _add_message(
        self, live: LiveState | None, account: Account, passes: Sequence[tuple[int, int]]
    ) -> tuple[Turn, TurnState]:
        assert self._message is not None
        new = NewTurn(self._message, timings=self._noted(account))
        return self._commits.add(new, self._parent, self._tip, self._ids, self._kept, live, passes)

    def _noted(self, account: Account, generated: int = 0, ran: int = 0) -> dict[str, Any]:
        """What is kept with a turn of what it cost: bringing back and prefill count with the first that a run adds.

        ``ran``: tokens that were run after the prefill; where these are counted too, it is not timed by this turn.
        """
        tokens = self._counts(account, generated, ran)
        first, self._has_noted = not self._has_noted, True
        return {"tokens": tokens, "prefill": self._prefilled} if first and not ran else {"tokens": tokens}

    def _counts(self, account: Account, generated: int, ran: int = 0) -> dict[str, int]:
        if self._has_noted:
            return asdict(Tokens(computed=ran, generated=generated))
        return asdict(Tokens(account.reused, account.replayed, self._computed + ran, generated))

    def _prefill(self, live: LiveState, passes: list[tuple[int, int]]) -> Any:
        """Run the tokens that are not held; ``passes`` are those that ran, also if it was cancelled."""
        start, began = live.length, time.perf_counter()
        try:
            return self._engine.prefill(
                live, self._ids[start:], cancel=self._options.cancel, progress=self._options.progress
            )
        finally:
            passes += [p for p in self._engine.passes(start, len(self._ids)) if p[1] <= live.length]
            self._computed += live.length - start
            self._prefilled += time.perf_counter() - began

    def _stream(self) -> TextStream:
        before = self._ids[-64:] if self._continues else ()
        return TextStream(
            self._loom.engine.tokenizer, stop=self._settings.stop, skip_ids=self._engine.eos_ids, before=before
        )

    def _finish(
        self,
        turn: Turn | None,
        text: str,
        reason: str,
        account: Account,
        tokens: Sequence[int],
        began: float,
        first: float | None,
        last: float,
    ) -> None:
        rate = (len(tokens) - 1) / (last - first) if first is not None and len(tokens) > 1 and last > first else None
        self._reply = Reply(
            session=self._session_name,
            branch=self._commits.branch.name,
            turn=turn.id if turn else "",
            text=text,
            finish_reason=reason,
            tokens=Tokens(account.reused, account.replayed, self._computed, len(tokens)),
            seconds=Seconds(account.seconds, first - began if first else None, time.perf_counter() - began),
            tokens_per_second=rate,
            model=self._engine.name,
            seed=self._seed,
            restored=Restored(account.rows, account.window_rows, account.keyframe, account.bytes_read, account.lossy),
            notices=tuple(self._commits.notices),
        )
