"""How fast a model was, from the timings that turns are stored with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from kvloom_store import turns
from kvloom_store.schema import provenance, turn, turn_state
from kvloom_store.segments import provenance_of
from kvloom_store.turns import Turn

LAST = 64
"""Turns looked at: enough to even out, few enough to be of late."""

LONG_ENOUGH = 64
"""Tokens of a prefill from which its speed is that of the long ones that reuse stands in for."""


BESIDE = 0.06
"""Seconds to bring a path back beside the model's own: finding what is missing, reading what is there, committing,
storing. 0.04 to 0.14 were measured; it only counts where a model is tiny."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Prefill on this machine, as this store's turns have timed it: tokens a second, over so many measurements of at
    least so many tokens each; None without any."""

    tokens_per_second: float | None = None
    measurements: int = 0
    at_least: int = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """The speed of prefill, tokens a second of replies (None: none was timed), and how many replies say so."""

    prefill: Speed = field(default_factory=Speed)
    reply: float | None = None
    replies: int = 0


@dataclass(frozen=True, slots=True)
class Pace:
    """What it takes to compute state on this machine: ``begin`` seconds for each path that is brought back and
    ``token`` for each of its tokens, and ``single`` for a token that is run alone, as those of replies are."""

    begin: float
    token: float
    single: float

    def prefill(self, tokens: float) -> float:
        """Seconds of computing so many tokens of a path in one run."""
        return self.begin + self.token * tokens if tokens else 0.0

    def exact(self, tokens: int, singly: int, paths: int = 1) -> float:
        """Seconds of running recorded passes of some paths again, ``singly`` of whose tokens were run alone."""
        return self.begin * paths * bool(tokens) + self.token * (tokens - singly) + self.single * singly


def pace(timed: Sequence[Turn]) -> Pace | None:
    """The pace that some turns were computed at; None if none of them was timed.

    A line through what the prefills took, by the least squares of relative errors: a short one is mostly its beginning,
    a long one mostly its tokens, and which of them will have to be run again is not known. Of those that went on from
    state, if there are any: some models have to be fed token by token there.
    """
    prefills = [turn for turn in timed if _is_timed(turn)]
    prefills = [turn for turn in prefills if turn.timings["tokens"].get("reused")] or prefills
    points = [(float(turn.timings["tokens"]["computed"]), turn.timings["prefill"]) for turn in prefills]
    single = _single(timed)
    if single is not None:
        points.append((1.0, single))
    if not points:
        return None
    begin, token = _line(points)
    return Pace(begin + BESIDE, token, single if single is not None else begin + token)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line y = begin + token x, neither below zero, of least relative errors."""
    scaled = [(1 / y, x / y) for x, y in points]
    aa, ab, bb = sum(u * u for u, _ in scaled), sum(u * v for u, v in scaled), sum(v * v for _, v in scaled)
    a, b = sum(u for u, _ in scaled), sum(v for _, v in scaled)
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        begin, token = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if begin >= 0 and token > 0:
            return begin, token
    return 0.0, b / bb


def prefill(timed: Iterable[Turn]) -> Speed:
    """Prefill as it was timed: by long ones if there are any, since short ones take as long as a few more tokens do."""
    pairs = [(turn.timings["tokens"]["computed"], turn.timings["prefill"]) for turn in timed if _is_timed(turn)]
    at_least = LONG_ENOUGH if any(tokens >= LONG_ENOUGH for tokens, _ in pairs) else 1
    pairs = [pair for pair in pairs if pair[0] >= at_least]
    taken = sum(seconds for _, seconds in pairs)
    return Speed(sum(tokens for tokens, _ in pairs) / taken if taken else None, len(pairs), at_least)


def _is_timed(turn: Turn) -> bool:
    record = turn.timings.get("tokens", {})
    return bool(record.get("computed") and turn.timings.get("prefill"))


def of_root(conn: sa.Connection, root: int, cpu: str) -> Rates:
    """The rates of a model's last turns that were computed on a CPU of this kind."""
    said = last_turns(conn, root, cpu)
    spoken, single = _replies(said), _single(said)
    return Rates(prefill(said), 1 / single if single else None, len(spoken))


def last_turns(conn: sa.Connection, root: int, cpu: str | None = None) -> list[Turn]:
    """A model's last turns that were computed on a CPU of this kind; None: of the kind of the very last one.

    That is known without torch, and where a store is used at all, it is this machine.
    """
    if cpu is None:
        newest = sa.select(turn_state.c.provenance).where(turn_state.c.root == root).order_by(turn_state.c.id.desc())
        row = conn.execute(newest.limit(1)).scalar_one_or_none()
        cpu = provenance_of(conn, row).cpu_capability if row is not None else ""
    seen = conn.execute(sa.select(provenance.c.id)).scalars().all()
    here = [row for row in seen if provenance_of(conn, row).cpu_capability == cpu]
    query = (
        sa.select(turn_state.c.turn)
        .join(turn, turn.c.id == turn_state.c.turn)
        .where(turn_state.c.root == root, turn_state.c.provenance.in_(here), _timed_here())
        .order_by(turn_state.c.id.desc())
        .limit(LAST)
    )
    return [turns.get(conn, row) for row in dict.fromkeys(conn.execute(query).scalars())]


def of_model(conn: sa.Connection, root: int) -> set[int]:
    """The rows of the turns that a model was timed by."""
    return set(conn.execute(sa.select(turn_state.c.turn).where(turn_state.c.root == root, _timed_here())).scalars())


def _timed_here() -> sa.ColumnElement[bool]:
    """Of turn states: whether the turn's timings are this one's. They are its first's; another model read it later."""
    first = turn_state.alias()
    older = sa.select(first.c.id).where(first.c.turn == turn_state.c.turn, first.c.id < turn_state.c.id)
    return ~older.where(first.c.root != turn_state.c.root).exists()


def _single(said: Sequence[Turn]) -> float | None:
    """Seconds that a token of a reply took, on average; None if no reply was timed."""
    spoken = _replies(said)
    return sum(taken for _, taken in spoken) / sum(tokens for tokens, _ in spoken) if spoken else None


def _replies(said: Sequence[Turn]) -> list[tuple[int, float]]:
    """Of replies, how many tokens, and in how many seconds."""
    # A reply that was chosen from some, or decoded beside others, was not generated one token after another.
    return [pair for pair in map(_spoken, said) if pair[0] and pair[1] > 0]


def _spoken(said: Turn) -> tuple[int, float]:
    """How many tokens a turn generated after its first one, and in how many seconds."""
    timings = said.timings
    generated = timings.get("tokens", {}).get("generated", 0)
    return max(0, generated - 1), timings.get("total", 0.0) - timings.get("first_token", 0.0)
