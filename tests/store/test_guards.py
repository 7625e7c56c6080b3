"""A damaged index, or a cell that a row's checksum does not cover, and what would be taken away, written out or shown
because of it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from states import MIXED, Store, filled

from kvloom_proto.bundle import Record
from kvloom_proto.records import Provenance, Schedule
from kvloom_store import (
    bundle_out,
    bundle_plan,
    erase,
    gc,
    gc_plan,
    pins,
    refs,
    removal,
    roots,
    schema,
    search,
    segments,
    stats,
    trie,
    turns,
)
from kvloom_store.database import Database
from kvloom_store.errors import CorruptRow, StoreError
from kvloom_store.refs import SessionRow
from kvloom_store.turns import Turn, TurnState


def damage(path: Path, statement: str, *values: object) -> None:
    """Change cells, and leave the checksums as they are."""
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute(statement, values).rowcount == 1
        raw.commit()


def mislead(path: Path, index: str, row: int, column: str = "", value: int | str = "") -> None:
    """Let an index say something else of a row; without a column, nothing."""
    with closing(sqlite3.connect(path)) as raw:
        [(table,)] = raw.execute("SELECT tbl_name FROM sqlite_master WHERE name = ?", (index,))
        columns = ", ".join(each[2] for each in raw.execute(f"PRAGMA index_info({index})"))
        raw.execute(f"CREATE TABLE other (id INTEGER PRIMARY KEY, {columns})")
        raw.execute(f"INSERT INTO other SELECT id, {columns} FROM {table}")
        raw.execute(
            f"UPDATE other SET {column} = {value} WHERE id = {row}" if column else f"DELETE FROM other WHERE id = {row}"
        )
        raw.execute(f"CREATE INDEX of_other ON other ({columns})")
        raw.execute("PRAGMA writable_schema=ON")
        found = "(SELECT rootpage FROM sqlite_master WHERE name = 'of_other')"
        assert raw.execute(f"UPDATE sqlite_master SET rootpage = {found} WHERE name = ?", (index,)).rowcount == 1
        raw.execute("DELETE FROM sqlite_master WHERE name IN ('other', 'of_other')")
        raw.commit()


def rows(path: Path) -> list[list[tuple[object, ...]]]:
    """All that the store says: what a test expects to be left as it is."""
    tables = ("session", "branch", "turn", "turn_state", "node", "segment")
    with closing(sqlite3.connect(path)) as raw:
        return [raw.execute(f"SELECT * FROM {table} NOT INDEXED").fetchall() for table in tables]


class Talks:
    """Sessions whose turns have tokens, and no state of theirs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(Database(path)) as database, database.write() as conn:
            self.root = roots.root_for(conn, roots.add_model(conn, b"m" * 16, "none", {}))
            self.provenance = segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "sdpa", "test"))

    def say(self, name: str, *paths: list[int]) -> list[TurnState]:
        """A session with a turn for each path, each below the one before; main leads to the last one."""
        with closing(Database(self.path)) as database, database.write() as conn:
            session = refs.create_session(conn, name, {})
            said: list[TurnState] = []
            above: Turn | None = None
            for tokens in paths:
                above, state = self.turn(conn, session, above, tokens, said[-1] if said else None)
                said.append(state)
            main = refs.branches(conn, session.row)[0]
            refs.move_branch(conn, main.row, None, said[-1].turn)
        return said

    def turn(
        self, conn: sa.Connection, session: SessionRow, parent: Turn | None, tokens: list[int], base: TurnState | None
    ) -> tuple[Turn, TurnState]:
        made = turns.add_turn(conn, session.row, parent, {"role": "user", "content": f"{session.name} {tokens}"})
        start = base.end if base else 0
        state = turns.add_state(
            conn,
            made.row,
            self.root,
            tokens[start:],
            start,
            trie.extend(conn, self.root, tokens),
            state_start=start,
            state_end=len(tokens),
            base_state=base.row if base else None,
            base_segment=None,
            schedule=Schedule(),
            provenance=self.provenance,
            hidden=None,
            hidden_dtype=None,
        )
        return made, state


def remove(path: Path, name: str, *, erased: bool = False) -> None:
    with closing(Database(path)) as database, database.write() as conn:
        (erase.session if erased else removal.remove_session)(conn, refs.get_session(conn, name).row)


@pytest.fixture
def talks(store_path: Path) -> Talks:
    return Talks(store_path)


# --- what is taken away ---


def test_an_edge_whose_use_an_index_hides_is_not_taken_away(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3], [1, 2, 3, 4, 5])
    [_, other] = talks.say("yours", [1, 2, 3], [1, 2, 3, 4, 5])
    mislead(talks.path, "ix_turn_state_node", other.row)
    before = rows(talks.path)
    with pytest.raises(CorruptRow, match="turn_state"):
        remove(talks.path, "mine")
    assert rows(talks.path) == before


def test_an_edge_whose_child_an_index_hides_is_not_taken_away(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3])
    [below] = talks.say("yours", [1, 2, 7])
    mislead(talks.path, "sqlite_autoindex_node_1", below.position.node)
    before = rows(talks.path)
    with pytest.raises(CorruptRow, match="node"):
        remove(talks.path, "mine")
    assert rows(talks.path) == before


def test_a_turn_state_that_others_stand_on_is_not_taken_away_where_an_index_hides_them(talks: Talks) -> None:
    [base] = talks.say("mine", [1, 2, 3])
    [first] = talks.say("yours", [1, 2, 3])
    with closing(Database(talks.path)) as database, database.write() as conn:
        _, above = talks.turn(conn, refs.get_session(conn, "yours"), turns.get(conn, first.turn), [1, 2, 3, 4], base)
    mislead(talks.path, "ix_turn_state_base_state", above.row)
    before = rows(talks.path)
    with pytest.raises(StoreError, match="damaged"):
        remove(talks.path, "mine")
    assert rows(talks.path) == before


def test_an_edge_is_not_cut_to_what_a_damaged_row_says_of_it(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3, 4, 5, 6])
    [other] = talks.say("yours", [1, 2, 3, 4, 5])
    damage(talks.path, "UPDATE turn_state SET offset = 4 WHERE id = ?", other.row)
    before = rows(talks.path)
    with pytest.raises(CorruptRow, match="turn_state"):
        remove(talks.path, "mine", erased=True)
    assert rows(talks.path) == before


def test_an_edge_is_cut_to_what_is_left_on_it_though_an_index_hides_that(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3, 4, 5, 6])
    [other] = talks.say("yours", [1, 2, 3, 4, 5])
    mislead(talks.path, "ix_turn_state_node", other.row)
    remove(talks.path, "mine", erased=True)
    with closing(Database(talks.path)) as database, database.read() as conn:
        assert trie.tokens_to(conn, other.position.node, other.position.offset) == [1, 2, 3, 4, 5]


def _forked(talks: Talks) -> tuple[TurnState, TurnState, TurnState]:
    """A session whose branch aside has one turn of its own, beside one that was undone: their parent, and both."""
    [first] = talks.say("talk", [1, 2])
    with closing(Database(talks.path)) as database, database.write() as conn:
        session, parent = refs.get_session(conn, "talk"), turns.get(conn, first.turn)
        _, undone = talks.turn(conn, session, parent, [1, 2, 3], first)
        turn, own = talks.turn(conn, session, parent, [1, 2, 4], first)
        refs.add_branch(conn, session.row, "aside", turn.row)
    return first, undone, own


def _remove_branch(path: Path) -> None:
    with closing(Database(path)) as database, database.write() as conn:
        found = {each.name: each for each in refs.branches(conn, refs.get_session(conn, "talk").row)}
        removal.remove_branch(conn, found["aside"])


def test_a_branch_whose_path_is_damaged_does_not_take_other_turns_along(talks: Talks) -> None:
    _, undone, own = _forked(talks)
    damage(talks.path, "UPDATE turn SET parent = ? WHERE id = ?", undone.turn, own.turn)
    before = rows(talks.path)
    with pytest.raises(CorruptRow, match="turn"):
        _remove_branch(talks.path)
    assert rows(talks.path) == before


# --- what is written out ---


def _exported(path: Path, name: str) -> list[Record]:
    with closing(Database(path)) as database, database.read() as conn:
        plan = bundle_plan.plan(conn, bundle_out.whole_session(conn, refs.get_session(conn, name).row))
        return list(bundle_out.records(conn, plan, {}, writer="test", text_only=False))


def test_a_turn_that_an_index_takes_for_another_sessions_is_not_written_out_with_it(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3])
    [first, _] = talks.say("yours", [5, 6], [5, 6, 7])
    sound = _exported(talks.path, "yours")
    mislead(talks.path, "ix_turn_session", first.turn, "session", 1)
    with pytest.raises(CorruptRow, match="turn"):
        _exported(talks.path, "mine")
    assert _exported(talks.path, "yours")[1:] == sound[1:]  # the head says when it was written


def test_a_turn_that_says_it_is_another_sessions_is_missed(talks: Talks) -> None:
    talks.say("mine", [1, 2, 3])
    [_, last] = talks.say("yours", [5, 6], [5, 6, 7])
    damage(talks.path, "UPDATE turn SET session = 1 WHERE id = ?", last.turn)
    with pytest.raises(CorruptRow, match="turn"):
        _exported(talks.path, "yours")


# --- what is followed ---

ON_ITSELF = "UPDATE turn_state SET base_state = id, state_start = state_end WHERE id = ?"


def test_a_turn_state_that_stands_on_itself_is_not_followed_for_ever(talks: Talks) -> None:
    [_, last] = talks.say("talk", [1, 2], [1, 2, 3])
    damage(talks.path, ON_ITSELF, last.row)
    with closing(Database(talks.path)) as database, pytest.raises(CorruptRow, match="turn_state"):
        gc.collect(database)
    with pytest.raises(CorruptRow, match="turn_state"):
        _exported(talks.path, "talk")


def test_the_state_of_a_pinned_turn_that_stands_on_itself_is_not_followed_for_ever(talks: Talks) -> None:
    [only] = talks.say("talk", [1, 2])
    with closing(Database(talks.path)) as database, database.write() as conn:
        pins.add(conn, only.turn)
    damage(talks.path, ON_ITSELF, only.row)
    with closing(Database(talks.path)) as database, database.write() as conn:
        assert gc.drop(conn, [], 0) == set()


@pytest.fixture
def held(store_path: Path) -> tuple[Path, int]:
    """A store with one segment, which says that it stands on itself."""
    store = Store(store_path)
    made = store.write(filled(MIXED[:1], 8), 0, 8)
    store.database.close()
    damage(store_path, "UPDATE segment SET base_segment = id WHERE id = ?", made)
    return store_path, made


def test_a_segment_that_stands_on_itself_is_not_followed_for_ever(held: tuple[Path, int]) -> None:
    path, made = held
    with closing(Database(path)) as database, database.write() as conn:
        assert not segments.is_lossy(conn, made)
        assert gc_plan.plan(gc.read_facts(conn, 0), 0).drops == ()
        assert erase._drop(conn, [made]) == 0
        assert conn.execute(sa.select(schema.segment.c.id)).all() == []


def test_an_edge_that_stands_on_itself_is_not_followed_for_ever(held: tuple[Path, int]) -> None:
    path, _ = held
    damage(path, "UPDATE node SET parent = id, start = 4 WHERE id = (SELECT node FROM segment)")
    with closing(Database(path)) as database, pytest.raises(CorruptRow, match="node"):
        stats.stats(database)


# --- what is shown ---


@pytest.mark.parametrize("value", ["x", b"1"])
def test_nothing_is_reckoned_with_what_is_no_number(talks: Talks, value: object) -> None:
    [only] = talks.say("talk", [1, 2])
    damage(talks.path, "UPDATE turn_state SET state_end = ?, end = ? WHERE id = ?", value, value, only.row)
    with closing(Database(talks.path)) as database:
        with database.read() as conn, pytest.raises(CorruptRow, match="turn_state"):
            turns.token_counts(conn, 1)
        with pytest.raises(CorruptRow, match="turn_state"):
            gc.collect(database)


@pytest.mark.parametrize("table", ["turn", "branch", "segment"])
def test_what_to_drop_is_not_reckoned_with_what_is_no_number(talks: Talks, held: tuple[Path, int], table: str) -> None:
    talks.say("talk", [1, 2])
    damage(talks.path, f"UPDATE {table} SET {'updated' if table == 'branch' else 'created'} = 'x'")
    with closing(Database(talks.path)) as database, pytest.raises(CorruptRow, match=table):
        gc.collect(database)
    if table == "segment":
        damage(talks.path, "UPDATE segment SET stored_bytes = 'x'")
        with closing(Database(talks.path)) as database, pytest.raises(CorruptRow, match=table):
            stats.stats(database)


@pytest.mark.parametrize("value", ["x", b"1"])
def test_a_turn_whose_id_is_damaged_leaves_the_ids_of_the_others_as_they_are(talks: Talks, value: object) -> None:
    [first, last] = talks.say("talk", [1, 2], [1, 2, 3])
    damage(talks.path, "UPDATE turn SET public_id = ? WHERE id = ?", value, last.turn)
    damage(talks.path, "UPDATE turn_state SET state_start = state_end WHERE id = ?", first.row)
    with closing(Database(talks.path)) as database, database.read() as conn:
        [(row, short)] = refs.short_ids(conn, 1).items()
        assert row == first.turn
        assert turns.get(conn, row).id.startswith(short)
        assert turns.held(conn, 1) == {turns.get(conn, row).id}
        with pytest.raises(CorruptRow, match="turn"):
            refs.short_id(conn, last.turn)


def test_turns_are_counted_though_a_damaged_index_has_one_in_no_session(talks: Talks) -> None:
    [first, _] = talks.say("talk", [1, 2], [1, 2, 3])
    mislead(talks.path, "ix_turn_session", first.turn, "session", "NULL")
    with closing(Database(talks.path)) as database, database.read() as conn:
        assert turns.count_by_session(conn) == {1: 1}


def test_a_turn_that_an_index_hides_is_found_by_its_words_and_has_its_whole_id(talks: Talks) -> None:
    [first, _] = talks.say("talk", [11, 22], [11, 22, 33])
    mislead(talks.path, "ix_turn_session", first.turn)
    with closing(Database(talks.path)) as database, database.read() as conn:
        found = {hit.ref for hit in search.search(database, "22").hits}
        whole = turns.get(conn, first.turn).id
        assert f"talk@{whole}" in found
        assert len(found) == 2
        assert refs.short_id(conn, first.turn) == whole
