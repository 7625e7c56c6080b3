"""What candidates are worth: from what the model thought of them, from each other, from a judge, or from a function."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.errors import SessionError
from kvloom.explore.plan import ExploreSettings, Score
from kvloom_store.explorations import Candidate

if TYPE_CHECKING:
    from kvloom.explore.judge import Judge

Scorer = Callable[[Score, Mapping[int, str]], Iterator[tuple[Candidate, float]]]
"""Gives candidates their scores, one after another; the texts are those of the whole replies, by candidate row."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def scorer_of(settings: ExploreSettings, judge: Callable[[], Judge]) -> Scorer:
    """The scorer that a search names. Raises SessionError if its function cannot be had."""
    if settings.score == "logprob":
        return lambda step, _: ((each, each.total_logprob) for each in step.candidates)
    if settings.score == "length-normalised":
        return lambda step, _: ((each, each.total_logprob / max(each.total, 1)) for each in step.candidates)
    if settings.score == "self-consistency":
        return _agreement
    if settings.score == "judge":
        return lambda step, texts: ((each, judge().rate(each, texts[each.row])) for each in step.candidates)
    return _by_function(settings.score.removeprefix("python:"))


def _agreement(step: Score, texts: Mapping[int, str]) -> Iterator[tuple[Candidate, float]]:
    """The share of the others that come to the same answer (self-consistency, arXiv 2203.11171)."""
    answers = Counter(answer_of(texts[each.row]) for each in step.among)
    for each in step.candidates:
        yield each, answers[answer_of(texts[each.row])] / len(step.among)


def answer_of(text: str) -> str:
    """What a reply comes to: the last number in it, else its last line, in small letters and without punctuation."""
    numbers = _NUMBER.findall(text)
    if numbers:
        return str(numbers[-1]).replace(",", "").removesuffix(".0")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"[\W_]+", " ", lines[-1]).strip().casefold() if lines else ""


def _by_function(name: str) -> Scorer:
    function = _function(name)

    def score(step: Score, texts: Mapping[int, str]) -> Iterator[tuple[Candidate, float]]:
        for each in step.candidates:
            try:
                value = float(function(texts[each.row]))
            except Exception as error:  # it is the user's own: whatever it raises is told, and what was scored is kept
                raise SessionError(f"the score {name} failed: {type(error).__name__}: {error}") from error
            if not math.isfinite(value):
                raise SessionError(f"the score {name} gave {value}", hint="return a finite number")
            yield each, value

    return score


def _function(name: str) -> Callable[[str], Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise SessionError(f"{name!r} names no function", hint="write python:MODULE:FUNCTION")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` would find it
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a module of the user's may raise anything
        raise SessionError(f"cannot import {module}: {error}", hint=f"it is looked for in {here} first") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise SessionError(f"{module} has no function {function!r}", hint="write python:MODULE:FUNCTION")
    return found  # type: ignore[no-any-return]
