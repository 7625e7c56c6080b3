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

from kvloom import mending
from kvloom.current import Current, is_lossy
from kvloom.engine import Cancelled, Progress
from kvloom.errors import EngineError, KVLoomError, ReuseRequired
from kvloom.live import LiveState
from kvloom.reading import Account, hidden_tensor
from kvloom_store import held, segments, trie, turns
from kvloom_store.errors import StateDropped
from kvloom_store.planner import StateDamaged, StateInexact
from kvloom_store.turns import TurnState


class Resumer(Current):
    """Moves the live state to wherever a conversation goes on. Used under the engine's lock."""

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
        began = time.perf_counter()
        account = Account(whole=whole, exact=exact, notices=self.writer.notices(), cancel=cancel, progress=progress)
        try:
            live = self._brought(ids, tip, room, account, logits, require_reuse)
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
        self, ids: Sequence[int], tip: TurnState | None, room: int, account: Account, logits: bool, require_reuse: bool
    ) -> LiveState:
        exact = account.exact
        live = self.begin(len(ids) + room)
        self.count_ahead(account)
        self._let_go_of_dropped(live, account)
        if exact and is_lossy(live):
            self.flush(live, account)
            live.truncate(0)
        if tip is not None:
            tip = self._gone_on_from(live, tip, min(tip.state_end, len(ids)), exact, require_reuse)
        if tip is not None:
            upto = min(tip.state_end, len(ids))
            known = tip.hidden if upto == tip.state_end else None
            if logits and upto == len(ids) and known is None:
                upto -= 1
            self._bring_back(live, tip, upto, account, require_reuse)
            if known is not None and tip.hidden_dtype and live.hidden is None:
                live.hidden = hidden_tensor(known, tip.hidden_dtype, self.engine.device)
        self._load_more(live, ids, tip, account, logits)
        return live

    def _let_go_of_dropped(self, live: LiveState, account: Account) -> None:
        """Forget the live state if another process, or our own quota, has dropped what it stands on meanwhile."""
        last = next((link.handle for link in reversed(live.chain) if link.handle.segment is not None), None)
        lost = any(isinstance(link.handle.error, StateDropped) for link in live.chain)
        if not lost and last is not None and last.segment is not None:  # what that stands on is there if it is
            with self.database.read() as conn:
                lost = bool(segments.missing(conn, [last.segment]))
        if lost:
            self.flush(live, account)
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

    def _bring_back(self, live: LiveState, tip: TurnState, upto: int, account: Account, require_reuse: bool) -> None:
        """Let ``live`` hold the state of a turn up to position ``upto``.

        First down, from the turn to what it stands on, until there is state that can be loaded; then up again,
        running the recorded passes of the turns in between.
        """
        if _holds(live, tip, upto):
            return
        wanted = upto
        self.flush(live, account)  # from here on every piece of state has its row
        to_replay: list[tuple[TurnState, int, bool]] = []
        state: TurnState | None = tip
        while state is not None and not _holds(live, state, upto):
            with self.database.read() as conn:
                state = turns.state(conn, state.row)
                base = turns.base_of(conn, state)
            damaged = False
            if upto > state.state_start:  # else the turn added no rows of its own: its state is its base's
                damaged = state.segment is not None and not self.loaded(live, state.segment, upto, account)
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
            if damaged and state.segment is not None:
                self.wait(account)
                if self.loaded(live, state.segment, end, account):
                    continue
                if mending.holds_others(self, state):
                    mending.mend_or_give_up(self, live, state.segment, account)
                    self._bring_back(live, tip, wanted, account, require_reuse)
                    return
            mending.replay(self, live, state, damaged, account)
            account.replayed += state.state_end - state.state_start
            self._cut_back(live, end, account)

    def _cut_back(self, live: LiveState, end: int, account: Account) -> None:
        """Let ``live``, which has just been run and stored, end earlier: what is overwritten is brought back."""
        if live.length == end:
            return
        handle = live.chain[-1].handle
        self.wait(account)  # other rows will be put where those are that are cut off
        live.truncate(end)
        if live.ready:
            return
        self.flush(live, account)
        if handle.segment is None:
            raise EngineError("state could not be stored, and cannot be brought back without", hint="free some disk")
        self.load(live, handle.segment, end, account)

    def _load_or_empty(self, live: LiveState, segment: int | None, upto: int, account: Account) -> None:
        if segment is None:
            if upto != 0:
                raise EngineError("the state this turn stood on is gone")
            live.truncate(0)
        elif not self.loaded(live, segment, upto, account):
            raise EngineError(
                "the state this turn stood on is damaged, and no turn is left that says how to compute it",
                hint="fork at an earlier turn, or say the whole again with --no-reuse in a new session",
            )

    def _load_more(
        self, live: LiveState, ids: Sequence[int], tip: TurnState | None, account: Account, logits: bool
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
        if not self.flush(live, account) and tip is not None:
            return self._bring_back(live, tip, tip.state_end, account, False)
        # State that is lossy is for the turns it belongs to, and for what follows from them.
        exact = tip is None or not is_lossy(live)
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
            self.load(live, found.segment, end, account, exact=exact)
        except StateDamaged as error:
            # Nobody's turn depends on it here: it is computed anew, and mended when its own turn needs it.
            if not isinstance(error, StateInexact):
                account.notices.append(str(error))
            live.truncate(0)
            return None if tip is None else self._bring_back(live, tip, tip.state_end, account, False)
        if hidden is not None:
            live.hidden = hidden_tensor(*hidden, self.engine.device)
        return None


def _holds(live: LiveState, state: TurnState, upto: int) -> bool:
    here = bool(live.chain) and live.chain[-1].handle.state == state.row and live.length == upto
    return here and live.ready
