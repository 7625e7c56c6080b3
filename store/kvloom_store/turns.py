"""Turns: messages that never change, each with one parent, and what a model made of them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.errors import FormatError, LimitExceeded
from kvloom_proto.records import Schedule, pack, read_schedule
from kvloom_store import fulltext
from kvloom_store.checksum import check_numbers, checked, insert, unpacked, update
from kvloom_store.database import allocate, now_us
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import segment as segment_table
from kvloom_store.schema import turn, turn_state
from kvloom_store.trie import Position, pack_tokens, unpack_tokens

QUERY_TURNS = 500
"""Turns asked for in one query: databases bound the number of parameters."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``row`` is the store's own number; users see ``id``, 32 hex digits."""

    row: int
    id: str
    session: int
    parent: int | None
    role: str
    continues: bool
    message: dict[str, Any]
    finish_reason: str | None
    settings: dict[str, Any]
    timings: dict[str, Any]
    digest: bytes
    created: int

    @property
    def text(self) -> str:
        """The message's text: derived from its content, which may be a list of parts."""
        content = self.message.get("content")
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else ""


@dataclass(frozen=True, slots=True)
class TurnState:
    """What one model made of a turn.

    ``tokens`` stand at positions [start, end) of the path that ends at ``position``. Their state was computed
    by ``schedule`` over positions [state_start, state_end), on top of ``base_state``'s segment (of another turn), or
    of ``base_segment``. state_end is end, or one less where the last token is pending. ``segment`` is None
    until the state is stored, and again when it has been ``dropped`` to make room.
    ``hidden`` is the final hidden state at state_end - 1, as raw little-endian bytes.
    ``scores`` are what the model thought of ``tokens`` if it generated them, packed (``kvloom_proto.scores``).
    """

    row: int
    turn: int
    root: int
    start: int
    end: int
    tokens: list[int]
    position: Position
    state_start: int
    state_end: int
    base_state: int | None
    base_segment: int | None
    segment: int | None
    schedule: Schedule
    provenance: int
    hidden: bytes | None
    hidden_dtype: str | None
    variant: bool
    scores: bytes | None = None
    dropped: bool = False


def chained_digest(parent: bytes, message: Mapping[str, Any]) -> bytes:
    """BLAKE2b-128 of the parent's digest (empty at the top) and the message as canonical MessagePack."""
    return hashlib.blake2b(parent + msgpack.packb(_sorted(message)), digest_size=16).digest()


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, (list, tuple)) else value


def add_turn(
    conn: sa.Connection,
    session: int,
    parent: Turn | None,
    message: Mapping[str, Any],
    *,
    continues: bool = False,
    finish_reason: str | None = None,
    settings: Mapping[str, Any] | None = None,
    timings: Mapping[str, Any] | None = None,
    public_id: bytes | None = None,
    created: int | None = None,
) -> Turn:
    """Add a turn below ``parent`` (inside a write transaction); one that was said elsewhere keeps its id and time."""
    packed = msgpack.packb(dict(message))
    if len(packed) > limits.MAX_TURN_BYTES:
        raise LimitExceeded("message", len(packed), limits.MAX_TURN_BYTES)
    values = {
        "id": allocate(conn, turn),
        "public_id": secrets.token_bytes(16) if public_id is None else public_id,
        "session": session,
        "parent": parent.row if parent else None,
        "role": message["role"],
        "continues": int(continues),
        "message": packed,
        "finish_reason": finish_reason,
        "settings": msgpack.packb(dict(settings or {})),
        "timings": msgpack.packb(dict(timings or {})),
        "digest": chained_digest(parent.digest if parent else b"", message),
        "created": now_us() if created is None else created,
    }
    insert(conn, turn, values)
    made = _turn(values)
    fulltext.add(conn, made.row, made.text)
    return made


def _turn(values: Mapping[str, Any]) -> Turn:
    row = values["id"]
    return Turn(
        row,
        values["public_id"].hex(),
        values["session"],
        values["parent"],
        values["role"],
        bool(values["continues"]),
        unpacked(values["message"], "turn", row),
        values["finish_reason"],
        unpacked(values["settings"], "turn", row),
        unpacked(values["timings"], "turn", row),
        values["digest"],
        values["created"],
    )


def by_id(conn: sa.Connection, public_id: bytes) -> Turn | None:
    """The turn of that id, in whichever session."""
    found = conn.execute(sa.select(turn).where(turn.c.public_id == public_id)).one_or_none()
    return None if found is None else _turn(checked(turn, found, public_id=public_id))


def alike(conn: sa.Connection, session: int, parent: int | None, digest: bytes) -> list[Turn]:
    """The turns of a session below the same parent that say the same, oldest first."""
    below = turn.c.parent.is_(None) if parent is None else turn.c.parent == parent
    query = sa.select(turn).where(turn.c.digest == digest, turn.c.session == session, below).order_by(turn.c.id)
    return [_turn(checked(turn, row, digest=digest, session=session, parent=parent)) for row in conn.execute(query)]


def get(conn: sa.Connection, row: int) -> Turn:
    """One turn."""
    found = conn.execute(sa.select(turn).where(turn.c.id == row)).one_or_none()
    if found is None:
        raise CorruptRow("turn", (row,))
    return _turn(checked(turn, found))


def each_of(conn: sa.Connection, rows: Sequence[int]) -> Iterator[Turn | None]:
    """Turns in the order of their rows, some hundred in one query; None for one that is damaged, or not there."""
    for first in range(0, len(rows), QUERY_TURNS):
        some = rows[first : first + QUERY_TURNS]
        found = {values.id: values for values in conn.execute(sa.select(turn).where(turn.c.id.in_(some)))}
        for row in some:
            try:
                yield _turn(checked(turn, found[row])) if row in found else None
            except CorruptRow:
                yield None


def of_session(conn: sa.Connection, session: int) -> list[Turn]:
    """Every turn of a session, oldest first."""
    query = sa.select(turn).where(turn.c.session == session).order_by(turn.c.id)
    return [_turn(checked(turn, row)) for row in conn.execute(query)]


def count_by_session(conn: sa.Connection) -> dict[int, int]:
    """How many turns each session has, without reading them: those that a damaged index has in none are left out."""
    query = sa.select(turn.c.session, sa.func.count()).group_by(turn.c.session)
    return {row: int(count) for row, count in conn.execute(query) if isinstance(row, int)}


def path_to(conn: sa.Connection, row: int | None) -> list[Turn]:
    """The turns from the first one down to this one, in one query; nothing for None."""
    if row is None:
        return []
    up = sa.select(turn.c.id, turn.c.parent).where(turn.c.id == row).cte("up", recursive=True)
    up = up.union(sa.select(turn.c.id, turn.c.parent).where(turn.c.id == up.c.parent))
    # A turn's parent was there before it, so ids grow along a path.
    query = sa.select(turn).where(turn.c.id.in_(sa.select(up.c.id))).order_by(turn.c.id)
    found = [_turn(checked(turn, values)) for values in conn.execute(query)]
    parents = [None, *(each.row for each in found[:-1])]
    if not found or found[-1].row != row or [each.parent for each in found] != parents:
        raise CorruptRow("turn", (row,))
    return found


def add_state(
    conn: sa.Connection,
    turn_row: int,
    root: int,
    tokens: Sequence[int],
    start: int,
    position: Position,
    *,
    state_start: int,
    state_end: int,
    base_state: int | None,
    base_segment: int | None,
    segment: int | None = None,
    schedule: Schedule,
    provenance: int,
    hidden: bytes | None,
    hidden_dtype: str | None,
    variant: bool = False,
    scores: bytes | None = None,
) -> TurnState:
    """Note what a model made of a turn; ``segment`` comes later, with the state (``set_segment``).

    A ``base_segment`` that another process has dropped meanwhile is left out: ``base_state`` says what that was.
    """
    query = sa.select(segment_table.c.id).where(segment_table.c.id == base_segment)
    if base_segment is not None and conn.execute(query).first() is None:
        base_segment = None
    values = {
        "id": allocate(conn, turn_state),
        "turn": turn_row,
        "root": root,
        "start": start,
        "end": start + len(tokens),
        "tokens": pack_tokens(tokens),
        "node": position.node,
        "offset": position.offset,
        "state_start": state_start,
        "state_end": state_end,
        "base_state": base_state,
        "base_segment": base_segment,
        "segment": segment,
        "schedule": pack(schedule),
        "provenance": provenance,
        "hidden": hidden,
        "hidden_dtype": hidden_dtype,
        "variant": int(variant),
        "dropped": 0,
        "created": now_us(),
        "scores": scores,
    }
    insert(conn, turn_state, values)
    return _state(values)


def _state(values: Mapping[str, Any]) -> TurnState:
    return TurnState(
        values["id"],
        values["turn"],
        values["root"],
        values["start"],
        values["end"],
        unpack_tokens(values["tokens"]),
        Position(values["node"], values["offset"], values["end"] - values["offset"]),
        values["state_start"],
        values["state_end"],
        values["base_state"],
        values["base_segment"],
        values["segment"],
        read_schedule(values["schedule"]),
        values["provenance"],
        values["hidden"],
        values["hidden_dtype"],
        bool(values["variant"]),
        values["scores"],
        bool(values["dropped"]),
    )


def states_of(conn: sa.Connection, turn_rows: Sequence[int]) -> list[TurnState]:
    """Every state of some turns, oldest first."""
    query = sa.select(turn_state).where(turn_state.c.turn.in_(turn_rows)).order_by(turn_state.c.id)
    return [_state(checked(turn_state, row)) for row in conn.execute(query)]


def check_listed(conn: sa.Connection, turn_rows: Sequence[int]) -> None:
    """Make sure that turns really have no state, before it is computed: all rows are read, which takes less than that.

    Raises:
        CorruptRow: one has, and the index does not say so.
    """
    # A sum is in no index, and not all columns are: so the table itself is read.
    query = sa.select(turn_state).where((turn_state.c.turn + 0).in_(turn_rows)).limit(1)
    hidden = conn.execute(query).one_or_none()
    if hidden is not None:
        raise CorruptRow("turn_state", (hidden.id,))


def states_of_session(conn: sa.Connection, session: int) -> list[TurnState]:
    """Every state of a session's turns, oldest first."""
    query = sa.select(turn_state).join(turn, turn.c.id == turn_state.c.turn).where(turn.c.session == session)
    return [_state(checked(turn_state, row)) for row in conn.execute(query.order_by(turn_state.c.id))]


def token_counts(conn: sa.Connection, session: int) -> list[tuple[int, int, int]]:
    """(turn, start, end) of each turn state of a session, oldest first, without reading their tokens.

    Raises:
        CorruptRow: what should be a number is not.
    """
    query = (
        sa.select(turn_state.c.id, turn_state.c.turn, turn_state.c.start, turn_state.c.end)
        .join(turn, turn.c.id == turn_state.c.turn)
        .where(turn.c.session == session)
        .order_by(turn_state.c.id)
    )
    found = []
    for row, *cells in conn.execute(query):
        check_numbers(turn_state, row, cells)
        found.append((cells[0], cells[1], cells[2]))
    return found


def held(conn: sa.Connection, session: int) -> set[str]:
    """The ids of a session's turns whose state is held (or that stand on another's and have none of their own).

    A damaged id is left out: it is told where the turn itself is read.
    """
    query = (
        sa.select(turn.c.public_id)
        .join(turn_state, turn_state.c.turn == turn.c.id)
        .where(turn.c.session == session)
        .where(turn_state.c.segment.is_not(None) | (turn_state.c.state_start == turn_state.c.state_end))
    )
    return {public.hex() for public in conn.execute(query).scalars() if isinstance(public, bytes)}


def owner_of(conn: sa.Connection, segment: int, position: int) -> TurnState | None:
    """The oldest state that a segment holds up to some position of it, or beyond; None if no turn is left of it.

    Damaged rows are left out: they may be anybody's.
    """
    query = sa.select(turn_state).where(
        turn_state.c.segment == segment, turn_state.c.state_start < position, turn_state.c.state_end >= position
    )
    for row in conn.execute(query.order_by(turn_state.c.id)):
        try:
            return _state(checked(turn_state, row))
        except (CorruptRow, FormatError):
            continue
    return None


def state(conn: sa.Connection, row: int) -> TurnState:
    """One turn state."""
    found = conn.execute(sa.select(turn_state).where(turn_state.c.id == row)).one_or_none()
    if found is None:
        raise CorruptRow("turn_state", (row,))
    return _state(checked(turn_state, found))


def best_state(states: Sequence[TurnState], root: int) -> TurnState | None:
    """Of a turn's states, the one to go on from: held before not held, the first before its variants, one that
    reaches the turn's end before one that was stopped on the way there, and one that says what comes next."""

    def worse(state: TurnState) -> tuple[bool, bool, int, bool, int]:
        lost = state.segment is None and state.state_end > state.state_start
        return lost, state.variant, -state.state_end, state.hidden is None, state.row

    return min((each for each in states if each.root == root), key=worse, default=None)


def base_of(conn: sa.Connection, above: TurnState) -> TurnState | None:
    """The turn state that one was computed on, which knows how to compute that again; None if no turn is left of it."""
    if above.base_state is not None:
        return state(conn, above.base_state)
    return owner_of(conn, above.base_segment, above.state_start) if above.base_segment is not None else None


def is_there(conn: sa.Connection, row: int) -> bool:
    """Whether a turn state was not removed meanwhile."""
    return conn.execute(sa.select(turn_state.c.id).where(turn_state.c.id == row)).first() is not None


def set_segment(conn: sa.Connection, row: int, segment: int, base_segment: int | None) -> None:
    """Link a turn's state to the segment that now holds it."""
    found = conn.execute(sa.select(turn_state).where(turn_state.c.id == row)).one_or_none()
    if found is not None:  # the session may have been removed meanwhile
        changes = {"segment": segment, "base_segment": base_segment, "dropped": 0}
        update(conn, turn_state, checked(turn_state, found), **changes)


def with_segments(conn: sa.Connection, root: int) -> list[int]:
    """The rows of a model's turn states that name a segment, those of the first tokens first."""
    query = sa.select(turn_state.c.id).where(turn_state.c.root == root, turn_state.c.segment.is_not(None))
    return list(conn.execute(query.order_by(turn_state.c.state_end, turn_state.c.id)).scalars())


def mark_dropped(conn: sa.Connection, row: int) -> None:
    """Note that a turn's state is not kept, for want of room: it comes back fresh, unless it is asked for exactly."""
    found = conn.execute(sa.select(turn_state).where(turn_state.c.id == row)).one_or_none()
    if found is not None:
        update(conn, turn_state, checked(turn_state, found), segment=None, dropped=1)


def must_be_fresh(conn: sa.Connection, tip: TurnState, upto: int) -> bool:
    """Whether the first ``upto`` tokens of a state can come back only by running again what was dropped.

    What was merely never written (a crash, a variant) does not count: that is replayed as it is recorded.
    """
    at: TurnState | None = tip
    while at is not None:
        if upto > at.state_start:
            if at.segment is not None:
                return False
            if at.dropped:
                return True
            upto = at.state_start
        below = base_of(conn, at)
        if below is None:
            return upto > 0 and at.base_segment is None
        at = below
    raise AssertionError("unreachable: the loop ends where there is no base")


def original_of(conn: sa.Connection, state: TurnState) -> TurnState:
    """What a turn's model made of it first, where ``state`` is a variant of that; else the state itself."""
    others = [each for each in states_of(conn, [state.turn]) if each.root == state.root and not each.variant]
    return next((each for each in others if each.end == state.end), state) if state.variant else state
