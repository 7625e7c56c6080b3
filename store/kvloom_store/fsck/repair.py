"""Repairing a store: first a plan from what a check found, then the steps of it that need no model.

Whatever is done is done in small transactions, each of which leaves the store better than it was: a repair that was
stopped goes on where it was, by checking and planning again. State that must be computed again is only named here
(``Action.RECOMPUTE``); who has the model does it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_proto.records import Provenance, pack
from kvloom_store import checksum, fulltext, refs, removal, scan, search, sqlite, turns
from kvloom_store import segments as state
from kvloom_store.checksum import checked, row_checksum
from kvloom_store.database import Database, now_us
from kvloom_store.errors import CorruptRow, StoreError
from kvloom_store.fsck.aside import set_aside
from kvloom_store.fsck.copies import told_elsewhere
from kvloom_store.fsck.findings import Finding, Kind, Report, Severity
from kvloom_store.fsck.mending import mended
from kvloom_store.fsck.paths import stands
from kvloom_store.fsck.reading import CACHE_OF_STATE, RELEASED, Reader, is_intact
from kvloom_store.fsck.rebuild import rebuild
from kvloom_store.schema import (
    chunk,
    meta,
    metadata,
    model,
    model_digest,
    node,
    provenance,
    segment,
    sequence,
    turn_state,
)


class Action(enum.StrEnum):
    """What is done about findings, in this order."""

    REBUILD = "rebuild"
    REINDEX = "reindex"
    MEND = "mend"
    REMAKE = "remake"
    SET_ASIDE = "set-aside"
    RELEASE = "release"
    INDEX = "index"
    SWEEP = "sweep"
    RECOMPUTE = "recompute"


_WORDS = {
    Action.REBUILD: "write the file anew from all rows that can be read; the old one is kept beside it",
    Action.REINDEX: "make SQLite's own indexes anew",
    Action.MEND: "mend rows of which their checksum says what they were",
    Action.REMAKE: "make rows anew that follow from others",
    Action.SET_ASIDE: "set rows aside that cannot be mended, with what stands on them; they are kept, and not served",
    Action.RELEASE: "forget where state was that is not there any more",
    Action.INDEX: "build the full-text index anew",
    Action.SWEEP: "remove rows that nothing refers to",
    Action.RECOMPUTE: "compute state again, exactly, with the model",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One action, and the findings that it is for."""

    action: Action
    findings: tuple[Finding, ...]

    @property
    def words(self) -> str:
        """What is going to be done, and to how much."""
        return f"{_WORDS[self.action]} ({len(self.findings):,})"

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {"action": self.action, "words": _WORDS[self.action], "findings": len(self.findings)}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair will do. Where the file itself is mended first, the rest is planned from another check."""

    steps: tuple[Step, ...]

    @property
    def segments(self) -> list[int]:
        """Segments that must be computed again; a damaged cell may hold something else than a segment's number."""
        found = [each.row for step in self.steps if step.action == Action.RECOMPUTE for each in step.findings]
        return sorted({row[0] for row in found if row and isinstance(row[0], int)})

    def to_json(self) -> list[dict[str, Any]]:
        """The list ``--json`` prints."""
        return [step.to_json() for step in self.steps]


def plan(report: Report) -> Plan:
    """What can be done about what a check found."""
    found: dict[Action, list[Finding]] = {}
    for each in report.findings:
        action = _action(each)
        if action is not None:
            found.setdefault(action, []).append(each)
    for first in (Action.REBUILD, Action.REINDEX):  # what else was found may only have been read wrong
        if first in found:
            found = {first: found[first]}
    return Plan(tuple(Step(action, tuple(found[action])) for action in Action if action in found))


def _action(found: Finding) -> Action | None:
    kind, table = found.kind, found.table
    if kind in (Kind.UNWRITTEN, Kind.SET_ASIDE):
        return None
    if kind == Kind.BIT:
        return Action.MEND
    if table in ("meta", "sequence", "model_digest", "provenance") and kind in (Kind.ROW, Kind.VALUE):
        return Action.REMAKE
    if table == model_digest.name and kind == Kind.POINTER:  # its model is gone: it is noted again when that is met
        return Action.REMAKE
    if table in CACHE_OF_STATE and kind in (Kind.ROW, Kind.VALUE, Kind.POINTER, Kind.STATE, Kind.CHUNK):
        return Action.RECOMPUTE
    if kind == Kind.STATE or (kind == Kind.POINTER and found.severity == Severity.HEALS):
        return Action.RELEASE
    return {
        Kind.PAGE: Action.REBUILD,
        Kind.SQL_INDEX: Action.REINDEX,
        Kind.INDEX: Action.INDEX,
        Kind.ORPHAN: Action.SWEEP,
    }.get(kind, Action.SET_ASIDE)


def execute(database: Database, planned: Plan, *, told: Callable[[str], None] = lambda _: None) -> None:
    """Do all of a plan that needs no model; ``told`` hears what was done, a line each.

    Raises:
        StoreUnavailable, StoreLocked: what was done before stays done.
    """
    for step in planned.steps:
        for line in _DO[step.action](database, step) if step.action in _DO else ():
            told(line)


def _rebuild(database: Database, _step: Step) -> Iterator[str]:
    yield f"the file was written anew; the old one is {rebuild(database)}"


def _reindex(database: Database, _step: Step) -> Iterator[str]:
    with database.write() as conn:
        sqlite.reindex(conn)
    yield "SQLite's indexes were made anew"


def _mend(database: Database, step: Step) -> Iterator[str]:
    for table, rowid, values in _damaged(database, step):
        with database.read() as conn:
            was = mended(table, values) or told_elsewhere(conn, table, values)
        if was is None:
            continue
        changed = {name: cell for name, cell in was.items() if cell != values[name]}
        with database.write() as conn:
            if scan.row_at(conn, table, rowid) == values:
                scan.put_at(conn, table, rowid, changed)
        yield f"row {rowid} of {table.name}: its {' and its '.join(changed)} was put right"


def _remake(database: Database, step: Step) -> Iterator[str]:
    wrong = {
        int(each.row[0])
        for each in step.findings
        if each.kind == Kind.VALUE and each.table == provenance.name and each.row
    }
    for table, rowid in [*((each[0], each[1]) for each in _damaged(database, step)), *((provenance, n) for n in wrong)]:
        with database.write() as conn:
            if table is provenance:
                scan.put_at(conn, table, rowid, _unknown(rowid))
            else:
                scan.delete_at(conn, table, rowid)
    with database.write() as conn:
        conn.execute(model_digest.delete().where(model_digest.c.model.not_in(sa.select(model.c.id))))
        there = {name for (name,) in conn.execute(sa.select(sequence.c.name))}
        for table in metadata.tables.values():
            if "id" not in table.columns:
                continue
            first = (conn.execute(sa.select(sa.func.max(table.c.id))).scalar() or 0) + 1
            if table.name in there:
                values = checked(sequence, conn.execute(_one(sequence, table.name)).one())
                checksum.update(conn, sequence, values, next=max(first, values["next"]))
            else:
                checksum.insert(conn, sequence, {"name": table.name, "next": first})
        if conn.execute(sa.select(meta).where(meta.c.key == "created")).first() is None:
            checksum.insert(conn, meta, {"key": "created", "value": msgpack.packb(now_us())})
    yield "rows that follow from others were made anew"


def _unknown(row: int) -> dict[str, Any]:
    """The cells of a provenance of which nothing is known any more; its number tells it from others."""
    record = pack(Provenance(0, "unknown", "unknown", "unknown", "unknown", "unknown", f"unknown {row}"))
    values = {"id": row, "digest": checksum.digest(record), "record": record}
    return {**values, "checksum": row_checksum(provenance, values)}


def _one(table: sa.Table, name: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.name == name)


def _set_aside(database: Database, step: Step) -> Iterator[str]:
    damaged = [(table, rowid, "damaged") for table, rowid, _ in _damaged(database, step)]
    told = [(metadata.tables[f.table], int(f.row[0]), f.words) for f in step.findings if f.row and f.kind != Kind.ROW]
    for table, rowid, why in [*damaged, *told]:
        with database.write() as conn:
            count = set_aside(conn, table, rowid, why)
        if count:
            yield f"row {rowid} of {table.name} was set aside" + (
                f", with {count - 1} that stood on it" if count > 1 else ""
            )
    with database.write() as conn:
        fulltext.drop(conn)  # it may hold what was said in turns that were set aside
    search.rebuild(database)


def _damaged(database: Database, step: Step) -> list[tuple[sa.Table, int, dict[str, Any]]]:
    """The damaged rows of the tables that findings are of, with SQLite's own numbers of them."""
    names = {each.table for each in step.findings if each.kind in (Kind.ROW, Kind.BIT)}
    with database.read() as conn:
        return [
            (table, found[0], found[1])
            for table in (metadata.tables[name] for name in metadata.tables if name in names)
            if table is not chunk
            for found in scan.scan(conn, table)
            if not isinstance(found, scan.Gap) and not is_intact(table, found[1])
        ]


def _release(database: Database, step: Step) -> Iterator[str]:
    rows = {int(each.row[0]) for each in step.findings if each.row and each.table == turn_state.name}
    for row in sorted(rows):
        with database.write() as conn:
            values = scan.row_at(conn, turn_state, row)
            if values is None or not is_intact(turn_state, values):
                continue
            gone = {column: None for _, column in RELEASED if not _is_held(conn, values, column)}
            new = {**values, **gone}
            new["checksum"] = row_checksum(turn_state, {k: v for k, v in new.items() if k != "checksum"})
            scan.put_at(conn, turn_state, row, {name: new[name] for name in (*gone, "checksum")})
        yield f"turn state {row} does not name state any more that is not there"


def _is_held(conn: sa.Connection, values: Mapping[str, Any], column: str) -> bool:
    """Whether what a turn state names is there, and of its path."""
    if values[column] is None:
        return True
    target = turn_state if column == "base_state" else segment
    found = conn.execute(sa.select(target.c.id).where(target.c.id == values[column])).first()
    if found is None or column == "base_state":
        return found is not None
    return stands(Reader(conn), values, column) is None


def _index(database: Database, _step: Step) -> Iterator[str]:
    search.rebuild(database)
    yield "the full-text index was built anew"


def _sweep(database: Database, step: Step) -> Iterator[str]:
    """What nothing refers to goes; complete segments stay: their state is found by its tokens."""
    count = 0
    with database.write() as conn:
        state.sweep(conn)
        for each in step.findings:
            if each.row is None or each.table == segment.name:
                continue
            table = metadata.tables[each.table]
            if table is node:
                removal.remove_nodes(conn, {int(each.row[0])})
            elif table is chunk:  # by what makes it one: a damaged key is not always what a finding shows
                conn.execute(chunk.delete().where(~sa.exists().where(segment.c.id == chunk.c.segment)))
            else:
                keys = [column == cell for column, cell in zip(table.primary_key.columns, each.row, strict=True)]
                conn.execute(table.delete().where(*keys))
            count += 1
    if count:
        yield f"{count} rows that nothing referred to were removed"


_DO: dict[Action, Callable[[Database, Step], Iterator[str]]] = {
    Action.REBUILD: _rebuild,
    Action.REINDEX: _reindex,
    Action.MEND: _mend,
    Action.REMAKE: _remake,
    Action.SET_ASIDE: _set_aside,
    Action.RELEASE: _release,
    Action.INDEX: _index,
    Action.SWEEP: _sweep,
}


def forget_state(database: Database, segment_id: int) -> None:
    """Take a segment away that cannot be computed again as it was, with all that stands on it.

    Turns keep their tokens and the passes that made them: their state is computed when it is needed.
    """
    with database.write() as conn:
        set_aside(conn, segment, segment_id, "")


def model_of(conn: sa.Connection, segment_id: int) -> tuple[int, str | None]:
    """The root a segment belongs to (0: unknown), and a session's name whose model that is."""
    where = conn.execute(
        sa.select(node.c.root).join(segment, segment.c.node == node.c.id).where(segment.c.id == segment_id)
    ).scalar()
    owners = conn.execute(sa.select(turn_state.c.root, turn_state.c.turn).where(turn_state.c.segment == segment_id))
    owner = owners.first()
    root = owner.root if owner is not None else where
    if root is None:
        return 0, None
    for row in conn.execute(sa.select(turn_state.c.turn).where(turn_state.c.root == root).limit(32)).scalars().all():
        try:
            return root, refs.session_of(conn, turns.get(conn, row).session).name
        except (CorruptRow, StoreError):
            continue
    return root, None
