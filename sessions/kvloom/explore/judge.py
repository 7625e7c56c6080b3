"""A judge: a model that is shown candidates and rates them, in a session of its own.

The problem is said once and stored; each candidate is shown on a branch from there, so only its own text is computed. A
rating that is stored already is read, not asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvloom.errors import RefNotFound
from kvloom_store.explorations import Candidate

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom.session import Session

RATINGS = tuple("123456789")

SYSTEM = "You judge answers strictly and fairly. Shown an answer you reply with one digit and nothing else."

QUESTION = (
    "Here is what somebody was asked:\n\n{problem}\n\nI will show you an answer, or the beginning of one. "
    "Rate it from 1 (wrong or useless) to 9 (right and clear)."
)

SHOWN = "The answer so far:\n\n{text}\n\nYour rating, from 1 to 9:"


class Judge:
    """Rates candidates of one search; ``loom`` is the store, opened with the judge's model."""

    def __init__(self, loom: KVLoom, name: str, problem: Sequence[dict[str, Any]]) -> None:
        """``name`` is that of the session that keeps the ratings, ``problem``: the messages before the candidates."""
        said = "\n\n".join(f"{message['role']}: {message['content']}" for message in problem)
        self._session = session_of(loom, name, said)

    def rate(self, candidate: Candidate, text: str) -> float:
        """The rating to be expected, from 1 to 9: each digit by how likely the judge is to say it."""
        name = f"of/{candidate.path}/{candidate.total}"
        try:
            branch = self._session.branch(name)
        except RefNotFound:
            branch = self._session.fork(name)
        settings = self._kept(name)
        if settings is None:
            if branch.log()[-1].role == "user":  # it was shown, and killed before it had answered
                branch.undo()
            branch.choose(SHOWN.format(text=text), RATINGS)
            settings = self._kept(name)
        assert settings is not None
        logprobs = [float(each) for each in settings["logprobs"]]
        weights = [math.exp(each - max(logprobs)) for each in logprobs]
        return sum(int(digit) * weight for digit, weight in zip(settings["chosen_from"], weights, strict=True)) / sum(
            weights
        )

    def _kept(self, name: str) -> dict[str, Any] | None:
        """What is stored of a rating; None if there is none."""
        from kvloom_store import refs, turns
        from kvloom_store.names import Ref

        with self._session.loom.database.read() as conn:
            point = refs.resolve(conn, Ref(self._session.name, name, 0))
            last = turns.get(conn, point.turn) if point.turn is not None else None
        return last.settings if last is not None and "chosen_from" in last.settings else None


def session_of(loom: KVLoom, name: str, problem: str) -> Session:
    """The judge's session, in which the problem has been told."""
    from kvloom.planned import PlannedBranch
    from kvloom.steps import Given
    from kvloom_store.names import MAIN

    session = loom.session(name, system=SYSTEM)
    if len(session.log()) <= 1:
        given = [
            Given({"role": "user", "content": QUESTION.format(problem=problem)}),
            Given({"role": "assistant", "content": "Show me."}),
        ]
        system = session.branch(MAIN).row.turn
        told = PlannedBranch(session, system, given, None, "told")
        told.run()
        session.branch(MAIN).move_to(told.name)
    return session
