"""Replies that are being generated: what there is of each, so that a killed process loses a few tokens and no more.

A run notes its reply every few tokens, in one row, and takes the row away in the transaction that adds the whole
reply's turn. A row whose process is dead becomes an interrupted turn, the next time the store is opened or its branch
is used; its state was not stored, so it is replayed by the passes that the row names, to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_proto.errors import KVLoomError
from kvloom_proto.records import Schedule, pack, read_schedule
from kvloom_store import owner, refs, trie, turns
from kvloom_store.checksum import checked, row_checksum, sealed, unpacked
from kvloom_store.database import Database, now_us
from kvloom_store.errors import StoreError
from kvloom_store.refs import Branch
from kvloom_store.schema import journal, segment, turn, turn_state
from kvloom_store.trie import pack_tokens, unpack_tokens

ELSEWHERE_US = 600_000_000
"""A row of another machine's process that has not been touched for so long was left by a dead one."""

INTERRUPTED = "interrupted"
"""The finish reason of a reply that was stopped before it had ended."""

ENDED = "ended"
"""Among the timings in a row: the finish reason. It is not one of the turn's."""

_running: set[bytes] = set()
"""The runs of this process that are still going on."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What there is of a reply: ``tokens`` behind the path of the state ``tip``, which is the turn's it replies to.

    Their state was computed by ``schedule`` over [state_start, state_end), on the base that a turn state would name.
    ``branch`` has no row (``refs.NO_ROW``) where the reply gets a branch of its own. Of several that grow together one
    may have ended before the others: ``finish_reason`` says how.
    """

    branch: Branch
    turn: int
    tip: int
    root: int
    tokens: list[int]
    text: str
    finish_reason: str
    continues: bool
    settings: Mapping[str, Any]
    timings: Mapping[str, Any]
    scores: bytes | None
    state_start: int
    state_end: int
    base_state: int | None
    base_segment: int | None
    schedule: Schedule
    provenance: int
    variant: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A reply of a dead process that was kept as a turn."""

    session: str
    branch: str
    turn: str
    tokens: int


def note(conn: sa.Connection, run: bytes, reply: Unfinished, *, first: bool) -> None:
    """Note how far a reply has got (inside a write transaction). ``run`` are 16 random bytes; ``first``: a new row."""
    values = {
        "run": run,
        "owner": owner.this_process(),
        "turn": reply.turn,
        "tip": reply.tip,
        "root": reply.root,
        "branch": reply.branch.row,
        "name": reply.branch.name,
        "tokens": pack_tokens(reply.tokens),
        "text": reply.text,
        "continues": int(reply.continues),
        "settings": msgpack.packb(dict(reply.settings)),
        "timings": msgpack.packb({**reply.timings, ENDED: reply.finish_reason}),
        "scores": reply.scores,
        "state_start": reply.state_start,
        "state_end": reply.state_end,
        "base_state": reply.base_state,
        "base_segment": reply.base_segment,
        "schedule": pack(reply.schedule),
        "provenance": reply.provenance,
        "variant": int(reply.variant),
        "updated": now_us(),
    }
    if first:
        conn.execute(journal.insert(), sealed(journal, values))
    else:  # if it was taken for a dead process's meanwhile, it is not put back
        conn.execute(
            journal.update().where(journal.c.run == run).values(**values, checksum=row_checksum(journal, values))
        )
    _running.add(run)


def remove(conn: sa.Connection, run: bytes) -> None:
    """Forget a reply: it has ended, and its turn is added in this transaction."""
    conn.execute(journal.delete().where(journal.c.run == run))


def over(run: bytes) -> None:
    """A run of this process does not go on; if its row is still there, it is a dead one's from now on."""
    _running.discard(run)


def recover(database: Database) -> list[Kept]:
    """Make interrupted turns of replies whose processes are dead; those of living ones are left alone.

    Nobody is waited for: where somebody else is writing, or nothing can be written, it is left for the next time; and
    where the rows cannot be read, for a check (which opens the store, too).
    """
    if database.read_only:
        return []
    dead, found = [], []
    with contextlib.suppress(StoreError), database.read() as conn:
        columns = (journal.c.run, journal.c.owner, journal.c.updated)
        dead = [row.run for row in conn.execute(sa.select(*columns)) if not _lives(row)]
    for run in dead:
        with contextlib.suppress(StoreError), database.write(wait=False) as conn:
            found.append(_recovered(conn, run))
    return [each for each in found if each is not None]


def _lives(row: Any) -> bool:
    if row.run in _running:
        return True
    seen = owner.lives(str(row.owner))
    if seen and str(row.owner) == owner.this_process():
        return False  # a run of this very process, which is over
    if seen is None and isinstance(row.updated, int):
        return row.updated > now_us() - ELSEWHERE_US
    return bool(seen)


def _recovered(conn: sa.Connection, run: bytes) -> Kept | None:
    """Make a turn of one row; None if somebody did before, or its session is gone, or it is damaged (it then stays)."""
    found = conn.execute(sa.select(journal).where(journal.c.run == run)).one_or_none()
    if found is None:
        return None
    try:
        values = checked(journal, found, run=run)
        settings, timings = (unpacked(values[name], "journal", run) for name in ("settings", "timings"))
        reason = timings.pop(ENDED, INTERRUPTED)
        schedule = read_schedule(values["schedule"])
        is_there = _there(conn, turn, values["turn"]) and _there(conn, turn_state, values["tip"])
        parent = turns.get(conn, values["turn"]) if is_there else None
        tip = turns.state(conn, values["tip"]) if is_there else None
        path = trie.tokens_to(conn, tip.position.node, tip.position.offset) if tip else []
    except KVLoomError:
        return None
    remove(conn, run)
    if parent is None or tip is None:
        return None
    tokens = unpack_tokens(values["tokens"])
    message = {"role": "assistant", "content": values["text"]}
    made = turns.add_turn(
        conn,
        parent.session,
        parent,
        message,
        continues=bool(values["continues"]),
        finish_reason=reason if isinstance(reason, str) else INTERRUPTED,
        settings=settings,
        timings=timings,
    )
    turns.add_state(
        conn,
        made.row,
        values["root"],
        tokens,
        tip.end,
        trie.extend(conn, values["root"], path + tokens, start_at=tip.position),
        schedule=schedule,
        provenance=values["provenance"],
        hidden=None,
        hidden_dtype=None,
        variant=bool(values["variant"]),
        scores=values["scores"],
        **_base(conn, values),
    )
    branch, _ = refs.move_on(conn, Branch(values["branch"], parent.session, values["name"], parent.row), made.row)
    return Kept(refs.session_of(conn, parent.session).name, branch.name, made.id, len(tokens))


def _base(conn: sa.Connection, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the state stands on. If that was taken away with another session, nothing of it is held."""
    base_state = values["base_state"] if _there(conn, turn_state, values["base_state"]) else None
    base_segment = values["base_segment"] if _there(conn, segment, values["base_segment"]) else None
    if values["state_start"] and base_state is None and base_segment is None:
        return {"state_start": 0, "state_end": 0, "base_state": None, "base_segment": None}
    place = {name: values[name] for name in ("state_start", "state_end")}
    return {**place, "base_state": base_state, "base_segment": base_segment}


def _there(conn: sa.Connection, table: sa.Table, row: int | None) -> bool:
    return row is not None and conn.execute(sa.select(table.c.id).where(table.c.id == row)).first() is not None
