"""What the model thinks of tokens: their log-probability, the entropy there, the likeliest ones in their place.

Always under the model itself: temperature 1, no filter, no penalty. Of each token of a reply this is kept with the turn
(``Session.token_scores``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom_proto.scores import TokenScore

if TYPE_CHECKING:
    import torch

__all__ = ["ALTERNATIVES", "TokenScore", "mean_logprob", "perplexity", "score", "scores_of"]

ALTERNATIVES = 5
"""How many of the likeliest tokens are kept of each."""


def score(logits: torch.Tensor, token: int) -> TokenScore:
    """What the model thinks of a token, given the logits (float32 ``[vocab]``, on the CPU) it would be drawn from."""
    return scores_of(logits, [token])[0]


def scores_of(logits: torch.Tensor, tokens: Sequence[int]) -> list[TokenScore]:
    """The same of several tokens that could stand in one place."""
    import torch

    logprobs = logits.log_softmax(0)
    entropy = torch.special.entr(logprobs.exp()).sum()  # entr: a token that is ruled out adds nothing
    top = logprobs.topk(min(ALTERNATIVES, len(logprobs)))
    # The order in which topk returns equals is nobody's promise.
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    likeliest = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
    uncertain = max(float(entropy), 0.0)
    return [TokenScore(token, float(logprobs[token]), uncertain, likeliest) for token in tokens]


def mean_logprob(scores: Sequence[TokenScore]) -> float:
    """The mean log-probability of some tokens (nats); 0 of none."""
    return math.fsum(each.logprob for each in scores) / len(scores) if scores else 0.0


def perplexity(scores: Sequence[TokenScore]) -> float:
    """How many equally likely tokens the model was choosing from, as it were: exp of minus the mean log-probability."""
    return math.exp(-mean_logprob(scores))
