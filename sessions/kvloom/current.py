"""The live state of a store: stored segments are loaded into it, and rows run on it are handed over to be stored.

What is in memory already is kept as far as it belongs to the same segments; the rest is read from the store. Which
point is wanted, and what to do where its state is gone or damaged, is for others to say (``resume``, ``mending``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.engine import TransformersEngine
from kvloom.errors import EngineError, SessionError, StoreError
from kvloom.live import Link, LiveState
from kvloom.passes import KEYFRAME_SPACING
from kvloom.prefetch import Prefetch
from kvloom.reading import Account, count, read_plan, rows_in_memory
from kvloom_proto.records import Schedule
from kvloom_store import planner, restore, segments, trie, turns
from kvloom_store.database import Database
from kvloom_store.planner import StateDamaged, StateInexact
from kvloom_store.writer import Handle, Job, Writer

if TYPE_CHECKING:
    from kvloom.commit import Held


class Current:
    """Keeps one live state, and moves it to wherever it is wanted. Used under the engine's lock."""

    def __init__(self, engine: TransformersEngine, database: Database, writer: Writer, root: int) -> None:
        self.engine = engine
        self.database = database
        self.writer = writer
        self.root = root
        self.live: LiveState | None = None
        self._ahead: Prefetch | None = None
        self.suspended = False
        """Whether a reply that is being generated on the live state waits for its caller to take what it has said."""

    def adopt(self, prefetch: Prefetch) -> None:
        """Begin with the state that was read while the model was being loaded."""
        taken = prefetch.take(self.engine.layers) if self.engine.device.type == "cpu" and self.live is None else None
        if taken is None:
            return
        buffer, plan = taken
        live = self.engine.new_state(buffer.capacity, buffer)
        live.show(plan.position)
        live.chain = [Link(Handle(read.segment), read.start, read.end) for read in plan.rows]
        live.window_base, live.frame_at = plan.base, None
        self.live, self._ahead = live, prefetch

    def count_ahead(self, account: Account) -> None:
        """What was read ahead counts where it is used first."""
        if self._ahead is not None and self._ahead.plan is not None:
            count(account, self._ahead.plan.rows, self._ahead.plan.windows, self._ahead.bytes_read)
            self._ahead = None

    def start_anew(self, tokens: int) -> LiveState:
        """An empty live state, for a run that reuses nothing."""
        live = self.begin(tokens)
        self.flush(live, Account())
        live.truncate(0)
        return live

    def forget(self) -> None:
        """Drop the live state; the next resume starts from the store."""
        self.live = None

    def begin(self, tokens: int) -> LiveState:
        """The live state as the last run that was stored left it, with room for so many tokens."""
        if self.suspended:  # in this very thread: others wait for the engine's lock
            raise SessionError(
                "a reply of this store is still being generated", hint="read it to its end, or close() it, first"
            )
        if self.live is None:
            self.live = self.engine.new_state(tokens)
        if self.live.length > self.live.captured:  # a run that was given up left rows behind
            self.live.truncate(self.live.captured)
        self.live.reserve(min(tokens, self.engine.context_limit))
        return self.live

    def flush(self, live: LiveState, account: Account) -> bool:
        """Wait for the writer. If it failed (a full disk), say so, and let go of the state that has no row.

        The turns themselves are safe; what is let go of is replayed.
        """
        self.wait(account)
        unstored = next((link for link in live.chain if link.handle.segment is None), None)
        if unstored is not None:
            live.truncate(unstored.start)
        return unstored is None

    def wait(self, account: Account) -> None:
        """Wait until no rows in memory are read by the writer any more. If it failed, say so."""
        try:
            self.writer.flush()
        except StoreError as error:
            account.notices.append(f"state could not be stored: {error}")

    def load(self, live: LiveState, segment: int, upto: int, account: Account, *, exact: bool = False) -> None:
        """Let ``live`` hold a segment's chain up to ``upto``: read what is not in memory already, run what must be."""
        with self.database.read() as conn:
            links = restore.chain(conn, segment)
            if links[-1].manifest.layers != live.layers:  # what it stands on was checked when it was made
                raise EngineError(
                    "this state was stored in another layout than the one this version of transformers keeps it in",
                    hint="use the version it was stored with, or say it again with --no-reuse in a new session",
                )
            reads = planner.reads_of(links, upto)
            if exact or account.exact:
                planner.check_exact(links, reads)
            kept = rows_in_memory(live, reads)
            live.truncate(kept)
            # Only a copy of this very point: one further back may have been made by a pass cut there, and the recorded
            # passes do not go on from it.
            here = upto in live.frames or live.frame_at == upto
            plan = planner.plan(links, upto, live.layers, in_memory=here, grid=KEYFRAME_SPACING)
            live.reserve(upto)
            read_plan(live, conn, links, plan, kept, account)
            # Only what this chain holds counts: another branch that left the path here keeps a keyframe of its own.
            last = next(
                (link.manifest.keyframes for link in links if plan.rows and link.id == plan.rows[-1].segment), []
            )
            live.stored = {upto} & set(last)
            owner = turns.owner_of(conn, plan.rows[-1].segment, upto) if plan.rows else None
            ids = trie.tokens_before(conn, links[-1].node, links[-1].end) if plan.replay else []
            threads = {step.provenance: segments.provenance_of(conn, step.provenance).threads for step in plan.replay}
        lossy = {link.id for link in links if link.lossy}
        live.chain = [Link(Handle(r.segment), r.start, r.end, r.segment in lossy) for r in plan.rows]
        if owner is not None:
            live.chain[-1].handle.state = owner.row
        if plan.replay:
            steps = [(step.start, step.end, threads[step.provenance]) for step in plan.replay]
            self.engine.bring_forward(live, ids, steps, cancel=account.cancel, progress=account.progress)
            account.replayed += plan.replayed
            live.keep_frame()

    def loaded(self, live: LiveState, segment: int, upto: int, account: Account) -> bool:
        """Load a segment's chain; False, and a notice, if it is damaged."""
        try:
            self.load(live, segment, upto, account)
        except StateInexact:
            return False  # whoever asked for exact state knows
        except StateDamaged as error:
            notice = f"{error}; computed again from the tokens"
            if notice not in account.notices:
                account.notices.append(notice)
            return False
        return True

    def capture(
        self, live: Held, position: trie.Position, schedule: Schedule, provenance: int, state: int | None
    ) -> None:
        """Hand the rows that belong to no segment yet over to be stored, as one segment that ends at ``position``."""
        start, end = live.captured, live.length
        if start == end:
            return
        handle = Handle(state=state)
        base = live.chain[-1].handle if live.chain else None
        source, lossy = live.take_captured(), is_lossy(live)
        below = len(live.chain)
        job = Job(handle, source, position.node, start, end, base, live.layers, schedule, provenance, lossy, below)
        try:
            self.writer.submit(job)
            live.chain.append(Link(handle, start, end, lossy))
        except BaseException:  # Ctrl-C: if the job waits to read these rows, nobody may write over them
            self.forget()
            raise

    def leave(self, live: Held, state: int) -> None:
        """Let rows count as a turn's without storing them: a run without reuse keeps its schedule, not its state."""
        if live.length > live.captured:
            live.chain.append(Link(Handle(state=state), live.captured, live.length, is_lossy(live)))


def is_lossy(live: Held) -> bool:
    """Whether rows computed on this state follow from rows that are not exact."""
    return any(link.lossy for link in live.chain)
