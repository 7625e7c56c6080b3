"""Turns whose text is given, as steps: which tokens each adds, and what computing them costs.

A plan is made of these before anything is run or written: pure functions over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvloom.report import Cost
from kvloom.scores import TokenScore
from kvloom.template import ChatTemplate, Message, extend, reply_ids
from kvloom_store.turns import Turn

if TYPE_CHECKING:
    from kvloom.engine import TransformersEngine
    from kvloom.known_model import KnownModel


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn that is to be added: what it says, and how that came about. ``scores`` are those of its first tokens."""

    message: Mapping[str, Any]
    finish_reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    scores: Sequence[TokenScore] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """A message to be added as it is. ``tokens`` are a reply's own, as a model has said them; none: as the template
    writes it."""

    message: Mapping[str, Any]
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One turn, new or there already, and its tokens, which follow the first ``start`` of those before it."""

    turn: NewTurn | Turn
    start: int
    tokens: tuple[int, ...]

    @property
    def end(self) -> int:
        """Tokens of the path down to this turn."""
        return self.start + len(self.tokens)


def steps_of(
    given: Sequence[Given],
    template: ChatTemplate,
    engine: TransformersEngine | KnownModel,
    history: Sequence[Message],
    ids: Sequence[int],
    reply_start: int | None,
) -> list[Step]:
    """The turns that say what is given, after a path whose messages are ``history`` and whose tokens are ``ids``.

    ``reply_start`` is where in ``ids`` the last message begins, if that is a reply. A system message has no tokens of
    its own: they come with the next one. Raises what ``template.extend`` raises.
    """
    messages, path, steps = list(history), list(ids), []
    for each in given:
        message = dict(each.message)
        role, start, tokens = message["role"], len(path), each.tokens
        if role == "assistant":
            if not tokens:
                written = reply_ids(
                    template, engine.tokenizer, messages, path, message["content"], eos_ids=engine.eos_ids
                )
                tokens = tuple(written)
            reply_start = start
        elif role != "system":
            prompt = extend(
                template,
                engine.tokenizer,
                messages,
                path,
                [message],
                reply_start=reply_start,
                eos_ids=engine.eos_ids,
            )
            start, tokens, reply_start = prompt.kept, prompt.ids[prompt.kept :], None
        messages.append(message)
        path[start:] = tokens
        steps.append(Step(NewTurn(message, each.finish_reason, each.settings), start, tokens))
    return steps


def path_of(ids: Sequence[int], steps: Sequence[Step]) -> list[int]:
    """The tokens of the path when all steps are done."""
    path = list(ids)
    for step in steps:
        path[step.start :] = step.tokens
    return path


def stretches(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps, parted where a template rewrites what was written before: within a part they only add tokens."""
    parts: list[list[Step]] = []
    for step in steps:
        if parts and step.start >= parts[-1][-1].end:
            parts[-1].append(step)
        else:
            parts.append([step])
    return parts


def cost_of(steps: Sequence[Step], held: int, replayed: int = 0) -> Cost:
    """What steps cost if ``held`` tokens of the path of their first stretch are held, ``replayed`` of them by being run
    again. What is held behind a place that a template rewrites is not counted on."""
    computed, here = 0, held
    for number, part in enumerate(stretches(steps)):
        here = min(here, part[0].start) if number else here
        computed += max(0, part[-1].end - here)
        here = max(here, part[-1].end)
    return Cost(max(0, held - replayed), replayed, computed)  # of a turn left in its middle, more is run than kept
