"""Writing state behind the conversation: one thread, jobs in order, flushed at close.

A turn has committed before its state is handed over, so all that a crash can cost is a replay. Rows stay where
the forward pass put them: a job holds the memory they are in until it is done, and copies nothing before.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import sqlalchemy as sa

from kvloom_proto.errors import KVLoomError
from kvloom_proto.records import LayerSpec, Schedule
from kvloom_store import segments, turns
from kvloom_store.database import Database
from kvloom_store.errors import NoRoom, RemovedMeanwhile, StateDropped, StoreError
from kvloom_store.quota import Room
from kvloom_store.rows import Captured

MAX_JOBS = 256
"""Jobs waiting before whoever hands over another one has to wait."""


@dataclass(slots=True, eq=False)
class Handle:
    """State that is stored (``segment`` is its row) or about to be. ``state`` is the turn_state it belongs to."""

    segment: int | None = None
    state: int | None = None
    error: KVLoomError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Rows [start, end) of ``source`` and all its keyframes, on top of ``base``; ``lossy``: as a ``Draft`` says it."""

    handle: Handle
    source: Captured = field(repr=False)
    node: int
    start: int
    end: int
    base: Handle | None
    layers: tuple[LayerSpec, ...]
    schedule: Schedule
    provenance: int
    lossy: bool = False


class Writer:
    """The one thread that stores state."""

    def __init__(self, database: Database, *, codec_name: str) -> None:
        self.database = database
        self.codec_name = codec_name
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._error: KVLoomError | None = None
        self._thread: threading.Thread | None = None
        self._room = Room(database)

    def notices(self) -> list[str]:
        """What the user should be told since this was last asked: what was dropped to make room, what is not stored."""
        told = self._room.notices[:]
        del self._room.notices[: len(told)]
        return told

    def submit(self, job: Job) -> None:
        """Hand state over; returns at once unless MAX_JOBS are waiting."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < MAX_JOBS)
            self._jobs.append(job)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kvloom-writer", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything handed over is stored.

        Raises:
            KVLoomError: what went wrong with the first job that could not be stored since the last flush. The
            turns themselves are safe; their state is computed again when it is needed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._busy)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Flush, and end the thread. Raises what ``flush`` raises."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
            # Where the flush failed, whoever holds this may go on: what is then handed over gets a thread of its own.
            self._thread, self._closing = None, False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                self._store(job)
            except RemovedMeanwhile as error:
                job.handle.error = error  # nobody is left who would want to know
            except KVLoomError as error:
                job.handle.error = error
                if not isinstance(error, NoRoom | StateDropped):  # not a failure: it was told, or need not be
                    self._error = self._error or error
            except Exception as error:  # a mistake in the code: were it to end the thread, a flush would wait for ever
                job.handle.error = StoreError(f"state could not be stored: {type(error).__name__}: {error}")
                self._error = self._error or job.handle.error
            finally:
                del job  # the rows it held may be freed now
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _store(self, job: Job) -> None:
        try:
            self._write(job)
        except NoRoom:
            if job.handle.state is not None:
                with self.database.write(background=True) as conn:
                    turns.mark_dropped(conn, job.handle.state)
            raise

    def _write(self, job: Job) -> None:
        if job.base is not None and job.base.segment is None:
            raise job.base.error or KVLoomError("state cannot be stored without the state it stands on")
        if job.handle.state is not None:
            with self.database.read() as conn:
                if not turns.is_there(conn, job.handle.state):
                    raise RemovedMeanwhile
        base = job.base.segment if job.base else None
        keyframes = tuple(sorted(job.source.frames))
        draft = segments.Draft(
            job.node, job.start, job.end, base, job.layers, job.schedule, job.provenance, keyframes, job.lossy
        )
        self._room.make(_most_bytes(job), base)

        def finish(conn: sa.Connection, segment: int) -> None:
            if job.handle.state is not None:
                turns.set_segment(conn, job.handle.state, segment, base)

        job.handle.segment = segments.write(self.database, job.source, draft, codec_name=self.codec_name, finish=finish)


def _most_bytes(job: Job) -> int:
    """What a job's state takes uncompressed."""
    chunks = segments.cut(job.layers, job.start, job.end, tuple(job.source.frames))
    return sum(spec.raw_length for spec in chunks)
