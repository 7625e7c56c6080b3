"""What a search does next: a pure function of its settings and its candidates, tried on made-up ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import SessionError
from kvloom.explore.plan import ROUND_TOKENS, Done, ExploreSettings, Grow, Score, next_step, ranked
from kvloom_store.explorations import ENDED, GROWING, OPEN, Candidate


class World:
    """Does what a search asks for: how long a path gets, and what it scores, follow from its name and a seed."""

    def __init__(self, settings: ExploreSettings, seed: int, *, ends: float = 0.2) -> None:
        self.settings, self.seed, self.ends = settings, seed, ends
        self.made: list[Candidate] = []
        self.rounds: list[Grow] = []
        self.scored: list[str] = []

    def luck(self, *about: object) -> random.Random:
        return random.Random(f"{self.seed} {about}")

    def do(self, step: Grow | Score) -> None:
        if isinstance(step, Score):
            for each in step.candidates:
                assert each.score is None, "a score is given once"
                self._put(replace(each, score=self.luck("score", each.path).choice([0.1, 0.5, 0.5, 0.9])))
                self.scored.append(each.path)
            return
        self.rounds.append(step)
        for each in step.paths:
            old = each if isinstance(each, Candidate) else None
            path = each.path
            held = old.tokens if old else 0
            ended = self.luck("ends", path, held).random() < self.ends
            tokens = held + (self.luck("at", path, held).randint(1, step.tokens) if ended else step.tokens)
            status = ENDED if ended else OPEN if tokens >= self.settings.step_tokens else GROWING
            if old:
                self._put(replace(old, tokens=tokens, status=status))
            else:
                assert path not in {other.path for other in self.made}, "a candidate is made once"
                parent = each.parent.row if each.parent else None  # type: ignore[union-attr]
                self.made.append(
                    Candidate(len(self.made) + 1, parent, each.number, 0, status, None, path, tokens, 0.0, tokens, 0.0)
                )

    def _put(self, new: Candidate) -> None:
        self.made = [new if each.row == new.row else each for each in self.made]

    def run(self, steps: int = 10_000) -> Done | None:
        for _ in range(steps):
            step = next_step(self.settings, self.made)
            if isinstance(step, Done):
                return step
            self.do(step)
        return None


settings_ = st.builds(
    ExploreSettings,
    strategy=st.sampled_from(["tree", "best-first", "best-of"]),
    width=st.integers(1, 4),
    keep=st.integers(1, 3),
    depth=st.integers(1, 3),
    step_tokens=st.sampled_from([5, 32, 70]),
    batch=st.integers(1, 9),
)


@given(settings=settings_, seed=st.integers(0, 99))
def test_it_comes_to_an_end_and_every_round_fits(settings: ExploreSettings, seed: int) -> None:
    world = World(settings, seed)
    done = world.run()
    assert done is not None
    assert done.best is not None
    assert all(1 <= len(each.paths) <= settings.batch and 1 <= each.tokens <= ROUND_TOKENS for each in world.rounds)
    assert sorted(world.scored) == sorted(each.path for each in world.made), "each is scored once"
    assert all(each.depth <= (1 if settings.strategy == "best-of" else settings.depth) for each in world.made)
    assert all(each.tokens <= settings.step_tokens and each.status != GROWING for each in world.made)


@given(settings=settings_, seed=st.integers(0, 99), cut=st.integers(0, 40))
def test_taken_up_again_after_any_step_it_does_the_same(settings: ExploreSettings, seed: int, cut: int) -> None:
    whole, parts = World(settings, seed), World(settings, seed)
    parts.run(cut)
    again = World(settings, seed)
    again.made = list(reversed(list(reversed(parts.made))))  # nothing but what is stored
    assert again.run() == whole.run()
    assert again.made == whole.made


@given(settings=settings_, seed=st.integers(0, 99))
def test_only_the_best_of_a_level_have_children(settings: ExploreSettings, seed: int) -> None:
    settings = replace(settings, strategy="tree")
    world = World(settings, seed)
    world.run()
    for depth in range(1, settings.depth):
        level = [each for each in world.made if each.depth == depth]
        parents = {each.parent for each in world.made if each.depth == depth + 1}
        kept = [each.row for each in ranked(level)[: settings.keep] if each.status == OPEN]
        assert parents == set(kept)
        for parent in parents:
            numbers = [each.number for each in world.made if each.parent == parent]
            assert sorted(numbers) == list(range(1, settings.width + 1))


def test_best_first_goes_on_with_the_best_wherever_it_is() -> None:
    world = World(ExploreSettings(strategy="best-first", width=2, keep=1, depth=6, step_tokens=4), seed=3, ends=0.0)
    for _ in range(30):
        step = next_step(world.settings, world.made)
        if isinstance(step, Grow) and step.paths[0].parent is not None:
            parents = {each.parent for each in world.made}
            leaves = [each for each in world.made if each.row not in parents and each.depth < 6]
            assert step.paths[0].parent == ranked(leaves)[0]
        assert not isinstance(step, Done)
        world.do(step)


@given(seed=st.integers(0, 99), budget=st.integers(1, 400))
def test_a_budget_is_kept(seed: int, budget: int) -> None:
    world = World(ExploreSettings(strategy="best-first", width=3, depth=9, step_tokens=8, budget_tokens=budget), seed)
    done = world.run()
    assert done is not None
    assert sum(each.tokens for each in world.made) <= budget
    assert not world.made or "tokens" in done.reason or "every path" in done.reason


def test_of_answers_the_best_that_has_ended_wins() -> None:
    def candidate(row: int, status: str, score: float) -> Candidate:
        return Candidate(row, None, row, 0, status, score, str(row), 8, 0.0, 8, 0.0)

    settings = ExploreSettings(width=3, depth=1, step_tokens=8)
    made = [candidate(1, OPEN, 0.9), candidate(2, ENDED, 0.4), candidate(3, ENDED, 0.5)]
    done = next_step(settings, made)
    assert isinstance(done, Done)
    assert done.best == made[2]
    assert done.pruned == (made[0], made[1])


@pytest.mark.parametrize(
    "wrong", [{"strategy": "depth-first"}, {"width": 0}, {"batch": 1000}, {"score": "best"}, {"depth": True}], ids=str
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SessionError):
        ExploreSettings(**wrong)  # type: ignore[arg-type]


def test_settings_are_read_as_they_were_written() -> None:
    settings = ExploreSettings(step_stop=("\n",), sampling={"temperature": 0.5}, seed=7)
    assert ExploreSettings.from_plain(settings.to_plain()) == settings
    with pytest.raises(SessionError, match="unknown"):
        ExploreSettings.from_plain({**settings.to_plain(), "more": 1})
