"""How the next token is chosen, as a pure function of logits, settings, seed and position.

There is no random generator to save: the only randomness is ``uniform(seed, position)``, where
position is the absolute place of the new token in its conversation. A reply can therefore be repeated,
continued or resumed in another process with nothing but its seed.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from kvloom.errors import EngineError, SessionError

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_SEED", "SamplingSettings", "choose", "float32", "fresh_seed", "logprob", "uniform"]

MAX_SEED = 2**63 - 1  # a signed 64-bit column holds it in every database
MAX_COUNT = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters

# Part of the definition of ``uniform``: another person string is another sequence for every seed ever stored.
_PERSON = b"kvloom-uniform-1"


def _number(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float in [low, high]; SessionError that names the setting otherwise."""
    # NaN fails both comparisons. bool is an int to Python, but nobody means temperature=True.
    # The comparison comes first: float() of a huge int raises OverflowError.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SessionError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}", hint=f"change {name}")
    return float(value) + 0.0  # -0.0 becomes 0.0, so that equal settings are stored as equal bytes


def _count(name: str, value: object, low: int, high: int) -> None:
    """Check that ``value`` is an int in [low, high]; SessionError that names the setting otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SessionError(
            f"{name} is {value!r}; it must be a whole number from {low} to {high}", hint=f"change {name}"
        )


def _stops(value: object) -> tuple[str, ...]:
    """``value`` as a tuple of stop strings; SessionError that names ``stop`` otherwise."""
    # A bare string would otherwise be taken for a sequence of one-character stops.
    if not isinstance(value, tuple | list):
        raise SessionError(f"stop is {value!r}; it must be a tuple of strings", hint="change stop")
    if len(value) > MAX_STOPS:
        raise SessionError(f"stop has {len(value)} strings; at most {MAX_STOPS} are allowed", hint="use fewer")
    for text in value:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise SessionError(
                f"stop has {text!r:.60}; each must be a string of 1 to {MAX_STOP_LENGTH} characters",
                hint="change stop",
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise SessionError(f"stop has {text!a:.60}, which is not valid Unicode text", hint="change stop")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What a reply was, or is to be, sampled with. Raises SessionError naming the field that is wrong.

    temperature         0 (greedy: the most likely token) to 100
    top_k               keep the k most likely tokens, and those equal to the last of them; 0: off
    top_p               keep the fewest tokens whose probability adds up to p, at least one; 1: off
    min_p               keep tokens at least min_p times as likely as the most likely one; 0: off
    repetition_penalty  above 1: tokens already in the text become less likely; 1: off
    seed                0 to 2**63-1; None: the caller draws one with ``fresh_seed`` and records it
    max_tokens          the reply ends after that many tokens
    stop                the reply ends before any of these strings
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        put("temperature", _number("temperature", self.temperature, 0.0, 100.0))
        _count("top_k", self.top_k, 0, MAX_COUNT)
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        # Bounded, so that no finite float32 logit of a sane model becomes infinite.
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.seed is not None:
            _count("seed", self.seed, 0, MAX_SEED)
        _count("max_tokens", self.max_tokens, 1, MAX_COUNT)
        put("stop", _stops(self.stop))

    def to_plain(self) -> dict[str, Any]:
        """Every field as plain data for MessagePack; defaults too: changing one must not change old turns."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["stop"] = list(self.stop)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SamplingSettings:
        """The settings ``to_plain`` wrote; missing fields get defaults, unknown ones raise SessionError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in plain if name not in known)
        if unknown:
            raise SessionError(
                f"unknown sampling settings: {', '.join(unknown)}",
                hint="known are " + ", ".join(sorted(known)),
            )
        return cls(**plain)


def fresh_seed() -> int:
    """A seed nobody can predict, in [0, 2**63-1]; whoever draws it records it with the turn."""
    return secrets.randbits(63)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), uniform to 53 bits, that depends on nothing but its arguments.

    It is the top 53 bits of BLAKE2b-64 (RFC 7693) over both numbers as little-endian unsigned 64-bit
    integers, so it is the same on every machine and in every version. Both must be in [0, 2**63-1];
    SessionError otherwise.
    """
    _count("seed", seed, 0, MAX_SEED)
    _count("position", position, 0, MAX_SEED)
    digest = blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=_PERSON).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(
    logits: torch.Tensor,
    settings: SamplingSettings,
    *,
    seen: Sequence[int] | torch.Tensor,
    seed: int,
    position: int,
) -> int:
    """The next token id, given the logits of the last position (shape [vocab], any float dtype, unchanged).

    Applied in this order, which is that of transformers: repetition penalty over the ids in ``seen``
    (shape [n]; repeats and ids outside the vocabulary are harmless), temperature, top-k, top-p, min-p.
    Then the first token, in order of token ids, at which the running sum of what is left exceeds
    ``uniform(seed, position)``. Greedy takes the lowest id among equals, after the penalty, and does
    not look at seed and position.

    The result does not depend on the thread count: everything is elementwise, exact (max, comparisons),
    or a sum taken in one fixed order. Raises EngineError if the largest logit is not a finite number.
    """
    import torch

    scores = _penalised(float32(logits), settings.repetition_penalty, seen)
    best = int(scores.argmax())  # documented to be the first of equals; a NaN counts as the largest
    top = float(scores[best])
    if not math.isfinite(top):
        raise EngineError(
            f"the model gave no usable logits: the largest is {top}",
            hint="check the model's files, or run it in float32",
        )
    if settings.temperature == 0.0:
        return best
    ids, weights = _weights(scores, top, settings)
    sums = weights.cumsum(0)
    target = sums[-1] * uniform(seed, position)
    # The first sum above the target belongs to a token of positive weight: the others add nothing.
    place = int(torch.searchsorted(sums, target, right=True))
    if place == len(sums):  # the product was rounded up to the whole sum
        place = int(weights.nonzero()[-1])
    return place if ids is None else int(ids[place])


def logprob(logits: torch.Tensor, token: int) -> float:
    """Natural logarithm of the probability the model itself (temperature 1, no filters) gives ``token``.

    ``logits`` has shape [vocab], any float dtype; EngineError if ``token`` is outside of it.
    """
    scores = float32(logits).double()
    if not 0 <= token < len(scores):
        raise EngineError(f"token {token} is outside the vocabulary of {len(scores)}")
    scores = scores - scores.max()
    return float(scores[token] - scores.exp().cumsum(0)[-1].log())


def float32(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` as float32 [vocab] in main memory (the same tensor if it is that already)."""
    import torch

    if logits.dim() != 1 or len(logits) == 0 or not logits.is_floating_point():
        raise EngineError(f"logits must be floats of shape [vocab], not {logits.dtype} {list(logits.shape)}")
    # On the CPU whatever the model runs on: other devices break ties differently or have no float64.
    return logits.detach().to("cpu", torch.float32)


def _penalised(scores: torch.Tensor, penalty: float, seen: Sequence[int] | torch.Tensor) -> torch.Tensor:
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


def _weights(scores: torch.Tensor, top: float, settings: SamplingSettings) -> tuple[torch.Tensor | None, torch.Tensor]:
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
