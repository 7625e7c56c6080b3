"""Opening the one file a store is, and its transactions.

Readers never block: each works on its own snapshot of the WAL. Writers queue: those of this process on a
lock that serves turns before state, those of other processes on SQLite's own lock with a bounded wait.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import platformdirs
import sqlalchemy as sa

from kvloom_store import checksum, fulltext, migrations, schema, sqlite
from kvloom_store.errors import SchemaTooNew, StoreLocked, StoreUnavailable

BUSY_MS = 30_000
"""How long a write waits for other processes before StoreLocked."""

SYNCHRONOUS = ("NORMAL", "FULL")
"""NORMAL survives kill -9 and a full disk; FULL adds power loss, at one fsync a turn. NORMAL is the default:
what a power cut can cost there is the last turns, never the file."""


def default_path() -> Path:
    """``KVLOOM_STORE`` if set, else ``kvloom.db`` in the platform's data folder."""
    given = os.environ.get("KVLOOM_STORE")
    return Path(given) if given else Path(platformdirs.user_data_dir("kvloom", appauthor=False)) / "kvloom.db"


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class Database:
    """An open store file."""

    def __init__(self, path: Path, *, must_exist: bool = False, busy_ms: int = BUSY_MS) -> None:
        """Open the store at ``path``; made anew if there is none, unless ``must_exist``.

        Raises:
            NotAStore, SchemaTooNew, StoreUnavailable, StoreLocked
        """
        self.path = path
        there = sqlite.kind_of(path)
        if there == "folder":
            raise StoreUnavailable(f"{path} is a folder", hint="give a file with --store PATH")
        if there == "nothing" and must_exist:
            raise StoreUnavailable(
                f"no store at {path}", hint="kvloom say NAME TEXT makes one; --store PATH names another file"
            )
        if there == "nothing":
            sqlite.create_file(path)
        self.read_only = not os.access(path, os.W_OK)
        synchronous = os.environ.get("KVLOOM_SYNCHRONOUS", "NORMAL").upper()
        if synchronous not in SYNCHRONOUS:
            raise StoreUnavailable(f"KVLOOM_SYNCHRONOUS is {synchronous!r}", hint="use NORMAL or FULL")
        self._writing = threading.Condition()
        self._busy = False
        self._turns_waiting = 0
        self._most_log = sqlite.MOST_LOG_BYTES
        self.engine = sqlite.make_engine(path, read_only=self.read_only, synchronous=synchronous, busy_ms=busy_ms)
        with sqlite.translated(path):
            self._prepare()

    def _prepare(self) -> None:
        with self.engine.begin() as conn:
            version = sqlite.identify(conn, self.path)
        if version > schema.SCHEMA_VERSION:
            raise SchemaTooNew(version, schema.SCHEMA_VERSION)
        if version == 0:
            with self._write(background=False, wait=True) as conn:
                if sqlite.identify(conn, self.path) == 0:  # another process may have been first
                    self._create(conn)
        elif version < schema.SCHEMA_VERSION:
            if self.read_only:
                raise StoreUnavailable(
                    f"{self.path} was written by an older kvloom, and cannot be brought to this one: it is read-only",
                    hint="copy it, and open the copy",
                )
            with self.queued(background=False):
                migrations.migrate(self.engine, self.path)

    @staticmethod
    def _create(conn: sa.Connection) -> None:
        schema.metadata.create_all(conn)
        fulltext.create(conn)
        for table in schema.metadata.tables.values():
            if "id" in table.columns:
                checksum.insert(conn, schema.sequence, {"name": table.name, "next": 1})
        facts = {"store_id": uuid.uuid4().bytes, "created": now_us()}
        for key, value in facts.items():
            checksum.insert(conn, schema.meta, {"key": key, "value": msgpack.packb(value)})
        sqlite.mark(conn, schema.SCHEMA_VERSION)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A snapshot of the store: everything read inside belongs together."""
        with sqlite.translated(self.path), self.engine.begin() as conn:
            try:
                _check_version(conn)
                yield conn
            except BaseException:
                # A query that was given up half way keeps its snapshot for as long as somebody holds the error, and
                # whoever was handed this connection next would read the past.
                conn.invalidate()
                raise

    @contextmanager
    def write(self, *, background: bool = False, wait: bool = True) -> Iterator[sa.Connection]:
        """A write transaction. ``background`` ones (state) let those of turns go first, and move a long log into the
        file when they have ended: SQLite would do it within a commit, and turns would wait for the disk.

        ``wait=False``: if somebody else is writing, StoreLocked at once.

        Raises:
            StoreUnavailable, StoreLocked
        """
        if self.read_only:
            raise StoreUnavailable(f"{self.path} is read-only", hint="change its permissions")
        with self._write(background=background, wait=wait) as conn:
            _check_version(conn)
            yield conn
        if background:
            with contextlib.suppress(StoreLocked, StoreUnavailable), sqlite.translated(self.path):
                self._keep_log_short()  # where it cannot be moved (a full disk) all of it stays, and is safe

    def _keep_log_short(self) -> None:
        """Move a long log, and wait for its readers where it is too long. If one stays (a check of the whole store may
        read for minutes) that is not done again before it is as much longer: everybody who writes waits with us."""
        size = sqlite.log_bytes(self.path)
        if size > sqlite.LOG_BYTES:
            wait = size > self._most_log
            began_anew = sqlite.move_log(self.engine, wait=wait)
            if wait:
                self._most_log = sqlite.MOST_LOG_BYTES + (0 if began_anew else size)

    @contextmanager
    def _write(self, *, background: bool, wait: bool) -> Iterator[sa.Connection]:
        with (
            sqlite.translated(self.path),
            self.queued(background, wait),
            self.engine.connect().execution_options(kvloom_write=True, kvloom_wait=wait) as conn,
            conn.begin(),
        ):
            yield conn

    @contextmanager
    def queued(self, background: bool, wait: bool = True) -> Iterator[None]:
        """This process's place in the queue of those that write. Raises StoreLocked if it is not to ``wait``."""
        with self._writing:
            if self._busy and not wait:
                raise StoreLocked(f"{self.path} is being written", hint="try again")
            self._turns_waiting += not background
            try:
                self._writing.wait_for(lambda: not self._busy and not (background and self._turns_waiting))
                self._busy = True
            finally:  # also where Ctrl-C ends the wait: state would never be written any more
                self._turns_waiting -= not background
                self._writing.notify_all()
        try:
            yield
        finally:
            with self._writing:
                self._busy = False
                self._writing.notify_all()

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file; what somebody still reads stays in it, and is safe there."""
        if not self.read_only:
            with contextlib.suppress(StoreLocked), sqlite.translated(self.path):
                sqlite.checkpoint(self.engine)

    def close(self) -> None:
        """Close every connection; nothing may be read or written afterwards."""
        self.engine.dispose()


def _check_version(conn: sa.Connection) -> None:
    """A newer kvloom may have brought the store to its schema while it was open here."""
    version = sqlite.version(conn)
    if version != schema.SCHEMA_VERSION:
        raise SchemaTooNew(version, schema.SCHEMA_VERSION)


def allocate(conn: sa.Connection, table: sa.Table) -> int:
    """A row id for ``table`` that was never used before; inside a write transaction."""
    row = conn.execute(sa.select(schema.sequence).where(schema.sequence.c.name == table.name)).one()
    old = checksum.checked(schema.sequence, row)
    checksum.update(conn, schema.sequence, old, next=old["next"] + 1)
    return int(old["next"])
