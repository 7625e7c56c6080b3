"""What the model thought of the tokens it generated, in a few bytes a token.

Of each token: 2 bytes of log-probability and 2 of entropy (float16, which keeps three decimal digits), and of each of
the likeliest tokens in its place 2 bytes more, and the id as a varint: 1 to 3 bytes in a vocabulary of up to two
million. With five of them that is 19 to 29 bytes a token. The tokens themselves are not there: they stand with their
turn.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvloom_proto import limits
from kvloom_proto import state_pb2 as pb
from kvloom_proto.errors import FormatError
from kvloom_proto.messages import VERSION, check_limit, parse

LOWEST = -65504.0
"""The least number of a float16; what is less likely is stored as this."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One generated token under the model itself: at temperature 1, before any filter.

    ``logprob`` is its log-probability (nats, at most 0), ``entropy`` that of the whole distribution (nats), ``top`` are
    the likeliest tokens there as (id, log-probability), the likeliest first.
    """

    token: int
    logprob: float
    entropy: float
    top: tuple[tuple[int, float], ...]


def pack_scores(scores: Sequence[TokenScore]) -> bytes:
    """The canonical bytes of some tokens' scores, each with as many alternatives as the first."""
    top = [entry for score in scores for entry in score.top]
    message = pb.TokenScores(
        version=VERSION,
        alternatives=len(scores[0].top) if scores else 0,
        logprobs=_halves([score.logprob for score in scores]),
        entropies=_halves([score.entropy for score in scores]),
        top_ids=[token for token, _ in top],
        top_logprobs=_halves([logprob for _, logprob in top]),
    )
    return message.SerializeToString(deterministic=True)


def read_scores(data: bytes, tokens: Sequence[int]) -> tuple[TokenScore, ...]:
    """Read and check the scores of ``tokens``.

    Raises:
        FormatError: they are not those of so many tokens, or no scores (LimitExceeded, UnsupportedVersion among them).
    """
    message = pb.TokenScores()
    parse(message, data, "scores")
    each = message.alternatives
    check_limit("scores.alternatives", each, limits.MAX_ALTERNATIVES)
    logprobs = _numbers(message.logprobs, len(tokens), "scores.logprobs")
    entropies = _numbers(message.entropies, len(tokens), "scores.entropies")
    top_logprobs = _numbers(message.top_logprobs, len(tokens) * each, "scores.top_logprobs")
    if len(message.top_ids) != len(top_logprobs):
        raise FormatError("the alternatives are not those of so many tokens", field="scores.top_ids")
    check_limit("scores.top_ids", max(message.top_ids, default=0), limits.MAX_VOCABULARY - 1)
    if max(logprobs + top_logprobs, default=0.0) > 0 or min(entropies, default=0.0) < 0:
        raise FormatError("a log-probability is above 0, or an entropy below", field="scores")
    found = []
    for at, (token, logprob, entropy) in enumerate(zip(tokens, logprobs, entropies, strict=True)):
        here = slice(at * each, (at + 1) * each)
        top = tuple(zip(message.top_ids[here], top_logprobs[here], strict=True))
        if any(a < b for (_, a), (_, b) in pairwise(top)):
            raise FormatError("the likeliest alternative does not come first", field="scores.top_logprobs")
        found.append(TokenScore(token, logprob, entropy, top))
    return tuple(found)


def _halves(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}e", *(max(value, LOWEST) + 0.0 for value in values))  # 0.0 rather than -0.0


def _numbers(data: bytes, count: int, field: str) -> tuple[float, ...]:
    """So many finite float16."""
    if len(data) != 2 * count:
        raise FormatError(f"{len(data)} bytes are not {count} numbers", field=field)
    values = struct.unpack(f"<{count}e", data)
    if any(value - value for value in values):  # of NaN and the infinities that is NaN
        raise FormatError("a number is not finite", field=field)
    return values
