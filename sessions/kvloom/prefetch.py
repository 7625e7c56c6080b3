"""Reading state while the model is being loaded.

Loading takes seconds and mostly one core; the state of the branch that is about to be gone on from is known before it
begins. Touching fresh memory is the larger part of a restore, and here nobody waits for it.
"""

from __future__ import annotations

import threading

from kvloom_proto.errors import KVLoomError
from kvloom_proto.records import LayerSpec
from kvloom_store import held, loading, planner, refs, restore, roots, trie, turns
from kvloom_store.database import Database
from kvloom_store.names import Ref
from kvloom_store.planner import Plan
from kvloom_store.rows import RowBuffer
from kvloom_store.turns import TurnState

ROOM = 1024
"""Tokens the buffer is larger than the state, so that the next turns need no other one."""


class Prefetch:
    """A thread that loads the state of a branch under one model (a digest) into a buffer. What goes wrong there is met
    again, and reported, by whoever needs the state."""

    def __init__(self, database: Database, session: str, branch: str, model: bytes) -> None:
        self._database = database
        self._model = model
        self._ref = Ref(session, branch, 0)
        self._buffer: RowBuffer | None = None
        self.plan: Plan | None = None
        self.bytes_read = 0
        self._thread = threading.Thread(target=self._run, name="kvloom-prefetch", daemon=True)
        self._thread.start()

    def take(self, layers: tuple[LayerSpec, ...]) -> tuple[RowBuffer, Plan] | None:
        """The buffer and the plan whose rows it holds, if it was filled and fits a model's layers; only once."""
        self._thread.join()
        buffer, self._buffer = self._buffer, None
        return (buffer, self.plan) if self.plan and buffer is not None and buffer.layers == layers else None

    def _run(self) -> None:
        try:
            self._load()
        except (KVLoomError, RuntimeError):  # RuntimeError: the program is ending, and starts no thread any more
            self._buffer = None

    def _load(self) -> None:
        with self._database.read() as conn:
            point = refs.resolve(conn, self._ref)
            path = reversed(turns.path_to(conn, point.turn))
            row = roots.find_model(conn, self._model)
            root = roots.find_root(conn, row) if row is not None else None
            states = (state for turn in path for state in turns.states_of(conn, [turn.row]) if state.root == root)
            found = next(((segment, state.state_end) for state in states if (segment := _segment(state))), None)
            if found is None:
                return
            segment, end = found
            links = restore.chain(conn, segment)
            layers = links[-1].manifest.layers
            self.plan = planner.plan(links, end, layers)
            buffer = RowBuffer(layers, end + ROOM)
            self.bytes_read = loading.load(conn, links, self.plan.rows, self.plan.windows, buffer)
            self._buffer = buffer
            # What is held beyond this is looked for next; asked for nothing here, these statements are put together
            # while nobody waits (10 ms).
            assert root is not None
            held.longest(conn, trie.match(conn, root, ()), at_most=end)


def _segment(state: TurnState) -> int | None:
    """The segment that holds a turn's state: its own, or its base's if it has no rows of its own (a cut turn)."""
    if state.segment is None and state.state_start == state.state_end:
        return state.base_segment
    return state.segment
