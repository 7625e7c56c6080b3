"""Sessions, branches and tags: the names that point at turns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store import spans, turns
from kvloom_store.checksum import checked, insert, unpacked, update
from kvloom_store.database import allocate, now_us
from kvloom_store.errors import InvalidName, RefConflict, RefExists, RefNotFound, RemovedMeanwhile
from kvloom_store.names import MAIN, Ref, check_name, nearest
from kvloom_store.schema import branch, session, tag, turn
from kvloom_store.turns import Turn

SHORTEST_ID = 4
"""Hex digits of a turn id that are always shown and always asked for."""

ID_BYTES = 16
"""Bytes of a turn id."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One conversation tree."""

    row: int
    name: str
    settings: dict[str, Any]
    created: int
    updated: int


NO_ROW = 0
"""Of a branch that is yet to be made."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A movable pointer to a turn (None: nothing was said yet)."""

    row: int
    session: int
    name: str
    turn: int | None


@dataclass(frozen=True, slots=True)
class Point:
    """What a ref points at: a turn (None at the very beginning) and, if it names one, the branch that moves on.

    ``token``: the point is inside the turn, where so many tokens of the path are kept.
    """

    session: SessionRow
    turn: int | None
    branch: Branch | None
    token: int | None = None


def create_session(conn: sa.Connection, name: str, settings: Mapping[str, Any]) -> SessionRow:
    """A new session with its branch main. Raises RefExists, InvalidName."""
    check_name("session", name)
    if find_session(conn, name) is not None:
        raise RefExists("session", name)
    now = now_us()
    values = {
        "id": allocate(conn, session),
        "name": name,
        "settings": msgpack.packb(dict(settings)),
        "created": now,
        "updated": now,
    }
    insert(conn, session, values)
    add_branch(conn, values["id"], MAIN, None)
    return _session(values)


def _session(values: Mapping[str, Any]) -> SessionRow:
    settings = unpacked(values["settings"], "session", values["id"])
    return SessionRow(values["id"], values["name"], settings, values["created"], values["updated"])


def sessions(conn: sa.Connection) -> list[SessionRow]:
    """Every session, the one used last first."""
    query = sa.select(session).order_by(session.c.updated.desc(), session.c.id.desc())
    return [_session(checked(session, row)) for row in conn.execute(query)]


def find_session(conn: sa.Connection, name: str) -> SessionRow | None:
    """The session of that name, if there is one.

    A damaged index would hide it, and another one be begun in its place: what it does not find is looked for among all.
    """
    row = conn.execute(sa.select(session).where(session.c.name == name)).one_or_none()
    if row is None:
        row = next((each for each in conn.execute(sa.select(session)) if each.name == name), None)
    return None if row is None else _session(checked(session, row, name=name))


def get_session(conn: sa.Connection, name: str) -> SessionRow:
    """The session of that name. Raises RefNotFound with the nearest names."""
    found = find_session(conn, name)
    if found is None:
        raise RefNotFound("session", name, nearest(name, conn.execute(sa.select(session.c.name)).scalars()))
    return found


def session_of(conn: sa.Connection, row: int) -> SessionRow:
    """The session in a row."""
    return _session(checked(session, conn.execute(sa.select(session).where(session.c.id == row)).one()))


def check_session(conn: sa.Connection, row: int) -> None:
    """Whether a session that is being used is still there. Raises RemovedMeanwhile."""
    if conn.execute(sa.select(session.c.id).where(session.c.id == row)).first() is None:
        raise RemovedMeanwhile


def rename_session(conn: sa.Connection, old: str, new: str) -> SessionRow:
    """Give a session another name. Raises RefNotFound, RefExists, InvalidName."""
    check_name("session", new)
    row = get_session(conn, old).row
    if find_session(conn, new) is not None:
        raise RefExists("session", new)
    values = checked(session, conn.execute(sa.select(session).where(session.c.id == row)).one())
    return _session(update(conn, session, values, name=new))


def change_settings(conn: sa.Connection, row: int, settings: Mapping[str, Any]) -> SessionRow:
    """A session with other settings."""
    values = checked(session, conn.execute(sa.select(session).where(session.c.id == row)).one())
    return _session(update(conn, session, values, settings=msgpack.packb(dict(settings))))


def add_branch(conn: sa.Connection, session_row: int, name: str, at: int | None) -> Branch:
    """A new branch at a turn: one row, and no state. Raises RefExists, InvalidName."""
    check_free(conn, session_row, name)
    now = now_us()
    values: dict[str, Any] = {
        "id": allocate(conn, branch),
        "session": session_row,
        "name": name,
        "turn": at,
        "created": now,
        "updated": now,
    }
    insert(conn, branch, values)
    return Branch(values["id"], session_row, name, at)


def check_free(conn: sa.Connection, session_row: int, name: str) -> None:
    """Whether a branch may be called so. Raises RefExists, InvalidName."""
    check_name("branch", name)
    if _named(conn, branch, session_row, name) or _named(conn, tag, session_row, name):
        raise RefExists("branch or tag", name)


def free_name(conn: sa.Connection, session_row: int, name: str, *, first: int = 2, itself: bool = False) -> str:
    """``name-2`` (or another ``first`` number), ``name-3`` ...: one that is neither a branch nor a tag; ``itself``:
    ``name`` before those."""
    taken = {b.name for b in branches(conn, session_row)} | set(tags(conn, session_row))
    if itself and name not in taken:
        return name
    return next(f"{name}-{n}" for n in itertools.count(first) if f"{name}-{n}" not in taken)


def place_branch(conn: sa.Connection, session_row: int, name: str, at: int | None, *, begin: bool = False) -> str:
    """Have a branch point at a turn, and move none: what it is called. It is ``name``, or, where that points
    elsewhere, ``name`` with a number; one that does already is taken. ``begin``: one that is still empty is begun."""
    there = {each.name: each for each in branches(conn, session_row)}
    found = _placed(name, {each.name: each.turn for each in there.values()}, at)
    if found is not None:
        return found
    if begin and name in there and there[name].turn is None:
        return move_branch(conn, there[name].row, None, at).name
    return add_branch(conn, session_row, free_name(conn, session_row, name, itself=True), at).name


def place_tag(conn: sa.Connection, session_row: int, name: str, at: int) -> str:
    """The same of a tag."""
    found = _placed(name, tags(conn, session_row), at)
    if found is None:
        found = free_name(conn, session_row, name, itself=True)
        add_tag(conn, session_row, found, at)
    return found


def _placed(name: str, there: Mapping[str, int | None], at: int | None) -> str | None:
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    return next((each for each, turn in there.items() if turn == at and numbered.fullmatch(each)), None)


def add_tag(conn: sa.Connection, session_row: int, name: str, at: int) -> None:
    """A name that stays at a turn. Raises RefExists, InvalidName."""
    check_name("tag", name)
    if _named(conn, branch, session_row, name) or _named(conn, tag, session_row, name):
        raise RefExists("branch or tag", name)
    values = {"id": allocate(conn, tag), "session": session_row, "name": name, "turn": at, "created": now_us()}
    insert(conn, tag, values)


def _named(conn: sa.Connection, table: sa.Table, session_row: int, name: str) -> dict[str, Any] | None:
    query = sa.select(table).where(table.c.session == session_row, table.c.name == name)
    row = conn.execute(query).one_or_none()
    return None if row is None else checked(table, row, session=session_row, name=name)


def branches(conn: sa.Connection, session_row: int) -> list[Branch]:
    """The branches of a session, oldest first."""
    return list(_branches(conn, sa.select(branch).where(branch.c.session == session_row)))


def branches_by_session(conn: sa.Connection) -> dict[int, list[Branch]]:
    """The branches of every session, oldest first, in one query."""
    found: dict[int, list[Branch]] = {}
    for each in _branches(conn, sa.select(branch)):
        found.setdefault(each.session, []).append(each)
    return found


def _branches(conn: sa.Connection, query: sa.Select[Any]) -> Iterator[Branch]:
    for row in conn.execute(query.order_by(branch.c.id)):
        values = checked(branch, row)
        yield Branch(values["id"], values["session"], values["name"], values["turn"])


def tags(conn: sa.Connection, session_row: int) -> dict[str, int]:
    """The tags of a session and the turns they name."""
    query = sa.select(tag).where(tag.c.session == session_row).order_by(tag.c.id)
    return {row["name"]: row["turn"] for row in (checked(tag, row) for row in conn.execute(query))}


def move_branch(conn: sa.Connection, row: int, expected: int | None, to: int | None) -> Branch:
    """Move a branch from ``expected`` to another turn, if it is still there (inside a write transaction).

    Raises:
        RefConflict: another process moved it first.
        RefNotFound: another process removed it.
    """
    found = conn.execute(sa.select(branch).where(branch.c.id == row)).one_or_none()
    if found is None:
        raise RefNotFound("branch", str(row))
    old = checked(branch, found)
    if old["turn"] != expected:
        raise RefConflict(old["name"], *(short_id(conn, at) for at in (expected, old["turn"])))
    now = now_us()
    new = update(conn, branch, old, turn=to, updated=now)
    parent = checked(session, conn.execute(sa.select(session).where(session.c.id == new["session"])).one())
    update(conn, session, parent, updated=now)
    return Branch(row, new["session"], new["name"], to)


def move_on(conn: sa.Connection, there: Branch, to: int) -> tuple[Branch, str | None]:
    """Move a branch on to a turn that was added where it stood; if another process moved it, or took it away, the turn
    is kept on a new branch. The branch, and what had happened to the other one ("moved", "removed"), if anything had.
    """
    try:
        return move_branch(conn, there.row, there.turn, to), None
    except (RefConflict, RefNotFound) as error:
        happened = "moved" if isinstance(error, RefConflict) else "removed"
        name = error.name if isinstance(error, RefConflict) else there.name
        return add_branch(conn, there.session, free_name(conn, there.session, name), to), happened


def remove_branch(conn: sa.Connection, row: int) -> None:
    """Take a branch away; its turns stay in the tree."""
    conn.execute(branch.delete().where(branch.c.id == row))


def resolve(conn: sa.Connection, ref: Ref) -> Point:
    """What a ref points at: a branch before a tag before a turn id.

    A token names a point that stays, so it never comes with a branch.

    Raises:
        RefNotFound: with the nearest names, or how many tokens there are.
    """
    if ref.token is not None:
        return _at_token(conn, ref, ref.token)
    owner = get_session(conn, ref.session)
    name = ref.point or MAIN
    found = _named(conn, branch, owner.row, name)
    if found is not None:
        moving = Branch(found["id"], owner.row, name, found["turn"])
        if ref.back == 0:
            return Point(owner, moving.turn, moving)
        return Point(owner, _back(conn, ref, moving.turn), None)
    tagged = _named(conn, tag, owner.row, name)
    at = tagged["turn"] if tagged else _by_id(conn, owner.row, name)
    if at is None:
        known = [b.name for b in branches(conn, owner.row)] + list(tags(conn, owner.row))
        raise RefNotFound("branch, tag or turn", name, nearest(name, known) or known[:3], session=owner.name)
    return Point(owner, _back(conn, ref, at), None)


def _back(conn: sa.Connection, ref: Ref, at: int | None) -> int | None:
    path = [each.row for each in turns.path_to(conn, at)]
    if ref.back > len(path):
        error = RefNotFound("turn", str(ref))
        error.hint = f"there are {len(path)} turns down to {ref.session}@{ref.point or MAIN}; kvloom log shows them"
        raise error
    return path[-1 - ref.back] if ref.back < len(path) else None


def _at_token(conn: sa.Connection, ref: Ref, token: int) -> Point:
    whole = resolve(conn, replace(ref, token=None))
    found = spans.of_path(conn, turns.path_to(conn, whole.turn))
    total = found[-1].end if found else 0
    if token > total:
        error = RefNotFound("token", str(ref))
        path = replace(ref, token=None)
        error.hint = f"the path to {path} has {total} tokens; kvloom show {path} --tokens shows the last"
        raise error
    if token == 0:
        return Point(whole.session, None, None)
    at = spans.containing(found, token)
    return Point(whole.session, at.turn.row, None, None if token == at.state.end else token)


def _by_id(conn: sa.Connection, session_row: int, prefix: str) -> int | None:
    """The turn whose id begins so. Raises InvalidName where several do."""
    text = prefix.lower()
    if not SHORTEST_ID <= len(text) <= 32 or set(text) - set("0123456789abcdef"):
        return None
    low, high = bytes.fromhex(text.ljust(32, "0")), bytes.fromhex(text.ljust(32, "f"))
    query = sa.select(turn).where(turn.c.public_id >= low, turn.c.public_id <= high, turn.c.session == session_row)
    rows = [checked(turn, row, session=session_row) for row in conn.execute(query)]
    rows = [each for each in rows if low <= each["public_id"] <= high]
    if len(rows) > 1:
        raise InvalidName(
            f"{prefix!r} begins the ids of {len(rows)} turns", hint="give more digits (kvloom log shows them)"
        )
    return rows[0]["id"] if rows else None


def short_id(conn: sa.Connection, row: int | None) -> str | None:
    """The shortest unique beginning of a turn's id, within its session."""
    if row is None:
        return None
    owner: Turn = turns.get(conn, row)
    return short_ids(conn, owner.session).get(row, owner.id)  # a damaged index may hide it


def short_ids(conn: sa.Connection, session_row: int) -> dict[int, str]:
    """The shortest unique beginning of each turn id of a session, of at least SHORTEST_ID digits.

    A damaged id is left out: it is told where the turn itself is read.
    """
    query = sa.select(turn.c.id, turn.c.public_id).where(turn.c.session == session_row).order_by(turn.c.public_id)
    rows = [(row, public.hex()) for row, public in conn.execute(query) if _is_id(public)]
    short = {}
    for i, (row, text) in enumerate(rows):
        around = [rows[j][1] for j in (i - 1, i + 1) if 0 <= j < len(rows)]
        shared = max((_shared(text, other) for other in around), default=0)
        short[row] = text[: max(SHORTEST_ID, shared + 1)]
    return short


def _is_id(cell: object) -> bool:
    return isinstance(cell, bytes) and len(cell) == ID_BYTES


def _shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
