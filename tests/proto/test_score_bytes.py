"""Scores of generated tokens as bytes: always the same ones, few, and refused where they contradict themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto import limits
from kvloom_proto import state_pb2 as pb
from kvloom_proto.errors import FormatError, LimitExceeded, UnsupportedVersion
from kvloom_proto.scores import LOWEST, TokenScore, pack_scores, read_scores

TOKENS = [5, 7]
SCORES = (
    TokenScore(5, -0.25, 1.5, ((5, -0.25), (300, -2.0))),
    TokenScore(7, -3.0, 0.0, ((9, -0.125), (70_000, -2.5))),
)
GOLDEN = "08011002 1a0400b400c2 2204003e0000 2a0705ac0209f0a204 320800b400c000b000c1"


def test_the_bytes_have_not_changed_and_are_those_of_the_format_page() -> None:
    page = (Path(__file__).parents[2] / "proto" / "FORMAT.md").read_text()
    section = page[page.index("## Token scores") : page.index("## What is not checked")]
    shown = re.search(r"^    ((?:[0-9a-f]{2} ?)+)$", section, re.MULTILINE)
    assert pack_scores(SCORES) == bytes.fromhex(GOLDEN)
    assert shown is not None
    assert bytes.fromhex(shown[1]) == bytes.fromhex(GOLDEN)
    assert read_scores(bytes.fromhex(GOLDEN), TOKENS) == SCORES


def test_no_tokens_have_no_scores() -> None:
    assert read_scores(pack_scores(()), []) == ()


def test_a_token_takes_29_bytes_at_most() -> None:
    top = tuple((2_000_000 + n, -1.0 - n) for n in range(5))
    assert len(pack_scores([TokenScore(1, -2.0, 3.0, top)] * 1000)) <= 29 * 1000 + 24


def test_what_is_less_likely_than_a_float16_can_say_is_stored_as_the_least_it_can() -> None:
    score = TokenScore(3, -1e9, 0.0, ((3, -0.0), (4, -math.inf)))
    packed = pack_scores([score])
    assert read_scores(packed, [3]) == (TokenScore(3, LOWEST, 0.0, ((3, 0.0), (4, LOWEST))),)
    assert pack_scores(read_scores(packed, [3])) == packed
    assert pack_scores([TokenScore(3, -1e9, 0.0, ((3, 0.0), (4, LOWEST)))]) == packed  # there is one zero only


numbers = st.floats(-30.0, 0.0, width=16)


@st.composite
def some_scores(draw: st.DrawFn) -> list[TokenScore]:
    each = draw(st.integers(0, 5))
    ids = st.integers(0, limits.MAX_VOCABULARY - 1)

    def one() -> TokenScore:
        top = sorted(draw(st.lists(numbers, min_size=each, max_size=each)), reverse=True)
        entropy = -draw(numbers)
        return TokenScore(draw(ids), draw(numbers), entropy, tuple((draw(ids), logprob) for logprob in top))

    return [one() for _ in range(draw(st.integers(0, 6)))]


@given(some_scores())
def test_any_scores_read_back_as_they_were(scores: list[TokenScore]) -> None:
    packed = pack_scores(scores)
    read = read_scores(packed, [score.token for score in scores])
    assert read == tuple(scores)
    assert pack_scores(read) == packed


def changed(**fields: Any) -> bytes:
    message = pb.TokenScores()
    message.ParseFromString(pack_scores(SCORES))
    for name, value in fields.items():
        if name == "top_ids":
            message.top_ids[:] = value
        else:
            setattr(message, name, value)
    return message.SerializeToString()


WRONG: list[tuple[str, Callable[[], bytes], str]] = [
    ("a number too few", lambda: changed(logprobs=b"\0\0"), "scores.logprobs"),
    ("half a number", lambda: changed(entropies=b"\0\0\0"), "scores.entropies"),
    ("other alternatives", lambda: changed(alternatives=1), "scores.top_logprobs"),
    ("an id too few", lambda: changed(top_ids=[1, 2, 3]), "scores.top_ids"),
    ("a NaN", lambda: changed(logprobs=bytes.fromhex("007e0000")), "scores.logprobs"),
    ("an infinity", lambda: changed(entropies=bytes.fromhex("007c0000")), "scores.entropies"),
    ("a probability above 1", lambda: changed(logprobs=bytes.fromhex("003c0000")), "scores"),
    ("an entropy below 0", lambda: changed(entropies=bytes.fromhex("00bc0000")), "scores"),
    ("another order", lambda: changed(top_logprobs=bytes.fromhex("00c000b400b000c1")), "scores.top_logprobs"),
]


@pytest.mark.parametrize(("made", "field"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_scores_that_contradict_themselves_are_refused(made: Callable[[], bytes], field: str) -> None:
    with pytest.raises(FormatError) as error:
        read_scores(made(), TOKENS)
    assert error.value.field == field


@pytest.mark.parametrize("tokens", [[], [5], [5, 7, 9]])
def test_scores_of_other_tokens_are_refused(tokens: list[int]) -> None:
    with pytest.raises(FormatError):
        read_scores(pack_scores(SCORES), tokens)


def test_scores_over_a_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"alternatives": limits.MAX_ALTERNATIVES + 1, "top_ids": [1, 2, 3, limits.MAX_VOCABULARY]}
    for field, value in over.items():
        with pytest.raises(LimitExceeded) as error:
            read_scores(changed(**{field: value}), TOKENS)
        assert error.value.field == f"scores.{field}"
    monkeypatch.setattr(limits, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(LimitExceeded):
        read_scores(pack_scores(SCORES), TOKENS)


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_is_refused(version: int) -> None:
    with pytest.raises(UnsupportedVersion):
        read_scores(changed(version=version), TOKENS)


@given(st.binary(max_size=200), st.integers(0, 4))
def test_bytes_that_are_no_scores_raise_only_format_errors(data: bytes, count: int) -> None:
    for candidate in (data, b"\x08\x01" + data):
        try:
            read = read_scores(candidate, list(range(count)))
        except FormatError:
            continue
        assert len(read) == count
