"""How a point of a conversation is brought back: loaded where its state is held, replayed where it is not.

The state at a turn is the one its own segment holds, never another computation of the same tokens. What is in
memory already is kept as far as it belongs to the same segments; the rest is read from the store. If state was
never stored (a crash before it was written behind, a variant) or is damaged, the recorded passes are run
again on top of the state they ran on, which gives the same bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
import torch

from kvloom.engine import Progress, TransformersEngine
from kvloom.errors import EngineError, ReuseRequired, StoreError
from kvloom.live import TORCH_DTYPES, Link, LiveState
from kvloom.prefetch import Prefetch
from kvloom_proto.records import Schedule
from kvloom_store import healing, held, restore, segments, trie, turns
from kvloom_store.database import Database
from kvloom_store.restore import StateDamaged
from kvloom_store.rows import RowBuffer
from kvloom_store.turns import TurnState
from kvloom_store.writer import Handle, Job, Writer


@dataclass(slots=True)
class Account:
    """What bringing back cost: tokens loaded, tokens run again, seconds, and what the user should be told."""

    reused: int = 0
    replayed: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    notices: list[str] = field(default_factory=list)


class Resumer:
    """Keeps one live state, and moves it to wherever a conversation goes on. Used under the engine's lock."""

    def __init__(self, engine: TransformersEngine, database: Database, writer: Writer, root: int) -> None:
        self.engine = engine
        self.database = database
        self.writer = writer
        self.root = root
        self.live: LiveState | None = None

    def resume(
        self,
        ids: Sequence[int],
        tip: TurnState | None,
        *,
        room: int,
        logits: bool = True,
        require_reuse: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> tuple[LiveState, Account]:
        """A live state that holds as much of ``ids`` as can be had without computing anything new.

        ``tip`` is the state that must be gone on from, all of whose tokens ``ids`` begin with; None takes whatever is
        held of ``ids``. ``room`` tokens more will be run. If all of ``ids`` is held, ``live.hidden`` is set, unless no
        ``logits`` are wanted.

        Raises:
            ReuseRequired: ``require_reuse``, and something would have to be replayed.
        """
        began, account = time.perf_counter(), Account()
        live = self._live(len(ids) + room)
        if tip is not None:
            self._bring_back(live, tip, tip.state_end, account, require_reuse, cancel, progress)
        self._load_more(live, ids, tip, account)
        if logits and live.length == len(ids) and live.hidden is None:
            self._hidden_of(live, tip)
        account.reused = live.length - account.replayed
        account.seconds = time.perf_counter() - began
        return live, account

    def adopt(self, prefetch: Prefetch) -> None:
        """Begin with the state that was read while the model was being loaded."""
        taken = prefetch.take(self.engine.layers) if self.engine.device.type == "cpu" and self.live is None else None
        if taken is None:
            return
        buffer, reads = taken
        live = LiveState(self.engine.layers, buffer.capacity, self.engine.device, buffer)
        live.show(reads[-1].end)
        live.chain = [Link(Handle(read.segment), read.start, read.end) for read in reads]
        self.live = live

    def start_anew(self, tokens: int) -> LiveState:
        """An empty live state, for a run that reuses nothing."""
        live = self._live(tokens)
        self._flush(live, Account())
        live.truncate(0)
        return live

    def capture(
        self, live: LiveState, position: trie.Position, schedule: Schedule, provenance: int, state: int | None
    ) -> None:
        """Hand the rows that belong to no segment yet over to be stored, as one segment that ends at ``position``."""
        start, end = live.captured, live.length
        if start == end:
            return
        handle = Handle(state=state)
        base = live.chain[-1].handle if live.chain else None
        self.writer.submit(Job(handle, live.source, position.node, start, end, base, live.layers, schedule, provenance))
        live.chain.append(Link(handle, start, end))

    def leave(self, live: LiveState, state: int) -> None:
        """Let rows count as a turn's without storing them: a run without reuse keeps its schedule, not its state."""
        if live.length > live.captured:
            live.chain.append(Link(Handle(state=state), live.captured, live.length))

    def forget(self) -> None:
        """Drop the live state; the next resume starts from the store."""
        self.live = None

    def _live(self, tokens: int) -> LiveState:
        if self.live is None:
            self.live = self.engine.new_state(tokens)
        if self.live.length > self.live.captured:  # a run that was given up left rows behind
            self.live.truncate(self.live.captured)
        self.live.reserve(min(tokens, self.engine.context_limit))
        return self.live

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
        self._flush(live, account)  # from here on every piece of state has its row
        to_replay: list[tuple[TurnState, int, bool]] = []
        state: TurnState | None = tip
        while state is not None and not _holds(live, state, upto):
            with self.database.read() as conn:
                state = turns.state(conn, state.row)
                base = self._base_of(conn, state)
            damaged = False
            if upto > state.state_start:  # else the turn added no rows of its own: its state is its base's
                damaged = state.segment is not None and not self._loaded(live, state.segment, upto, account)
                if state.segment is not None and not damaged:
                    break
                if require_reuse:
                    raise ReuseRequired(min(live.captured, state.state_start), upto)
                to_replay.append((state, upto, damaged))
                upto = state.state_start
            if base is None:
                self._load_or_empty(live, state.base_segment, upto, account)
            state = base
        for state, end, damaged in reversed(to_replay):
            # The damage may have been further down, and is mended now.
            if damaged and state.segment is not None and self._loaded(live, state.segment, end, account):
                continue
            self._replay(live, state, damaged, cancel, progress)
            account.replayed += state.state_end - state.state_start
            live.truncate(end)

    def _loaded(self, live: LiveState, segment: int, upto: int, account: Account) -> bool:
        """Load a segment's chain; False, and a notice, if it is damaged."""
        try:
            self._load(live, segment, upto, account)
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
        try:
            self.writer.flush()
        except StoreError as error:
            account.notices.append(f"state could not be stored: {error}")
        unstored = next((link for link in live.chain if link.handle.segment is None), None)
        if unstored is not None:
            live.truncate(unstored.start)
        return unstored is None

    @staticmethod
    def _base_of(conn: sa.Connection, tip: TurnState) -> TurnState | None:
        """The turn whose state a turn's own was computed on: it knows how to compute that again, too."""
        if tip.base_state is not None:
            return turns.state(conn, tip.base_state)
        owners = turns.states_with_segments(conn, [tip.base_segment]) if tip.base_segment is not None else []
        return owners[0] if owners else None

    def _hidden_of(self, live: LiveState, tip: TurnState | None) -> None:
        """Set the hidden state that the next token follows from; without one the last token is run again."""
        if tip is not None and tip.state_end == live.length and tip.hidden and tip.hidden_dtype:
            live.hidden = hidden_tensor(tip.hidden, tip.hidden_dtype, self.engine.device)
        else:
            live.truncate(live.length - 1)

    def _replay(
        self,
        live: LiveState,
        tip: TurnState,
        damaged: bool,
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
        live.reserve(tip.state_end)
        self.engine.replay(live, ids[: tip.state_end], tip.schedule, recorded, cancel=cancel, progress=progress)
        base = live.chain[-1].handle.segment if live.chain else None
        draft = segments.Draft(
            tip.position.node, live.captured, live.length, base, live.layers, tip.schedule, tip.provenance
        )
        codec = self.writer.codec_name
        if (
            damaged
            and tip.segment is not None
            and healing.heal(self.database, live.source, tip.segment, draft, codec_name=codec)
        ):
            live.chain.append(Link(Handle(tip.segment, tip.row), live.captured, live.length))
        else:
            self.capture(live, tip.position, tip.schedule, tip.provenance, tip.row)

    def _load_or_empty(self, live: LiveState, segment: int | None, upto: int, account: Account) -> None:
        if segment is None:
            if upto != 0:
                raise EngineError("the state this turn stood on is gone")
            live.truncate(0)
        elif not self._loaded(live, segment, upto, account):
            raise EngineError(
                "the state this turn stood on is damaged, and no turn is left that says how to compute it",
                hint="fork at an earlier turn, or say the whole again with --no-reuse in a new session",
            )

    def _load(self, live: LiveState, segment: int, upto: int, account: Account) -> None:
        """Let ``live`` hold a segment's chain up to ``upto``, reading only what is not in memory already."""
        with self.database.read() as conn:
            links = restore.chain(conn, segment)
            reads = restore.plan(links, upto)
            kept = 0
            for link, read in zip(live.chain, reads, strict=False):
                if link.handle.segment != read.segment or link.start != read.start:
                    break
                kept = min(link.end, read.end)
                if link.end != read.end:
                    break
            live.truncate(kept)
            live.reserve(upto)
            missing = [restore.Read(r.segment, max(r.start, kept), r.end) for r in reads if r.end > kept]
            if missing:
                self._read(live, conn, links, missing, account)
            live.show(upto)
            with_state = {s.segment: s.row for s in turns.states_with_segments(conn, [r.segment for r in reads])}
        # The very handles in memory are kept: later segments may be waiting on them.
        same = {link.handle.segment: link.handle for link in live.chain}
        for handle in same.values():
            handle.state = handle.state if handle.state is not None else with_state.get(handle.segment or 0)
        live.chain = [
            Link(same.get(r.segment) or Handle(r.segment, with_state.get(r.segment)), r.start, r.end) for r in reads
        ]

    def _read(
        self,
        live: LiveState,
        conn: sa.Connection,
        links: list[restore.Link],
        missing: list[restore.Read],
        account: Account,
    ) -> None:
        if isinstance(live.source, RowBuffer):
            account.bytes_read += restore.load(conn, links, missing, live.source)
            return
        first, last = missing[0].start, missing[-1].end
        staging = RowBuffer(live.layers, last)
        account.bytes_read += restore.load(conn, links, missing, staging)
        live.take(staging, first, last)

    def _load_more(self, live: LiveState, ids: Sequence[int], tip: TurnState | None, account: Account) -> None:
        """Load what is held beyond the tip: the same words said before, or another session's beginning."""
        with self.database.read() as conn:
            match = trie.match(conn, self.root, ids)
        if tip is not None and match.known <= tip.end:
            return None
        # What is found must not depend on how far the writer has got.
        if not self._flush(live, account) and tip is not None:
            return self._bring_back(live, tip, tip.state_end, account, False, None, None)
        on = live.chain[-1].handle.segment if tip is not None and live.chain else None
        with self.database.read() as conn:
            found = held.longest(conn, match, at_most=len(ids), on=on, on_end=live.length if on else 0)
            if found is None or found.end <= (live.length if tip is not None else 0):
                if tip is None:
                    live.truncate(0)
                return None
            hidden = held.hidden_at(conn, found) if found.end == len(ids) else None
        try:
            self._load(live, found.segment, found.end, account)
        except StateDamaged as error:
            # Nobody's turn depends on it here: it is computed anew, and mended when its own turn needs it.
            account.notices.append(str(error))
            if tip is None:
                live.truncate(0)
            else:
                live.truncate(tip.state_end)
            return None
        if hidden is not None:
            live.hidden = hidden_tensor(*hidden, self.engine.device)
        return None


def _holds(live: LiveState, state: TurnState, upto: int) -> bool:
    return bool(live.chain) and live.chain[-1].handle.state == state.row and live.length == upto


def hidden_tensor(data: bytes, dtype: str, device: torch.device) -> torch.Tensor:
    """A stored final hidden state as ``[1, 1, hidden_size]``."""
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype])[None, None].to(device)


def hidden_bytes(hidden: torch.Tensor) -> bytes:
    """The inverse: the raw little-endian bytes of a final hidden state."""
    return hidden.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()
