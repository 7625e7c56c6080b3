"""Several replies to one message: siblings, decoded together, each on a branch of its own."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.commit import Addition, Commits, Held, NewBranch, commit_all
from kvloom.engine import Cancelled
from kvloom.growing import Growing, Told, grow, grow_alone
from kvloom.journal import Journal
from kvloom.passes import joined
from kvloom.reading import Account
from kvloom.report import Reply, Seconds, Tokens
from kvloom.run import Run
from kvloom.sampling import MAX_SEED
from kvloom.siblings import Siblings
from kvloom.steps import NewTurn
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import torch

    from kvloom.live import LiveState


@dataclass(frozen=True, slots=True)
class Sample:
    """One of several replies. ``reply`` names the branch it is on; ``logprob`` is the sum over its tokens (nats).

    ``score``: the greater, the better. Of a reply that was sampled it is the mean log-probability, of one that a beam
    search found what that went by.
    """

    reply: Reply
    logprob: float
    tokens: int
    score: float

    @property
    def mean_logprob(self) -> float:
        """The log-probability a token: what replies of unequal length are compared by."""
        return self.logprob / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints for each."""
        reply, figures = self.reply, {"score": self.score, "logprob": self.logprob, "mean_logprob": self.mean_logprob}
        named = {"branch": reply.branch, "turn": reply.turn, "text": reply.text, "finish_reason": reply.finish_reason}
        return {**named, **figures, "tokens": self.tokens, "seed": reply.seed}


def seed_of(seed: int, number: int) -> int:
    """The seed of sibling ``number``: that of the first is the one given, each other has one made from it."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=8, person=b"kvloom-sibling-1").digest()
    return int.from_bytes(digest, "little") & MAX_SEED


class SampleRun(Run):
    """A run that ends in several replies, none of which the branch moves to; afterwards they are its ``samples``.

    Stopped, the siblings keep what they have said so far. ``reply`` tells of them all: the tokens are sums, the text
    and the turn are those of the best.
    """

    def __init__(self, count: int, told: Told | None, *args: Any, **options: Any) -> None:
        """``count`` of siblings, and whom to tell of each step, before what ``Run`` takes."""
        super().__init__(*args, **options)
        self._count = count
        self._told_steps = told
        self._paths: list[Growing] = []
        self._account = Account()
        self.samples: list[Sample] = []

    def finished(self) -> list[Sample]:
        """The siblings; runs them first if that was not done."""
        _ = self.reply
        return self.samples

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
        if passes and turn is not None and state is not None:  # what was pending is run once, and stored once
            _, state = self._commits.add(turn, None, state, self._ids, state.start, live, passes)
        self._account, started = account, time.perf_counter()
        try:
            self._decode(live, logits, turn, state)
        finally:
            self._conclude(turn, account, began, started)
        if self.samples and self._reply is not None:
            yield self._reply.text

    def _decode(self, live: LiveState, logits: torch.Tensor, turn: Turn | None, state: TurnState | None) -> None:
        """Let the paths grow, and commit them, however that ends."""
        self._paths = [self._path(number, live) for number in range(self._count)]
        if self._engine.apart is None:
            self._together(self._paths, live, logits, turn, state)
        else:
            self._one_by_one(self._paths, live, logits, turn, state)

    def _path(self, number: int, live: LiveState) -> Growing:
        seed = seed_of(self._seed, number)
        budget = min(self._settings.max_tokens, self._engine.context_limit - len(self._ids))
        settings = replace(self._settings, seed=seed)
        return Growing(
            list(self._ids), settings, seed, budget, self._stream(), self._engine.eos_ids, hidden=live.hidden
        )

    def _together(
        self, paths: list[Growing], live: LiveState, logits: torch.Tensor, turn: Turn | None, state: TurnState | None
    ) -> None:
        room = max(path.budget for path in paths)
        siblings = Siblings(self._engine, live, live.length, [0] * len(paths), room)
        journal = Journal(self._loom, len(paths))

        def step(chosen: int) -> None:
            self._note(journal, paths, [path.state(live.chain, live.layers) for path in paths], turn, state)
            self._tell(chosen)

        try:
            grow(siblings, paths, logits.expand(len(paths), -1), cancel=self._options.cancel, told=step)
        finally:
            said = [path for path in paths if path.tokens]
            self._commit(said, [path.state(live.chain, live.layers) for path in said], turn, state, journal)

    def _one_by_one(
        self, paths: list[Growing], live: LiveState, logits: torch.Tensor, turn: Turn | None, state: TurnState | None
    ) -> None:
        for number, path in enumerate(paths):
            if number:
                try:
                    live, logits = self._from_the_start(path, turn, state)
                except Cancelled:
                    path.reason = "interrupted"
                    return
                path.hidden = live.hidden
            self._alone(path, live, logits, turn, state)
            if path.reason == "interrupted":
                return

    def _from_the_start(
        self, path: Growing, turn: Turn | None, state: TurnState | None
    ) -> tuple[LiveState, torch.Tensor]:
        """The state that every path begins with; where it found no room meanwhile, or was dropped, computed anew."""
        live, _ = self._loom.resumer.resume(self._ids, state, room=path.budget, cancel=self._options.cancel)
        at = live.length
        if at == len(self._ids) and live.hidden is not None:
            return live, self._engine.logits_of(live.hidden)
        logits = self._engine.prefill(live, self._ids[at:], cancel=self._options.cancel)
        if turn is not None and state is not None:
            commits = Commits(self._loom, self._commits.branch, again=True)
            passes = list(self._engine.passes(at, len(self._ids)))
            commits.add(turn, None, state, self._ids, state.start, live, passes)
        return live, logits

    def _alone(
        self, path: Growing, live: LiveState, logits: torch.Tensor, turn: Turn | None, state: TurnState | None
    ) -> None:
        journal = Journal(self._loom)

        def step(chosen: int) -> None:
            self._note(journal, [path], [live], turn, state)
            self._tell(chosen)

        try:
            grow_alone(self._engine, live, path, logits, cancel=self._options.cancel, told=step)
        finally:
            if path.tokens:
                self._commit([path], [live], turn, state, journal)

    def _tell(self, chosen: int) -> None:
        if self._told_steps is not None:
            self._told_steps(chosen)

    def _note(
        self,
        journal: Journal,
        paths: Sequence[Growing],
        states: Sequence[Held],
        turn: Turn | None,
        state: TurnState | None,
    ) -> None:
        if journal.is_due(max(len(path.tokens) for path in paths)):
            journal.note(*self._additions([path.copy() for path in paths], states, turn, state))

    def _additions(
        self, paths: Sequence[Growing], states: Sequence[Held], turn: Turn | None, state: TurnState | None
    ) -> list[tuple[Commits, Addition]]:
        """What is added of these paths, each on a branch of its own."""
        there = self._commits.branch
        name = NewBranch(there.session, there.name)
        return [
            (Commits(self._loom, name), self._addition(path, held, turn, state))
            for path, held in zip(paths, states, strict=True)
        ]

    def _commit(
        self,
        paths: Sequence[Growing],
        states: Sequence[Held],
        turn: Turn | None,
        state: TurnState | None,
        journal: Journal | None = None,
    ) -> None:
        additions = self._additions(paths, states, turn, state)
        try:
            made = commit_all(self._loom, additions, journal.ended if journal is not None else None)
        finally:
            if journal is not None:
                journal.over()
        for path, (commits, _), (added, _) in zip(paths, additions, made, strict=True):
            told = self._told(path, commits, added)
            self.samples.append(Sample(told, path.logprob, len(path.tokens), self._score(path)))

    def _score(self, path: Growing) -> float:
        return path.logprob / len(path.tokens)

    def _ran(self, path: Growing) -> int:
        """Tokens that were run for a path."""
        return len(path.passes)

    def _settings_for(self, path: Growing) -> dict[str, Any]:
        """What is kept with a path's turn of how it was chosen."""
        return {**path.settings.to_plain(), "seed": path.seed, "reopened": path.stream.reopened}

    def _addition(self, path: Growing, held: Held, turn: Turn | None, state: TurnState | None) -> Addition:
        new = NewTurn(
            {"role": "assistant", "content": path.text()},
            finish_reason=path.reason or "interrupted",
            settings=self._settings_for(path),
            timings=self._noted(self._account, len(path.tokens), self._ran(path)),
            continues=self._continues,
            scores=path.scores,
        )
        return Addition(new, turn, state, path.ids, len(self._ids), held, joined(path.passes))

    def _told(self, path: Growing, commits: Commits, turn: Turn) -> Reply:
        return Reply(
            session=self._session_name,
            branch=commits.branch.name,
            turn=turn.id,
            text=turn.text,
            finish_reason=path.reason or "interrupted",
            tokens=Tokens(reused=len(self._ids), computed=self._ran(path), generated=len(path.tokens)),
            seconds=Seconds(0.0, None, 0.0),
            tokens_per_second=None,
            model=self._engine.name,
            seed=path.seed,
        )

    def _conclude(self, turn: Turn | None, account: Account, began: float, started: float) -> None:
        """Let ``reply`` tell of them all."""
        paths = self._paths
        spent, generated = time.perf_counter() - started, sum(len(path.tokens) for path in paths)
        self._computed += sum(self._ran(path) for path in paths)
        stopped = not paths or any(path.reason in (None, "interrupted") for path in paths)
        self._finish(turn, "", "interrupted" if stopped else "stop", account, (), began, started, 0.0)
        assert self._reply is not None
        tokens = replace(self._reply.tokens, generated=generated)
        rate = generated / spent if spent and generated else None
        self._reply = replace(self._reply, tokens=tokens, tokens_per_second=rate)
        if self.samples:
            best = max(self.samples, key=lambda sample: sample.score).reply
            self._reply = replace(self._reply, branch=best.branch, turn=best.turn, text=best.text)
