"""Stores of released versions: opened by this one, they say what they said, and hold the bits they held."""

from __future__ import annotations

from pathlib import Path

import pytest
import released
import sqlalchemy as sa

from kvloom_store import fsck
from kvloom_store.database import Database
from kvloom_store.schema import SCHEMA_VERSION, segment


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_store_of_every_version_there_was_is_read_to_the_bit(tmp_path: Path, version: int) -> None:
    """A new schema needs the file of the last version with the old one, and a migration."""
    expected = released.unpacked(version, tmp_path / "store.db")
    database = Database(tmp_path / "store.db")
    assert fsck.check(database).findings == ()
    assert released.described(database) == expected
    database.close()


def test_the_file_has_some_of_everything(tmp_path: Path) -> None:
    """Else it would prove little: exact and lossy codecs, a turn cut at a token, a pin, several models on one path,
    small segments that were merged."""
    expected = released.unpacked(SCHEMA_VERSION, tmp_path / "store.db")
    database = Database(tmp_path / "store.db")
    with database.read() as conn:
        assert conn.execute(sa.select(segment.c.id).where(segment.c.merged > 0)).all()
    database.close()
    states = [state for each in expected.values() for state in each["states"]]
    assert {codec for state in states for codec in state["codecs"]} >= {"raw", "zstd", "q8_0"}
    assert any(state["lossy"] for state in states)
    assert len({state["bits"] for state in states}) > 6
    assert {reason for each in expected.values() for _, _, reason in each["said"]} >= {None, "length", "cut"}
    assert any(any(each["pinned"]) for each in expected.values())
    assert any(len(each["states"]) > 1 for each in expected.values())
    assert max(len(each["said"]) for each in expected.values()) > 6
