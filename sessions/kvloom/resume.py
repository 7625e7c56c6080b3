"""How a point of a conversation is brought back: loaded where its state is held, replayed where it is not.

The state at a turn is the one its own segment holds, never another computation of the same tokens. What is in
memory already is kept as far as it belongs to the same segments; the rest is read from the store. If state was
never stored (a crash before it was written behind, a variant) or is damaged, the recorded passes are run
again on top of the state they ran on, which gives the same bits. State that was dropped to make room comes back so only
if that is asked for; otherwise its tokens are computed anew, on top of whatever is held of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom.engine import Cancelled, Progress, TransformersEngine
from kvloom.errors import EngineError, KVLoomError, ReuseRequired, SessionError, StoreError
from kvloom.live import Link, LiveState
from kvloom.passes import KEYFRAME_SPACING
from kvloom.prefetch import Prefetch
from kvloom.reading import Account, count, hidden_tensor, read_plan, rows_in_memory
from kvloom_proto.records import Schedule
from kvloom_store import healing, held, planner, restore, segments, trie, turns
from kvloom_store.database import Database
from kvloom_store.errors import StateDropped
from kvloom_store.planner import StateDamaged, StateInexact
from kvloom_store.rows import Captured
from kvloom_store.turns import TurnState
from kvloom_store.writer import Handle, Job, Writer

if TYPE_CHECKING:
    from kvloom.commit import Held


class Resumer:
    """Keeps one live state, and moves it to wherever a conversation goes on. Used under the engine's lock."""

    def __init__(self, engine: TransformersEngine, database: Database, writer: Writer, root: int) -> None:
        self.engine = engine
        self.database = database
        self.writer = writer
        self.root = root
        self.live: LiveState | None = None
        self._ahead: Prefetch | None = None  # what was read ahead counts where it is used first
        self.suspended = False
        """Whether a reply that is being generated on the live state waits for its caller to take what it has said."""

    def resume(
        self,
        ids: Sequence[int],
        tip: TurnState | None,
        *,
        room: int,
        logits: bool = True,
        whole: bool = False,
        exact: bool = False,
        require_reuse: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> tuple[LiveState, Account]:
        """A live state that holds as much of ``ids`` as can be had without computing anything new.

        ``tip`` is the state that must be gone on from: ``ids`` begin with its tokens, or with some of them and end
        there. None takes whatever is held of ``ids``. ``room`` tokens more will be run. If all of ``ids`` is held,
        ``live.hidden`` is set, unless no ``logits`` are wanted; where no hidden state is kept of the last token, that
        token is left to be run. ``whole``: load all rows of windows, not only those that are still seen.

        Where the state of ``tip`` was dropped, it is gone on from whatever is held of ``ids``, and the rest is left to
        be computed anew. ``exact``: what was dropped, and what is held with loss only, is run again as it is recorded,
        which gives the same bits.

        Raises:
            ReuseRequired: ``require_reuse``, and something would have to be replayed.
        """
        began, account = time.perf_counter(), Account(whole=whole, exact=exact, notices=self.writer.notices())
        try:
            live = self._brought(ids, tip, room, account, logits, require_reuse, cancel, progress)
        except (Cancelled, KVLoomError):
            raise
        except BaseException:  # Ctrl-C anywhere: what is in memory may be half of something
            self.forget()
            raise
        account.reused = max(0, live.length - account.replayed)  # more may have been run again than was kept
        account.lossy = sum(link.end - link.start for link in live.chain if link.lossy)
        if account.lossy:
            account.notices.append(
                f"the state of {account.lossy:,} of {live.length:,} tokens is lossy: it was stored with loss, or "
                "follows from such state"
            )
        account.seconds = time.perf_counter() - began
        return live, account

    def _brought(
        self,
        ids: Sequence[int],
        tip: TurnState | None,
        room: int,
        account: Account,
        logits: bool,
        require_reuse: bool,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> LiveState:
        exact = account.exact
        live = self._live(len(ids) + room)
        if self._ahead is not None and self._ahead.plan is not None:
            count(account, self._ahead.plan.rows, self._ahead.plan.windows, self._ahead.bytes_read)
            self._ahead = None
        self._let_go_of_dropped(live, account)
        if exact and _is_lossy(live):
            self._flush(live, account)
            live.truncate(0)
        if tip is not None:
            tip = self._gone_on_from(live, tip, min(tip.state_end, len(ids)), exact, require_reuse)
        if tip is not None:
            upto = min(tip.state_end, len(ids))
            known = tip.hidden if upto == tip.state_end else None
            if logits and upto == len(ids) and known is None:
                upto -= 1
            self._bring_back(live, tip, upto, account, require_reuse, cancel, progress)
            if known is not None and tip.hidden_dtype and live.hidden is None:
                live.hidden = hidden_tensor(known, tip.hidden_dtype, self.engine.device)
        self._load_more(live, ids, tip, account, logits, cancel, progress)
        return live

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

    def start_anew(self, tokens: int) -> LiveState:
        """An empty live state, for a run that reuses nothing."""
        live = self._live(tokens)
        self._flush(live, Account())
        live.truncate(0)
        return live

    def capture(
        self, live: Held, position: trie.Position, schedule: Schedule, provenance: int, state: int | None
    ) -> None:
        """Hand the rows that belong to no segment yet over to be stored, as one segment that ends at ``position``."""
        start, end = live.captured, live.length
        if start == end:
            return
        handle = Handle(state=state)
        base = live.chain[-1].handle if live.chain else None
        source, lossy = live.take_captured(), _is_lossy(live)
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
            live.chain.append(Link(Handle(state=state), live.captured, live.length, _is_lossy(live)))

    def mend(self, segment: int, *, cancel: threading.Event | None = None, progress: Progress | None = None) -> bool:
        """Run the recorded passes of a segment again, and put what is stored of it right.

        False if they gave other bits than were stored: it is then marked so that nobody reads it any more.

        Raises:
            StateDamaged, CorruptRow: its own row is damaged, or what it stands on.
            EngineError: its passes are not known, or it was stored in another layout.
            Cancelled
        """
        live, account = self._live(0), Account()
        self._flush(live, account)
        with self.database.read() as conn:
            link = restore.link_of(conn, segment)
            ids = trie.tokens_before(conn, link.node, link.end)
            recorded = segments.provenance_of(conn, link.provenance)
        if link.schedule.unknown:
            raise EngineError(
                "the passes of this state are not known: another loop ran them, or a bundle cut one of them"
            )
        if link.base_segment is None:
            live.truncate(0)
        else:
            self._load(live, link.base_segment, link.start, account, cancel, progress)
        live.keep_frame()
        live.reserve(link.end)
        keyframes = link.manifest.keyframes  # one for each turn of it
        self.engine.replay(live, ids, link.schedule, recorded, keep=keyframes, cancel=cancel, progress=progress)
        done = self._heal(live, segment, link.node, link.schedule, link.provenance, None)
        if not done:
            live.truncate(live.captured)
        return done

    def forget(self) -> None:
        """Drop the live state; the next resume starts from the store."""
        self.live = None

    def _live(self, tokens: int) -> LiveState:
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

    def _let_go_of_dropped(self, live: LiveState, account: Account) -> None:
        """Forget the live state if another process, or our own quota, has dropped what it stands on meanwhile."""
        last = next((link.handle for link in reversed(live.chain) if link.handle.segment is not None), None)
        lost = any(isinstance(link.handle.error, StateDropped) for link in live.chain)
        if not lost and last is not None and last.segment is not None:  # what that stands on is there if it is
            with self.database.read() as conn:
                lost = bool(segments.missing(conn, [last.segment]))
        if lost:
            self._flush(live, account)
            live.truncate(0)

    def _gone_on_from(
        self, live: LiveState, tip: TurnState, upto: int, exact: bool, require_reuse: bool
    ) -> TurnState | None:
        """The state to bring back; None where it was dropped, and is to be computed anew. Raises ReuseRequired."""
        if _holds(live, tip, upto) and not exact:
            return tip
        with self.database.read() as conn:
            if exact:
                return turns.original_of(conn, tip)
            if not turns.must_be_fresh(conn, turns.state(conn, tip.row), upto):
                return tip
        if require_reuse:
            raise ReuseRequired(0, upto)
        return None

    def _bring_back(
        self,
        live: LiveState,
        tip: TurnState,
        upto: int,
        account: Account,
        require_reuse: bool,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        """Let ``live`` hold the state of a turn up to position ``upto``.

        First down, from the turn to what it stands on, until there is state that can be loaded; then up again,
        running the recorded passes of the turns in between.
        """
        if _holds(live, tip, upto):
            return
        wanted = upto
        self._flush(live, account)  # from here on every piece of state has its row
        to_replay: list[tuple[TurnState, int, bool]] = []
        state: TurnState | None = tip
        while state is not None and not _holds(live, state, upto):
            with self.database.read() as conn:
                state = turns.state(conn, state.row)
                base = turns.base_of(conn, state)
            damaged = False
            if upto > state.state_start:  # else the turn added no rows of its own: its state is its base's
                damaged = state.segment is not None and not self._loaded(
                    live, state.segment, upto, account, cancel, progress
                )
                if state.segment is not None and not damaged:
                    break
                if require_reuse:
                    raise ReuseRequired(min(live.captured, state.state_start), upto)
                to_replay.append((state, upto, damaged))
                upto = state.state_start
            if base is None:
                self._load_or_empty(live, state.base_segment, upto, account, cancel, progress)
            state = base
        for state, end, damaged in reversed(to_replay):
            # The damage may have been further down, and is mended now.
            if damaged and state.segment is not None:
                self._wait(account)
                if self._loaded(live, state.segment, end, account):
                    continue
                if self._holds_others(state):
                    self._mend_or_give_up(live, state.segment, account, cancel, progress)
                    self._bring_back(live, tip, wanted, account, require_reuse, cancel, progress)
                    return
            self._replay(live, state, damaged, account, cancel, progress)
            account.replayed += state.state_end - state.state_start
            self._cut_back(live, end, account)

    def _cut_back(self, live: LiveState, end: int, account: Account) -> None:
        """Let ``live``, which has just been run and stored, end earlier: what is overwritten is brought back."""
        if live.length == end:
            return
        handle = live.chain[-1].handle
        self._wait(account)  # other rows will be put where those are that are cut off
        live.truncate(end)
        if live.ready:
            return
        self._flush(live, account)
        if handle.segment is None:
            raise EngineError("state could not be stored, and cannot be brought back without", hint="free some disk")
        self._load(live, handle.segment, end, account)

    def _loaded(
        self,
        live: LiveState,
        segment: int,
        upto: int,
        account: Account,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Load a segment's chain; False, and a notice, if it is damaged."""
        try:
            self._load(live, segment, upto, account, cancel, progress)
        except StateInexact:
            return False  # whoever asked for exact state knows
        except StateDamaged as error:
            notice = f"{error}; computed again from the tokens"
            if notice not in account.notices:
                account.notices.append(notice)
            return False
        return True

    def _flush(self, live: LiveState, account: Account) -> bool:
        """Wait for the writer. If it failed (a full disk), say so, and let go of the state that has no row.

        The turns themselves are safe; what is let go of is replayed.
        """
        self._wait(account)
        unstored = next((link for link in live.chain if link.handle.segment is None), None)
        if unstored is not None:
            live.truncate(unstored.start)
        return unstored is None

    def _wait(self, account: Account) -> None:
        """Wait until no rows in memory are read by the writer any more. If it failed, say so."""
        try:
            self.writer.flush()
        except StoreError as error:
            account.notices.append(f"state could not be stored: {error}")

    def _replay(
        self,
        live: LiveState,
        tip: TurnState,
        damaged: bool,
        account: Account,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        """Run a turn's recorded passes again, and store their state (or mend what is stored)."""
        if tip.schedule.unknown:
            raise EngineError(
                "this state was captured from another loop and is gone; its passes are not known",
                hint="say it again with --no-reuse, or fork at an earlier turn",
            )
        with self.database.read() as conn:
            ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
            recorded = segments.provenance_of(conn, tip.provenance)
        live.truncate(tip.state_start)
        live.keep_frame()
        live.reserve(tip.state_end)
        self.engine.replay(live, ids[: tip.state_end], tip.schedule, recorded, cancel=cancel, progress=progress)
        by = tip.provenance
        if damaged and tip.segment is not None:
            if self._heal(live, tip.segment, tip.position.node, tip.schedule, by, tip.row):
                return
            account.notices.append(
                f"tokens {tip.state_start} to {tip.state_end} are kept as a fresh variant: what was stored cannot be"
                " told, or came out with other bits (another processor or build, or other state below)"
            )
            with self.database.write() as conn:
                by = segments.add_provenance(conn, self.engine.provenance())
        self.capture(live, tip.position, tip.schedule, by, tip.row)

    def _heal(
        self, live: LiveState, segment: int, node: int, schedule: Schedule, provenance: int, state: int | None
    ) -> bool:
        """Mend a damaged segment with what has just been run again; False if that has other bits."""
        live.keep_frame()
        base = live.chain[-1].handle.segment if live.chain else None
        start, end = live.captured, live.length
        frames = {position: frame for position, frame in live.frames.items() if start <= position <= end}
        new = tuple(sorted(position for position in frames if position not in live.stored))
        lossy = _is_lossy(live)
        draft = segments.Draft(node, start, end, base, live.layers, schedule, provenance, new, lossy)
        source = Captured(live.source, frames)
        if not healing.heal(self.database, source, segment, draft, codec_name=self.writer.codec_name):
            return False
        live.take_captured()
        live.chain.append(Link(Handle(segment, state), start, end, lossy))
        if state is not None:  # what it stands on may have been stored anew
            with self.database.write() as conn:
                turns.set_segment(conn, state, segment, base)
        return True

    def _holds_others(self, state: TurnState) -> bool:
        """Whether the segment of a turn's state holds that of other turns, too."""
        assert state.segment is not None
        with self.database.read() as conn:
            try:
                link = restore.chain(conn, state.segment)[-1]
            except StateDamaged:  # each turn knows how its part was computed
                return False
        return (link.start, link.end) != (state.state_start, state.state_end)

    def _mend_or_give_up(
        self,
        live: LiveState,
        segment: int,
        account: Account,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        """Compute a damaged segment of several turns again; if it does not come out as it was, nobody reads it any more
        and each of the turns is computed by itself."""
        try:
            whole = self.mend(segment, cancel=cancel, progress=progress)
            account.replayed += live.length - live.chain[-1].start if whole else 0
            whole = whole and self._loaded(live, segment, live.length, account)
        except (StoreError, EngineError):
            whole = False
        if not whole:
            healing.give_up(self.database, segment)

    def _load_or_empty(
        self,
        live: LiveState,
        segment: int | None,
        upto: int,
        account: Account,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        if segment is None:
            if upto != 0:
                raise EngineError("the state this turn stood on is gone")
            live.truncate(0)
        elif not self._loaded(live, segment, upto, account, cancel, progress):
            raise EngineError(
                "the state this turn stood on is damaged, and no turn is left that says how to compute it",
                hint="fork at an earlier turn, or say the whole again with --no-reuse in a new session",
            )

    def _load(
        self,
        live: LiveState,
        segment: int,
        upto: int,
        account: Account,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        *,
        exact: bool = False,
    ) -> None:
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
            self.engine.bring_forward(live, ids, steps, cancel=cancel, progress=progress)
            account.replayed += plan.replayed
            live.keep_frame()

    def _load_more(
        self,
        live: LiveState,
        ids: Sequence[int],
        tip: TurnState | None,
        account: Account,
        logits: bool,
        cancel: threading.Event | None,
        progress: Progress | None,
    ) -> None:
        """Load what is held beyond the tip: the same words said before, or another session's beginning."""
        if tip is not None and len(ids) <= tip.end:
            return None
        with self.database.read() as conn:
            # From where the tip's state ends: before that there may be hundreds of edges, each a query.
            held_to = trie.just_before(conn, tip.position.node, tip.state_end) if tip is not None else None
            match = trie.match(conn, self.root, ids, start_at=held_to)
        if tip is not None and match.known <= tip.end:
            return None
        # What is found must not depend on how far the writer has got.
        if not self._flush(live, account) and tip is not None:
            return self._bring_back(live, tip, tip.state_end, account, False, cancel, progress)
        # State that is lossy is for the turns it belongs to, and for what follows from them.
        exact = tip is None or not _is_lossy(live)
        on = live.chain[-1].handle.segment if tip is not None and live.chain else None
        at_least = live.length if tip is not None else 0
        with self.database.read() as conn:
            on_end = live.length if on else 0
            found = held.longest(conn, match, at_most=len(ids), on=on, on_end=on_end, exact=exact)
            hidden = held.hidden_at(conn, found) if found is not None and found.end == len(ids) else None
        end = 0 if found is None else found.end
        if logits and end == len(ids) and hidden is None:
            end -= 1  # the last token is run, for what follows from it
        if found is None or end <= at_least:
            if tip is None:
                live.truncate(0)
            return None
        try:
            self._load(live, found.segment, end, account, cancel, progress, exact=exact)
        except StateDamaged as error:
            # Nobody's turn depends on it here: it is computed anew, and mended when its own turn needs it.
            if not isinstance(error, StateInexact):
                account.notices.append(str(error))
            live.truncate(0)
            return None if tip is None else self._bring_back(live, tip, tip.state_end, account, False, cancel, progress)
        if hidden is not None:
            live.hidden = hidden_tensor(*hidden, self.engine.device)
        return None


def _is_lossy(live: Held) -> bool:
    """Whether rows computed on this state follow from rows that are not exact."""
    return any(link.lossy for link in live.chain)


def _holds(live: LiveState, state: TurnState, upto: int) -> bool:
    here = bool(live.chain) and live.chain[-1].handle.state == state.row and live.length == upto
    return here and live.ready
