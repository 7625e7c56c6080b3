"""Searching: which turns are found, how they are shown, and what becomes of the index when turns come and go."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kvloom_store import cut, fsck, fulltext, refs, removal, schema, turns
from kvloom_store.database import Database
from kvloom_store.errors import InvalidQuery, RefNotFound
from kvloom_store.fsck import Kind, Severity
from kvloom_store.search import Hits, rebuild, search
from kvloom_store.turns import Turn

SAID = {
    "trip": [
        ("system", "You are brief."),
        ("user", "Name three cities in Italy."),
        ("assistant", "Rome, Florence and Venice."),
        ("user", "And in France?"),
        ("assistant", "Paris, Lyon, Nîmes."),
    ],
    "food": [
        ("user", "A dish from Italy?"),
        ("assistant", "Pizza! Italy, Italy, Italy."),
        ("user", "Straße, 😀, 東京"),
    ],
}


@pytest.fixture
def database(store_path: Path) -> Iterator[Database]:
    made = Database(store_path)
    for name, said in SAID.items():
        talk(made, name, *said)
    yield made
    made.close()


def talk(database: Database, name: str, *said: tuple[str, str]) -> list[Turn]:
    with database.write() as conn:
        row = (refs.find_session(conn, name) or refs.create_session(conn, name, {"model": "none"})).row
        path: list[Turn] = []
        for role, text in said:
            message = {"role": role, "content": text}
            path.append(turns.add_turn(conn, row, path[-1] if path else None, message))
    return path


def texts(database: Database, query: str, **options: object) -> list[str]:
    """What the turns say that are found, in their order."""
    found = search(database, query, **options)
    with database.read() as conn:
        said = {turn.id: turn.text for row in refs.sessions(conn) for turn in turns.of_session(conn, row.row)}
    return [said[hit.turn] for hit in found.hits]


def execute(database: Database, *statements: str) -> None:
    with database.write() as conn:
        for statement in statements:
            conn.exec_driver_sql(statement)


def index_is(database: Database, there: bool) -> bool:
    with database.read() as conn:
        return fulltext.exists(conn) == there


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("italy", 3),
        ("ITALY", 3),
        ("three cities", 1),
        ("cities three", 1),
        ('"three cities"', 1),
        ('"cities three"', 0),
        ('"three cities" italy', 1),
        ('three "cities', 1),
        ("nimes", 1),
        ("Nîmes", 1),
        ("straße", 1),
        ("東京", 1),
        ("ital", 0),
        ("italy ???", 3),
        ("in france?", 1),
        ("nothing of it", 0),
    ],
)
def test_turns_that_hold_all_words_are_found(database: Database, query: str, count: int):
    assert len(texts(database, query)) == count


def test_the_best_come_first_or_the_newest(database: Database):
    assert texts(database, "italy")[0] == "Pizza! Italy, Italy, Italy."
    newest = [hit.created for hit in search(database, "italy", newest=True).hits]
    assert newest == sorted(newest, reverse=True)
    assert texts(database, "italy", newest=True)[-1] == "Name three cities in Italy."


def test_a_search_can_be_narrowed(database: Database):
    assert len(texts(database, "italy", session="food")) == 2
    assert texts(database, "italy", session="trip") == ["Name three cities in Italy."]
    assert texts(database, "italy", role="assistant") == ["Pizza! Italy, Italy, Italy."]
    assert texts(database, "italy", session="trip", role="assistant") == []
    assert len(texts(database, "italy", limit=2)) == 2
    with pytest.raises(RefNotFound):
        search(database, "italy", session="trap")


def test_a_hit_is_named_by_its_ref_and_shows_the_match(database: Database):
    [hit] = search(database, "florence").hits
    with database.read() as conn:
        assert refs.resolve(conn, refs.Ref("trip", hit.ref.removeprefix("trip@"), 0)).turn == 3
    assert (hit.session, hit.role, hit.snippet) == ("trip", "assistant", "Rome, Florence and Venice.")
    assert [hit.snippet[start:end] for start, end in hit.marks] == ["Florence"]


def test_of_a_long_text_the_part_around_the_match_is_shown(database: Database):
    talk(database, "long", ("user", "word " * 500 + "needle " + "word " * 500))
    [hit] = search(database, "needle").hits
    assert len(hit.snippet) < 200
    assert [hit.snippet[start:end] for start, end in hit.marks] == ["needle"]


def test_marks_are_right_where_the_text_has_the_signs_that_mark(database: Database):
    talk(database, "odd", ("user", "\ufdd0\ufdd1 needle \ufdd1\ufdd0\0 and [needle]"))
    [hit] = search(database, "needle").hits
    assert [hit.snippet[start:end] for start, end in hit.marks] == ["needle", "needle"]


SYNTAX = ["AND", "a OR", "NOT x", "NEAR(a b)", '"a', "a*", "^a", "text:a", "{a b}:c", "-a", "a\0b", "'a'", "a;"]


@pytest.mark.parametrize("text", [*SYNTAX, "a " * 1000, "(" * 5000 + "a", 'a"' * 999])
def test_what_is_typed_is_never_syntax(database: Database, text: str):
    assert search(database, text).damaged == 0


@pytest.mark.parametrize("text", ["", " ", "(", '"', '""', "???", "+", "\0", "*", "😀"])
def test_without_a_word_there_is_nothing_to_search(database: Database, text: str):
    with pytest.raises(InvalidQuery, match="no word"):
        search(database, text)


@given(st.text(max_size=60))
def test_no_text_at_all_is_a_syntax_error(text: str):
    query = fulltext.words(text.encode("utf-8", "replace").decode())
    if query:
        fulltext.marked({1: "some text"}, query)


@given(st.lists(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=1, max_size=8), min_size=1, max_size=5))
def test_a_text_is_found_by_its_own_words(said: list[str]):
    text = ", ".join(said)
    assert list(fulltext.marked({7: text}, fulltext.words(" ".join(reversed(said))))) == [7]


def test_raw_queries_are_fts5s_and_wrong_ones_are_told(database: Database):
    assert texts(database, "flor* NOT paris", raw=True) == ["Rome, Florence and Venice."]
    assert len(texts(database, "rome OR paris", raw=True)) == 2
    for query in ["(", '"', "a AND", "nosuch:a", "NEAR(", "*", "(" * 3000, "  ", ""]:
        with pytest.raises(InvalidQuery) as refused:
            search(database, query, raw=True)
        assert "FTS5" in refused.value.hint


def test_a_turn_is_indexed_in_its_own_transaction(database: Database):
    with database.write() as conn:
        row = refs.get_session(conn, "trip").row
        turns.add_turn(conn, row, None, {"role": "user", "content": "unheard"})
        conn.rollback()
    assert texts(database, "unheard") == []
    talk(database, "trip", ("user", "heard"))
    assert texts(database, "heard") == ["heard"]


def test_of_a_message_in_parts_the_text_is_found_and_other_parts_are_not(database: Database):
    with database.write() as conn:
        row = refs.get_session(conn, "trip").row
        content = [{"type": "text", "text": "part one"}, {"type": "text", "text": " part two"}]
        turns.add_turn(conn, row, None, {"role": "user", "content": content, "name": "hidden"})
    assert texts(database, "one two") == ["part one part two"]
    assert texts(database, "hidden") == []


def test_a_removed_session_is_found_no_more_and_others_are(database: Database):
    with database.write() as conn:
        removal.remove_session(conn, refs.get_session(conn, "food").row)
    assert texts(database, "italy") == ["Name three cities in Italy."]
    with database.read() as conn:  # not in the index either
        assert fulltext.matching(conn, "pizza", session=None, role=None, newest=False, limit=9) == []
        assert conn.exec_driver_sql("SELECT count(*) FROM turn_text WHERE turn_text MATCH 'pizza'").scalar_one() == 0


def test_a_damaged_turn_does_not_keep_its_session_from_being_removed(database: Database):
    execute(database, "UPDATE turn SET role = 'robot' WHERE id = 7")
    with database.write() as conn:
        removal.remove_session(conn, refs.get_session(conn, "food").row)
    assert index_is(database, False)
    assert texts(database, "italy") == ["Name three cities in Italy."]
    assert index_is(database, True)


def test_a_cut_turn_that_is_taken_back_is_found_no_more(database: Database):
    with database.write() as conn:
        row = refs.get_session(conn, "trip").row
        settings = {cut.CUT_FROM: "x"}
        made = turns.add_turn(conn, row, None, {"role": "user", "content": "halved"}, settings=settings)
    assert texts(database, "halved") == ["halved"]
    with database.write() as conn:
        cut.discard(conn, made.row)
        assert fulltext.matching(conn, "halved", session=None, role=None, newest=False, limit=9) == []


def test_a_store_without_an_index_gets_it_when_it_is_first_searched(database: Database):
    execute(database, "DROP TABLE turn_text")
    talk(database, "later", ("user", "Italy, later"))
    assert index_is(database, False)
    assert len(texts(database, "italy")) == 4
    assert index_is(database, True)
    talk(database, "later", ("user", "Italy, last"))
    assert len(texts(database, "italy")) == 5


def test_a_store_that_cannot_be_written_is_searched_without_an_index(database: Database):
    execute(database, "DROP TABLE turn_text")
    database.read_only = True
    assert len(texts(database, "italy")) == 3
    assert texts(database, "italy", session="food", role="user") == ["A dish from Italy?"]
    assert len(texts(database, "italy", limit=1)) == 1
    assert index_is(database, False)


NOISE = random.Random(0).randbytes(40).hex()
CLAIMS = "62484f263722004ce4a5a98a977b124229c76e6228dda6f1e841e00518d6e2054a"
"""A record of the index's parts that says they are more than fit into memory."""
DAMAGE = {
    "its words are noise": f"UPDATE turn_text_data SET block = x'{NOISE}' WHERE id > 10",
    "all of it is noise": f"UPDATE turn_text_data SET block = x'{NOISE}'",
    "it claims to be larger than memory": f"UPDATE turn_text_data SET block = x'{CLAIMS}' WHERE id = 10",
    "all of it is empty": "UPDATE turn_text_data SET block = x'00'",
    "its words are gone": "DELETE FROM turn_text_data WHERE id > 10",
    "all of it is gone": "DELETE FROM turn_text_data",
    "it has no version": "DELETE FROM turn_text_config",
    "it has another version": "UPDATE turn_text_config SET v = 99",
    "its table is gone": "DROP TABLE turn_text_data",
}
HIDES = {"its words are noise", "all of it is empty", "its words are gone"}
"""What SQLite does not always see: turns are hidden then, and none is made up."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_built_again_when_it_is_searched(database: Database, damage: str):
    execute(database, DAMAGE[damage])
    database.engine.dispose()
    found = texts(database, "italy")
    if damage in HIDES:
        assert set(found) <= {text for said in SAID.values() for _, text in said}
        rebuild(database)
        found = texts(database, "italy")
    assert len(found) == 3


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_keeps_no_turn_from_being_stored_and_no_session_from_being_removed(
    database: Database, damage: str
):
    execute(database, DAMAGE[damage])
    database.engine.dispose()
    for number in range(40):
        talk(database, "more", ("user", f"Italy, more {number}"))
    with database.write() as conn:
        removal.remove_session(conn, refs.get_session(conn, "food").row)
    rebuild(database)
    assert len(texts(database, "italy", limit=100)) == 41


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_told_from_a_whole_one(database: Database, damage: str):
    assert not [each for each in fsck.check(database).findings if each.kind == Kind.INDEX]
    execute(database, DAMAGE[damage])
    database.engine.dispose()
    assert [each.severity for each in fsck.check(database).findings if each.kind == Kind.INDEX] == [Severity.HEALS]


def test_an_index_that_says_what_is_not_so_shows_nothing_that_was_not_said(database: Database):
    with database.write() as conn:
        fulltext.add(conn, 1, "florence")  # the first turn says something else
    assert texts(database, "florence") == ["Rome, Florence and Venice."]


def test_an_index_that_hides_turns_can_be_built_anew(database: Database):
    with database.write() as conn:
        fulltext.build(conn, [])
    assert texts(database, "italy") == []
    rebuild(database)
    assert len(texts(database, "italy")) == 3


def test_a_damaged_turn_is_left_out_and_counted(database: Database):
    execute(database, "UPDATE turn SET role = 'robot' WHERE id = 7")
    found = search(database, "italy")
    assert (len(found.hits), found.damaged) == (2, 1)
    rebuild(database)
    assert search(database, "italy") == Hits(found.hits, 0)


def test_a_sqlite_without_fts5_keeps_turns_and_has_no_index(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fulltext, "create", lambda conn: None)
    made = Database(store_path)
    talk(made, "trip", ("user", "Italy"))
    assert index_is(made, False)
    assert texts(made, "italy") == ["Italy"]
    made.close()


def test_the_index_holds_no_text(database: Database):
    database.checkpoint()
    with sqlite3.connect(database.path) as raw:
        tables = [row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE name LIKE 'turn_text%'")]
        rows = raw.execute("SELECT count(*) FROM turn_text WHERE text IS NOT NULL").fetchone()
    raw.close()
    assert "turn_text" in tables
    assert "turn_text_content" not in tables
    assert rows == (0,)
    assert not set(tables) & set(schema.metadata.tables)
    with database.read() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(schema.turn)).scalar_one() == 8
