"""Committing turns: a turn is in the file, with its schedule, before its state is handed over to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.layers import dtype_name
from kvloom.passes import schedule_of
from kvloom.resume import hidden_bytes
from kvloom.steps import NewTurn
from kvloom_store import refs, segments, trie, turns
from kvloom_store.errors import RefConflict
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.turns import Turn, TurnState
from kvloom_store.writer import Handle

if TYPE_CHECKING:
    import sqlalchemy as sa
    import torch

    from kvloom.live import LiveState
    from kvloom.loom import KVLoom


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the state of a turn that adds none of its own is found: up to position ``end`` of other state, where the
    final hidden state is ``hidden``, if that is known."""

    handle: Handle
    end: int
    hidden: torch.Tensor | None = None


class Commits:
    """Commits one turn after another, and moves a branch on to each of them.

    ``branch`` is where that has got to, ``notices`` what the user should be told. ``reuse=False``: what is committed
    is a variant, whose state is not stored.
    """

    def __init__(self, loom: KVLoom, branch: BranchRow, *, reuse: bool = True) -> None:
        self._loom = loom
        self._reuse = reuse
        self.branch = branch
        self.notices: list[str] = []

    def add(
        self,
        new: NewTurn | Turn,
        parent: Turn | None,
        tip: TurnState | None,
        ids: Sequence[int],
        start: int,
        live: LiveState | None,
        passes: Sequence[tuple[int, int]],
        *,
        stands: Standing | None = None,
    ) -> tuple[Turn, TurnState]:
        """Add a turn whose tokens are ids[start:] below ``parent``, whose state is ``tip``, and hand its state over.

        ``passes`` ran since ``tip``. Without a ``live`` state the turn has none of its own: it ``stands`` on what there
        is of its tokens, or on its parent's.
        A turn that is there already gets this state besides those it has, and the branch stays where it is.
        """
        loom, root = self._loom, self._loom.root
        if live is not None:
            base = live.chain[-1].handle if live.chain else None
            state_start, state_end, hidden = live.captured, live.length, live.hidden
        else:
            if stands is None and tip is not None:
                stands = Standing(Handle(tip.segment, tip.row), tip.state_end)
            base, hidden = (stands.handle, stands.hidden) if stands else (None, None)
            state_start = state_end = stands.end if stands else 0
        schedule = schedule_of(passes)
        with loom.database.write() as conn:
            known = tip.position if tip is not None and start >= tip.end else None
            position = trie.extend(conn, root, ids, start_at=known)
            provenance = segments.add_provenance(conn, loom.engine.provenance())
            turn = new if isinstance(new, Turn) else self._turn(conn, new, parent)
            state = turns.add_state(
                conn,
                turn.row,
                root,
                ids[start:],
                start,
                position,
                state_start=state_start,
                state_end=state_end,
                base_state=base.state if base else None,
                base_segment=base.segment if base else None,
                schedule=schedule,
                provenance=provenance,
                hidden=hidden_bytes(hidden) if hidden is not None else None,
                hidden_dtype=dtype_name(hidden.dtype) if hidden is not None else None,
                variant=not self._reuse,
            )
        if live is None:
            return turn, state
        if self._reuse:
            loom.resumer.capture(live, position, schedule, provenance, state.row)
        else:
            loom.resumer.leave(live, state.row)
        return turn, state

    def add_bare(self, new: NewTurn, parent: Turn | None) -> Turn:
        """Add a turn without tokens below ``parent``: a system message, whose tokens come with the next one."""
        with self._loom.database.write() as conn:
            return self._turn(conn, new, parent)

    def _turn(self, conn: sa.Connection, new: NewTurn, parent: Turn | None) -> Turn:
        turn = turns.add_turn(
            conn,
            self.branch.session,
            parent,
            new.message,
            continues=new.continues,
            finish_reason=new.finish_reason,
            settings=new.settings,
            timings=new.timings,
        )
        self._move_branch(conn, turn)
        return turn

    def _move_branch(self, conn: sa.Connection, turn: Turn) -> None:
        """Move the branch on; if another process moved it first, the turn is kept on a branch of its own."""
        try:
            self.branch = refs.move_branch(conn, self.branch.row, self.branch.turn, turn.row)
        except RefConflict as conflict:
            self.branch = refs.add_branch(
                conn, self.branch.session, refs.free_name(conn, self.branch.session, conflict.name), turn.row
            )
            self.notices.append(
                f"branch {conflict.name!r} moved meanwhile; this turn is kept on branch {self.branch.name!r}"
            )
