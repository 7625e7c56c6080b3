"""What of a path's state was dropped to make room, and what either way back takes. It needs no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvloom.passes import KEYFRAME_SPACING
from kvloom.translated import root_of
from kvloom_store import outlook, rates, trie, turns

if TYPE_CHECKING:
    from kvloom.session import Session
    from kvloom_store.outlook import Outlook
    from kvloom_store.rates import Pace


@dataclass(frozen=True, slots=True)
class Dropped:
    """Of a path, ``fresh`` tokens are to be computed anew, in ``fresh_seconds``, or ``exact`` ones run again just as
    they were first run, in ``exact_seconds`` (None: not known). All are 0 where nothing was dropped.

    ``possible``: all that was dropped says how it was computed, so that it can come back exactly.
    """

    fresh: int = 0
    exact: int = 0
    fresh_seconds: float | None = 0.0
    exact_seconds: float | None = 0.0
    possible: bool = True

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return asdict(self)


def dropped(session: Session, turn: int | None) -> Dropped:
    """What bringing back the state down to a turn (its row) takes, if some of it was dropped."""
    with session.loom.database.read() as conn:
        root = root_of(conn, session.settings)
        if turn is None or root is None:
            return Dropped()
        tip = turns.best_state(turns.states_of(conn, [turn]), root)
        if tip is None:
            return Dropped()
        ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)[: tip.state_end]
        fresh = outlook.of_tokens(conn, tip.root, ids, tip, grid=KEYFRAME_SPACING, logits=False)
        if not fresh.dropped:
            return Dropped()
        exact = outlook.of_tokens(conn, tip.root, ids, tip, grid=KEYFRAME_SPACING, logits=False, exact=True)
        pace = rates.pace(rates.last_turns(conn, tip.root))
    missing = len(ids) - fresh.reused - fresh.replayed
    took = pace.prefill(missing + fresh.replayed) if pace is not None else None
    return Dropped(missing, exact.replayed, took, _exact_seconds(exact, pace), not exact.gone)


def _exact_seconds(exact: Outlook, pace: Pace | None) -> float | None:
    return pace.exact(exact.replayed, exact.one_by_one) if pace is not None and not exact.gone else None
