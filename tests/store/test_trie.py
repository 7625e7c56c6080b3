"""The trie against a brute-force oracle, and with several processes inserting at once."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto.errors import LimitExceeded
from kvloom_store import roots, schema, trie
from kvloom_store.database import Database
from kvloom_store.errors import CorruptRow

TOKENS = st.lists(st.integers(0, 3), max_size=12)
"""Four tokens only, so that prefixes, divergence inside an edge and at its end all happen often."""


def two_roots(database: Database) -> list[int]:
    """Two new ones: tests may share a database, which takes longer to make than most tests."""
    with database.write() as conn:
        ids = [os.urandom(16) for _ in range(2)]
        return [roots.root_for(conn, roots.add_model(conn, each, f"model {each.hex()}", {})) for each in ids]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("trie") / "s.db")
    yield database
    database.close()


def oracle_match(stored: set[tuple[int, ...]], ids: list[int]) -> int:
    """The longest prefix of ids that is a prefix of something stored, by looking at everything."""
    return max((n for n in range(len(ids) + 1) if any(s[:n] == tuple(ids[:n]) for s in stored)), default=0)


@given(
    inserted=st.lists(st.tuples(st.integers(0, 1), TOKENS), max_size=12),
    looked_up=st.lists(TOKENS, max_size=6),
)
def test_longest_known_prefix_is_the_one_a_brute_force_search_finds(shared, inserted, looked_up):
    database = shared
    ids_of_root = two_roots(database)
    stored: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    for which, ids in inserted:
        with database.write() as conn:
            position = trie.extend(conn, ids_of_root[which], ids)
            assert position.depth == len(ids)
            assert trie.tokens_to(conn, position.node, position.offset) == ids
        stored[which].add(tuple(ids))
    with database.read() as conn:
        for which in (0, 1):
            for ids in [*looked_up, *(ids for _, ids in inserted)]:
                found = trie.match(conn, ids_of_root[which], ids)
                assert found.known == oracle_match(stored[which], ids)
                assert trie.tokens_to(conn, found.position.node, found.position.offset) == ids[: found.known]
        of_these = schema.node.c.root.in_(ids_of_root)
        rows = [row._mapping for row in conn.execute(sa.select(schema.node).where(of_these))]
    # Each token of each distinct prefix is stored exactly once.
    for which in (0, 1):
        unique = {s[:n] for s in stored[which] for n in range(1, len(s) + 1)}
        assert sum(row["length"] for row in rows if row["root"] == ids_of_root[which]) == len(unique)
    for row in rows:
        if row["parent"] is not None:
            parent = next(other for other in rows if other["id"] == row["parent"])
            smallest = 0 if parent["parent"] is None else 1
            assert smallest <= row["parent_offset"] <= parent["length"]


@pytest.mark.parametrize(
    "order", [([5, 6, 7], [5, 6, 8], [5, 6]), ([5, 6], [5, 6, 8], [5, 6, 7]), ([5, 6, 8], [5, 6], [5, 6, 7])]
)
def test_order_of_insertion_does_not_matter(store_path: Path, order):
    database = Database(store_path)
    root = two_roots(database)[0]
    for ids in order:
        with database.write() as conn:
            trie.extend(conn, root, ids)
    with database.read() as conn:
        for ids in order:
            assert trie.match(conn, root, ids).known == len(ids)
        assert trie.match(conn, root, [5]).known == 1
        assert trie.match(conn, root, []).known == 0
        assert trie.match(conn, root, [6]).known == 0
    database.close()


def test_walking_on_from_a_known_point_finds_the_same(store_path: Path):
    database = Database(store_path)
    root = two_roots(database)[0]
    with database.write() as conn:
        first = trie.extend(conn, root, [1, 2, 3])
        second = trie.extend(conn, root, [1, 2, 3, 4, 5], start_at=first)
        middle = trie.extend(conn, root, [1, 2, 9], start_at=trie.match(conn, root, [1, 2]).position)
        assert trie.match(conn, root, [1, 2, 3, 4, 5]).position == second
        assert trie.match(conn, root, [1, 2, 9]).position == middle
        assert trie.extend(conn, root, [1, 2, 3, 4, 5], start_at=first) == second
    database.close()


def test_the_point_before_a_position_is_in_the_edge_that_holds_the_token_before_it(store_path: Path):
    database = Database(store_path)
    root = two_roots(database)[0]
    with database.write() as conn:
        first = trie.extend(conn, root, [1, 2, 3])
        second = trie.extend(conn, root, [1, 2, 4, 5])
        assert trie.just_before(conn, second.node, 4) == second
        assert trie.just_before(conn, second.node, 3) == trie.Position(second.node, 1, 2)
        for depth in (2, 1):  # where it left the other edge, or further up
            assert trie.just_before(conn, second.node, depth) == trie.Position(first.node, depth, 0)
        assert trie.just_before(conn, second.node, 0) == trie.top(conn, root)
        for depth in range(5):
            known = trie.just_before(conn, second.node, depth)
            assert trie.match(conn, root, [1, 2, 4, 5, 6], start_at=known).position == second
    database.close()


def insert_many(path: Path, seed: int, root: int) -> None:
    generator = random.Random(seed)
    database = Database(path)
    for _ in range(60):
        ids = [generator.randrange(3) for _ in range(generator.randrange(1, 14))]
        with database.write() as conn:
            trie.extend(conn, root, ids)
    database.close()


def test_four_processes_inserting_at_once_agree(store_path: Path):
    database = Database(store_path)
    root = two_roots(database)[0]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=insert_many, args=(store_path, seed, root)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    stored = set()
    for seed in range(4):
        generator = random.Random(seed)
        for _ in range(60):
            stored.add(tuple(generator.randrange(3) for _ in range(generator.randrange(1, 14))))
    with database.read() as conn:
        for ids in stored:
            assert trie.match(conn, root, list(ids)).known == len(ids)
        total = conn.execute(
            sa.select(sa.func.sum(schema.node.c.length)).where(schema.node.c.root == root)
        ).scalar_one()
    assert total == len({s[:n] for s in stored for n in range(1, len(s) + 1)})
    database.close()


def test_a_damaged_node_is_found_when_it_is_read(store_path: Path):
    database = Database(store_path)
    root = two_roots(database)[0]
    with database.write() as conn:
        position = trie.extend(conn, root, [1, 2, 3])
        conn.execute(
            schema.node.update().where(schema.node.c.id == position.node).values(tokens=trie.pack_tokens([1, 2, 4]))
        )
    with database.read() as conn, pytest.raises(CorruptRow) as caught:
        trie.match(conn, root, [1, 2, 3])
    assert caught.value.table == "node"
    database.close()


def test_an_index_that_leads_to_another_edge_is_told(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    database = Database(store_path)
    root, other = two_roots(database)
    with database.write() as conn:
        trie.extend(conn, root, [1, 2, 3, 4])
        left = [trie.extend(conn, root, [1, 2, 7]).node, trie.extend(conn, root, [1, 2, 8]).node]
        elsewhere = trie.extend(conn, other, [1, 2, 7]).node
    with database.read() as conn:
        assert trie.match(conn, root, [1, 2, 7]).known == 3
        for wrong in (left[1], elsewhere):
            monkeypatch.setattr(trie, "_child", lambda *_, at=wrong: at)
            with pytest.raises(CorruptRow):
                trie.match(conn, root, [1, 2, 7])
    database.close()


@pytest.mark.parametrize("bad", [[-1], [1 << 32]])
def test_a_token_id_out_of_range_is_refused(bad):
    with pytest.raises(LimitExceeded):
        trie.pack_tokens(bad)
