"""Computing damaged state again, for a repair of the store: exactly as it was recorded, and said where it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.binding import identified
from kvloom.errors import CorruptRow, EngineError, StoreError
from kvloom_store import refs, restore, roots, trie, turns
from kvloom_store.fsck import repair
from kvloom_store.fsck.segments import is_whole
from kvloom_store.planner import StateDamaged

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.engine import Progress
    from kvloom.loom import KVLoom
    from kvloom_store.fsck import Report
    from kvloom_store.fsck.repair import Plan
    from kvloom_store.turns import TurnState

Told = Callable[[str], None]

ROUNDS = 4
"""Times a repair is planned: what is under a damaged page shows only when the file was written anew."""


@dataclass(frozen=True, slots=True)
class Work:
    """Segments of one model that must be computed again, and a session that is read by it (None: none is known)."""

    root: int
    session: str | None
    model: str
    dtype: str
    segments: tuple[int, ...]


def work(conn: sa.Connection, segments: Sequence[int]) -> list[Work]:
    """What must be computed again, by the model that it needs."""
    by_root: dict[int, list[int]] = {}
    sessions: dict[int, str | None] = {}
    for each in segments:
        root, sessions[root] = repair.model_of(conn, each)
        by_root.setdefault(root, []).append(each)
    found = []
    for root, some in by_root.items():
        name = sessions[root]
        if name is None:
            found.append(Work(root, None, "", "", tuple(some)))
            continue
        settings = refs.get_session(conn, name).settings
        mine = identified(settings, roots.model_of_root(conn, root)["digest"].hex()) or settings
        found.append(Work(root, name, str(mine["model"]), str(mine["dtype"]), tuple(some)))
    return found


def in_rounds(report: Report, act: Callable[[Plan], None], check: Callable[[], Report]) -> Report:
    """Plan and ``act`` until nothing is left to do, or nothing changes any more; what the last ``check`` found."""
    before: Plan | None = None
    for _ in range(ROUNDS):
        planned = repair.plan(report)
        if not planned.steps or planned == before:
            break
        act(planned)
        before, report = planned, check()
    return report


def repair_all(loom: KVLoom, *, told: Told = lambda _: None) -> Report:
    """Repair the store of a loom, with its own model; what is found afterwards.

    Segments of other models wait for theirs.
    """

    def act(planned: Plan) -> None:
        repair.execute(loom.database, planned, told=told)
        with loom.database.read() as conn:
            mine = [each for each in work(conn, planned.segments) if loom.has_model and each.root in (0, loom.root)]
        for each in mine:
            recompute(loom, each.segments, told=told)

    return in_rounds(loom.fsck(), act, loom.fsck)


def recompute(
    loom: KVLoom,
    segments: Sequence[int],
    *,
    told: Told = lambda _: None,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> None:
    """Compute segments of this model again and put them right, those that others stand on first.

    Where the passes give other bits (another processor or build), fresh state takes the place of what was stored, and
    of what stands on it. What cannot be computed so is forgotten: its turns keep their tokens.

    Raises:
        EngineError and its kinds, Cancelled: what was mended before stays.
    """
    with loom.engine.lock:
        loom.resumer.forget()
        left = [each for each in _by_start(loom, segments) if not _mended(loom, each, told, cancel, progress)]
        if left:
            _anew(loom, told, cancel, progress)
            loom.flush()
            for each in left:
                _settle(loom, each, told, cancel, progress)
        loom.resumer.forget()


def _by_start(loom: KVLoom, segments: Sequence[int]) -> list[int]:
    """Segments in an order in which each comes after those it stands on; where they begin says which."""
    starts = {}
    with loom.database.read() as conn:
        for each in segments:
            try:
                starts[each] = restore.link_of(conn, each).start
            except CorruptRow:
                starts[each] = -1
    return sorted(segments, key=lambda each: (starts[each], each))


def _mended(loom: KVLoom, segment: int, told: Told, cancel: threading.Event | None, progress: Progress | None) -> bool:
    from kvloom import mending
    from kvloom.reading import Account

    try:
        done = mending.mend(loom.resumer, segment, Account(cancel=cancel, progress=progress))
        with loom.database.read() as conn:  # its rows may be right, and what it says of them wrong
            done = done and is_whole(conn, segment)
    except (StoreError, EngineError):  # its row, what it stands on, or its passes: its turns may know more
        return False
    if done:
        told(f"segment {segment} was computed again, and is what it was, bit for bit")
    return done


def _anew(loom: KVLoom, told: Told, cancel: threading.Event | None, progress: Progress | None) -> None:
    """Bring back every turn of this model whose stored state cannot be loaded: its passes are run again, and stored."""
    for state in _broken(loom):
        with loom.database.read() as conn:
            ids = trie.tokens_to(conn, state.position.node, state.position.offset)
        try:
            _, account = loom.resumer.resume(
                ids[: state.state_end], state, room=0, logits=False, cancel=cancel, progress=progress
            )
            loom.flush()
        except (EngineError, CorruptRow, StateDamaged) as error:
            told(f"tokens {state.state_start} to {state.state_end} cannot be computed as they were: {error}")
            continue
        for notice in account.notices:
            if "variant" in notice:
                told(notice)


def _broken(loom: KVLoom) -> Iterator[TurnState]:
    """The turn states of this model whose segment is named and cannot be read, the first tokens first."""
    with loom.database.read() as conn:
        rows = turns.with_segments(conn, loom.root)
    for row in rows:
        with loom.database.read() as conn:
            try:
                state = turns.state(conn, row)
                if state.segment is not None:
                    restore.chain(conn, state.segment)
            except StateDamaged:
                yield state
            except CorruptRow:
                continue


def _settle(loom: KVLoom, segment: int, told: Told, cancel: threading.Event | None, progress: Progress | None) -> None:
    """Say what became of a segment that its own passes did not mend at first; what nobody can mend is forgotten."""
    with loom.database.read() as conn:
        whole = is_whole(conn, segment)
    if whole:
        told(f"segment {segment} was written anew from its turn's passes, and is what it was, bit for bit")
    elif not _mended(loom, segment, told, cancel, progress):
        repair.forget_state(loom.database, segment)
        told(f"segment {segment} was taken out of use: its turns have state of their own, or get it when they need it")
