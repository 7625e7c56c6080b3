"""Texts that are given to choose from, and how likely the model thought each. No model is needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.errors import InvalidText
from kvloom.plaintext import check_unicode

if TYPE_CHECKING:
    from kvloom.report import Tokens


@dataclass(frozen=True, slots=True)
class Option:
    """One of the texts, under the model itself: temperature 1, no filters.

    ``ids`` are its tokens, as the template begins a reply with it, ``logprobs`` the log-probability (nats) of each,
    ``logprob`` their sum: how likely a reply is to begin so. ``mean_logprob`` is that by its length, and
    ``probability`` its share among the options.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    logprob: float
    mean_logprob: float
    probability: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Options in the order they were given, the likeliest of them (by ``logprob``), and where tokens came from.

    Of the ``tokens``, those count as computed that were run to score the options, too.
    """

    options: tuple[Option, ...]
    best: Option
    tokens: Tokens


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts of which one says nothing, or is there twice. Raises InvalidText."""
    if isinstance(texts, str):
        raise InvalidText("the choices are one text", hint='give a list: ["yes", "no"]')
    if not texts:
        raise InvalidText("there is nothing to choose from", hint="give some texts")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise InvalidText(f"choice {number} of {len(texts)} is empty", hint="give each some text")
        check_unicode(text)
        if text in texts[: number - 1]:
            raise InvalidText(f"the choice {text!r:.60} is given twice", hint="give each once")


def options_of(texts: Sequence[str], ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> list[Option]:
    """Each text, its token ids and their log-probabilities, with what follows from them, whatever their order."""
    sums = [math.fsum(each) for each in logprobs]
    top = max(sums)
    weights = [math.exp(each - top) for each in sums]
    whole = math.fsum(weights)
    return [
        Option(text, tuple(some), tuple(own), total, total / len(own), weight / whole)
        for text, some, own, total, weight in zip(texts, ids, logprobs, sums, weights, strict=True)
    ]


def best_of(options: Sequence[Option]) -> Option:
    """The likeliest; of equals the one whose text comes first in the alphabet, not in the list."""
    return min(options, key=lambda option: (-option.logprob, option.text))
