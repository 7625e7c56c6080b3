"""Paths that grow: their tokens chosen one after another, of several paths together or of one alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvloom.filters import float32
from kvloom.live import Link
from kvloom.sampling import SamplingSettings, choose
from kvloom.scores import TokenScore, score
from kvloom.textstream import TextStream
from kvloom_proto.records import LayerSpec, Pass
from kvloom_store.rows import Captured, RowSource

if TYPE_CHECKING:
    import torch

    from kvloom.engine import TransformersEngine
    from kvloom.live import LiveState
    from kvloom.siblings import Siblings

Told = Callable[[int], None]
"""Called after each step with how many tokens were chosen in it."""


@dataclass(eq=False)
class PathState:
    """The state of one path of a batch, for ``commit``: it stands on ``chain``, its own rows are in ``rows``."""

    chain: list[Link]
    layers: tuple[LayerSpec, ...]
    length: int
    hidden: torch.Tensor | None
    rows: RowSource | None

    @property
    def captured(self) -> int:
        """Tokens whose rows belong to a segment."""
        return self.chain[-1].end if self.chain else 0

    def take_captured(self) -> Captured:
        """What the rows behind the chain's end are stored from."""
        assert self.rows is not None
        return Captured(self.rows, {})


@dataclass(eq=False)
class Growing:
    """One path while it grows: ``ids`` are all its tokens, ``tokens`` those that were added here.

    ``origin`` says which of the paths that were begun with it goes on from; of the same reply it has ``said`` tokens
    already, and ``thought`` is their log-probability.

    It ends for a ``reason``: "stop" (the model ended the reply, or a stop string did), "length" (``budget`` tokens were
    added), "step" (the text contains one of ``until``, and goes on after it), or "interrupted".
    """

    ids: list[int]
    settings: SamplingSettings
    seed: int
    budget: int
    stream: TextStream
    eos_ids: frozenset[int]
    until: tuple[str, ...] = ()
    origin: int = 0
    said: int = 0
    thought: float = 0.0
    hidden: torch.Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    rows: RowSource | None = None
    reason: str | None = None

    def copy(self) -> Growing:
        """The same path so far, to go on with in another way."""
        return replace(
            self,
            ids=self.ids.copy(),
            stream=self.stream.copy(),
            tokens=self.tokens.copy(),
            scores=self.scores.copy(),
            pieces=self.pieces.copy(),
            passes=self.passes.copy(),
        )

    def choose(self, logits: torch.Tensor) -> None:
        """Add the token that follows from the logits ``[vocab]``."""
        logits = float32(logits)
        token = choose(logits, self.settings, seen=self.ids, seed=self.seed, position=len(self.ids))
        self.add(token, score(logits, token))

    def add(self, token: int, scored: TokenScore) -> None:
        """Add a token that was chosen."""
        self.ids.append(token)
        self.tokens.append(token)
        self.scores.append(scored)
        self.pieces.append(self.stream.push(token))
        if token in self.eos_ids or self.stream.stopped is not None:
            self.reason = "stop"
        elif self.until and any(text in "".join(self.pieces) for text in self.until):
            self.reason = "step"
        elif len(self.tokens) >= self.budget:
            self.reason = "length"

    def ran(self, siblings: Siblings, row: int) -> None:
        """Note that the last token was run, as this row of a batch."""
        assert siblings.hidden is not None
        self.passes.append(siblings.last_pass(row))
        self.hidden, self.rows = siblings.hidden[row : row + 1], siblings.source(row)

    @property
    def logprob(self) -> float:
        """The log-probability of the tokens added here (nats), under the model itself."""
        return math.fsum(each.logprob for each in self.scores)

    def text(self) -> str:
        """What was said here, to the end."""
        self.pieces.append(self.stream.finish())
        return "".join(self.pieces)

    def state(self, chain: Sequence[Link], layers: tuple[LayerSpec, ...]) -> PathState:
        """The state to commit, on that of the tokens before."""
        length = len(self.ids) - len(self.tokens) + len(self.passes)
        return PathState(list(chain), layers, length, self.hidden, self.rows)


def grow(
    siblings: Siblings,
    paths: Sequence[Growing],
    logits: torch.Tensor,
    *,
    close: bool = False,
    cancel: threading.Event | None = None,
    told: Told | None = None,
) -> None:
    """Let paths grow together until each has ended; ``logits`` ``[paths, vocab]`` are those of their next tokens.

    A path that has ended is taken out of the batch. The last token of a path is left to be run by whoever goes on with
    it, or, to ``close`` it, is run here, if the reply has not ended with it: its state then holds all its tokens.
    """
    rows = list(range(len(paths)))  # the path that each row of the batch is
    while rows:
        if cancel is not None and cancel.is_set():
            _interrupt([paths[number] for number in rows])
            return
        for row, number in enumerate(rows):
            paths[number].choose(logits[row])
        if told is not None:
            told(len(rows))
        run = [row for row, number in enumerate(rows) if _is_run(paths[number], close)]
        if not run:
            return
        siblings, rows = _left(siblings, rows, run)
        logits = siblings.step([paths[number].tokens[-1] for number in rows])
        for row, number in enumerate(rows):
            paths[number].ran(siblings, row)
        going = [row for row, number in enumerate(rows) if paths[number].reason is None]
        logits = logits[going]
        if not going:
            return
        siblings, rows = _left(siblings, rows, going)


def grow_alone(
    engine: TransformersEngine,
    live: LiveState,
    path: Growing,
    logits: torch.Tensor,
    *,
    close: bool = False,
    cancel: threading.Event | None = None,
    told: Told | None = None,
) -> None:
    """The same for one path, on a live state: for models whose paths cannot be decoded together."""
    while path.reason is None:
        if cancel is not None and cancel.is_set():
            _interrupt([path])
            return
        path.choose(logits)
        if told is not None:
            told(1)
        if _is_run(path, close):
            logits = engine.run_pass(live, path.tokens[-1:])
            path.passes.append(Pass(live.length - 1, 1))
    path.hidden = live.hidden


def _is_run(path: Growing, close: bool) -> bool:
    return path.reason is None or (close and path.reason in ("length", "step"))


def _left(siblings: Siblings, rows: list[int], which: list[int]) -> tuple[Siblings, list[int]]:
    if len(which) == len(rows):
        return siblings, rows
    return siblings.select(which), [rows[row] for row in which]


def _interrupt(paths: Sequence[Growing]) -> None:
    for path in paths:
        path.reason = "interrupted"
