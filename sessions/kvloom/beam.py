"""Beam search: the likeliest replies, found by going on with the best few beginnings of one at each step.

What is found, in which order and with which scores is what transformers' ``generate(num_beams=width, do_sample=False)``
finds. The beams are siblings: one batch over the shared prefix, whose rows are put in a new order after each step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvloom.errors import SessionError
from kvloom.filters import check_usable, float32
from kvloom.growing import Growing, Told
from kvloom.journal import Journal
from kvloom.sample import SampleRun
from kvloom.sampling import check_siblings
from kvloom.scores import TokenScore, scores_of
from kvloom.siblings import Siblings

if TYPE_CHECKING:
    import torch

    from kvloom.engine import TransformersEngine
    from kvloom.live import LiveState
    from kvloom_store.turns import Turn, TurnState


@dataclass(frozen=True, slots=True)
class BeamSettings:
    """How to search. Raises SessionError naming the setting that is wrong.

    width           beams that are gone on with at each step, and replies that are found in the end
    length_penalty  a reply's score is its log-probability over its number of tokens to this power: above 0 long ones
                    gain, below 0 short ones
    early_stopping  True: stop when ``width`` replies have ended; False: when, by their scores so far, no beam will
                    better them; "never": when none can, however long it gets
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = True

    def __post_init__(self) -> None:
        check_siblings("width", self.width)
        if not isinstance(self.length_penalty, int | float) or not -10 <= self.length_penalty <= 10:
            raise SessionError(
                f"length_penalty is {self.length_penalty!r}; it must be a number from -10 to 10",
                hint="change length_penalty",
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise SessionError(
                f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"',
                hint="change early_stopping",
            )

    def normalised(self, logprob: float, tokens: int) -> float:
        """The score of a reply of so many tokens (at least one)."""
        return logprob / math.pow(tokens, self.length_penalty)

    def considered(self, engine: TransformersEngine) -> int:
        """Continuations looked at in each step: enough that ``width`` are left if the others all end the reply."""
        return max(2, 1 + len(engine.eos_ids)) * self.width

    def check_for(self, engine: TransformersEngine) -> None:
        """Refuse what cannot be searched with this model. Raises SessionError."""
        if engine.apart is not None:
            raise SessionError(
                f"beams cannot be decoded together with {engine.name}: {engine.apart}",
                hint="sample several replies instead: kvloom sample SESSION -n 8 (branch.sample)",
            )
        if self.considered(engine) > engine.vocab_size:
            raise SessionError(
                f"width is {self.width}; that is too many beams for a vocabulary of {engine.vocab_size} tokens",
                hint="change width",
            )


class Beams:
    """A search: its ``running`` beams, the likeliest first, and the best ``width`` replies that have ``finished``.

    ``ran`` is how many tokens the model has run for it.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        siblings: Siblings,
        running: Sequence[Growing],
        settings: BeamSettings,
        earlier: Sequence[float] = (),
    ) -> None:
        """Begin with these paths, the likeliest first, each a row of the batch.

        ``earlier`` are the scores of replies that had finished before.
        """
        self._engine = engine
        self._siblings = siblings
        self._settings = settings
        self._longest = max(path.said + path.budget for path in running)
        self._earlier = list(earlier)
        self.running = list(running)
        self.finished: list[Growing] = []
        self.ran = 0

    @property
    def found(self) -> list[Growing]:
        """The replies, best first; of a search that was stopped, or is not over, also the beams that are running."""
        return sorted((path for path in [*self.finished, *self.running] if path.tokens), key=self.score, reverse=True)

    def score(self, path: Growing) -> float:
        """The score of a reply, or of a beam as it is now."""
        return self._settings.normalised(path.thought + path.logprob, path.said + len(path.tokens))

    def search(
        self,
        logits: torch.Tensor,
        *,
        steps: int | None = None,
        cancel: threading.Event | None = None,
        told: Told | None = None,
    ) -> None:
        """Search to the end, or until it is cancelled; ``logits`` ``[running, vocab]`` are those of the next tokens.

        With ``steps`` it goes on by so many tokens at most, and the beams that are running then have run all of theirs,
        at the end of the search too: others can go on with them.
        """
        taken = 0
        while self.running and taken != steps:
            if cancel is not None and cancel.is_set():
                for path in self.running:
                    path.reason = "interrupted"
                return
            before = len(self.running)
            rows, chosen = self._choose(logits)
            taken += 1
            if told is not None:
                told(chosen)
            over = self._is_over()
            if over and steps is None:
                self.running = []
            if self.running:
                logits = self._run(rows, before)
            if over:
                return

    def _choose(self, logits: torch.Tensor) -> tuple[list[int], int]:
        """Take the next tokens: the rows of the last pass that the beams come from, and how many were taken.

        Of the likeliest continuations only the first ``width`` may finish; so the better ones among those that go on
        are never crowded out by many that end.
        """
        width = self._settings.width
        running: list[tuple[Growing, int]] = []
        ended: list[tuple[Growing, int]] = []
        for place, (_, row, scored) in enumerate(self._likeliest(logits)):
            if place >= width and len(running) == width:
                break
            path = self.running[row].copy()
            path.add(scored.token, scored)
            if path.reason is None:
                running.append((path, row))
            elif place < width:
                ended.append((path, row))
        self._finish(ended)
        self.running = [path for path, _ in running]
        return [row for _, row in running], len(running) + len(ended)

    def _likeliest(self, logits: torch.Tensor) -> list[tuple[float, int, TokenScore]]:
        """Continuations of all beams, the likeliest first: (log-probability of the whole, row, its token's score)."""
        count, found = self._settings.considered(self._engine), []
        for row, path in enumerate(self.running):
            each, so_far = float32(logits[row]), path.thought + path.logprob
            check_usable(float(each.max()))
            found += [(so_far + s.logprob, row, s) for s in scores_of(each, each.topk(count).indices.tolist())]
        possible = [each for each in found if each[0] > -math.inf]
        return sorted(possible, key=lambda each: (-each[0], each[1], each[2].token))[:count]

    def _finish(self, ended: list[tuple[Growing, int]]) -> None:
        """Take in replies that have ended; those that stay get rows of their own, so that the batch's can go."""
        every = [*self.finished, *(path for path, _ in ended)]
        self.finished = sorted(every, key=self.score, reverse=True)[: self._settings.width]
        for path, row in ended:
            if path in self.finished and path.passes:
                path.rows = self._siblings.select([row], steps=0).source(0)

    def _is_over(self) -> bool:
        if not self.running:
            return True
        scores = sorted([*self._earlier, *map(self.score, self.finished)], reverse=True)[: self._settings.width]
        if len(scores) < self._settings.width:
            return False
        if self._settings.early_stopping is True:
            return True
        best = self.running[0]
        longest = self._settings.early_stopping == "never" and self._settings.length_penalty > 0
        tokens = self._longest if longest else best.said + len(best.tokens)
        return self._settings.normalised(best.thought + best.logprob, tokens) <= scores[-1]

    def _run(self, rows: list[int], before: int) -> torch.Tensor:
        """Run the last token of each beam, after its row among ``before`` of them; the logits ``[beams, vocab]``."""
        if rows != list(range(before)):
            self._siblings = self._siblings.select(rows)
        logits = self._siblings.step([path.tokens[-1] for path in self.running])
        for row, path in enumerate(self.running):
            path.ran(self._siblings, row)
        self.ran += len(rows)
        return logits


class BeamRun(SampleRun):
    """A run that ends in the likeliest replies, best first; stopped, the running beams are kept as they are. Of one
    that is killed those are kept that were the best when they were noted.

    What the search ran is counted with the best reply: the others stand on passes that it shares, or that led nowhere.
    """

    def __init__(self, search: BeamSettings, told: Told | None, *args: Any, **options: Any) -> None:
        """How to search, and whom to tell of each step, before what ``Run`` takes."""
        super().__init__(search.width, told, *args, **options)
        self._search = search
        self._beams: Beams | None = None

    def _decode(self, live: LiveState, logits: torch.Tensor, turn: Turn | None, state: TurnState | None) -> None:
        root = self._path(0, live)
        siblings = Siblings(self._engine, live, live.length, [0], root.budget)
        self._beams = beams = Beams(self._engine, siblings, [root], self._search)
        journal = Journal(self._loom, self._search.width)

        def step(chosen: int) -> None:
            best = beams.found[: self._search.width]
            if len(best) == self._search.width:
                self._note(journal, best, [path.state(live.chain, live.layers) for path in best], turn, state)
            self._tell(chosen)

        try:
            beams.search(logits[None], cancel=self._options.cancel, told=step)
        finally:
            self._paths = beams.found
            held = [path.state(live.chain, live.layers) for path in self._paths]
            self._commit(self._paths, held, turn, state, journal)

    def _score(self, path: Growing) -> float:
        return self._search.normalised(path.logprob, len(path.tokens))

    def _ran(self, path: Growing) -> int:
        return self._beams.ran if self._beams is not None and self._paths and path is self._paths[0] else 0

    def _settings_for(self, path: Growing) -> dict[str, Any]:
        search = asdict(self._search)
        return {**super()._settings_for(path), "beam_width": search.pop("width"), **search, "score": self._score(path)}
