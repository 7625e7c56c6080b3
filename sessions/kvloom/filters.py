"""From logits to the probabilities a token is drawn from: penalties, temperature, and the tokens that are left out.

In the order of transformers, and with its results; each filter is a pure function of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom.errors import EngineError

if TYPE_CHECKING:
    import torch

    from kvloom.sampling import SamplingSettings


def float32(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` as float32 [vocab] in main memory (the same tensor if it is that already)."""
    import torch

    if logits.dim() != 1 or len(logits) == 0 or not logits.is_floating_point():
        raise EngineError(f"logits must be floats of shape [vocab], not {logits.dtype} {list(logits.shape)}")
    # On the CPU whatever the model runs on: other devices break ties differently or have no float64.
    return logits.detach().to("cpu", torch.float32)


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
    return ids, weights if keep is None else weights * keep


def _nucleus(weights: torch.Tensor, p: float) -> torch.Tensor:
    """Which of ``weights`` (float64 [n]) belong to the smallest set of mass >= p of the whole: bool [n].

    Nucleus sampling (arXiv 1904.09751). At least one is kept; of equals, those of lower index first.
    """
    import numpy
    import torch

    # Sums are numpy's, which uses one thread; the rounding of torch's depends on the number of threads.
    band = weights.numpy()
    target = float(band.sum()) * p
    # The last weight that belongs to the set lies in the band; ``count`` others of mass ``above`` are
    # larger than all of it. Halving it a few times costs a fifth of sorting a whole vocabulary.
    count, above = 0, 0.0
    while len(band) > 512:
        upper = band >= band.mean()
        high = band[upper]
        if len(high) in (0, len(band)):  # all are equal
            break
        mass = float(high.sum())
        if above + mass >= target:
            band = high
        else:
            count, above, band = count + len(high), above + mass, band[~upper]
    ordered = numpy.sort(band)[::-1]
    place = min(int(numpy.searchsorted(above + ordered.cumsum(), target)), len(ordered) - 1)
    last = float(ordered[place])
    keep = weights > last
    equal = (weights == last).nonzero().squeeze(1)
    keep[equal[: count + place + 1 - int(torch.count_nonzero(keep))]] = True
    return keep
