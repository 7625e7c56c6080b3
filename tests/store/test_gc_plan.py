"""What is dropped: nothing that something kept stands on, nothing that is protected, and no more than is needed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom_store.gc_plan import DAY_US, Facts, Held, Plan, Point, plan
from kvloom_store.rates import Pace, _line

PACE = Pace(begin=0.0, token=0.01, single=0.05)


@st.composite
def forests(draw: st.DrawFn) -> Facts:
    """A few segments on one another, the points that lead to some of them, and some that may not go."""
    count = draw(st.integers(0, 7))
    held: list[Held] = []
    for number in range(1, count + 1):
        base = draw(st.sampled_from([None, *held]))
        start = draw(st.integers(base.start + 1, base.end)) if base is not None else 0
        end = start + draw(st.integers(1, 50))
        size, reached = draw(st.integers(0, 40)) * 1000, draw(st.booleans())
        held.append(Held(number, base.id if base else None, 1, start, end, size, reached))
    points = [
        Point(each.id, each.end, draw(st.integers(0, 40)) * DAY_US, draw(st.sampled_from(["", f"s@{each.id}"])))
        for each in held
        if each.reached and draw(st.booleans())
    ]
    kept = draw(st.sets(st.sampled_from([each.id for each in held]))) if held else set()
    return Facts(tuple(draw(st.permutations(held))), tuple(points), frozenset(kept), {1: PACE})


def below(facts: Facts, ids: set[int]) -> set[int]:
    """Some segments and what they stand on, found the slow way."""
    bases = {each.id: each.base for each in facts.segments}
    while True:
        more = {bases[each] for each in ids} - {None} - ids
        if not more:
            return ids
        ids = ids | more


def allowed(facts: Facts, *, keep_named: bool) -> set[int]:
    """What may go at all."""
    protected = below(facts, set(facts.kept))
    if keep_named:
        protected |= below(facts, {point.segment for point in facts.points if point.name})
    return {each.id for each in facts.segments} - protected


def ways(facts: Facts, may_go: set[int]) -> list[set[int]]:
    """Every set that may go together: whatever stands on one of it goes, too."""
    on = {each.id: {other.id for other in facts.segments if other.base == each.id} for each in facts.segments}
    every = itertools.chain.from_iterable(itertools.combinations(sorted(may_go), n) for n in range(len(may_go) + 1))
    return [set(some) for some in every if all(on[each] <= set(some) for each in some)]


@given(forests(), st.integers(0, 200_000), st.booleans())
def test_what_is_dropped_is_allowed_frees_enough_and_is_no_more_than_is_needed(
    facts: Facts, most: int, keep_named: bool
):
    made = plan(facts, most, keep_named=keep_named)
    gone = {each.id for each in made.drops}
    may_go, size = allowed(facts, keep_named=keep_named), {each.id: each.bytes for each in facts.segments}
    possible = ways(facts, may_go)
    assert gone in possible, "nothing that is protected, and nothing that something kept stands on"
    assert made.before - made.after == made.freed == sum(size[each] for each in gone)
    reachable = below(facts, {each.id for each in facts.segments if each.reached} | {p.segment for p in facts.points})
    orphans = {each for each in may_go if each not in reachable}
    assert orphans <= gone, "what no turn reaches goes in any case"
    least = min(made.before - sum(size[each] for each in some) for some in possible)
    assert made.after <= max(most, least), "it frees enough, or all that there is"
    for each in gone - orphans:
        fewer = gone - {each}
        assert fewer not in possible or made.before - sum(size[one] for one in fewer) > most, "each is needed"


@given(forests(), st.integers(0, 200_000))
def test_each_is_dropped_after_all_that_stands_on_it(facts: Facts, most: int):
    order = [each.id for each in plan(facts, most).drops]
    for each in plan(facts, most).drops:
        assert each.base not in order[: order.index(each.id)]


@given(forests(), st.integers(0, 200_000))
def test_branches_lose_state_only_when_all_else_is_gone(facts: Facts, most: int):
    named = below(facts, {point.segment for point in facts.points if point.name})
    made = plan(facts, most)
    if {each.id for each in made.drops} & named:
        assert plan(facts, most, keep_named=True).after > most, "without them it would not have been enough"


@given(forests())
def test_no_target_drops_only_what_no_turn_reaches(facts: Facts):
    reached = below(facts, {each.id for each in facts.segments if each.reached} | {p.segment for p in facts.points})
    made = plan(facts, None)
    assert not {each.id for each in made.drops} & reached
    assert made.touched == ()


@given(forests(), st.integers(0, 200_000))
def test_what_is_touched_is_what_a_path_loses_at_its_end(facts: Facts, most: int):
    made = plan(facts, most)
    gone = {each.id for each in made.drops}
    told = {each.name: each for each in made.touched}
    for point in facts.points:
        if point.name:
            mine = below(facts, {point.segment}) & gone
            assert set(told[point.name].segments if point.name in told else ()) == mine
            if mine:
                first = min(each.start for each in facts.segments if each.id in mine)
                assert told[point.name].tokens == point.end - first
                assert told[point.name].seconds == pytest.approx(PACE.prefill(point.end - first))


def test_a_shared_prefix_outlives_what_stands_on_it_and_the_branch_used_last_the_others():
    prefix, old, new = Held(1, None, 1, 0, 100, 100), Held(2, 1, 1, 100, 200, 100), Held(3, 1, 1, 100, 200, 100)
    points = (Point(2, 200, 30 * DAY_US, "s@old"), Point(3, 200, 0, "s@new"))
    facts = Facts((prefix, old, new), points, paces={1: PACE})

    def gone(most: int) -> list[int]:
        return [each.id for each in plan(facts, most).drops]

    assert [gone(most) for most in (300, 299, 200, 100, 0)] == [[], [2], [2], [2, 3], [2, 3, 1]]


def test_state_that_is_dear_to_compute_outlives_state_that_is_only_large():
    short_and_large, long_and_small = Held(1, None, 1, 0, 10, 5000), Held(2, None, 1, 0, 1000, 4000)
    points = (Point(1, 10, 0, "s@a"), Point(2, 1000, 0, "s@b"))
    facts = Facts((short_and_large, long_and_small), points, paces={1: PACE})
    assert [each.id for each in plan(facts, 6000).drops] == [1]


def test_a_pace_that_nobody_knows_is_told_as_unknown():
    facts = Facts((Held(1, None, 1, 0, 10, 100),), (Point(1, 10, 0, "s@a"),))
    made = plan(facts, 0)
    assert isinstance(made, Plan)
    assert (made.seconds, made.touched[0].seconds) == (None, None)


@given(
    st.floats(0.001, 1.0), st.floats(0.0005, 0.1), st.lists(st.integers(1, 4000), min_size=2, max_size=9, unique=True)
)
def test_a_pace_is_found_from_what_was_timed(begin: float, token: float, sizes: list[int]):
    found = _line([(float(n), begin + token * n) for n in sizes])
    for n in sizes:
        assert found[0] + found[1] * n == pytest.approx(begin + token * n, rel=0.01)


def test_a_pace_takes_no_time_back_and_is_within_what_noisy_timings_say():
    assert _line([(10.0, 1.0), (20.0, 1.0), (30.0, 0.8)]) == (0.0, pytest.approx(1 / 24, rel=0.4))
    begin, token = _line([(1.0, 0.07), (24.0, 0.23), (300.0, 0.95), (30.0, 0.2)])
    assert begin + 4000 * token == pytest.approx(11.0, rel=0.5)
