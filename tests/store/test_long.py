"""Long state is brought back in its own memory and little more."""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import long

from kvloom.prefetch import Prefetch
from kvloom_proto import limits
from kvloom_store import loading, planner, restore, schema
from kvloom_store.database import Database
from kvloom_store.rows import RowBuffer

TOKENS = 6_000

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what is resident is told by Linux alone")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "kvloom.db"
    long.write(path, TOKENS, "plain", 0)
    return path


def brought_back(store: Path) -> dict[str, int]:
    """What was resident meanwhile."""
    database = Database(store)
    with long.watched() as memory:
        taken = Prefetch(database, f"long-{TOKENS}", "main", long.MODEL).take(long.LAYERS)
    assert taken is not None
    expected = long.random_rows(long.LAYERS, TOKENS)
    for layer in range(8):
        for tensor in range(2):
            found = taken[0].rows(layer, tensor, 0, TOKENS)
            assert found.tobytes() == expected.rows(layer, tensor, 0, TOKENS).tobytes()
    database.close()
    return memory


@linux
def test_long_state_is_read_into_its_own_memory_and_that_of_some_chunks(store, monkeypatch):
    size = TOKENS * long.ROW_BYTES
    assert size <= loading.LONG_BYTES
    with monkeypatch.context() as alone:
        alone.setattr(loading, "READERS", 1)
        mapped = brought_back(store)
    assert mapped["mapped"] > 0.9 * size, "this much is read mapped, and the file's pages count as ours"
    monkeypatch.setattr(loading, "LONG_BYTES", size - 1)
    memory = brought_back(store)
    assert memory["mapped"] < size // loading.PARTS + 2 * loading.READERS * limits.CHUNK_BYTES
    assert memory["peak"] < 1.1 * size + size // loading.PARTS + 2 * loading.READERS * limits.CHUNK_BYTES


@pytest.mark.parametrize("readers", [1, 3])
def test_pages_are_let_go_of_after_so_many_bytes_and_no_chunk_is_read_twice(store, monkeypatch, readers):
    let_go, real, read, real_read = [], loading.sqlite.unmap, [], loading.sqlite.read_blob
    monkeypatch.setattr(loading.sqlite, "unmap", lambda conn: let_go.append(True) or real(conn))
    monkeypatch.setattr(loading.sqlite, "read_blob", lambda *given: read.append(given[4]) or real_read(*given))
    monkeypatch.setattr(loading, "READERS", readers)
    size = TOKENS * long.ROW_BYTES
    for parts in (1, 4):
        monkeypatch.setattr(loading, "LONG_BYTES", size - 1)
        monkeypatch.setattr(loading, "PARTS", parts)
        let_go.clear()
        read.clear()
        brought_back(store)
        assert parts - 2 <= len(let_go) <= parts * readers, "each connection maps its share"
        assert sum(read) == size


@pytest.mark.parametrize("failure", ["connect", "another snapshot", "malformed"])
def test_what_a_helping_thread_cannot_read_is_read_by_the_one_that_asked(store, monkeypatch, failure):
    real_read, real_begin = loading.sqlite.read_blob, sa.Engine.begin
    failures: list[str] = []

    def helping() -> bool:
        here = threading.current_thread().name
        if here.startswith("kvloom-read"):
            failures.append(here)
        return here.startswith("kvloom-read")

    def read_blob(*given):
        if helping() and failure == "another snapshot":
            return None
        if failure == "malformed" and helping():
            raise sa.exc.DatabaseError("blob", None, sqlite3.DatabaseError("database disk image is malformed"))
        return real_read(*given)

    def begin(engine):
        if failure == "connect" and helping():
            raise sa.exc.OperationalError("connect", None, sqlite3.OperationalError("unable to open database file"))
        return real_begin(engine)

    monkeypatch.setattr(loading, "READERS", 2)
    monkeypatch.setattr(loading.sqlite, "read_blob", read_blob)
    monkeypatch.setattr(sa.Engine, "begin", begin)
    brought_back(store)
    assert failures


def test_a_stop_while_others_read_stops_them_too(store, monkeypatch):
    real_read, read = loading.sqlite.read_blob, []

    def read_blob(*given):
        read.append(threading.current_thread().name)
        if not read[-1].startswith("kvloom-read"):
            raise KeyboardInterrupt
        return real_read(*given)

    monkeypatch.setattr(loading, "READERS", 2)
    monkeypatch.setattr(loading.sqlite, "read_blob", read_blob)
    database = Database(store)
    with database.read() as conn:
        links = restore.chain(conn, conn.execute(sa.select(schema.segment.c.id)).scalar_one())
        plan = planner.plan(links, TOKENS, long.LAYERS)
        with pytest.raises(KeyboardInterrupt):
            loading.load(conn, links, plan.rows, plan.windows, RowBuffer(long.LAYERS, TOKENS))
    assert len(read) < len(links[0].manifest.chunks)
    assert not [each for each in threading.enumerate() if each.name.startswith("kvloom-read")]
    database.close()
