"""The full-text index over what turns say: SQLite's FTS5. Besides ``sqlite``, the only SQL that is SQLite's alone.

It is derived data, and holds no text: only which words stand in which turn. What is shown comes from the turns' own
rows, which are checked when they are read, and is matched a second time in memory, where matches are marked; so a
damaged index can hide a turn, and never make one up. It is made when a store is, filled in the transaction that adds a
turn, and built again from the turns wherever it is missing.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

from kvloom_store import sqlite
from kvloom_store.checksum import digest
from kvloom_store.errors import InvalidQuery

TABLE = "turn_text"

COMPARED = 256
"""Turns indexed at a time to compare the index with."""

SNIPPET_WORDS = 24
"""Words of a turn shown around a match."""

DAMAGE = (DatabaseError, MemoryError)
"""What reading and writing a damaged index raises, if ``is_damage`` says so of it."""

_WORDS = "tokenize = 'unicode61 remove_diacritics 2'"
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters that mark a match on its way out of SQLite; in texts they are taken for spaces."""
_UNMARKED = str.maketrans({_OPEN: " ", _CLOSE: " ", "\0": " "})


@dataclass(frozen=True, slots=True)
class Snippet:
    """A part of a text, and which of its characters [start, end) match."""

    text: str
    marks: tuple[tuple[int, int], ...]


def create(conn: sa.Connection) -> None:
    """Make the index of a store, empty (inside a write transaction); nothing where SQLite was built without FTS5."""
    if conn.exec_driver_sql("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").first():
        conn.exec_driver_sql(f"CREATE VIRTUAL TABLE {TABLE} USING fts5(text, content = '', {_WORDS})")


def exists(conn: sa.Connection) -> bool:
    """Whether the store has its index."""
    return conn.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = ?", (TABLE,)).first() is not None


def add(conn: sa.Connection, row: int, text: str) -> None:
    """Index a turn that is being added; where there is no index, it will be built with the turn in it."""
    with _kept_or_dropped(conn) as there:
        if there:
            _insert(conn, row, text)


def remove(conn: sa.Connection, texts: Mapping[int, str]) -> None:
    """Take turns out of the index; these must be the texts they were added with."""
    with _kept_or_dropped(conn) as there:
        for row, text in texts.items() if there else ():
            sql = f"INSERT INTO {TABLE}({TABLE}, rowid, text) VALUES ('delete', ?, ?)"
            conn.exec_driver_sql(sql, (row, _clean(text)))


def drop(conn: sa.Connection) -> None:
    """Take the index away; it is built again when something is searched."""
    conn.exec_driver_sql("SAVEPOINT dropping")
    try:
        conn.exec_driver_sql(f"DROP TABLE IF EXISTS {TABLE}")
    except DAMAGE as error:
        if not is_damage(error):
            raise
        conn.exec_driver_sql("ROLLBACK TO dropping")
        sqlite.forget_table(conn, TABLE, [f"{TABLE}_{part}" for part in ("data", "idx", "docsize", "config")])
    conn.exec_driver_sql("RELEASE dropping")


def build(conn: sa.Connection, texts: Iterable[tuple[int, str]]) -> None:
    """Make the index anew of these turns (inside a write transaction)."""
    drop(conn)
    create(conn)
    for row, text in texts if exists(conn) else ():
        _insert(conn, row, text)


def _insert(conn: sa.Connection, row: int, text: str) -> None:
    conn.exec_driver_sql(f"INSERT INTO {TABLE}(rowid, text) VALUES (?, ?)", (row, _clean(text)))


@contextmanager
def _kept_or_dropped(conn: sa.Connection) -> Iterator[bool]:
    """Change the index, if there is one. A damaged one is dropped: what it is derived from must not suffer from it."""
    if not exists(conn):
        yield False
        return
    conn.exec_driver_sql("SAVEPOINT before")
    conn.exec_driver_sql("SAVEPOINT indexing")
    try:
        yield True
        conn.exec_driver_sql("RELEASE indexing")  # here FTS5 writes and may meet damage; then this one is gone
    except DAMAGE as error:
        if not is_damage(error):
            raise
        conn.exec_driver_sql("ROLLBACK TO before")
        drop(conn)
    conn.exec_driver_sql("RELEASE before")


def is_damage(error: DatabaseError | MemoryError) -> bool:
    """Whether SQLite found the index to be other than it was written, by what FTS5 then stumbles over.

    FTS5 believes a damaged record that claims to describe millions of segments, and asks for memory for them all.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error.orig).lower()
    return not isinstance(error, OperationalError) or "fts5" in text or "vtable" in text


def matching(
    conn: sa.Connection, query: str, *, session: int | None, role: str | None, newest: bool, limit: int
) -> list[int]:
    """The turns that match, at most so many: the best first (BM25), or the newest."""
    order = "turn.id DESC" if newest else f"{TABLE}.rank, turn.id DESC"
    sql = (
        f"SELECT turn.id FROM {TABLE} JOIN turn ON turn.id = {TABLE}.rowid WHERE {TABLE} MATCH :query"
        " AND (:session IS NULL OR turn.session = :session) AND (:role IS NULL OR turn.role = :role)"
        f" ORDER BY {order} LIMIT :limit"
    )
    values = {"query": query, "session": session, "role": role, "limit": limit}
    with sqlite.cells_unchecked(conn):  # of a word that is everywhere, every turn is visited
        return list(conn.execute(sa.text(sql), values).scalars())


def marked(texts: Mapping[int, str], query: str) -> dict[int, Snippet]:
    """Of some texts those that match, with the part around the best match; the best text first.

    Raises:
        InvalidQuery: the query is not one.
    """
    engine = sa.create_engine("sqlite://")
    try:
        with engine.begin() as conn:
            conn.exec_driver_sql(f"CREATE VIRTUAL TABLE {TABLE} USING fts5(text, {_WORDS})")
            for row, text in texts.items():
                _insert(conn, row, text)
            sql = f"SELECT rowid, snippet({TABLE}, 0, ?, ?, '…', {SNIPPET_WORDS}) FROM {TABLE} WHERE {TABLE} MATCH ?"
            found = conn.exec_driver_sql(f"{sql} ORDER BY rank, rowid DESC", (_OPEN, _CLOSE, query)).all()
    except DBAPIError as error:
        raise InvalidQuery(query, str(error.orig)) from error
    finally:
        engine.dispose()
    return {row: _snippet(text) for row, text in found}


def _snippet(text: str) -> Snippet:
    parts = text.replace(_CLOSE, _OPEN).split(_OPEN)  # every other part is a match
    marks, at = [], 0
    for number, part in enumerate(parts):
        if number % 2:
            marks.append((at, at + len(part)))
        at += len(part)
    return Snippet("".join(parts), tuple(marks))


def difference(conn: sa.Connection, texts: Iterable[tuple[int, str]]) -> str | None:
    """In what the index differs from that of some turns (all that there are); None if it does not.

    Every word of it is read and looked up. Memory: a few turns and their words at a time.
    """
    try:
        conn.exec_driver_sql(f"CREATE VIRTUAL TABLE temp.indexed USING fts5vocab(main, {TABLE}, instance)")
        conn.exec_driver_sql(f"CREATE VIRTUAL TABLE temp.counted USING fts5vocab(main, {TABLE}, row)")
        try:
            if _content(conn, "temp.indexed", TABLE) != _expected(texts):
                return "it does not hold the words of the turns"
            if conn.exec_driver_sql(f"SELECT k FROM {TABLE}_config").scalars().all() != ["version"]:
                return "it does not say how it is made"
            if conn.exec_driver_sql(_MISLEADING).scalar_one():
                return "it does not say where its pages are"
            for term, count in conn.exec_driver_sql("SELECT term, doc FROM temp.counted"):
                sql = f"SELECT count(*) FROM {TABLE} WHERE {TABLE} MATCH ?"
                if conn.exec_driver_sql(sql, (f'"{term}"',)).scalar_one() != count:
                    return f"turns with the word {term!r} are not found by it"
        finally:
            for name in ("indexed", "counted"):
                conn.exec_driver_sql(f"DROP TABLE IF EXISTS temp.{name}")
    except DBAPIError as error:
        return str(error.orig)
    except MemoryError:
        return "it claims to be larger than memory"
    return None


# FTS5 keeps page n of segment s as row (s << 37) + n. What names a page, with a flag in its lowest bit, must name one
# that is there.
_MISLEADING = f"""
SELECT count(*) FROM {TABLE}_idx AS way LEFT JOIN {TABLE}_data AS page ON page.id = (way.segid << 37) + (way.pgno >> 1)
WHERE page.id IS NULL OR way.segid < 1 OR typeof(way.pgno) <> 'integer' OR typeof(way.term) <> 'blob'
"""


def _expected(texts: Iterable[tuple[int, str]]) -> tuple[int, int, int]:
    """What ``_content`` gives for an index of these turns."""
    total = (0, 0, 0)
    some: list[tuple[int, str]] = []
    for each in itertools.chain(texts, [None]):
        if each is not None:
            some.append(each)
        if some and (each is None or len(some) == COMPARED):
            total = _plus(total, _content_of(some))
            some = []
    return total


def _plus(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _content_of(texts: Iterable[tuple[int, str]]) -> tuple[int, int, int]:
    engine = sa.create_engine("sqlite://")
    try:
        with engine.begin() as conn:
            conn.exec_driver_sql(f"CREATE VIRTUAL TABLE {TABLE} USING fts5(text, content = '', {_WORDS})")
            conn.exec_driver_sql(f"CREATE VIRTUAL TABLE indexed USING fts5vocab({TABLE}, instance)")
            for row, text in texts:
                _insert(conn, row, text)
            return _content(conn, "indexed", TABLE)
    finally:
        engine.dispose()


def _content(conn: sa.Connection, words: str, index: str) -> tuple[int, int, int]:
    """What an index says, in any order: a sum over all places of words, one over the turns' lengths, their number."""
    rows = conn.exec_driver_sql(f'SELECT term, doc, "offset" FROM {words}')
    placed = sum(_number(f"{term}\0{doc}\0{place}".encode()) for term, doc, place in rows)
    lengths, count = 0, 0
    for row, size in conn.exec_driver_sql(f"SELECT id, sz FROM {index}_docsize"):
        told = size if isinstance(size, bytes) else str(size).encode()  # a damaged row may hold anything
        lengths, count = lengths + _number(b"%d\0%s" % (row, told)), count + 1
    return placed, lengths, count


def _number(data: bytes) -> int:
    return int.from_bytes(digest(data))


def _clean(text: str) -> str:
    return text.translate(_UNMARKED)


def words(text: str) -> str:
    """The query for what a person typed: all of its words, and as one what stands between two quotation marks.

    Whatever is typed is a word and never syntax; "" where nothing in it is a letter or a digit.
    """
    parts = text.translate(_UNMARKED).split('"')
    phrases = parts[1::2] if len(parts) % 2 else []
    others = parts[::2] if len(parts) % 2 else parts
    found = [*phrases, *(word for part in others for word in part.split())]
    return " ".join(f'"{word}"' for word in found if any(_is_letter(character) for character in word))


def _is_letter(character: str) -> bool:
    """Whether FTS5 takes a character for a part of a word."""
    kind = unicodedata.category(character)
    return kind[0] in "LN" or kind == "Co"
