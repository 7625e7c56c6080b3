"""What a store's size costs, counted: statements, and the steps that the database takes to run them.

A step of SQLite's virtual machine visits a row, or compares one value: it takes as many on every machine.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import synthetic
from benchmarks.synthetic import TOKENS, Builder, Synthetic

from kvloom.cli import run
from kvloom_store import (
    checksum,
    fulltext,
    held,
    loading,
    planner,
    refs,
    removal,
    restore,
    schema,
    search,
    segments,
    trie,
    turns,
)
from kvloom_store.database import Database
from kvloom_store.rows import RowBuffer

PERSISTENT = {"node", "segment", "chunk", "session", "turn", "turn_state", "branch", "tag", "exploration", "candidate"}
"""Tables that rows are taken away from."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Synthetic, Synthetic]:
    """A small store and one of twelve times as many sessions."""
    folder = tmp_path_factory.mktemp("scale")
    small, large = (synthetic.conversations(folder / f"{count}.db", count) for count in (2, 24))
    return small, large


@contextmanager
def opened(made: Synthetic) -> Iterator[Database]:
    database = Database(made.path)
    yield database
    database.close()


class Work:
    """Counts statements, and steps of the database, while it is entered."""

    def __init__(self, conn: sa.Connection) -> None:
        self._conn = conn
        self.statements = 0
        self.steps = 0

    def __enter__(self) -> Work:
        raw = self._conn.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)
        self._raw = raw
        raw.set_progress_handler(self._step, 1)
        sa.event.listen(self._conn, "before_cursor_execute", self._statement)
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.set_progress_handler(None, 0)
        sa.event.remove(self._conn, "before_cursor_execute", self._statement)

    def _step(self) -> int:
        self.steps += 1
        return 0

    def _statement(self, *_: object) -> None:
        self.statements += 1


def work(conn: sa.Connection, action: Callable[[], Any]) -> tuple[int, int]:
    with Work(conn) as done:
        action()
    return done.statements, done.steps


def ids_of(conn: sa.Connection, made: Synthetic, session: str, turn: int) -> list[int]:
    end = made.ends[session][turn]
    return trie.tokens_to(conn, end.node, end.offset)


def on_both(stores: tuple[Synthetic, Synthetic], action: Callable[[sa.Connection, Synthetic], Any]) -> list[Any]:
    found = []
    for made in stores:
        with opened(made) as database, database.read() as conn:
            found.append(work(conn, lambda c=conn, m=made: action(c, m)))
    return found


def looked_up(conn: sa.Connection, made: Synthetic) -> None:
    ids = ids_of(conn, made, "session-1", -1)
    held.longest(conn, trie.match(conn, made.root, [*ids, 1, 2, 3]), at_most=len(ids))


def log_read(conn: sa.Connection, made: Synthetic) -> None:
    point = refs.resolve(conn, refs.Ref("session-1", "main", 0))
    turns.states_of(conn, [turn.row for turn in turns.path_to(conn, point.turn)])


def tree_read(conn: sa.Connection, made: Synthetic) -> None:
    row = refs.get_session(conn, "session-1").row
    turns.of_session(conn, row)
    turns.token_counts(conn, row)
    refs.branches(conn, row)
    refs.short_ids(conn, row)


def state_read(conn: sa.Connection, made: Synthetic) -> None:
    ids = ids_of(conn, made, "session-1", -1)
    found = held.longest(conn, trie.match(conn, made.root, ids), at_most=len(ids))
    assert found is not None
    links = restore.chain(conn, found.segment)
    plan = planner.plan(links, len(ids), synthetic.LAYERS)
    loading.load(conn, links, plan.rows, plan.windows, RowBuffer(synthetic.LAYERS, len(ids)))


@pytest.mark.parametrize("action", [looked_up, log_read, tree_read, state_read])
def test_reading_of_one_session_takes_no_more_steps_in_a_store_with_many(stores, action):
    small, large = on_both(stores, action)
    assert small[0] == large[0]
    assert large[1] < 1.01 * small[1]  # random tokens sort a little differently


def test_a_long_path_is_matched_in_as_many_statements_as_it_leaves_edges_in_their_middle(stores):
    with opened(stores[1]) as database, database.read() as conn:
        straight = ids_of(conn, stores[1], "session-3", 36)  # the end of the first branch
        beside = ids_of(conn, stores[1], "session-3", -1)  # of the second one, which leaves the first in an edge
        assert len(trie.match(conn, stores[1].root, straight).path) == 39
        assert work(conn, lambda: trie.match(conn, stores[1].root, straight))[0] == 2
        assert work(conn, lambda: trie.match(conn, stores[1].root, [*straight, 1, 2]))[0] == 2
        assert work(conn, lambda: trie.match(conn, stores[1].root, beside))[0] == 4


def test_one_of_many_children_is_found_in_as_many_steps_as_one_of_few(tmp_path):
    found = []
    for children in (3, 300):
        builder = Builder(tmp_path / f"{children}.db")
        builder.session("wide", (None, 0, *[1] * children))
        made = builder.finish()
        with opened(made) as database, database.read() as conn:
            ids = ids_of(conn, made, "wide", 2)
            found.append(work(conn, lambda c=conn, m=made, i=ids: trie.match(c, m.root, i)))
    assert found[0] == found[1]


def test_a_path_of_many_nodes_is_matched_in_two_statements_and_only_the_state_at_its_end_is_read(tmp_path):
    depth = 40 * held.QUERY_NODES
    builder = Builder(tmp_path / "deep.db")
    builder.session("deep", (None, *range(depth)), tokens=2)
    made = builder.finish()
    with opened(made) as database, database.read() as conn:
        ids = ids_of(conn, made, "deep", -1)
        match = trie.match(conn, made.root, ids)
        assert (match.known, len(match.path)) == (len(ids), depth + 2)
        assert work(conn, lambda: trie.match(conn, made.root, ids))[0] == 2
        found = held.longest(conn, match, at_most=len(ids))
        assert found is not None
        assert found.end == len(ids)
        statements, steps = work(conn, lambda: held.longest(conn, match, at_most=len(ids)))
        assert statements == 2
        assert steps < 60 * held.QUERY_NODES
        half = held.longest(conn, match, at_most=len(ids) // 2)
        assert half is not None
        assert half.end == len(ids) // 2


def every_row(conn: sa.Connection, match: trie.Match, at_most: int, on: int | None, on_end: int) -> held.Held | None:
    """What ``held.longest`` says, by reading all segments of the path."""
    depth = {position.node: position.depth for position in match.path}
    query = sa.select(schema.segment).where(schema.segment.c.complete == 1).order_by(schema.segment.c.id)
    rows = {row.id: row for row in conn.execute(query) if row.node in depth}
    best = None
    for row in rows.values():
        at = row
        while on is not None and at is not None and at.id != on:
            at = rows.get(at.base_segment) if at.start >= on_end else None
        end = min(row.end, depth[row.node], at_most)
        if end > row.start and at is not None and (best is None or end > best.end):
            best = held.Held(row.id, end)
    return best


def test_the_state_that_is_found_is_the_one_that_reading_every_segment_finds(tmp_path):
    builder = Builder(tmp_path / "held.db")
    builder.session("deep", (None, *range(3 * held.QUERY_NODES)), tokens=3)
    made, draw = builder.finish(), random.Random(2)
    with opened(made) as database, database.write() as conn:
        ids = ids_of(conn, made, "deep", -1)
        match = trie.match(conn, made.root, ids)
        rows = conn.execute(sa.select(schema.segment).where(schema.segment.c.node.in_([p.node for p in match.path])))
        whole = [checksum.checked(schema.segment, row) for row in rows]
        for number, values in enumerate(draw.sample(whole, len(whole) // 2)):  # others of the same tokens, some longer
            start = max(0, values["start"] - draw.choice((0, 0, 4, 200)))
            changed = {"id": 100_000 + number, "start": start, "complete": int(draw.random() < 0.8)}
            checksum.insert(conn, schema.segment, {**values, **changed})
        for values in draw.sample(whole, len(whole) // 3):
            checksum.update(conn, schema.segment, values, complete=0)
        seen = set()
        for at_most in range(0, len(ids) + 10, 3):
            for on in (None, draw.choice(whole)):
                at, end = (on["id"], draw.choice((on["start"] + 1, on["end"]))) if on else (None, 0)
                found = held.longest(conn, match, at_most=at_most, on=at, on_end=end)
                assert found == every_row(conn, match, at_most, at, end), (at_most, at, end)
                seen.add(None if found is None else found.segment < 100_000)
        assert seen == {None, True, False}


def test_what_dead_processes_left_is_looked_for_without_reading_the_segments_that_are_whole(stores):
    small, large = on_both(stores, lambda conn, _: segments.sweep(conn))
    assert small == large
    with opened(stores[0]) as database, database.write() as conn:
        row = conn.execute(sa.select(schema.segment).order_by(schema.segment.c.id.desc()).limit(1)).one()
        conn.execute(schema.segment.update().where(schema.segment.c.id == row.id).values(complete=0, created=1))
        conn.execute(schema.turn_state.update().values(segment=None, base_segment=None))
        segments.sweep(conn)
        there = sa.select(schema.segment.c.id).where(schema.segment.c.id == row.id)
        assert conn.execute(there).first() is None
        conn.rollback()


def test_taking_a_session_away_takes_no_more_in_a_store_with_many_than_a_look_at_each_row(stores):
    found, rows = [], []
    looked_through = (schema.node, schema.segment, schema.turn_state, schema.turn_state)  # the last one twice
    for made in stores:
        with opened(made) as database, database.write() as conn:
            row = refs.get_session(conn, "session-0").row
            found.append(work(conn, lambda c=conn, r=row: removal.remove_session(c, r)))
            rows.append(sum(len(conn.execute(sa.select(table.c.id)).all()) for table in looked_through))
            conn.rollback()
    assert found[1][0] < 1.1 * found[0][0]
    assert found[1][1] < 1.1 * found[0][1] + 10 * (rows[1] - rows[0])


def test_adding_a_turn_takes_no_more_steps_in_a_store_with_many(stores):
    found = []
    for made in stores:
        with opened(made) as database, database.write() as conn:
            session = refs.get_session(conn, "session-1")
            branch = refs.branches(conn, session.row)[0]
            parent = turns.get(conn, branch.turn or 0)
            end = made.ends["session-1"][36]
            ids = [*trie.tokens_to(conn, end.node, end.offset), 5, 6]

            def add(conn=conn, made=made, session=session, branch=branch, parent=parent, ids=ids) -> None:
                trie.extend(conn, made.root, ids)
                turn = turns.add_turn(conn, session.row, parent, {"role": "user", "content": "hello"})
                refs.move_branch(conn, branch.row, branch.turn, turn.row)

            found.append(work(conn, add))
            conn.rollback()
    assert found[0][0] == found[1][0]
    assert found[1][1] < 1.1 * found[0][1]


@contextmanager
def statements(engine: Any = sa.Engine) -> Iterator[list[str]]:
    """Every statement that an engine, or any, runs."""
    seen: list[str] = []

    def heard(_conn: object, _cursor: object, text: str, *_: object) -> None:
        seen.append(text)

    sa.event.listen(engine, "before_cursor_execute", heard)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", heard)


def test_all_branches_are_read_in_one_statement(stores):
    with opened(stores[1]) as database, database.read() as conn:
        each = {row.row: refs.branches(conn, row.row) for row in refs.sessions(conn)}
        with statements() as seen:
            assert refs.branches_by_session(conn) == each
    assert len(seen) == 1


def test_hits_in_one_session_cost_no_more_statements_the_more_they_are(stores):
    counted = []
    with opened(stores[1]) as database:
        for limit in (2, 40):
            with statements(database.engine) as seen:
                hits = search.search(database, synthetic.COMMON, session="session-1", limit=limit).hits
            counted.append((len(hits), len(seen)))
    assert [hits for hits, _ in counted] == [2, 40]
    assert counted[0][1] == counted[1][1]


def test_checks_that_a_search_and_a_long_restore_leave_out_are_made_again_afterwards(stores, monkeypatch):
    monkeypatch.setattr(loading, "LONG_BYTES", 0)

    def pragma(conn: sa.Connection, name: str) -> int:
        return int(conn.exec_driver_sql(f"PRAGMA {name}").scalar_one())

    with opened(stores[0]) as database:
        with database.read() as conn:
            before = [pragma(conn, name) for name in ("mmap_size", "cell_size_check")]
            assert len(fulltext.matching(conn, synthetic.COMMON, session=None, role=None, newest=False, limit=1)) == 1
            state_read(conn, stores[0])
            assert [pragma(conn, name) for name in ("mmap_size", "cell_size_check")] == before
        assert before[1] == 1


def test_listing_many_sessions_takes_as_many_statements_as_listing_few(stores, capsys):
    counted = []
    for made in stores:
        with statements() as seen:
            assert run(["ls", "--json", "--store", str(made.path)]) == 0
        counted.append(len(seen))
        listed = json.loads(capsys.readouterr().out)["sessions"]
        assert [(each["turns"], each["branches"]) for each in listed] == [(51, ["main", "branch-1"])] * len(made.ends)
    assert counted[0] == counted[1]


def test_whatever_refers_to_rows_that_are_taken_away_is_found_by_an_index():
    """Else taking one row away reads all rows that might refer to it."""
    for table in schema.metadata.tables.values():
        found = [list(index.columns) for index in table.indexes if index.dialect_options["sqlite"]["where"] is None]
        found += [list(each.columns) for each in table.constraints if isinstance(each, sa.UniqueConstraint)]
        first = {columns[0].name for columns in [*found, list(table.primary_key.columns)] if columns}
        for column in table.columns:
            for key in column.foreign_keys:
                if key.column.table.name in PERSISTENT:
                    assert column.name in first, f"{table.name}.{column.name}"


def test_a_synthetic_store_is_one_that_the_stores_own_functions_would_have_made(stores):
    with opened(stores[0]) as database, database.write() as conn:
        nodes = sa.select(sa.func.count(), sa.func.sum(schema.node.c.length)).where(schema.node.c.parent.is_not(None))
        assert tuple(conn.execute(nodes).one()) == (stores[0].nodes, stores[0].tokens)
        for name, ends in stores[0].ends.items():
            for number, end in enumerate(ends):
                ids = ids_of(conn, stores[0], name, number)
                assert trie.extend(conn, stores[0].root, ids) == end
                assert end.depth == len(ids)
            for turn in turns.of_session(conn, refs.get_session(conn, name).row):
                for state in turns.states_of(conn, [turn.row]):
                    ids = trie.tokens_to(conn, state.position.node, state.position.offset)
                    assert state.tokens == ids[state.start : state.end]
                    assert len(state.tokens) >= TOKENS
        assert conn.exec_driver_sql("PRAGMA foreign_key_check").all() == []
