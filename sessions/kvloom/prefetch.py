"""Reading state while the model is being loaded.

Loading takes seconds and mostly one core; the state of the branch that is about to be gone on from is known before it
begins. Touching fresh memory is the larger part of a restore, and here nobody waits for it.
"""

from __future__ import annotations

import threading

from kvloom_proto.errors import KVLoomError
from kvloom_proto.records import LayerSpec
from kvloom_store import refs, restore, turns
from kvloom_store.database import Database
from kvloom_store.names import Ref
from kvloom_store.restore import Plan
from kvloom_store.rows import RowBuffer

ROOM = 1024
"""Tokens the buffer is larger than the state, so that the next turns need no other one."""


class Prefetch:
    """A thread that loads the state of a branch into a buffer. What goes wrong there is met again, and reported, by
    whoever needs the state."""

    def __init__(self, database: Database, session: str, branch: str) -> None:
        self._database = database
        self._ref = Ref(session, branch, 0)
        self._buffer: RowBuffer | None = None
        self._plan: Plan | None = None
        self._thread = threading.Thread(target=self._run, name="kvloom-prefetch", daemon=True)
        self._thread.start()

    def take(self, layers: tuple[LayerSpec, ...]) -> tuple[RowBuffer, Plan] | None:
        """The buffer and the plan whose rows it holds, if it was filled and fits a model's layers; only once."""
        self._thread.join()
        buffer, self._buffer = self._buffer, None
        return (buffer, self._plan) if self._plan and buffer is not None and buffer.layers == layers else None

    def _run(self) -> None:
        try:
            self._load()
        except KVLoomError:
            self._buffer = None

    def _load(self) -> None:
        with self._database.read() as conn:
            point = refs.resolve(conn, self._ref)
            for turn in reversed(turns.path_to(conn, point.turn)):
                held = [state for state in turns.states_of(conn, [turn.row]) if state.segment is not None]
                if held:
                    break
            else:
                return
            state = held[0]
            assert state.segment is not None
            links = restore.chain(conn, state.segment)
            layers = links[-1].manifest.layers
            self._plan = restore.plan(links, state.state_end, layers)
            buffer = RowBuffer(layers, state.state_end + ROOM)
            restore.load(conn, links, self._plan.rows, self._plan.windows, buffer)
        self._buffer = buffer
