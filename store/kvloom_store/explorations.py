"""Explorations: searches over continuations of a turn, and the candidates they made.

What a search does next follows from its settings and its candidates alone, so both are kept with the turns: whoever
opens the store later can go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store.checksum import checked, insert, unpacked, update
from kvloom_store.database import allocate, now_us
from kvloom_store.errors import RefExists, RefNotFound
from kvloom_store.names import check_name
from kvloom_store.schema import candidate, exploration

GROWING, OPEN, ENDED = "growing", "open", "ended"
"""What a candidate is: still short of its step; at the end of it, so that others may follow; a reply that has ended."""


@dataclass(frozen=True, slots=True)
class Exploration:
    """One search: where it began, and its settings."""

    row: int
    session: int
    name: str
    turn: int
    settings: dict[str, Any]
    created: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation: the ``number``-th child of ``parent`` (None: of the turn the search began at).

    ``turn`` is the last of its turns; ``tokens`` it added to its parent, ``logprob`` is the sum of theirs (nats);
    ``total`` and ``total_logprob`` count from where the search began. ``path`` are the numbers from there ("2.1.3").
    """

    row: int
    parent: int | None
    number: int
    turn: int
    status: str
    score: float | None
    path: str
    tokens: int
    logprob: float
    total: int
    total_logprob: float

    @property
    def depth(self) -> int:
        """How many steps from where the search began."""
        return self.path.count(".") + 1


def create(conn: sa.Connection, session: int, name: str, turn: int, settings: Mapping[str, Any]) -> Exploration:
    """A new search (inside a write transaction). Raises RefExists, InvalidName."""
    check_name("exploration", name)
    if find(conn, session, name) is not None:
        raise RefExists("exploration", name)
    values = {
        "id": allocate(conn, exploration),
        "session": session,
        "name": name,
        "turn": turn,
        "settings": msgpack.packb(dict(settings)),
        "created": now_us(),
    }
    insert(conn, exploration, values)
    return _exploration(values)


def find(conn: sa.Connection, session: int, name: str) -> Exploration | None:
    """The search of that name."""
    query = sa.select(exploration).where(exploration.c.session == session, exploration.c.name == name)
    row = conn.execute(query).one_or_none()
    return None if row is None else _exploration(checked(exploration, row, session=session, name=name))


def of_session(conn: sa.Connection, session: int) -> list[Exploration]:
    """The searches of a session, oldest first."""
    query = sa.select(exploration).where(exploration.c.session == session).order_by(exploration.c.id)
    return [_exploration(checked(exploration, row)) for row in conn.execute(query)]


def get(conn: sa.Connection, session: int, name: str) -> Exploration:
    """The search of that name. Raises RefNotFound with those there are."""
    found = find(conn, session, name)
    if found is None:
        raise RefNotFound("exploration", name, [each.name for each in of_session(conn, session)])
    return found


def candidates(conn: sa.Connection, of: Exploration) -> list[Candidate]:
    """What a search has made so far, oldest first."""
    query = sa.select(candidate).where(candidate.c.exploration == of.row).order_by(candidate.c.id)
    return [_candidate(checked(candidate, row)) for row in conn.execute(query)]


def scores(conn: sa.Connection, session: int) -> dict[int, float]:
    """The turns (their rows) of a session that a search has scored; where several have, the newest of them."""
    query = sa.select(candidate).join(exploration, exploration.c.id == candidate.c.exploration)
    query = query.where(exploration.c.session == session, candidate.c.score.is_not(None)).order_by(candidate.c.id)
    found = [_candidate(checked(candidate, row)) for row in conn.execute(query)]
    return {each.turn: each.score for each in found if each.score is not None}


def add(
    conn: sa.Connection,
    of: Exploration,
    parent: Candidate | None,
    number: int,
    turn: int,
    status: str,
    tokens: int,
    logprob: float,
) -> Candidate:
    """A new candidate (inside the transaction that adds its turn)."""
    found = {
        "path": f"{parent.path}.{number}" if parent else str(number),
        "tokens": tokens,
        "logprob": logprob,
        "total": tokens + (parent.total if parent else 0),
        "total_logprob": logprob + (parent.total_logprob if parent else 0.0),
    }
    values = {
        "id": allocate(conn, candidate),
        "exploration": of.row,
        "parent": parent.row if parent else None,
        "number": number,
        "turn": turn,
        "status": status,
        "score": None,
        "found": msgpack.packb(found),
    }
    insert(conn, candidate, values)
    return _candidate(values)


def grow(conn: sa.Connection, of: Candidate, turn: int, status: str, tokens: int, logprob: float) -> Candidate:
    """A candidate that has grown by another turn (inside the transaction that adds it)."""
    values = _read(conn, of.row)
    found = {
        "path": of.path,
        "tokens": of.tokens + tokens,
        "logprob": of.logprob + logprob,
        "total": of.total + tokens,
        "total_logprob": of.total_logprob + logprob,
    }
    return _candidate(update(conn, candidate, values, turn=turn, status=status, found=msgpack.packb(found)))


def set_score(conn: sa.Connection, of: Candidate, score: float) -> Candidate:
    """A candidate with its score."""
    return _candidate(update(conn, candidate, _read(conn, of.row), score=msgpack.packb(float(score))))


def remove_all(conn: sa.Connection, session: int) -> None:
    """Take the searches of a session away; their turns and branches stay."""
    _remove(conn, sa.select(exploration.c.id).where(exploration.c.session == session))


def remove_of(conn: sa.Connection, turns: sa.Select[Any]) -> None:
    """Take away the searches that began at some turns, or made one of them; the others they made stay."""
    made = sa.select(candidate.c.exploration).where(candidate.c.turn.in_(turns))
    began = exploration.c.turn.in_(turns)
    _remove(conn, sa.select(exploration.c.id).where(began | exploration.c.id.in_(made)))


def _remove(conn: sa.Connection, chosen: sa.Select[Any]) -> None:
    for row in list(conn.execute(chosen).scalars()):
        # Children before parents: foreign keys are checked row by row.
        query = sa.select(candidate.c.id).where(candidate.c.exploration == row).order_by(candidate.c.id.desc())
        for each in conn.execute(query).scalars().all():
            conn.execute(candidate.delete().where(candidate.c.id == each))
        conn.execute(exploration.delete().where(exploration.c.id == row))


def _read(conn: sa.Connection, row: int) -> dict[str, Any]:
    return checked(candidate, conn.execute(sa.select(candidate).where(candidate.c.id == row)).one())


def _exploration(values: Mapping[str, Any]) -> Exploration:
    settings = unpacked(values["settings"], "exploration", values["id"])
    return Exploration(values["id"], values["session"], values["name"], values["turn"], settings, values["created"])


def _candidate(values: Mapping[str, Any]) -> Candidate:
    row = values["id"]
    score = None if values["score"] is None else float(unpacked(values["score"], "candidate", row))
    found = unpacked(values["found"], "candidate", row)
    return Candidate(row, values["parent"], values["number"], values["turn"], values["status"], score, **found)
