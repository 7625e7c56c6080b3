"""Dropping state to make room: what a plan (``gc_plan``) is made from, and doing what it says.

Text and tokens are never touched. A turn whose state is dropped says so, and keeps how it was computed: it comes back
fresh, or exactly, as it is asked for. Each transaction is small and looks again at what it drops; who is
reading has a snapshot of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.records import Schedule, read_schedule
from kvloom_store import gc_plan, pins, rates, segments, sqlite
from kvloom_store.checksum import check_numbers, checked, update
from kvloom_store.database import Database, now_us
from kvloom_store.errors import CorruptRow
from kvloom_store.gc_plan import Facts, Held, Plan, Point
from kvloom_store.schema import branch, node, segment, session, tag, turn, turn_state

IN_FLIGHT_US = 60_000_000
"""A turn this young whose state is not stored yet is about to get some: what it stands on stays."""

BATCH_BYTES = 32 << 20
BATCH_SEGMENTS = 200
"""How much one transaction drops: whoever wants to write meanwhile waits for no more."""

QUERY_IDS = 500

Progress = Callable[[int, int], None]
"""Called with bytes dropped so far, and in all."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was dropped, or with ``dry_run`` would be. Bytes of state, except ``file_freed``: what the file gave back.

    ``seconds`` is what computing all of it anew takes on this machine (None: nothing was timed yet), ``exact_seconds``
    what running it again just as it was first run takes. ``branches`` are those that lose state, with both for each.
    ``kept`` bytes may not be dropped: they are pinned, in use, or nobody would know how to bring them back.
    ``skipped`` segments were not dropped after all, as they came into use meanwhile.
    """

    before: int
    after: int
    freed: int
    segments: int
    tokens: int
    seconds: float | None
    exact_seconds: float | None
    branches: tuple[Lost, ...]
    kept: int
    skipped: int = 0
    file_freed: int = 0
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """A branch or tag whose last ``tokens`` have no state any more, and what bringing it back takes."""

    name: str
    tokens: int
    seconds: float | None
    exact_seconds: float | None


def collect(
    database: Database,
    max_bytes: int | None = None,
    *,
    keep_named: bool = False,
    keep: frozenset[int] = frozenset(),
    dry_run: bool = False,
    agree: Callable[[Collected], bool] | None = None,
    cancelled: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Bring the state down to ``max_bytes`` (None: take away only what no turn reaches).

    ``keep_named``: what branches and tags lead to stays, and so do the segments ``keep`` and what they stand on.
    ``agree`` is asked before anything is dropped.
    ``cancelled`` is asked between transactions: what was dropped until then stays so.

    Raises:
        StoreUnavailable, StoreLocked
    """
    with database.read() as conn:
        facts = read_facts(conn, now_us())
        facts = replace(facts, kept=facts.kept | keep)
        made = gc_plan.plan(facts, max_bytes, keep_named=keep_named)
        told = _told(conn, facts, made)
        newest = _newest(conn)
    if dry_run or (agree is not None and not agree(told)):
        return replace(told, dry_run=True)
    return _execute(database, made, told, newest, cancelled, progress)


def _execute(
    database: Database,
    made: Plan,
    told: Collected,
    newest: int,
    cancelled: Callable[[], bool] | None,
    progress: Progress | None,
) -> Collected:
    """Drop what a plan says; what came of it."""
    size, freed, done = sqlite.file_bytes(database.path), 0, 0
    for batch in _batches(made.drops):
        if cancelled is not None and cancelled():
            break
        with database.write(background=True) as conn:
            dropped = drop(conn, [each.id for each in batch], newest)
        freed += sum(each.bytes for each in batch if each.id in dropped)
        done += len(dropped)
        if progress is not None:
            progress(freed, made.freed)
    if done:
        give_back(database, cancelled)
    return replace(
        told,
        freed=freed,
        after=made.before - freed,
        segments=done,
        skipped=len(made.drops) - done,
        file_freed=max(0, size - sqlite.file_bytes(database.path)),
    )


def _batches(drops: Sequence[Held]) -> Iterator[list[Held]]:
    batch: list[Held] = []
    for each in drops:
        if batch and (len(batch) == BATCH_SEGMENTS or sum(b.bytes for b in batch) + each.bytes > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def give_back(database: Database, cancelled: Callable[[], bool] | None = None) -> None:
    """Let the file shrink by its free pages, some at a time: the lock is free in between."""
    while cancelled is None or not cancelled():
        with database.write(background=True) as conn:
            if not sqlite.shrink(conn):
                break
    database.checkpoint()


def drop(conn: sa.Connection, ids: Sequence[int], newest: int) -> set[int]:
    """Drop segments (inside a write transaction), what stands on others first; which of them were dropped.

    What has come into use since turn state ``newest`` stays: something stands on it, or it was pinned.
    """
    stays = _pinned(conn) | segments.missing(conn, ids)  # what pinned ones stand on is not free
    dropped: set[int] = set()
    for each in ids:
        if each not in stays and _is_free(conn, each, newest) and _let_go(conn, each):
            segments.delete(conn, [each])
            dropped.add(each)
    return dropped


def _is_free(conn: sa.Connection, each: int, newest: int) -> bool:
    uses = (
        sa.select(segment.c.id).where(segment.c.base_segment == each),
        sa.select(turn_state.c.id).where(turn_state.c.base_segment == each, turn_state.c.id > newest),
        sa.select(turn_state.c.id).where(turn_state.c.segment == each, turn_state.c.id > newest),
    )
    return all(conn.execute(query.limit(1)).first() is None for query in uses)


def _let_go(conn: sa.Connection, each: int) -> bool:
    """Have every turn state that names a segment say that it is dropped; False if one could not be computed again."""
    named = (turn_state.c.segment == each) | (turn_state.c.base_segment == each)
    try:
        rows = [checked(turn_state, row) for row in conn.execute(sa.select(turn_state).where(named))]
    except CorruptRow:  # fsck tells of it; nothing is made worse here
        return False
    owners = [row for row in rows if row["segment"] == each]
    changes: list[dict[str, int | None]] = []
    for row in rows:
        change: dict[str, int | None] = {"segment": None, "dropped": 1} if row["segment"] == each else {}
        if row["base_segment"] == each:
            base = row["base_state"] or _owner(owners, row["state_start"], row["id"])
            if base is None and row["state_start"]:
                return False
            change |= {"base_segment": None, "base_state": base}
        changes.append(change)
    for row, change in zip(rows, changes, strict=True):
        update(conn, turn_state, row, **change)
    return True


def _owner(owners: Sequence[dict[str, int]], position: int, other: int) -> int | None:
    """The turn state that says how the state up to a position of a segment was computed."""
    found = (o["id"] for o in owners if o["state_start"] < position <= o["state_end"] and o["id"] != other)
    return min(found, default=None)


# --- what a plan is made from ---


@dataclass(frozen=True, slots=True)
class _State:
    id: int
    turn: int
    root: int
    end: int
    base_state: int | None
    base_segment: int | None
    segment: int | None
    waits: bool
    own: bool


def read_facts(conn: sa.Connection, now: int) -> Facts:
    """What a plan is made from, in a number of queries that grows with the models of the store alone."""
    c = segment.c
    columns = (c.id, c.base_segment, node.c.root, c.start, c.end, c.stored_bytes, c.complete, c.created)
    rows = conn.execute(sa.select(*columns).join(node, node.c.id == c.node)).all()
    for row in rows:
        check_numbers(segment, row.id, row[2:], row[1:2])
    states = _states(conn, now)
    holders = {each.id: each for each in states}
    named = {s.segment for s in states} | {s.base_segment for s in states} - {None}
    young = {row.id for row in rows if not row.complete and row.created > now - segments.ABANDONED_US}
    captured = _captured(conn, [row.id for row in rows if row.complete and row.id not in named])
    held = tuple(Held(*row[:6], reached=row.id in named or row.id in captured) for row in rows if row.id not in young)
    busy = {row.base_segment for row in rows if row.id in young} | {s.base_segment for s in states if s.waits}
    kept = busy | _unowned(states) | _pinned(conn)
    roots = {row.root for row in rows}
    paces = {root: pace for root in roots if (pace := rates.pace(rates.last_turns(conn, root))) is not None}
    points = tuple(_points(conn, states, holders, now))
    return Facts(held, points, frozenset(each for each in kept if each is not None), paces)


def _states(conn: sa.Connection, now: int) -> list[_State]:
    c = turn_state.c
    columns = (c.id, c.turn, c.root, c.state_start, c.state_end, c.base_state, c.base_segment, c.segment)
    query = sa.select(*columns, c.variant, c.dropped, c.created).order_by(c.id)
    found = []
    for row in conn.execute(query):
        check_numbers(turn_state, row.id, (*row[1:5], *row[8:]), row[5:8])
        own = row.state_end > row.state_start
        unwritten = own and row.segment is None and not row.variant and not row.dropped
        waits = unwritten and row.created > now - IN_FLIGHT_US
        found.append(_State(*row[:3], row.state_end, *row[5:8], waits=waits, own=own))
    return found


def _unowned(states: Sequence[_State]) -> set[int | None]:
    """Segments that turns stand on, but that no turn has: none could say how they were computed."""
    owned = {each.segment for each in states}
    return {each.base_segment for each in states if each.base_state is None and each.base_segment not in owned}


def _captured(conn: sa.Connection, ids: Sequence[int]) -> set[int]:
    """Of segments that no turn names, those that somebody's own loop put here to be found again."""
    return {each for each, schedule in _schedules(conn, ids) if schedule.unknown}


def _schedules(conn: sa.Connection, ids: Sequence[int]) -> Iterator[tuple[int, Schedule]]:
    for first in range(0, len(ids), QUERY_IDS):
        some = ids[first : first + QUERY_IDS]
        for row in conn.execute(sa.select(segment.c.id, segment.c.schedule).where(segment.c.id.in_(some))):
            try:
                yield row.id, read_schedule(row.schedule)
            except FormatError:
                yield row.id, Schedule(unknown=True)


def _pinned(conn: sa.Connection) -> set[int]:
    """The segments that hold the state of pinned turns."""
    c = turn_state.c
    columns = (c.id, c.segment, c.base_segment, c.base_state, (c.state_end > c.state_start).label("own"))
    at = conn.execute(sa.select(*columns).where(c.turn.in_(pins.pinned(conn)))).all()
    found: set[int | None] = set()
    seen: set[int] = set()  # a damaged row stands on itself
    while at:  # a turn without rows of its own has its state in another's
        found |= {row.segment for row in at} | {row.base_segment for row in at if not row.own}
        seen |= {row.id for row in at}
        below = {row.base_state for row in at if row.segment is None and not row.own} - seen
        at = conn.execute(sa.select(*columns).where(c.id.in_(below))).all() if below else []
    return {each for each in found if each is not None}


def _segment(state: _State, holders: dict[int, _State]) -> int | None:
    """The segment a state is in: its own, or where it has no rows of its own, that which it stands on."""
    at, seen = state, set[int]()
    while at.segment is None and not at.own and at.base_state in holders:
        if at.id in seen:
            raise CorruptRow(turn_state.name, (at.id,))
        seen.add(at.id)
        at = holders[at.base_state]
    return at.segment if at.segment is not None else at.base_segment if not at.own else None


def _points(conn: sa.Connection, states: Sequence[_State], holders: dict[int, _State], now: int) -> Iterator[Point]:
    """Where paths end: the tips of branches and tags, and turns that nothing was said on."""
    own: dict[int, dict[int, tuple[int, int]]] = {}
    for each in states:
        at = _segment(each, holders)
        if at is not None and each.root not in own.get(each.turn, {}):
            own.setdefault(each.turn, {})[each.root] = (at, each.end)
    turns = conn.execute(sa.select(turn.c.id, turn.c.parent, turn.c.created).order_by(turn.c.id)).all()
    nearest: dict[int | None, dict[int, tuple[int, int]]] = {None: {}}
    for row in turns:  # parents come before their children
        check_numbers(turn, row.id, (row.created,), (row.parent,))
        above = nearest.get(row.parent, {})
        nearest[row.id] = {**above, **own[row.id]} if row.id in own else above
    named = set()
    for name, at, used in _names(conn):
        named.add(at)
        yield from (Point(held, end, now - used, name) for held, end in nearest.get(at, {}).values())
    parents = {row.parent for row in turns}
    for row in turns:
        if row.id not in parents and row.id not in named and row.id in own:
            yield from (Point(held, end, now - row.created) for held, end in own[row.id].values())


def _names(conn: sa.Connection) -> Iterator[tuple[str, int, int]]:
    """Branches and tags: what they are called, the turn they lead to, and when that was last used."""
    for table, used in ((branch, branch.c.updated), (tag, tag.c.created)):
        query = sa.select(table.c.id, session.c.name, table.c.name, table.c.turn, used).join(
            session, session.c.id == table.c.session
        )
        for row, owner, name, at, when in conn.execute(query.where(table.c.turn.is_not(None)).order_by(table.c.id)):
            check_numbers(table, row, (at, when))
            yield f"{owner}@{name}", at, when


def _newest(conn: sa.Connection) -> int:
    return int(conn.execute(sa.select(sa.func.coalesce(sa.func.max(turn_state.c.id), 0))).scalar_one())


def _told(conn: sa.Connection, facts: Facts, made: Plan) -> Collected:
    """A plan with what coming back exactly would cost: how its passes ran is read of these segments alone."""
    ids = [each.id for each in made.drops]
    singly = {each: sum(e - s == 1 for s, e in schedule.each()) for each, schedule in _schedules(conn, ids)}
    held = {each.id: each for each in made.drops}

    def exact(some: Sequence[int]) -> float | None:
        total = 0.0
        for root in {held[each].root for each in some}:
            mine = [each for each in some if held[each].root == root]
            if root not in facts.paces:
                return None
            tokens = sum(held[each].tokens for each in mine)
            ends = set(mine) - {held[each].base for each in mine}
            alone = sum(min(singly[each], held[each].tokens) for each in mine)
            total += facts.paces[root].exact(tokens, alone, len(ends))
        return total

    lost = [Lost(each.name, each.tokens, each.seconds, exact(each.segments)) for each in made.touched]
    return Collected(
        before=made.before,
        after=made.after,
        freed=made.freed,
        segments=len(made.drops),
        tokens=made.tokens,
        seconds=made.seconds,
        exact_seconds=exact([each.id for each in made.drops if each.reached]),
        branches=tuple(lost),
        kept=made.kept_bytes,
    )
