"""Stores of older schema versions: they become ones of this version, whole or not at all."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from older import make_schema_1
from states import MIXED, Store, filled

from kvloom_store import fsck, migrations, schema, sqlite
from kvloom_store.checksum import checked
from kvloom_store.database import Database
from kvloom_store.errors import CorruptRow, StoreUnavailable
from kvloom_store.schema import SCHEMA_VERSION, segment


def version(path: Path) -> int:
    with sqlite3.connect(path) as raw:
        found = raw.execute("PRAGMA user_version").fetchone()[0]
    raw.close()
    return int(found)


def said(path: Path) -> dict[str, Any]:
    """What the file says of its tables."""
    database = Database(path)
    with database.read() as conn:
        found = sqlite.definitions(conn)
    database.close()
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of schema 1 with three segments, one on another."""
    store = Store(tmp_path / "old.db")
    source = filled(MIXED, 400, [0, 100, 200])
    first = store.write(source, 0, 200)
    store.write(filled(MIXED, 400, [300], seed=1), 200, 300, base=first)
    store.write(filled(MIXED, 400, [400], seed=2), 200, 400, base=first)
    store.database.close()
    make_schema_1(tmp_path / "old.db")
    assert version(tmp_path / "old.db") == 1
    return tmp_path / "old.db"


def test_a_store_of_schema_1_becomes_what_a_new_one_is(old: Path, tmp_path: Path) -> None:
    database = Database(old)
    assert {each.kind for each in fsck.check(database).findings} <= {fsck.Kind.ORPHAN}  # no turn has it
    with database.read() as conn:
        rows = [checked(segment, row) for row in conn.execute(sa.select(segment).order_by(segment.c.id))]
    database.close()
    assert version(old) == SCHEMA_VERSION
    assert [(row["start"], row["end"], row["merged"]) for row in rows] == [(0, 200, 0), (200, 300, 0), (200, 400, 0)]
    assert said(old) == said(tmp_path / "new.db")


def test_a_damaged_row_stays_damaged(old: Path) -> None:
    with sqlite3.connect(old) as raw:
        raw.execute("UPDATE segment SET raw_bytes = raw_bytes + 1 WHERE start = 0")
        raw.execute('UPDATE segment SET lossy = 1e300 WHERE "end" = 300')
    raw.close()
    database = Database(old)
    with database.read() as conn:
        rows = conn.execute(sa.select(segment).order_by(segment.c.id)).all()
        for row in rows[:2]:
            with pytest.raises(CorruptRow):
                checked(segment, row)
        assert checked(segment, rows[2])["merged"] == 0
    assert {each.table for each in fsck.check(database).findings} == {"segment"}
    database.close()


def test_one_that_is_broken_off_leaves_the_store_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    with monkeypatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(sqlite, "mark", stop)
        with pytest.raises(KeyboardInterrupt):
            Database(old)
    assert version(old) == 1
    with sqlite3.connect(old) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("SELECT count(*) FROM segment").fetchone() == (3,)
    raw.close()
    assert len(old.read_bytes()) == len(before)
    Database(old).close()
    assert version(old) == SCHEMA_VERSION


def test_a_process_that_was_second_finds_it_done(old: Path) -> None:
    Database(old).close()
    database = Database(old)
    migrations.migrate(database.engine, old)
    assert {each.kind for each in fsck.check(database).findings} <= {fsck.Kind.ORPHAN}  # no turn has it
    database.close()


def test_every_version_there_was_has_a_step_to_the_next() -> None:
    assert list(migrations._STEPS) == list(range(1, schema.SCHEMA_VERSION))


def test_an_old_store_that_cannot_be_written_is_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StoreUnavailable, match="older kvloom"):
        Database(old)
    assert version(old) == 1
