"""How the next token is chosen, as a pure function of logits, settings, seed and position.

There is no random generator to save: the only randomness is ``uniform(seed, position)``, where
position is the absolute place of the new token in its conversation. A reply can therefore be repeated,
continued or resumed in another process with nothing but its seed.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from kvloom.errors import SessionError
from kvloom.filters import check_usable, float32, penalised, weighted

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_SEED", "SamplingSettings", "check_siblings", "choose", "fresh_seed", "uniform"]

MAX_SEED = 2**63 - 1  # a signed 64-bit column holds it in every database
MAX_COUNT = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_SIBLINGS = 256  # replies at once

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
    typical_p           keep the fewest tokens of about the expected information that add up to p, at least one; 1: off
    repetition_penalty  above 1: tokens already in the text become less likely; 1: off
    seed                0 to 2**63-1; None: the caller draws one with ``fresh_seed`` and records it
    max_tokens          the reply ends after that many tokens
    stop                the reply ends before any of these strings
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
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
        put("typical_p", _number("typical_p", self.typical_p, 0.0, 1.0))
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


def check_siblings(name: str, count: object) -> None:
    """Check how many replies are asked for at once. Raises SessionError."""
    _count(name, count, 1, MAX_SIBLINGS)


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
    (shape [n]; repeats and ids outside the vocabulary are harmless), temperature, top-k, top-p, min-p, typical-p.
    Then the first token, in order of token ids, at which the running sum of what is left exceeds
    ``uniform(seed, position)``. Greedy takes the lowest id among equals, after the penalty, and does
    not look at seed and position.

    The result does not depend on the thread count: everything is elementwise, exact (max, comparisons),
    or a sum taken in one fixed order. Raises EngineError if the largest logit is not a finite number.
    """
    import torch

    scores = penalised(float32(logits), settings.repetition_penalty, seen)
    best = int(scores.argmax())  # documented to be the first of equals; a NaN counts as the largest
    top = float(scores[best])
    check_usable(top)
    if settings.temperature == 0.0:
        return best
    ids, weights = weighted(scores, top, settings)
    sums = weights.cumsum(0)
    target = sums[-1] * uniform(seed, position)
    # The first sum above the target belongs to a token of positive weight: the others add nothing.
    place = int(torch.searchsorted(sums, target, right=True))
    if place == len(sums):  # the product was rounded up to the whole sum
        place = int(weights.nonzero()[-1])
    return place if ids is None else int(ids[place])
