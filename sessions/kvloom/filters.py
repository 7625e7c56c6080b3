"""From logits to the probabilities a token is drawn from: penalties, temperature, and the tokens that are left out.

In the order of transformers, and with its results; each filter is a pure function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kvloom.sampling import SamplingSettings

    Floats = NDArray[np.float64]


def float32(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` as float32 [vocab] in main memory (the same tensor if it is that already)."""
    import torch

    if logits.dim() != 1 or len(logits) == 0 or not logits.is_floating_point():
        raise EngineError(f"logits must be floats of shape [vocab], not {logits.dtype} {list(logits.shape)}")
    # On the CPU whatever the model runs on: other devices break ties differently or have no float64.
    return logits.detach().to("cpu", torch.float32)


def check_usable(top: float) -> None:
    """Refuse logits of which the largest is not a finite number (a NaN counts as the largest). Raises EngineError."""
    if not math.isfinite(top):
        raise EngineError(
            f"the model gave no usable logits: the largest is {top}",
            hint="check the model's files, or run it in float32",
        )


def penalised(scores: torch.Tensor, penalty: float, seen: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """``scores`` (float32 [vocab]) with those of ``seen`` divided by ``penalty``, or multiplied if negative.

    The formula of CTRL (arXiv 1909.05858, section 4.1) in the sign-aware form that transformers uses. A
    token that occurs several times is penalised once.
    """
    import numpy
    import torch

    if penalty == 1.0:
        return scores
    if not isinstance(seen, torch.Tensor):
        seen = torch.from_numpy(numpy.asarray(seen, numpy.int64))  # much faster than torch's own conversion
    ids = seen.to("cpu", torch.int64).reshape(-1)
    # Embeddings may have more rows than the output head; such ids cannot be sampled anyway.
    ids = ids[(ids >= 0) & (ids < len(scores))]
    found = scores[ids]
    scores = scores.clone()  # the caller's logits stay as they are
    scores[ids] = torch.where(found < 0, found * penalty, found / penalty)
    return scores


def weighted(scores: torch.Tensor, top: float, settings: SamplingSettings) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Token ids and their unnormalised probabilities, which are 1 for the most likely, 0 for removed tokens.

    ``scores``: float32 [vocab], ``top`` its largest value, temperature above 0. The ids are int64 [n],
    ascending, or None for the whole vocabulary; the probabilities are float64 [n], so that the last digit
    of an ``exp``, which differs between CPUs, has next to no chance to decide about a token.
    """
    ids: torch.Tensor | None = None
    if 0 < settings.top_k < len(scores):
        # By value: tokens equal to the last one kept are kept too, as transformers does. The order in
        # which topk returns equals would not be reproducible.
        floor = scores.topk(settings.top_k).values[-1]
        ids = (scores >= floor).nonzero().squeeze(1)
        scores = scores[ids]
    # The largest is subtracted before dividing: a tiny temperature then can't overflow.
    weights = scores.double().sub_(top).div_(settings.temperature).exp_()
    keep: torch.Tensor | None = None
    if settings.top_p < 1.0:
        keep = _nucleus(weights, settings.top_p)
    if settings.min_p > 0.0:
        # Min-p (arXiv 2407.01082): relative to the most likely token, whose weight is 1.
        likely = weights >= settings.min_p
        keep = likely if keep is None else keep & likely
    if keep is not None:
        weights = weights * keep
    if settings.typical_p < 1.0:
        weights = weights * _typical(weights, settings.typical_p)
    return ids, weights


def _nucleus(weights: torch.Tensor, p: float) -> torch.Tensor:
    """Which of ``weights`` (float64 [n]) belong to the smallest set of mass >= p of the whole: bool [n].

    Nucleus sampling (arXiv 1904.09751). At least one is kept; of equals, those of lower index first.
    """
    import torch

    last, count = _edge(weights.numpy(), weights.numpy(), p)
    keep = weights > last
    equal = (weights == last).nonzero().squeeze(1)
    keep[equal[: count - int(torch.count_nonzero(keep))]] = True
    return keep


def _typical(weights: torch.Tensor, p: float) -> torch.Tensor:
    """Which of ``weights`` (float64 [n]) are about as likely as expected, up to a mass >= p of the whole: bool [n].

    Locally typical sampling (arXiv 2202.00666): those come first whose information -log(probability) is nearest to
    its mean, the entropy. At least one is kept, and those as near as the last of them.
    """
    import numpy
    import torch

    there = weights > 0
    held = weights[there].numpy()
    probabilities = held / held.sum()
    information = -numpy.log(probabilities)
    nearness = -numpy.abs(information - (probabilities * information).sum())
    last, _ = _edge(nearness, probabilities, p)
    keep = there.clone()
    keep[there] = torch.from_numpy(nearness >= last)
    return keep


def _edge(ranks: Floats, weights: Floats, p: float) -> tuple[float, int]:
    """The rank of the last that belongs to the smallest set of weight >= p of the whole, and how many that set has.

    It takes those of the highest rank first.
    """
    import numpy

    # Sums are numpy's, which uses one thread; the rounding of torch's depends on the number of threads.
    target = float(weights.sum()) * p
    # The last one lies in the band; ``count`` others of mass ``above`` rank higher than all of it. Halving it a few
    # times costs a fifth of sorting a whole vocabulary.
    count, above = 0, 0.0
    while len(ranks) > 512:
        upper = ranks >= ranks.mean()
        high = int(numpy.count_nonzero(upper))
        if high in (0, len(ranks)):  # all are equal
            break
        mass = float(weights[upper].sum())
        if above + mass >= target:
            ranks, weights = ranks[upper], weights[upper]
        else:
            count, above, ranks, weights = count + high, above + mass, ranks[~upper], weights[~upper]
    order = numpy.argsort(-ranks, kind="stable")
    place = min(int(numpy.searchsorted(above + weights[order].cumsum(), target)), len(order) - 1)
    return float(ranks[order[place]]), count + place + 1
