"""The restore planner: what is read and what is run again, against a second opinion that goes position by position.

The oracle knows nothing of how a plan is made. It walks over every position of a chain of random segments, asks who
owns it, and holds the plan to that.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto.records import (
    ChunkSpec,
    LayerKind,
    LayerSpec,
    Manifest,
    Pass,
    Schedule,
    TensorSpec,
    pack,
)
from kvloom_store import planner, segments
from kvloom_store.planner import Keyframe, Link, Plan, Read, StateDamaged, Step

TENSOR = TensorSpec("keys", "bfloat16", (1,), 0)
GRID = 7


@dataclass(frozen=True)
class Made:
    """One segment as it was recorded: where its passes begin and end, and the keyframes it holds."""

    id: int
    start: int
    passes: tuple[tuple[int, int], ...]
    keyframes: tuple[int, ...]
    unknown: bool

    @property
    def end(self) -> int:
        return self.passes[-1][1]

    def link(self, base: int | None, layers: tuple[LayerSpec, ...]) -> Link:
        chunks: tuple[ChunkSpec, ...] = tuple(
            replace(spec, raw_digest=bytes(16), stored_digest=bytes(16))
            for spec in segments.cut(layers, self.start, self.end, self.keyframes)
        )
        manifest = pack(Manifest(self.start, self.end, 256, layers, chunks))
        schedule = Schedule(() if self.unknown else tuple(Pass(a, b - a) for a, b in self.passes), self.unknown)
        return Link(self.id, 1, self.start, self.end, base, 10 + self.id, manifest, pack(schedule))


@dataclass(frozen=True)
class Case:
    """A chain of segments, the layers of the model, and a position to come back to."""

    chain: tuple[Made, ...]
    layers: tuple[LayerSpec, ...]
    position: int

    @property
    def links(self) -> list[Link]:
        bases = [None, *(made.id for made in self.chain)]
        return [made.link(base, self.layers) for made, base in zip(self.chain, bases, strict=False)]

    @property
    def window(self) -> int:
        return max((spec.window for spec in self.layers), default=0)

    @property
    def has_keyframes(self) -> bool:
        return any(spec.kind == LayerKind.KEYFRAME for spec in self.layers)

    def owner(self, at: int) -> Made:
        """Whose row the one at a position is: that of the last segment that has begun by then."""
        return [made for made in self.chain if made.start <= at][-1]

    def taken_over(self, made: Made) -> int:
        """Where the next segment begins, or infinity."""
        return min((other.start for other in self.chain[made.id + 1 :]), default=1 << 30)

    def plan(self, **options: object) -> Plan:
        return planner.plan(self.links, self.position, self.layers, grid=GRID, **options)  # type: ignore[arg-type]


@st.composite
def kinds(draw: st.DrawFn) -> tuple[LayerSpec, ...]:
    some = st.sampled_from([LayerKind.ROWS, LayerKind.WINDOW, LayerKind.KEYFRAME, LayerKind.EMPTY])
    made: Sequence[LayerSpec] = []
    for index, kind in enumerate(draw(st.lists(some, min_size=1, max_size=4))):
        window = draw(st.integers(1, 30)) if kind == LayerKind.WINDOW else 0
        made.append(LayerSpec(index, 1, kind, () if kind == LayerKind.EMPTY else (TENSOR,), window))
    return tuple(made)


@st.composite
def cases(draw: st.DrawFn, layers: st.SearchStrategy[tuple[LayerSpec, ...]] = kinds()) -> Case:  # noqa: B008
    specs = draw(layers)
    keeps = any(spec.kind == LayerKind.KEYFRAME for spec in specs)
    chain: list[Made] = []
    for number in range(draw(st.integers(1, 5))):
        # At least one row of the segment before stays, as in a conversation.
        start = draw(st.integers(chain[-1].start + 1, chain[-1].end)) if chain else 0
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
        cuts = list(itertools.accumulate(lengths, initial=start))
        # Keyframes stand where a pass ends; at the start, where there is state already, it is the delta's own.
        possible = cuts[1:] if start == 0 else cuts
        keyframes = tuple(at for at in possible if keeps and draw(st.booleans()))
        chain.append(Made(number, start, tuple(itertools.pairwise(cuts)), keyframes, draw(st.integers(0, 5)) == 0))
    return Case(tuple(chain), specs, draw(st.integers(0, chain[-1].end)))


def wrong(case: Case, plan: Plan, *, in_memory: bool = False) -> list[str]:
    """What the oracle has against a plan; nothing, if it is right."""
    found = []
    if _positions(plan.rows) != [(at, case.owner(at).id) for at in range(case.position)]:
        found.append("rows")
    base = plan.replay[0].start if plan.replay else case.position
    first = max(0, base - case.window + 1)
    if _positions(plan.windows) != [(at, case.owner(at).id) for at in range(first, case.position) if case.window]:
        found.append("windows")
    if not case.has_keyframes:
        return found + ["keyframe"] * (plan.keyframe is not None) + ["replay"] * bool(plan.replay)
    if in_memory:
        expected = Keyframe(None, case.position)
        return found + ["keyframe"] * (plan.keyframe != expected) + ["replay"] * bool(plan.replay)
    if plan.keyframe not in _nearest_legal(case):
        found.append("keyframe")
    if plan.keyframe is None or _bad_steps(case, plan.keyframe.position, plan.replay):
        found.append("replay")
    return found


def _positions(reads: Sequence[Read]) -> list[tuple[int, int]]:
    return [(at, read.segment) for read in reads for at in range(read.start, read.end)]


def _nearest_legal(case: Case) -> list[Keyframe]:
    """The keyframes that stand on the path to the position, of those the ones that stand furthest along it."""
    legal = [
        Keyframe(made.id, at)
        for made in case.chain
        for at in made.keyframes
        # What a segment computed behind the point where the next one took over is another path's.
        if at <= min(case.position, case.taken_over(made))
    ]
    furthest = max((each.position for each in legal), default=0)
    return [each for each in legal if each.position == furthest] or [Keyframe(None, 0)]


def _bad_steps(case: Case, start: int, steps: Sequence[Step]) -> bool:
    """Whether passes do not lead from a keyframe to the position just as they are recorded."""
    at = start
    for step in steps:
        made = case.owner(step.start)
        limit = min(case.position, case.taken_over(made))
        if made.unknown:
            end = step.start - step.start % GRID + GRID
        else:
            end = next(b for a, b in made.passes if a <= step.start < b)
            # A pass is begun where it began, or where a keyframe was taken before.
            if step.start not in {start, *(a for a, _ in made.passes)}:
                return True
        if (step.start, step.end, step.provenance) != (at, min(end, limit), 10 + made.id):
            return True
        at = step.end
    return at != case.position


@given(case=cases())
def test_a_plan_is_right_at_every_position_of_every_chain(case: Case) -> None:
    assert wrong(case, case.plan()) == []


@given(case=cases())
def test_a_keyframe_in_memory_needs_no_other_and_nothing_is_run_again(case: Case) -> None:
    plan = case.plan(in_memory=True)
    assert wrong(case, plan, in_memory=True) == []
    assert (plan.base, plan.replayed) == (case.position, 0)


PLAIN = st.lists(st.sampled_from([0, 3, 20]), min_size=1, max_size=3).map(
    lambda windows: tuple(
        LayerSpec(n, 1, LayerKind.WINDOW if window else LayerKind.ROWS, (TENSOR,), window)
        for n, window in enumerate(windows)
    )
)


@given(case=cases(PLAIN))
def test_models_that_overwrite_nothing_never_replay(case: Case) -> None:
    plan = case.plan()
    assert (plan.keyframe, plan.replay, plan.base) == (None, (), case.position)


@given(case=cases(), data=st.data())
def test_a_plan_depends_on_nothing_but_what_it_is_given(case: Case, data: st.DataObject) -> None:
    links = case.links
    once = planner.plan(links, case.position, case.layers, grid=GRID)
    planner.plan(links, data.draw(st.integers(0, case.chain[-1].end)), case.layers, in_memory=True)
    assert planner.plan(links, case.position, case.layers, grid=GRID) == once


@given(case=cases(), beyond=st.integers(1, 500))
def test_a_position_nobody_holds_is_refused(case: Case, beyond: int) -> None:
    with pytest.raises(StateDamaged):
        planner.plan(case.links, case.chain[-1].end + beyond, case.layers)


# The oracle itself: plans that are a little wrong must not please it.


def later_keyframe(case: Case, plan: Plan) -> Plan | None:
    """A keyframe behind the point where the next segment took over."""
    for made in case.chain[:-1]:
        beyond = [at for at in made.keyframes if case.taken_over(made) < at <= case.position]
        if beyond:
            steps = tuple(step for step in plan.replay if step.start >= beyond[0])
            return replace(plan, keyframe=Keyframe(made.id, beyond[0]), replay=steps)
    return None


def row_of_the_base(case: Case, plan: Plan) -> Plan | None:
    """One row too many of the segment below."""
    if len(plan.rows) < 2:
        return None
    low, high, *rest = plan.rows
    moved = (replace(low, end=low.end + 1), replace(high, start=high.start + 1), *rest)
    return replace(plan, rows=tuple(read for read in moved if read.start < read.end))


def shorter_window(case: Case, plan: Plan) -> Plan | None:
    """The window's first row left out."""
    if not plan.windows:
        return None
    first, *rest = plan.windows
    cut = [replace(first, start=first.start + 1), *rest]
    return replace(plan, windows=tuple(read for read in cut if read.start < read.end))


def joined_passes(case: Case, plan: Plan) -> Plan | None:
    """Two passes run as one."""
    if len(plan.replay) < 2:
        return None
    one, two, *rest = plan.replay
    return replace(plan, replay=(replace(one, end=two.end), *rest))


def other_threads(case: Case, plan: Plan) -> Plan | None:
    """A pass run as another segment's were."""
    if not plan.replay:
        return None
    return replace(plan, replay=(replace(plan.replay[0], provenance=99), *plan.replay[1:]))


def early_keyframe(case: Case, plan: Plan) -> Plan | None:
    """Nothing wrong with the bits, but more run again than need be."""
    if plan.keyframe is None or plan.keyframe.position == 0:
        return None
    return replace(plan, keyframe=Keyframe(None, 0))


MUTANTS = [later_keyframe, row_of_the_base, shorter_window, joined_passes, other_threads, early_keyframe]


def random_case(rng: random.Random) -> Case:
    """One of every kind of layer, and many keyframes."""
    layers = tuple(
        LayerSpec(n, 1, kind, (TENSOR,), 9 * (kind == LayerKind.WINDOW))
        for n, kind in enumerate([LayerKind.ROWS, LayerKind.WINDOW, LayerKind.KEYFRAME])
    )
    chain: list[Made] = []
    for number in range(rng.randint(2, 4)):
        start = rng.randint(chain[-1].start + 1, chain[-1].end) if chain else 0
        cuts = list(itertools.accumulate((rng.randint(1, 9) for _ in range(6)), initial=start))
        keyframes = tuple(at for at in cuts[1:] if rng.random() < 0.4)
        chain.append(Made(number, start, tuple(itertools.pairwise(cuts)), keyframes, False))
    return Case(tuple(chain), layers, rng.randint(1, chain[-1].end))


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.__name__ for mutant in MUTANTS])
def test_a_plan_that_is_a_little_wrong_is_found_out(mutant: Callable[[Case, Plan], Plan | None]) -> None:
    rng = random.Random(5)
    tried = 0
    while tried < 30:
        case = random_case(rng)
        plan = case.plan()
        assert wrong(case, plan) == []
        changed = mutant(case, plan)
        if changed is None or changed == plan:
            continue
        tried += 1
        assert wrong(case, changed), f"{mutant.__name__} pleased the oracle: {case} {changed}"
