"""Opening a store: what is refused, what is private, who waits for whom."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import sqlalchemy as sa

from kvloom_store import checksum, database, fsck, gc, refs, schema, sqlite
from kvloom_store.database import Database, allocate
from kvloom_store.errors import CorruptRow, NotAStore, SchemaTooNew, StoreError, StoreLocked, StoreUnavailable
from kvloom_store.fsck import repair
from kvloom_store.fsck.rebuild import rebuild


def test_a_new_store_is_private_to_the_user(store_path: Path):
    Database(store_path).close()
    assert stat.S_IMODE(store_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store_path.parent.stat().st_mode) == 0o700


def test_a_text_file_is_not_a_store(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n" * 1000)
    with pytest.raises(NotAStore):
        Database(path)
    assert path.read_text().startswith("dear diary")


def test_another_programs_database_is_not_a_store_and_is_left_alone(tmp_path: Path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name)")
    other.close()
    with pytest.raises(NotAStore):
        Database(path)
    with sqlite3.connect(path) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["recipes"]
    other.close()


def test_a_newer_store_is_refused(store_path: Path):
    Database(store_path).close()
    with sqlite3.connect(store_path) as raw:
        raw.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(SchemaTooNew) as caught:
        Database(store_path)
    assert caught.value.found == schema.SCHEMA_VERSION + 1


def test_who_has_a_store_open_that_a_newer_version_takes_over_is_told_and_touches_nothing(store_path: Path):
    database = Database(store_path)
    with sqlite3.connect(store_path) as raw:
        raw.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(SchemaTooNew), database.read():
        pass
    with pytest.raises(SchemaTooNew), database.write() as conn:
        conn.execute(schema.meta.delete())
    with sqlite3.connect(store_path) as raw:
        assert raw.execute("SELECT count(*) FROM meta").fetchone() == (2,)
    raw.close()
    database.close()


def test_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(StoreUnavailable):
        Database(tmp_path)


def test_a_path_that_cannot_be_created_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot open"):
        Database(tmp_path / "file" / "kvloom.db")


def test_a_missing_store_is_not_made_where_one_must_exist(store_path: Path):
    with pytest.raises(StoreUnavailable, match="no store"):
        Database(store_path, must_exist=True)
    assert not store_path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_can_be_read_and_not_written(store_path: Path):
    Database(store_path).close()
    store_path.chmod(0o400)
    opened = Database(store_path)
    with opened.read() as conn:
        assert conn.execute(sa.select(schema.session)).all() == []
    with pytest.raises(StoreUnavailable, match="read-only"), opened.write():
        pass
    opened.close()


def test_a_store_locked_by_another_process_is_waited_for_and_then_refused(store_path: Path):
    opened = Database(store_path, busy_ms=50)
    other = sqlite3.connect(store_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreLocked), opened.write():
        pass
    with opened.read() as conn:  # readers are not held up
        assert conn.execute(sa.select(schema.session)).all() == []
    other.execute("ROLLBACK")
    other.close()
    with opened.write() as conn:
        assert allocate(conn, schema.turn) == 1
    opened.close()


def test_who_does_not_wait_is_refused_at_once_and_waits_as_ever_the_next_time(store_path: Path):
    opened = Database(store_path)
    with opened.write(), pytest.raises(StoreLocked), opened.write(wait=False):
        pass
    other = sqlite3.connect(store_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreLocked), opened.write(wait=False):
        pass
    other.execute("ROLLBACK")
    other.close()
    with opened.write(wait=False) as conn:
        assert conn.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == database.BUSY_MS
        assert allocate(conn, schema.turn) == 1
    opened.close()


def test_ids_are_never_used_twice(store_path: Path):
    opened = Database(store_path)
    with opened.write() as conn:
        assert [allocate(conn, schema.turn) for _ in range(3)] == [1, 2, 3]
    opened.close()
    opened = Database(store_path)
    with opened.write() as conn:
        assert allocate(conn, schema.turn) == 4
    opened.close()


def test_a_write_that_fails_leaves_nothing_behind(store_path: Path):
    opened = Database(store_path)
    with pytest.raises(ZeroDivisionError), opened.write() as conn:
        _ = allocate(conn, schema.turn) / 0
    with opened.write() as conn:
        assert allocate(conn, schema.turn) == 1
    opened.close()


def test_turns_go_before_state(store_path: Path):
    opened = Database(store_path)
    order: list[str] = []
    inside, turn_waits = threading.Event(), threading.Event()

    def state() -> None:
        with opened.write(background=True):
            inside.set()
            turn_waits.wait()
        with opened.write(background=True):
            order.append("state")

    def turn() -> None:
        with opened.write():
            order.append("turn")

    first = threading.Thread(target=state)
    first.start()
    inside.wait()
    second = threading.Thread(target=turn)
    second.start()
    while not opened._turns_waiting:
        pass
    turn_waits.set()
    first.join()
    second.join()
    assert order == ["turn", "state"]
    opened.close()


@pytest.mark.parametrize("table", sorted(schema.metadata.tables))
def test_every_table_has_a_checksum(table: str):
    assert "checksum" in schema.metadata.tables[table].columns


def test_a_changed_cell_is_found(store_path: Path):
    opened = Database(store_path)
    with opened.write() as conn:
        conn.execute(schema.sequence.update().where(schema.sequence.c.name == "turn").values(next=7))
        with pytest.raises(CorruptRow) as caught:
            allocate(conn, schema.turn)
    assert caught.value.table == "sequence"
    opened.close()


def test_a_row_cannot_stand_in_for_another(store_path: Path):
    """The checksum covers the keys: the bytes of one row under another row's key do not pass."""
    opened = Database(store_path)
    with opened.write() as conn:
        row = conn.execute(sa.select(schema.sequence).where(schema.sequence.c.name == "turn")).one()
        swapped = {**row._mapping, "name": "node"}
        conn.execute(schema.sequence.delete().where(schema.sequence.c.name == "node"))
        conn.execute(schema.sequence.insert(), swapped)
        found = conn.execute(sa.select(schema.sequence).where(schema.sequence.c.name == "node")).one()
        with pytest.raises(CorruptRow):
            checksum.checked(schema.sequence, found)
    opened.close()


def test_the_place_of_the_store_comes_from_the_environment(store_path: Path):
    assert database.default_path() == store_path


def test_an_unknown_durability_is_refused(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVLOOM_SYNCHRONOUS", "MAYBE")
    with pytest.raises(StoreUnavailable, match="KVLOOM_SYNCHRONOUS"):
        Database(store_path)


def test_a_read_that_failed_half_way_leaves_nobody_in_the_past(store_path):
    database = Database(store_path)
    held = []

    def names(conn):
        return [row.name for row in conn.execute(sa.select(schema.session.c.name))]

    with database.write() as conn:
        for name in ("a", "b", "c"):
            refs.create_session(conn, name, {})

    def give_up():
        with database.read() as conn:
            rows = conn.execute(sa.select(schema.session))
            held.append((rows, next(iter(rows))))  # as the traceback of an error does
            raise ZeroDivisionError

    with database.read(), database.read():  # so that there are two connections, and another one writes
        pass
    with pytest.raises(ZeroDivisionError):
        give_up()
    with database.write() as conn:
        refs.create_session(conn, "d", {})
    with database.read() as one, database.read() as two:  # every connection there is
        assert names(one) == names(two) == ["a", "b", "c", "d"]
    held.clear()
    database.close()


def test_a_map_of_pages_that_is_damaged_is_told_of_and_a_repair_lets_the_file_shrink_again(store_path: Path):
    opened = Database(store_path)
    with opened.write() as conn:
        refs.create_session(conn, "talk", {})
        conn.exec_driver_sql("CREATE TABLE large AS SELECT randomblob(1000000)")
    with opened.write() as conn:
        conn.exec_driver_sql("DROP TABLE large")  # its pages are free now
    opened.close()
    data = bytearray(store_path.read_bytes())
    last = len(data) // sqlite.PAGE_BYTES
    kind = sqlite.PAGE_BYTES + 5 * (last - 3)  # the second page says of each from the third on what it is, in 5 bytes
    assert data[kind] == 2, "a free page"
    data[kind] ^= 1 << 4
    store_path.write_bytes(data)

    opened = Database(store_path)
    with pytest.raises(StoreError, match="malformed"):
        gc.give_back(opened)
    repair.execute(opened, repair.plan(fsck.check(opened)))
    assert fsck.check(opened).sound
    gc.give_back(opened)
    with opened.read() as conn:
        assert [row.name for row in conn.execute(sa.select(schema.session))] == ["talk"]
    opened.close()
    assert store_path.stat().st_size < len(data) - 900_000


def test_a_rebuild_without_room_for_the_old_file_changes_nothing(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Database(store_path)

    def full(_source: BinaryIO, target: BinaryIO) -> None:
        target.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfileobj", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            rebuild(opened)
    assert not list(store_path.parent.glob("*.damaged"))
    kept = rebuild(opened)
    assert (kept.name, stat.S_IMODE(kept.stat().st_mode)) == (f"{store_path.name}.damaged", 0o600)
    opened.close()


def test_a_rebuild_that_cannot_put_the_new_file_in_place_changes_nothing(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = Database(store_path)
    notes = store_path.with_name("notes.txt")
    notes.write_text("dear diary\n" * 1000)
    other = sqlite.make_engine(notes, read_only=True, synchronous="NORMAL", busy_ms=0)
    put = sqlite.overwrite
    monkeypatch.setattr(sqlite, "overwrite", lambda target, _fresh: put(target, other))
    with pytest.raises(NotAStore):
        rebuild(opened)
    assert not list(store_path.parent.glob("*.damaged"))
    other.dispose()
    assert fsck.check(opened).sound
    opened.close()


def test_a_log_that_always_has_a_reader_is_moved_when_it_is_too_long(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sqlite, "LOG_BYTES", 1 << 20)
    monkeypatch.setattr(sqlite, "MOST_LOG_BYTES", 4 << 20)
    opened = Database(store_path)
    readers: list[tuple[threading.Thread, threading.Event]] = []

    def begin() -> None:
        """Somebody begins to read, and goes on until told otherwise."""
        begun, end = threading.Event(), threading.Event()

        def read() -> None:
            with opened.read() as conn:
                conn.execute(sa.select(schema.meta.c.key)).all()
                begun.set()
                end.wait()

        reader = threading.Thread(target=read)
        readers.append((reader, end))
        reader.start()
        assert begun.wait(10)

    def end_all_but(some: int) -> None:
        while len(readers) > some:
            reader, end = readers.pop(0)
            end.set()
            reader.join()

    waited = sqlite._patience

    def patience(conn: sa.Connection, most_ms: int | None):
        if most_ms == sqlite.CHECKPOINT_MS:  # who is waited for comes to an end
            end_all_but(0)
        return waited(conn, most_ms)

    monkeypatch.setattr(sqlite, "_patience", patience)
    lengths = []
    try:
        for number in range(64):
            begin()
            end_all_but(1)  # only now: there always was one
            with opened.write(background=True) as conn:
                checksum.insert(conn, schema.meta, {"key": f"long {number}", "value": os.urandom(256 << 10)})
            lengths.append(sqlite.log_bytes(store_path))
    finally:
        end_all_but(0)
    assert max(lengths) < 6 << 20
    with opened.read() as conn:
        assert conn.execute(sa.select(sa.func.count()).where(schema.meta.c.key.like("long %"))).scalar_one() == 64
    opened.close()


def test_who_reads_for_long_is_waited_for_only_now_and_then(store_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sqlite, "LOG_BYTES", 1 << 20)
    monkeypatch.setattr(sqlite, "MOST_LOG_BYTES", 4 << 20)
    monkeypatch.setattr(sqlite, "CHECKPOINT_MS", 1)
    opened, waited, patience = Database(store_path), [], sqlite._patience

    def counted(conn: sa.Connection, most_ms: int | None):
        waited.extend([most_ms] * (most_ms == sqlite.CHECKPOINT_MS))
        return patience(conn, most_ms)

    monkeypatch.setattr(sqlite, "_patience", counted)
    with opened.read() as reading:
        reading.execute(sa.select(schema.meta.c.key)).all()
        for number in range(64):
            with opened.write(background=True) as conn:
                checksum.insert(conn, schema.meta, {"key": f"long {number}", "value": os.urandom(256 << 10)})
        assert sqlite.log_bytes(store_path) > 16 << 20
        assert 1 <= len(waited) <= sqlite.log_bytes(store_path) // (4 << 20)  # once for each 4 MB by which it grew
    with opened.write(background=True) as conn:
        checksum.insert(conn, schema.meta, {"key": "then", "value": b""})
    with opened.write(background=True) as conn:
        checksum.insert(conn, schema.meta, {"key": "and again", "value": b""})
    assert sqlite.log_bytes(store_path) <= 1 << 20
    opened.close()
