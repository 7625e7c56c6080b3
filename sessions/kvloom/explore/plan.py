"""What a search does next, as a pure function of its settings and of the candidates there are.

Nothing else decides: no clock, no random state, nothing that is only in memory. So a search that is taken up again does
what it would have done, and every batch has the paths it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvloom.errors import SessionError
from kvloom_store.explorations import ENDED, GROWING, OPEN, Candidate

STRATEGIES = ("tree", "best-first", "best-of", "beam")
OWN_SCORES = ("logprob", "length-normalised")
"""Scores that are known before a path has ended, and which beams can therefore be ranked by."""

SCORES = (*OWN_SCORES, "self-consistency", "judge")

ROUND_TOKENS = 32
"""Tokens of each path between two commits: what being killed costs at most."""


@dataclass(frozen=True, slots=True)
class ExploreSettings:
    """How a search goes. Raises SessionError naming the field that is wrong.

    strategy       tree: level by level, of each the best ``keep`` go on; best-first: always the best ``keep`` that
                   are open, wherever they are; best-of: ``width`` replies of one step; beam: the likeliest replies,
                   as beam search finds them token by token, the ``width`` beams committed after each step
    width          continuations of each candidate that goes on
    keep           how many go on (tree: of a level, best-first: at a time)
    depth          steps at most
    step_tokens    tokens of a step at most
    step_stop      texts that end a step: it ends with the token that completes one
    score          logprob, length-normalised, self-consistency, judge, or python:MODULE:FUNCTION
    judge          the model that judges; None: the session's own
    budget_tokens  no new round begins that could compute more than so many tokens in all; 0: no bound
    batch          paths decoded together at most
    seed           each candidate's randomness follows from it and from its path
    sampling       temperature, top_k ... of ``SamplingSettings``
    """

    strategy: str = "tree"
    width: int = 4
    keep: int = 4
    depth: int = 4
    step_tokens: int = 32
    step_stop: tuple[str, ...] = ()
    score: str = "length-normalised"
    judge: str | None = None
    budget_tokens: int = 0
    batch: int = 16
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SessionError(f"no strategy {self.strategy!r}", hint=f"known are {', '.join(STRATEGIES)}")
        if self.score not in SCORES and not self.score.startswith("python:"):
            raise SessionError(
                f"no score {self.score!r}", hint=f"known are {', '.join(SCORES)} and python:MODULE:FUNCTION"
            )
        bounds = {"width": 256, "keep": 256, "depth": 1000, "step_tokens": 1 << 20, "batch": 256}
        if self.strategy == "beam" and (self.score not in OWN_SCORES or self.step_stop or self.batch < self.width):
            raise SessionError(
                f"beams are ranked by {' or '.join(OWN_SCORES)}, in steps of so many tokens, all in one batch",
                hint="leave out score, step_stop and batch, or choose another strategy",
            )
        for name, most in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise SessionError(f"{name} is {value!r}; it must be from 1 to {most}", hint=f"change {name}")

    def to_plain(self) -> dict[str, Any]:
        """Every field as plain data for MessagePack."""
        return {**asdict(self), "step_stop": list(self.step_stop)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ExploreSettings:
        """The settings ``to_plain`` wrote; unknown fields raise SessionError."""
        unknown = sorted(set(plain) - {each.name for each in fields(cls)})
        if unknown:
            raise SessionError(f"unknown settings of a search: {', '.join(unknown)}", hint="update kvloom")
        return cls(**{**plain, "step_stop": tuple(plain.get("step_stop", ()))})


@dataclass(frozen=True, slots=True)
class Child:
    """A candidate to be made: child ``number`` of a parent (None: of the beginning)."""

    parent: Candidate | None
    number: int

    @property
    def path(self) -> str:
        """What its path will be."""
        return f"{self.parent.path}.{self.number}" if self.parent else str(self.number)


@dataclass(frozen=True, slots=True)
class Grow:
    """One round: these candidates are begun, or go on, together, by ``tokens`` at most."""

    paths: tuple[Child | Candidate, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Beam:
    """One round of a beam search: these beams (none: the beginning) go on by ``tokens`` at most.

    ``finished`` are the best replies so far.
    """

    frontier: tuple[Candidate, ...]
    finished: tuple[Candidate, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """These candidates get their scores; ``among`` all of their level."""

    candidates: tuple[Candidate, ...]
    among: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The search is over. ``best`` is None if nothing was made; ``pruned`` are those that were not gone on with."""

    best: Candidate | None
    pruned: tuple[Candidate, ...]
    reason: str


Step = Grow | Beam | Score | Done


def next_step(settings: ExploreSettings, candidates: Sequence[Candidate]) -> Step:
    """What a search does next."""
    growing = [each for each in candidates if each.status == GROWING]
    if growing:
        alike = [each for each in growing if each.tokens == growing[0].tokens]
        left = settings.step_tokens - growing[0].tokens
        return Grow(tuple(alike[: settings.batch]), min(left, ROUND_TOKENS))
    if settings.strategy == "best-first":
        return _best_first(settings, candidates)
    if settings.strategy == "beam":
        return _beam(settings, candidates)
    return _tree(settings, candidates)


def _tree(settings: ExploreSettings, candidates: Sequence[Candidate]) -> Step:
    """Level by level: make all of a level, score all of it, and go on with the best."""
    parents: Sequence[Candidate | None] = [None]
    for depth in range(1, 2 if settings.strategy == "best-of" else settings.depth + 1):
        missing = _missing(settings, candidates, parents)
        if missing:
            return _round(settings, candidates, missing)
        level = [each for each in candidates if each.depth == depth]
        unscored = tuple(each for each in level if each.score is None)
        if unscored:
            return Score(unscored, tuple(level))
        parents = [each for each in ranked(level)[: settings.keep] if each.status == OPEN]
        if not parents:
            break
    return _done(candidates, "every path that was gone on with has ended, or is as deep as it may be")


def _best_first(settings: ExploreSettings, candidates: Sequence[Candidate]) -> Step:
    """Finish what was begun, score all there is, and go on with the best that has no children."""
    parents = {each.parent for each in candidates}
    begun = [each for each in candidates if each.row in parents]
    missing = _missing(settings, candidates, [None, *begun])
    if missing:
        return _round(settings, candidates, missing)
    unscored = tuple(each for each in candidates if each.score is None)
    if unscored:
        return Score(unscored, tuple(candidates))
    leaves = [each for each in candidates if each.status == OPEN and each.row not in parents]
    best = ranked([each for each in leaves if each.depth < settings.depth])[: settings.keep]
    if not best:
        return _done(candidates, "every path has ended, or is as deep as it may be")
    return _round(settings, candidates, _missing(settings, candidates, best))


def _beam(settings: ExploreSettings, candidates: Sequence[Candidate]) -> Step:
    """Go on with the deepest beams, until none will better the ``width`` best replies that have ended."""
    unscored = tuple(each for each in candidates if each.score is None)
    if unscored:
        return Score(unscored, tuple(candidates))
    depth = max((each.depth for each in candidates), default=0)
    frontier = ranked([each for each in candidates if each.depth == depth and each.status == OPEN])
    finished = ranked([each for each in candidates if each.status == ENDED])[: settings.width]
    if depth and not frontier:
        return _done(candidates, "every beam has ended")
    if len(finished) == settings.width and ranked([*finished, frontier[0]])[-1] is frontier[0]:
        return _done(candidates, f"no beam will better the {settings.width} replies that have ended")
    if depth == settings.depth:
        return _done(candidates, "every beam is as deep as it may be", [*finished, *frontier])
    spent = sum(each.tokens for each in candidates)
    if settings.budget_tokens and spent + settings.width * settings.step_tokens > settings.budget_tokens:
        return _done(candidates, f"of {settings.budget_tokens} tokens {spent} are spent")
    return Beam(tuple(frontier), tuple(finished), settings.step_tokens)


def _missing(
    settings: ExploreSettings, candidates: Sequence[Candidate], parents: Sequence[Candidate | None]
) -> list[Child]:
    """The children of some candidates that are not there, in order."""
    there = {each.path for each in candidates}
    children = [Child(parent, number) for parent in parents for number in range(1, settings.width + 1)]
    return [child for child in children if child.path not in there]


def _round(settings: ExploreSettings, candidates: Sequence[Candidate], children: Sequence[Child]) -> Step:
    some = tuple(children[: settings.batch])
    spent = sum(each.tokens for each in candidates)
    if settings.budget_tokens and spent + len(some) * settings.step_tokens > settings.budget_tokens:
        return _done(candidates, f"of {settings.budget_tokens} tokens {spent} are spent")
    return Grow(some, min(settings.step_tokens, ROUND_TOKENS))


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first; of equals, the one that was made first. Those without a score come last."""
    return sorted(candidates, key=lambda each: (each.score is None, -(each.score or 0.0), each.row))


def _done(candidates: Sequence[Candidate], reason: str, answers: Sequence[Candidate] = ()) -> Done:
    """The end; the best is the best of ``answers``, or of those that there are in the end."""
    parents = {each.parent for each in candidates}
    leaves = [each for each in candidates if each.row not in parents and each.status != GROWING]
    deepest = max((each.depth for each in leaves), default=0)
    # A path that has ended is an answer; one that was cut off is one only if nothing got further.
    ended = [each for each in leaves if each.status == ENDED]
    best = next(iter(ranked(answers or ended or [each for each in leaves if each.depth == deepest])), None)
    kept = _ancestors(best, candidates)
    return Done(best, tuple(each for each in candidates if each.row not in kept), reason)


def _ancestors(best: Candidate | None, candidates: Sequence[Candidate]) -> set[int]:
    by_row, kept = {each.row: each for each in candidates}, set()
    while best is not None:
        kept.add(best.row)
        best = by_row[best.parent] if best.parent is not None else None
    return kept
