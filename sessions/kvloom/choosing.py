"""Scoring given texts from one state, and saying the likeliest of them.

Each text is scored in passes over its own tokens, from the very state all of them begin with; what the passes left is
taken away again. So neither their order nor their number matters to any of them, and nothing of them is stored but the
reply that is chosen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.choices import Choice, best_of, options_of
from kvloom.engine import Cancelled, Progress, TransformersEngine
from kvloom.errors import InvalidText
from kvloom.filters import float32
from kvloom.plaintext import encode_text
from kvloom.report import Tokens
from kvloom.run import Run
from kvloom.scores import TokenScore, score
from kvloom.steps import NewTurn
from kvloom.template import ChatTemplate, Message, reply_ids

if TYPE_CHECKING:
    import torch

    from kvloom.live import LiveState
    from kvloom.loom import KVLoom
    from kvloom.reading import Account
    from kvloom_store.turns import Turn, TurnState

SCORED_TOKENS = 64
"""Tokens of one scoring pass at most: the logits of each are there at once, up to 1 MB a token."""


@dataclass(frozen=True, slots=True)
class Given:
    """A text that nobody sampled: its token ids, and, of a whole reply, what ends it (at most one)."""

    text: str
    ids: Sequence[int]
    end: Sequence[int] = ()


def replies(
    engine: TransformersEngine,
    template: ChatTemplate,
    messages: Sequence[Message],
    ids: Sequence[int],
    texts: Sequence[str],
) -> list[Given]:
    """Texts as whole replies to messages whose tokens are ``ids``. Raises InvalidText, ContextOverflow."""
    found = []
    for text in texts:
        said = reply_ids(template, engine.tokenizer, messages, ids, text, eos_ids=engine.eos_ids)
        length = len(said) - (1 if said and said[-1] in engine.eos_ids else 0)
        found.append(Given(text, said[:length], said[length:]))
    return _checked(engine, ids, found)


def more(engine: TransformersEngine, ids: Sequence[int], texts: Sequence[str]) -> list[Given]:
    """Texts that go on with a reply whose tokens end ``ids``. Raises InvalidText, ContextOverflow."""
    return _checked(engine, ids, [Given(text, encode_text(engine.tokenizer, text, ids[-1])) for text in texts])


def _checked(engine: TransformersEngine, ids: Sequence[int], given: Sequence[Given]) -> list[Given]:
    seen: dict[tuple[int, ...], str] = {}
    for each in given:
        other = seen.setdefault(tuple(each.ids), each.text)
        if other != each.text or not each.ids:
            what = f"has the same tokens as {other!r:.60}" if each.ids else "has no tokens"
            raise InvalidText(f"{each.text!r:.60} {what}", hint="give texts that the model can tell apart")
    engine.check_ids([*ids, *max((each.ids for each in given), key=len)])
    return list(given)


def scored(
    engine: TransformersEngine,
    live: LiveState,
    logits: torch.Tensor,
    given: Sequence[Given],
    cancel: threading.Event | None = None,
) -> list[list[TokenScore]]:
    """What the model thinks of each token of some texts; ``logits`` are those after what ``live`` holds.

    ``live`` is left as it was. Raises Cancelled between two texts.
    """
    first = float32(logits)
    live.reserve(min(live.length + max(len(each.ids) for each in given), engine.context_limit))
    found = []
    for each in given:
        if cancel is not None and cancel.is_set():
            raise Cancelled
        scores = [score(first, each.ids[0])]
        with _put_back(live):
            for ids, after in _passes(engine, live.length, each.ids):
                rows = engine.run_scored(live, ids)[-len(ids) :]
                scores += [score(float32(row), token) for row, token in zip(rows, after, strict=True)]
        found.append(scores)
    return found


def _passes(engine: TransformersEngine, base: int, ids: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The tokens of each pass, and those that follow each of them: the last one need not be run."""
    for start, end in engine.passes(base, base + len(ids) - 1):
        for at in range(start - base, end - base, SCORED_TOKENS):
            stop = min(end - base, at + SCORED_TOKENS)
            yield ids[at:stop], ids[at + 1 : stop + 1]


@contextmanager
def _put_back(live: LiveState) -> Iterator[None]:
    """Let a live state be afterwards what it was before, whatever was run on it meanwhile."""
    length, hidden, frames = live.length, live.hidden, dict(live.frames)
    live.keep_frame()
    try:
        yield
    finally:
        live.truncate(length)
        live.hidden, live.frames = hidden, frames


def score_at(
    loom: KVLoom,
    ids: Sequence[int],
    tip: TurnState,
    given: Sequence[Given],
    cancel: threading.Event | None,
    progress: Progress | None,
) -> Choice:
    """Score texts where ``ids`` end, which are the tokens up to a turn's state ``tip``. Nothing is stored."""
    engine = loom.engine
    with engine.lock:
        room = max(len(each.ids) for each in given)
        live, account = loom.resumer.resume(ids, tip, room=room, cancel=cancel, progress=progress)
        pending = ids[live.length :]
        with _put_back(live):
            if pending:
                logits = engine.prefill(live, pending, cancel=cancel, progress=progress)
            else:
                assert live.hidden is not None
                logits = engine.logits_of(live.hidden)
            scores = scored(engine, live, logits, given, cancel)
    return _choice(given, scores, Tokens(account.reused, account.replayed, len(pending) + _run_for(given)))


def _choice(given: Sequence[Given], scores: Sequence[Sequence[TokenScore]], tokens: Tokens) -> Choice:
    logprobs = [[each.logprob for each in some] for some in scores]
    options = options_of([each.text for each in given], [each.ids for each in given], logprobs)
    return Choice(tuple(options), best_of(options), tokens)


def _run_for(given: Sequence[Given]) -> int:
    return sum(len(each.ids) - 1 for each in given)


class ChoiceRun(Run):
    """A run whose reply is the likeliest of some given ones; ``reply.choice`` says how likely each was.

    Stopped while they are scored it ends as ``interrupted``, with the message kept and no choice made.
    """

    def __init__(self, given: Sequence[Given], *args: Any, **options: Any) -> None:
        """``given`` before what ``Run`` takes."""
        super().__init__(*args, **options)
        self._given = given

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
        try:
            scores = scored(self._engine, live, logits, self._given, self._options.cancel)
            choice = _choice(self._given, scores, Tokens())
            at = choice.options.index(choice.best)
            best, thought = self._given[at], scores[at]
            ran = list(self._engine.passes(live.length, live.length + len(best.ids)))
            logits = self._engine.prefill(live, best.ids)
        except (Cancelled, KeyboardInterrupt) as error:
            self._finish(turn, "", "interrupted", account, (), began, None, 0.0)
            if isinstance(error, KeyboardInterrupt):
                raise
            return
        said, run_here = time.perf_counter(), _run_for(self._given) + len(best.ids)
        tokens = [*best.ids, *best.end]
        timings = {"first_token": said - began, "total": said - began, "restore": account.seconds}
        new = NewTurn(
            {"role": "assistant", "content": best.text},
            finish_reason="stop",
            settings={
                "chosen_from": [option.text for option in choice.options],
                "logprobs": [option.logprob for option in choice.options],
                "stop": list(self._settings.stop),
            },
            timings={**timings, **self._noted(account, len(tokens), run_here)},
            scores=[*thought, *(score(float32(logits), token) for token in best.end)],
        )
        turn, _ = self._commits.add(new, turn, state, self._ids + tokens, len(self._ids), live, [*passes, *ran])
        self._computed += run_here
        self._finish(turn, best.text, "stop", account, tokens, began, said, said)
        assert self._reply is not None
        self._reply = replace(self._reply, choice=replace(choice, tokens=self._reply.tokens))
        yield best.text
