"""Finding turns by their words: from the index to checked turns, with the place that matches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from kvloom_store import fulltext, refs, turns
from kvloom_store.database import Database
from kvloom_store.errors import InvalidQuery
from kvloom_store.fulltext import Snippet
from kvloom_store.schema import turn
from kvloom_store.turns import Turn


@dataclass(frozen=True, slots=True)
class Hit:
    """A turn that matches: ``ref`` names it (``session@turn``), ``snippet`` is the part of its text around a match.

    ``marks`` are the characters [start, end) of the snippet that match; ``created`` is in microseconds since 1970.
    """

    ref: str
    session: str
    turn: str
    role: str
    created: int
    snippet: str
    marks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Hits:
    """What a search found, and how many turns could not be searched because their rows are damaged."""

    hits: tuple[Hit, ...]
    damaged: int = 0


def search(
    database: Database,
    text: str,
    *,
    session: str | None = None,
    role: str | None = None,
    limit: int = 20,
    newest: bool = False,
    raw: bool = False,
) -> Hits:
    """Turns that hold all words of ``text``, those between quotation marks in this order; the best first, or the
    newest.

    ``raw`` takes the text for FTS5's query syntax. A store without an index gets one first; where it cannot be written,
    every turn is read, and the newest come first.

    Raises:
        InvalidQuery: there is no word in the text, or it is not FTS5's syntax.
        RefNotFound: no such session.
    """
    query = text.replace("\0", " ") if raw else fulltext.words(text)
    if not query.strip():
        raise InvalidQuery(text, "there is no word in it")
    fulltext.marked({}, query)  # refused before anything is read
    with database.read() as conn:
        own = refs.get_session(conn, session).row if session is not None else None
        there = fulltext.exists(conn)
    if not there and not database.read_only:
        rebuild(database)
    with database.read() as conn:
        rows = _candidates(conn, query, own, role, limit, newest)
    if rows is None:  # the index is damaged
        rebuild(database)
        with database.read() as conn:
            rows = _candidates(conn, query, own, role, limit, newest) or []
    with database.read() as conn:
        found, damaged = _checked(conn, rows)
        snippets = fulltext.marked({each.row: each.text for each in found}, query)
        hits = tuple(_hits(conn, [each for each in found if each.row in snippets][:limit], snippets))
    return Hits(hits, damaged)


def rebuild(database: Database) -> None:
    """Build the index anew from the turns; those that are damaged are left out of it."""
    with database.write() as conn:
        rows = conn.execute(sa.select(turn.c.id).order_by(turn.c.id)).scalars().all()
        fulltext.build(conn, ((each.row, each.text) for each in turns.each_of(conn, rows) if each is not None))


def _candidates(
    conn: sa.Connection, query: str, session: int | None, role: str | None, limit: int, newest: bool
) -> list[int] | None:
    """The turns that match by the index; None if it is damaged. Without one, all that could: the newest first."""
    if fulltext.exists(conn):
        try:
            return fulltext.matching(conn, query, session=session, role=role, newest=newest, limit=limit)
        except fulltext.DAMAGE as error:
            if not fulltext.is_damage(error):
                raise
            return None
    where = [turn.c.session == session] if session is not None else []
    where += [turn.c.role == role] if role is not None else []
    return list(conn.execute(sa.select(turn.c.id).where(*where).order_by(turn.c.id.desc())).scalars())


def _checked(conn: sa.Connection, rows: Sequence[int]) -> tuple[list[Turn], int]:
    """Turns in the order of their rows, and how many are damaged."""
    found = list(turns.each_of(conn, rows))
    return [each for each in found if each is not None], found.count(None)


def _hits(conn: sa.Connection, found: Sequence[Turn], snippets: Mapping[int, Snippet]) -> Iterator[Hit]:
    names: dict[int, str] = {}
    short: dict[int, dict[int, str]] = {}
    for each in found:
        at = each.session
        if at not in names:
            names[at], short[at] = refs.session_of(conn, at).name, refs.short_ids(conn, at)
        snippet = snippets[each.row]
        ref = f"{names[at]}@{short[at].get(each.row, each.id)}"  # a damaged index may hide a turn of a session
        yield Hit(ref, names[at], each.id, each.role, each.created, snippet.text, snippet.marks)
