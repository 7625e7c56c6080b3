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
    mapped = brought_back(store)
    assert mapped["mapped"] > 0.9 * size, "this much is read mapped, and the file's pages count as ours"
    monkeypatch.setattr(restore, "MAPPED_BYTES", size - 1)
    memory = brought_back(store)
    assert memory["mapped"] < limits.CHUNK_BYTES
    assert memory["peak"] < 1.1 * size + 4 * limits.CHUNK_BYTES


def test_what_is_long_is_decided_by_the_bytes_that_are_read(store, monkeypatch):
    unmapped = []
    real = restore.sqlite.unmapped
    monkeypatch.setattr(restore.sqlite, "unmapped", lambda conn: unmapped.append(True) or real(conn))
    for allowed in (TOKENS * long.ROW_BYTES, TOKENS * long.ROW_BYTES - 1):
        monkeypatch.setattr(restore, "MAPPED_BYTES", allowed)
        brought_back(store)
        assert unmapped == [True] * (allowed < TOKENS * long.ROW_BYTES)
