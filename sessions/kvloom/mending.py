"""Recorded passes run again, where state that was stored is gone or damaged.

The same passes on the same state give the same bits: a damaged segment is mended with them, and what is gone is stored
again. Where they give other bits (another processor or build), that is kept as a variant, and said.
"""

from __future__ import annotations

from kvloom.current import Current, is_lossy
from kvloom.errors import EngineError, StoreError
from kvloom.live import Link, LiveState
from kvloom.reading import Account
from kvloom_proto.records import Schedule
from kvloom_store import healing, restore, segments, trie, turns
from kvloom_store.planner import StateDamaged
from kvloom_store.rows import Captured
from kvloom_store.turns import TurnState
from kvloom_store.writer import Handle


def mend(current: Current, segment: int, account: Account) -> bool:
    """Run the recorded passes of a segment again, and put what is stored of it right.

    False if they gave other bits than were stored: it is then marked so that nobody reads it any more.

    Raises:
        StateDamaged, CorruptRow: its own row is damaged, or what it stands on.
        EngineError: its passes are not known, or it was stored in another layout.
        Cancelled
    """
    live = current.begin(0)
    current.flush(live, account)
    with current.database.read() as conn:
        link = restore.link_of(conn, segment)
        ids = trie.tokens_before(conn, link.node, link.end)
        recorded = segments.provenance_of(conn, link.provenance)
    if link.schedule.unknown:
        raise EngineError("the passes of this state are not known: another loop ran them, or a bundle cut one of them")
    if link.base_segment is None:
        live.truncate(0)
    else:
        current.load(live, link.base_segment, link.start, account)
    live.keep_frame()
    live.reserve(link.end)
    keyframes = link.manifest.keyframes  # one for each turn of it
    current.engine.replay(
        live, ids, link.schedule, recorded, keep=keyframes, cancel=account.cancel, progress=account.progress
    )
    done = _heal(current, live, segment, link.node, link.schedule, link.provenance, None)
    if not done:
        live.truncate(live.captured)
    return done


def mend_or_give_up(current: Current, live: LiveState, segment: int, account: Account) -> None:
    """Compute a damaged segment of several turns again; if it does not come out as it was, nobody reads it any more
    and each of the turns is computed by itself."""
    try:
        whole = mend(current, segment, Account(cancel=account.cancel, progress=account.progress))
        account.replayed += live.length - live.chain[-1].start if whole else 0
        whole = whole and current.loaded(live, segment, live.length, account)
    except (StoreError, EngineError):
        whole = False
    if not whole:
        healing.give_up(current.database, segment)


def holds_others(current: Current, state: TurnState) -> bool:
    """Whether the segment of a turn's state holds that of other turns, too."""
    assert state.segment is not None
    with current.database.read() as conn:
        try:
            link = restore.chain(conn, state.segment)[-1]
        except StateDamaged:  # each turn knows how its part was computed
            return False
    return (link.start, link.end) != (state.state_start, state.state_end)


def replay(current: Current, live: LiveState, tip: TurnState, damaged: bool, account: Account) -> None:
    """Run a turn's recorded passes again, and store their state (or mend what is stored)."""
    if tip.schedule.unknown:
        raise EngineError(
            "this state was captured from another loop and is gone; its passes are not known",
            hint="say it again with --no-reuse, or fork at an earlier turn",
        )
    with current.database.read() as conn:
        ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
        recorded = segments.provenance_of(conn, tip.provenance)
    live.truncate(tip.state_start)
    live.keep_frame()
    live.reserve(tip.state_end)
    current.engine.replay(
        live, ids[: tip.state_end], tip.schedule, recorded, cancel=account.cancel, progress=account.progress
    )
    by = tip.provenance
    if damaged and tip.segment is not None:
        if _heal(current, live, tip.segment, tip.position.node, tip.schedule, by, tip.row):
            return
        account.notices.append(
            f"tokens {tip.state_start} to {tip.state_end} are kept as a fresh variant: what was stored cannot be"
            " told, or came out with other bits (another processor or build, or other state below)"
        )
        with current.database.write() as conn:
            by = segments.add_provenance(conn, current.engine.provenance())
    current.capture(live, tip.position, tip.schedule, by, tip.row)


def _heal(
    current: Current, live: LiveState, segment: int, node: int, schedule: Schedule, provenance: int, state: int | None
) -> bool:
    """Mend a damaged segment with what has just been run again; False if that has other bits."""
    live.keep_frame()
    base = live.chain[-1].handle.segment if live.chain else None
    start, end = live.captured, live.length
    frames = {position: frame for position, frame in live.frames.items() if start <= position <= end}
    new = tuple(sorted(position for position in frames if position not in live.stored))
    lossy = is_lossy(live)
    draft = segments.Draft(node, start, end, base, live.layers, schedule, provenance, new, lossy)
    source = Captured(live.source, frames)
    if not healing.heal(current.database, source, segment, draft, codec_name=current.writer.codec_name):
        return False
    live.take_captured()
    live.chain.append(Link(Handle(segment, state), start, end, lossy))
    if state is not None:  # what it stands on may have been stored anew
        with current.database.write() as conn:
            turns.set_segment(conn, state, segment, base)
    return True
