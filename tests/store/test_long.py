"""Long state is brought back in its own memory and little more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import long

from kvloom.prefetch import Prefetch
from kvloom_proto import limits
from kvloom_store import restore
from kvloom_store.database import Database

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
        taken = Prefetch(database, f"long-{TOKENS}", "main").take(long.LAYERS)
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
    assert size <= restore.MAPPED_BYTES
    mapped = brought_back(store)
    assert mapped["mapped"] > 0.9 * size, "this much is read mapped, and the file's pages count as ours"
    monkeypatch.setattr(restore, "MAPPED_BYTES", size // 16)
    memory = brought_back(store)
    assert memory["mapped"] < size // 16 + 2 * limits.CHUNK_BYTES
    assert memory["peak"] < 1.1 * size + size // 16 + 4 * limits.CHUNK_BYTES


def test_pages_are_let_go_of_after_so_many_bytes_and_no_chunk_is_read_twice(store, monkeypatch):
    let_go, real, read = [], restore.sqlite.unmap, []
    monkeypatch.setattr(restore.sqlite, "unmap", lambda conn: let_go.append(True) or real(conn))
    real_blobs = restore._blobs
    monkeypatch.setattr(
        restore, "_blobs", lambda *given: (read.append(len(values["blob"])) or values for values in real_blobs(*given))
    )
    size = TOKENS * long.ROW_BYTES
    for parts in (1, 4):
        monkeypatch.setattr(restore, "MAPPED_BYTES", size // parts)
        let_go.clear()
        read.clear()
        brought_back(store)
        assert abs(len(let_go) - (parts - 1)) <= 1
        assert sum(read) == size
