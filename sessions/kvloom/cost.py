"""What a session has cost so far: tokens reused and computed, seconds saved, what a hosted model would have charged.

All of it follows from what each turn keeps: no model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvloom.binding import identified
from kvloom.report import Tokens
from kvloom.translated import root_of
from kvloom_store import cut, rates, refs, turns
from kvloom_store.rates import Speed
from kvloom_store.turns import Turn

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.session import Session


@dataclass(frozen=True, slots=True)
class Prices:
    """What a hosted model charges, in US dollars a million tokens.

    The defaults are those of a typical mid-size hosted model, as of November 2026.
    """

    input: float = 3.00
    cached: float = 0.30
    output: float = 15.00


@dataclass(frozen=True, slots=True)
class Hosted:
    """The same replies from a hosted model: one request each, with the whole conversation before it as input.

    ``cached`` of the ``input`` tokens had been in an earlier request, along the tree. The charges, in US dollars, are
    without caching and with all of those cached.
    """

    requests: int
    input: int
    cached: int
    output: int
    charged_uncached: float
    charged_cached: float


@dataclass(frozen=True, slots=True)
class SessionCost:
    """``tokens`` of all turns that keep them; ``unrecorded`` turns do not. ``seconds_saved``: what computing the reused
    tokens would have taken, None where the speed is not known."""

    tokens: Tokens
    unrecorded: int
    speed: Speed
    seconds_saved: float | None
    hosted: Hosted
    prices: Prices = field(default_factory=Prices)

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return asdict(self)


def cost(session: Session, prices: Prices | None = None) -> SessionCost:
    """What a session has cost so far."""
    with session.loom.database.read() as conn:
        said = turns.of_session(conn, session.row.row)
        places = turns.token_counts(conn, session.row.row)
        root = root_of(conn, session.settings)
        timed = rates.of_model(conn, root) if root is not None else set()
        alike = (turn for row in _alike(conn, session) for turn in turns.of_session(conn, row))
        speed = rates.prefill([turn for turn in alike if turn.row in timed])
    prices = prices or Prices()
    records = [turn.timings["tokens"] for turn in said if "tokens" in turn.timings]
    tokens = Tokens(**{name: sum(record.get(name, 0) for record in records) for name in asdict(Tokens())})
    rate = speed.tokens_per_second
    return SessionCost(
        tokens,
        sum(turn.role != "system" and "tokens" not in turn.timings and not cut.is_cut(turn) for turn in said),
        speed,
        tokens.reused / rate if rate else None,
        hosted(said, {row: (start, end) for row, start, end in reversed(places)}, prices),
        prices,
    )


def _alike(conn: sa.Connection, session: Session) -> list[int]:
    """The sessions that the same model in the same precision reads: what it timed there holds for this one."""
    same = session.settings["model_digest"]
    return [each.row for each in refs.sessions(conn) if identified(each.settings, same)]


def hosted(said: Sequence[Turn], places: Mapping[int, tuple[int, int]], prices: Prices) -> Hosted:
    """What a hosted model would have charged for the replies among some turns, oldest first.

    ``places`` are the positions [start, end) of turns' tokens, by their rows. A turn has been sent when it was part of
    a request, or was the reply to one; a prefix that ends with such a turn is cached.
    """
    parents = {turn.row: turn.parent for turn in said}
    sent: set[int] = set()
    requests = given = known = made = 0
    for turn in said:
        output = turn.timings.get("tokens", {}).get("generated", 0)
        if turn.role != "assistant" or not output or turn.row not in places:
            continue
        above, at = [], turn.parent
        while at is not None:
            above.append(at)
            at = parents[at]
        before = places[turn.row][0]
        requests, given, made = requests + 1, given + before, made + output
        known += min(before, max((places[row][1] for row in above if row in sent and row in places), default=0))
        sent.update(above, [turn.row])
    plain = given * prices.input + made * prices.output
    cached = (given - known) * prices.input + known * prices.cached + made * prices.output
    return Hosted(requests, given, known, made, plain / 1e6, cached / 1e6)
