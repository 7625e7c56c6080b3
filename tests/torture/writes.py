"""Something happens at the N-th write of a process: it is killed there, or the write fails.

SQLite's own file layer cannot be reached from Python, so a write is what is handed to it: a statement of a write
transaction, its beginning, and its commit. The real thing, a full disk, is in ``disk.py``.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import sqlalchemy as sa
from sqlalchemy import event

from kvloom_store import sqlite

FAILURES = ("disk I/O error", "database or disk is full")
READS = ("SELECT", "PRAGMA", "WITH")


class Writes:
    """Counts the writes of this process, and calls ``then`` with the number of each, before it is done."""

    def __init__(self, then: Callable[[int], None]) -> None:
        self.count = 0
        self._then = then
        self._lock = threading.Lock()

    def watch(self) -> None:
        """From now on, every database that is opened is watched."""
        make = sqlite.make_engine

        def made(*args: Any, **options: Any) -> sa.Engine:
            engine = make(*args, **options)
            self._attach(engine)
            return engine

        mock.patch.object(sqlite, "make_engine", made).start()

    def _one(self) -> None:
        with self._lock:
            self.count += 1
            number = self.count
        self._then(number)

    def _attach(self, engine: sa.Engine) -> None:
        writing: set[int] = set()

        def statement(cursor: Any, text: str, *_: Any) -> None:
            if text == "BEGIN IMMEDIATE":
                writing.add(id(cursor.connection))
            if not text.lstrip().upper().startswith(READS) and text != "BEGIN":
                self._one()

        for name in ("do_execute", "do_execute_no_params", "do_executemany"):
            event.listen(engine, name, statement)
        commit = engine.dialect.do_commit

        def committed(connection: Any) -> None:
            if id(connection.dbapi_connection) in writing:
                self._one()
            commit(connection)
            writing.discard(id(connection.dbapi_connection))

        rollback = engine.dialect.do_rollback

        def over(connection: Any) -> None:
            writing.discard(id(connection.dbapi_connection))
            rollback(connection)

        engine.dialect.do_commit = committed  # type: ignore[method-assign]
        engine.dialect.do_rollback = over  # type: ignore[method-assign]


def killed_at(number: int) -> None:
    """This process dies by SIGKILL just before its N-th write."""

    def then(at: int) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Writes(then).watch()


def failing_at(number: int, *, from_there_on: bool) -> Writes:
    """The N-th write fails, alone or with all that follow, by turns in the words of both errors SQLite knows."""

    def then(at: int) -> None:
        if at == number or (from_there_on and at > number):
            raise sqlite3.OperationalError(FAILURES[number % len(FAILURES)])

    writes = Writes(then)
    writes.watch()
    return writes
