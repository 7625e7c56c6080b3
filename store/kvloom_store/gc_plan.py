"""Which state to drop so that little is lost by it: a pure function over what a store holds.

The value of a segment is (how likely it is needed) x (seconds to compute it anew - seconds to read it) / (its bytes).
What is worth least goes first, but only leaves go: a segment stays as long as one that stays stands on it, so what
several paths share is counted for all of them and outlives each. Nothing but state is ever dropped.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from kvloom_store.rates import Pace

READ_BYTES = 1e9
"""Bytes a second that a restore reads, about: it is little beside computing, and need not be known well."""

DAY_US = 86_400_000_000

UNNAMED = 0.125
"""How likely what no branch and no tag leads to is needed, beside what one does."""

ASSUMED = Pace(0.1, 0.01, 0.05)
"""For the order alone, where no turn of a model was timed yet."""


class Tier(IntEnum):
    """What goes before what, whatever it is worth."""

    ORPHAN = 0
    """No turn reaches it, or it was never finished: it goes in any case."""
    UNNAMED = 1
    """No branch and no tag leads to it: replies that were taken back, or regenerated."""
    NAMED = 2


@dataclass(frozen=True, slots=True)
class Held:
    """One segment: positions [start, end) of a root's path, on top of ``base``. ``reached``: a turn stands on it."""

    id: int
    base: int | None
    root: int
    start: int
    end: int
    bytes: int
    reached: bool = True

    @property
    def tokens(self) -> int:
        """Tokens whose state it holds."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Point:
    """The end of a path that somebody may go on from: at position ``end`` of a segment, last used ``idle_us`` ago.

    ``name`` is what leads to it, ``session@branch`` or a tag; none: it is a turn that nothing was said on.
    """

    segment: int
    end: int
    idle_us: int
    name: str = ""

    @property
    def weight(self) -> float:
        """How likely it is gone on from, beside others: what has been idle for long goes on being so."""
        return (1.0 if self.name else UNNAMED) / (1 + max(self.idle_us, 0) / DAY_US)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan is made from. ``kept`` are segments that may not be dropped: those of pins, and those that somebody
    needs who could not bring them back, or is about to put state on. ``paces`` are by root."""

    segments: tuple[Held, ...]
    points: tuple[Point, ...]
    kept: frozenset[int] = frozenset()
    paces: Mapping[int, Pace] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What all state takes."""
        return sum(each.bytes for each in self.segments)


@dataclass(frozen=True, slots=True)
class Touched:
    """A branch or tag that loses state: how many tokens at its end are to be computed anew when it is gone on with.

    ``segments`` are those it loses, the last one first; ``seconds`` what computing them anew takes, None if unknown.
    """

    name: str
    tokens: int
    segments: tuple[int, ...]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Segments to drop, in an order in which nothing ever stands on what is gone; bytes of state before and after.

    ``seconds`` is what computing all of it anew would take on this machine, each token once; None if that is unknown.
    ``kept_bytes`` is what is left that may not go: pins, and what they stand on.
    """

    drops: tuple[Held, ...]
    before: int
    after: int
    touched: tuple[Touched, ...]
    tokens: int
    seconds: float | None
    kept_bytes: int

    @property
    def freed(self) -> int:
        """Bytes of state that go."""
        return self.before - self.after


def plan(facts: Facts, max_bytes: int | None, *, keep_named: bool = False) -> Plan:
    """What to drop so that at most ``max_bytes`` of state are left (None: only what no turn reaches).

    ``keep_named``: nothing goes that a branch or a tag leads to. If not enough may go, all that may does.
    """
    forest = {each.id: each for each in facts.segments}
    bases = {each.id: each.base for each in facts.segments}
    kept = chain_of(bases, facts.kept)
    tiers, weights = _tiers(facts, bases), _weights(facts, forest)
    last = Tier.ORPHAN if max_bytes is None else Tier.UNNAMED if keep_named else Tier.NAMED
    allowed = {each for each in forest if each not in kept and tiers[each] <= last}
    chosen = list(_chosen(facts, forest, allowed, tiers, weights, max_bytes or 0))
    drops = _needed(forest, chosen, tiers, facts.bytes, max_bytes)
    gone = {each.id for each in drops}
    state = [each for each in drops if tiers[each.id] > Tier.ORPHAN]
    return Plan(
        tuple(drops),
        facts.bytes,
        facts.bytes - sum(each.bytes for each in drops),
        tuple(_touched(facts, forest, gone)),
        sum(each.tokens for each in state),
        _seconds(facts, state),
        sum(forest[each].bytes for each in kept),
    )


def chain_of(bases: Mapping[int, int | None], ids: Iterable[int]) -> set[int]:
    """Some segments and all that they stand on."""
    found: set[int] = set()
    for each in ids:
        at: int | None = each
        while at in bases and at not in found:
            assert at is not None
            found.add(at)
            at = bases[at]
    return found


def _tiers(facts: Facts, bases: Mapping[int, int | None]) -> dict[int, Tier]:
    named = chain_of(bases, (point.segment for point in facts.points if point.name))
    reached = chain_of(bases, (each.id for each in facts.segments if each.reached))
    return {each: Tier.NAMED if each in named else Tier.UNNAMED if each in reached else Tier.ORPHAN for each in bases}


def _weights(facts: Facts, forest: Mapping[int, Held]) -> dict[int, float]:
    """How likely each segment is needed: by all paths that end in it or in what stands on it."""
    weights = dict.fromkeys(forest, 0.0)
    for point in facts.points:
        if point.segment in weights:
            weights[point.segment] += point.weight
    for each in _leaves_first(forest):
        if each.base is not None and each.base in weights:
            weights[each.base] += weights[each.id]
    return weights


def _leaves_first(forest: Mapping[int, Held]) -> Iterator[Held]:
    standing = _standing(forest)
    free = [each for each in forest if not standing[each]]
    while free:
        at = forest[free.pop()]
        yield at
        if at.base in standing:
            standing[at.base] -= 1
            if not standing[at.base]:
                free.append(at.base)


def _standing(forest: Mapping[int, Held]) -> dict[int, int]:
    """How many segments stand on each."""
    standing = dict.fromkeys(forest, 0)
    for each in forest.values():
        if each.base in standing:
            standing[each.base] += 1
    return standing


def _chosen(
    facts: Facts,
    forest: Mapping[int, Held],
    allowed: set[int],
    tiers: Mapping[int, Tier],
    weights: Mapping[int, float],
    max_bytes: int,
) -> Iterator[Held]:
    """Leaves, worth least first, until what is left is little enough; whatever no turn reaches goes anyhow."""

    def rank(each: int) -> tuple[Tier, float, int]:
        held = forest[each]
        saved = facts.paces.get(held.root, ASSUMED).token * held.tokens - held.bytes / READ_BYTES
        return tiers[each], weights[each] * max(saved, 0.0) / max(held.bytes, 1), each

    standing, left = _standing(forest), facts.bytes
    heap = [rank(each) for each in allowed if not standing[each]]
    heapq.heapify(heap)
    while heap:
        tier, _, at = heapq.heappop(heap)
        if tier > Tier.ORPHAN and left <= max_bytes:
            return
        yield forest[at]
        left -= forest[at].bytes
        base = forest[at].base
        if base in standing:
            standing[base] -= 1
            if not standing[base] and base in allowed:
                heapq.heappush(heap, rank(base))


def _needed(
    forest: Mapping[int, Held], chosen: Sequence[Held], tiers: Mapping[int, Tier], before: int, max_bytes: int | None
) -> list[Held]:
    """What was chosen without what later, larger choices made needless; the rest stays in its order."""
    left, gone = before - sum(each.bytes for each in chosen), {each.id for each in chosen}
    for each in reversed(chosen):  # what it stands on was chosen after it, and so is looked at before
        fits = max_bytes is not None and left + each.bytes <= max_bytes
        if fits and tiers[each.id] > Tier.ORPHAN and each.base not in gone:
            gone.remove(each.id)
            left += each.bytes
    return [each for each in chosen if each.id in gone]


def _touched(facts: Facts, forest: Mapping[int, Held], gone: set[int]) -> Iterator[Touched]:
    for point in facts.points:
        lost: list[int] = []
        at: int | None = point.segment
        while at in gone:
            lost.append(at)
            at = forest[at].base
        if point.name and lost:
            below = forest[lost[-1]]
            tokens, pace = point.end - below.start, facts.paces.get(below.root)
            yield Touched(point.name, tokens, tuple(lost), pace.prefill(tokens) if pace else None)


def _seconds(facts: Facts, drops: Sequence[Held]) -> float | None:
    """Computing everything anew: its tokens, and a beginning for each end of a path that is gone."""
    if any(each.root not in facts.paces for each in drops):
        return None
    bases = {each.base for each in drops}
    paces = [(facts.paces[each.root], each) for each in drops]
    return sum(pace.token * each.tokens + pace.begin * (each.id not in bases) for pace, each in paces)
