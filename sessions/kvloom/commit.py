"""Committing turns: a turn is in the file, with its schedule, before its state is handed over to be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvloom.layers import dtype_name
from kvloom.passes import schedule_of
from kvloom.reading import hidden_bytes
from kvloom.steps import NewTurn
from kvloom_proto.scores import pack_scores
from kvloom_store import refs, segments, trie, turns
from kvloom_store.errors import RemovedMeanwhile
from kvloom_store.refs import NO_ROW
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.turns import Turn, TurnState
from kvloom_store.writer import Handle

if TYPE_CHECKING:
    import threading

    import sqlalchemy as sa
    import torch

    from kvloom.engine import Progress
    from kvloom.live import Link, LiveState
    from kvloom.loom import KVLoom
    from kvloom_proto.records import LayerSpec, Schedule
    from kvloom_store.rows import Captured


@dataclass(frozen=True, slots=True)
class NewBranch:
    """A branch that is made when its first turn is: ``name``, if ``numbered`` with the first number that is free."""

    session: int
    name: str
    numbered: bool = True


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the state of a turn that adds none of its own is found: up to position ``end`` of other state.

    ``hidden`` is the final hidden state there, if it is known.
    """

    handle: Handle
    end: int
    hidden: torch.Tensor | None = None


class Held(Protocol):
    """State of a path whose last rows belong to no segment yet: a ``LiveState``, or a path of a batch."""

    chain: list[Link]
    hidden: torch.Tensor | None
    layers: tuple[LayerSpec, ...]

    @property
    def captured(self) -> int: ...

    @property
    def length(self) -> int: ...

    def take_captured(self) -> Captured: ...


@dataclass(frozen=True, slots=True)
class Addition:
    """A turn to be added below ``parent``, whose state is ``tip``: its tokens are ids[start:], ``passes`` ran since.

    Without ``held`` state the turn has none of its own: it ``stands`` on what there is of its tokens, or on its
    parent's. A turn that is there already gets this state besides those it has, and the branch stays where it is.
    """

    new: NewTurn | Turn
    parent: Turn | None
    tip: TurnState | None
    ids: Sequence[int]
    start: int
    held: Held | None
    passes: Schedule
    stands: Standing | None = None


class Commits:
    """Commits one turn after another, and moves a branch on to each of them; a branch that is a name is made first.

    ``branch`` is where that has got to, ``notices`` what the user should be told. ``reuse=False``: what is committed
    is a variant, whose state is not stored; ``again``: one of a state that was dropped, which is stored in its place.
    """

    def __init__(self, loom: KVLoom, branch: BranchRow | NewBranch, *, reuse: bool = True, again: bool = False) -> None:
        self._loom = loom
        self._reuse = reuse
        self._again = again
        self._branch = branch
        self.notices: list[str] = []

    @property
    def reuse(self) -> bool:
        """Whether what is committed is to be stored; else it is a variant."""
        return self._reuse

    @property
    def branch(self) -> BranchRow:
        """The branch, as it stands after the last turn."""
        assert not isinstance(self._branch, NewBranch)
        return self._branch

    @property
    def place(self) -> BranchRow:
        """The branch that the next turn goes to; of one that is yet to be made, the name, and no row."""
        there = self._branch
        return BranchRow(NO_ROW, there.session, there.name, None) if isinstance(there, NewBranch) else there

    def add(
        self,
        new: NewTurn | Turn,
        parent: Turn | None,
        tip: TurnState | None,
        ids: Sequence[int],
        start: int,
        live: Held | None,
        passes: Sequence[tuple[int, int]],
        *,
        stands: Standing | None = None,
    ) -> tuple[Turn, TurnState]:
        """Add one turn (see ``Addition``), and hand its state over."""
        addition = Addition(new, parent, tip, ids, start, live, schedule_of(passes), stands)
        return commit_all(self._loom, [(self, addition)])[0]

    def _insert(self, conn: sa.Connection, addition: Addition) -> tuple[Turn, TurnState]:
        refs.check_session(conn, self._branch.session)
        loom, root, held, tip = self._loom, self._loom.root, addition.held, addition.tip
        ids, start, new = addition.ids, addition.start, addition.new
        if held is not None:
            base = held.chain[-1].handle if held.chain else None
            state_start, state_end, hidden = held.captured, held.length, held.hidden
        else:
            stands = addition.stands
            if stands is None and tip is not None:
                # Where the template rewrote history, the parent's state is that of other tokens from there on.
                stands = Standing(Handle(tip.segment, tip.row), min(tip.state_end, start))
            base, hidden = (stands.handle, stands.hidden) if stands else (None, None)
            state_start = state_end = stands.end if stands else 0
        base_state = base.state if base else None
        if base is not None and base_state is None and base.segment is not None:
            owner = turns.owner_of(conn, base.segment, state_start)
            base_state = owner.row if owner else None
        known = tip.position if tip is not None and start >= tip.end else None
        position = trie.extend(conn, root, ids, start_at=known)
        turn = new if isinstance(new, Turn) else self._turn(conn, new, addition.parent)
        state = turns.add_state(
            conn,
            turn.row,
            root,
            ids[start:],
            start,
            position,
            state_start=state_start,
            state_end=state_end,
            base_state=base_state,
            base_segment=base.segment if base else None,
            schedule=addition.passes,
            provenance=segments.add_provenance(conn, loom.engine.provenance()),
            hidden=hidden_bytes(hidden) if hidden is not None else None,
            hidden_dtype=dtype_name(hidden.dtype) if hidden is not None else None,
            variant=self._again or not self._reuse,
            scores=_packed(new, len(ids) - start),
        )
        return turn, state

    def _hand_over(self, held: Held, state: TurnState) -> None:
        if self._reuse:
            self._loom.resumer.capture(held, state.position, state.schedule, state.provenance, state.row)
        else:
            self._loom.resumer.leave(held, state.row)

    def add_bare(self, new: NewTurn, parent: Turn | None) -> Turn:
        """Add a turn without tokens below ``parent``: a system message, whose tokens come with the next one."""
        with self._loom.database.write() as conn:
            refs.check_session(conn, self._branch.session)
            return self._turn(conn, new, parent)

    def _turn(self, conn: sa.Connection, new: NewTurn, parent: Turn | None) -> Turn:
        turn = turns.add_turn(
            conn,
            self._branch.session,
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
        there = self._branch
        if isinstance(there, NewBranch):
            name = refs.free_name(conn, there.session, there.name, first=1) if there.numbered else there.name
            self._branch = refs.add_branch(conn, there.session, name, turn.row)
            return
        self._branch, happened = refs.move_on(conn, there, turn.row)
        if happened:
            was = {"moved": "moved", "removed": "was removed"}[happened]
            own = self._branch.name
            self.notices.append(
                f"branch {there.name!r} {was} meanwhile, by another process; this turn is kept on branch {own!r}: "
                f"go on there, or say it again where you want it"
            )


def commit_all(
    loom: KVLoom,
    additions: Sequence[tuple[Commits, Addition]],
    also: Callable[[sa.Connection, list[Turn]], None] | None = None,
) -> list[tuple[Turn, TurnState]]:
    """Add several turns, each on its branch, in one transaction; then their state is handed over.

    ``also`` runs in the same transaction: what it writes is there if the turns are, and only then.
    """
    try:
        with loom.database.write() as conn:
            made = [commits._insert(conn, addition) for commits, addition in additions]
            if also is not None:
                also(conn, [turn for turn, _ in made])
    except RemovedMeanwhile:  # what is in memory may stand on what is gone: the next use begins with the store
        loom.resumer.forget()
        raise
    for (commits, addition), (_, state) in zip(additions, made, strict=True):
        if addition.held is not None:
            commits._hand_over(addition.held, state)
    return made


def compute_anew(
    loom: KVLoom,
    branch: BranchRow | NewBranch,
    turn: Turn,
    tip: TurnState,
    ids: Sequence[int],
    live: LiveState,
    *,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> int:
    """Compute what is not held of the state of a turn (``tip``) that was dropped, and store it as a variant of it:
    whoever goes on from that turn later finds it. ``ids`` begin with its tokens; how many were run.

    Raises Cancelled; nothing is stored then.
    """
    start, engine = live.length, loom.engine
    if start >= tip.state_end - 1:  # the last token is left to be run where nothing is known of what follows it
        return 0
    engine.prefill(live, ids[start : tip.end], cancel=cancel, progress=progress)
    commits = Commits(loom, branch, again=True)  # the branch stays where it is: the turn is there
    commits.add(turn, None, tip, ids[: tip.end], tip.start, live, list(engine.passes(start, tip.end)))
    return tip.end - start


def _packed(new: NewTurn | Turn, tokens: int) -> bytes | None:
    return pack_scores(new.scores[:tokens]) if isinstance(new, NewTurn) and new.scores else None
