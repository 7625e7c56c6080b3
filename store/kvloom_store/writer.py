"""Writing state behind the conversation: one thread, jobs in order, flushed at close.

A turn has committed before its state is handed over, so all that a crash can cost is a replay. Rows stay where
the forward pass put them: a job holds the memory they are in until it is done, and copies nothing before.

Where a path has many segments, small turns wait for one another, some seconds at most, and are written as one.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from kvloom_proto.errors import KVLoomError
from kvloom_proto.records import LayerSpec, Schedule
from kvloom_store import merging, segments, turns
from kvloom_store.database import Database
from kvloom_store.errors import NoRoom, RemovedMeanwhile, StateDropped, StoreError
from kvloom_store.gathered import FEW_SEGMENTS, MOST_TOKENS, SMALL_TOKENS, Part, joined
from kvloom_store.quota import Room
from kvloom_store.rows import Captured

MAX_JOBS = 256
"""Jobs waiting before whoever hands over another one has to wait."""

GATHER_SECONDS = 5.0
"""How long state waits for more to be written with: what a process that is killed must run again grows by what it ran
in so long. Whoever flushes does not wait."""

TIPS = 8
MERGE_BYTES = 64 << 20
"""What is looked at for small segments when a writer is closed, and how much is then written at most: nobody should
wait for it."""


@dataclass(slots=True, eq=False)
class Handle:
    """State that is stored (``segment`` is its row) or about to be. ``state`` is the turn_state it belongs to."""

    segment: int | None = None
    state: int | None = None
    error: KVLoomError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Rows [start, end) of ``source`` and all its keyframes, on top of ``base``; ``lossy``: as a ``Draft`` says it.

    ``depth`` is how many segments there are below it.
    """

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
    depth: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def waits(self) -> bool:
        """Whether it is better written together with others."""
        small = self.depth >= FEW_SEGMENTS and self.end - self.start < SMALL_TOKENS
        return small and self.handle.state is not None and not self.schedule.unknown

    def follows(self, other: Job) -> bool:
        """Whether its rows go on where those of another one end, and may be in one segment with them."""
        alike = (self.layers, self.provenance, self.lossy) == (other.layers, other.provenance, other.lossy)
        return self.base is other.handle and self.start == other.end and alike


class Writer:
    """The one thread that stores state."""

    def __init__(self, database: Database, *, codec_name: str) -> None:
        self.database = database
        self.codec_name = codec_name
        self.gather_seconds = GATHER_SECONDS
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._flushing = 0
        self._error: KVLoomError | None = None
        self._thread: threading.Thread | None = None
        self._room = Room(database)
        self._tips: list[int] = []  # what was stored here and has nothing on it, the last few

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
            self._flushing += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: not self._jobs and not self._busy)
            finally:
                self._flushing -= 1
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Flush, merge small segments of the paths that were written, and end the thread. Raises as ``flush`` does."""
        try:
            self.flush()
            self._merge_small()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
            # Where the flush failed, whoever holds this may go on: what is then handed over gets a thread of its own.
            self._thread, self._closing = None, False

    def _merge_small(self) -> None:
        left = MERGE_BYTES
        for tip in reversed(self._tips):
            # It need not be done, and not now: what is damaged is told when it is read, what is gone is not missed.
            with contextlib.suppress(KVLoomError):
                left -= merging.merge_small(self.database, tip, most_bytes=left)
        self._tips.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (wait := self._wait()) != 0:
                    self._changed.wait(wait)
                if not self._jobs:
                    return
                jobs = [self._jobs.popleft() for _ in range(_together(self._jobs))]
                self._busy = True
            try:
                self._store(jobs)
            except RemovedMeanwhile as error:
                _failed(jobs, error)  # nobody is left who would want to know
            except KVLoomError as error:
                _failed(jobs, error)
                if not isinstance(error, NoRoom | StateDropped):  # not a failure: it was told, or need not be
                    self._error = self._error or error
            except Exception as error:  # a mistake in the code: were it to end the thread, a flush would wait for ever
                told = StoreError(f"state could not be stored: {type(error).__name__}: {error}")
                _failed(jobs, told)
                self._error = self._error or told
            finally:
                del jobs  # the rows they held may be freed now
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _wait(self) -> float | None:
        """Seconds until something is to be written if nothing happens before; None: nothing waits."""
        if not self._jobs:
            return None
        tokens = sum(job.end - job.start for job in self._jobs)
        if self._flushing or not self._jobs[0].waits or tokens >= MOST_TOKENS or len(self._jobs) >= MAX_JOBS // 2:
            return 0
        return max(0.0, self._jobs[0].since + self.gather_seconds - time.monotonic())

    def _store(self, jobs: Sequence[Job]) -> None:
        try:
            self._write(jobs)
        except NoRoom:
            with self.database.write(background=True) as conn:
                for job in jobs:
                    if job.handle.state is not None:
                        turns.mark_dropped(conn, job.handle.state)
            raise

    def _write(self, jobs: Sequence[Job]) -> None:
        first = jobs[0]
        jobs = self._still_there(jobs)
        base = self._base(first.base) if first.base is not None else None
        parts = [Part(job.source, job.start, job.end, job.schedule) for job in jobs]
        whole = joined(parts, first.layers)
        keyframes = tuple(sorted(whole.source.frames))
        draft = segments.Draft(
            jobs[-1].node,
            whole.start,
            whole.end,
            base,
            first.layers,
            whole.schedule,
            first.provenance,
            keyframes,
            first.lossy,
        )
        self._room.make(_most_bytes(draft), base)

        def finish(conn: sa.Connection, segment: int) -> None:
            for job in jobs:
                if job.handle.state is not None:
                    turns.set_segment(conn, job.handle.state, segment, base if job is first else segment)

        stored = segments.write(self.database, whole.source, draft, codec_name=self.codec_name, finish=finish)
        for job in jobs:
            job.handle.segment = stored
        self._tips = [*(each for each in self._tips if each not in (base, stored)), stored][-TIPS:]

    def _base(self, base: Handle) -> int:
        """The segment to stand on: another process may have put it together with others meanwhile."""
        if base.segment is None:
            raise base.error or KVLoomError("state cannot be stored without the state it stands on")
        if base.state is not None:
            with self.database.read() as conn:
                base.segment = merging.now_in(conn, base.segment, base.state)
        return base.segment

    def _still_there(self, jobs: Sequence[Job]) -> list[Job]:
        """Jobs whose turns were not removed meanwhile: where one was, so were those that follow it."""
        with self.database.read() as conn:
            there = list(itertools.takewhile(lambda job: _is_wanted(conn, job), jobs))
        if not there:
            raise RemovedMeanwhile
        _failed(jobs[len(there) :], RemovedMeanwhile())
        return there


def _together(waiting: Sequence[Job]) -> int:
    """How many of the first jobs become one segment: small ones, each on the one before, and nothing else on those
    between, so that no path shares a part of it only."""
    count, tokens = 1, waiting[0].end - waiting[0].start
    for before, job in itertools.pairwise(waiting):
        tokens += job.end - job.start
        if not (before.waits and job.waits and job.follows(before) and tokens <= MOST_TOKENS):
            break
        if sum(other.base is before.handle for other in waiting) > 1:
            break
        count += 1
    return count


def _is_wanted(conn: sa.Connection, job: Job) -> bool:
    return job.handle.state is None or turns.is_there(conn, job.handle.state)


def _failed(jobs: Sequence[Job], error: KVLoomError) -> None:
    for job in jobs:
        job.handle.error = error


def _most_bytes(draft: segments.Draft) -> int:
    """What a segment takes uncompressed."""
    return sum(spec.raw_length for spec in segments.cut(draft.layers, draft.start, draft.end, draft.keyframes))
