"""What people said: sessions, turns, the names that point at them, searches. Rows that are damaged are left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.records import read_provenance
from kvloom_store.checksum import digest, unpacked
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.reading import CACHE_OF_STATE, RELEASED, Reader, finding, key_of, shown
from kvloom_store.schema import (
    branch,
    candidate,
    exploration,
    metadata,
    provenance,
    sequence,
    tag,
    turn,
)
from kvloom_store.turns import chained_digest

_PACKED = {
    "meta": ("value",),
    "model": ("fields",),
    "session": ("settings",),
    "exploration": ("settings",),
    "candidate": ("score", "found"),
}
"""Columns that hold MessagePack, by table; those of turns are read with their digest."""


def values(reader: Reader) -> Iterator[Finding]:
    """Cells that must be read by a rule: MessagePack, provenances."""
    for table in metadata.tables.values():
        for row in reader.intact(table) if table.name in _PACKED else ():
            for name in _PACKED[table.name]:
                if row[name] is None:
                    continue
                try:
                    unpacked(row[name], table.name, key_of(table, row))
                except CorruptRow:
                    words = f"{name} of row {row.get('id', row.get('key'))} of {table.name} cannot be read"
                    yield finding(Kind.VALUE, Severity.LOST, table, key_of(table, row), reader.at(table, row), words)
    for row in reader.intact(provenance):
        try:
            read_provenance(row["record"])
            sound = digest(row["record"]) == row["digest"]
        except FormatError:
            sound = False
        if not sound:
            words = f"provenance {row['id']} does not say how state was computed: it cannot be computed again exactly"
            yield finding(Kind.VALUE, Severity.LOST, provenance, (row["id"],), None, words)


def turns(reader: Reader) -> Iterator[Finding]:
    """Each turn's message and its digest, which is chained over its parent's."""
    for row in reader.intact(turn):
        try:
            message = unpacked(row["message"], "turn", (row["id"],))
            unpacked(row["settings"], "turn", (row["id"],))
            unpacked(row["timings"], "turn", (row["id"],))
            said = isinstance(message, dict) and message.get("role") == row["role"]
        except CorruptRow:
            message, said = None, False
        if not said:
            words = "the message of this turn cannot be read, or is another role's"
            yield finding(Kind.VALUE, Severity.LOST, turn, (row["id"],), reader.at_turn(row["id"]), words)
            continue
        above = b"" if row["parent"] is None else _digest_of(reader, row["parent"])
        if above is not None and chained_digest(above, message) != row["digest"]:
            words = "this turn does not follow the one it stands below: its digest is over another history"
            yield finding(Kind.VALUE, Severity.LOST, turn, (row["id"],), reader.at_turn(row["id"]), words)


def _digest_of(reader: Reader, row: int) -> bytes | None:
    found = [] if reader.is_damaged(turn, row) else reader.ask(sa.select(turn.c.digest).where(turn.c.id == row))
    return found[0][0] if found else None


def pointers(reader: Reader) -> Iterator[Finding]:
    """Rows that name another: it is there, and of the same session."""
    for table in metadata.tables.values():
        for column in table.columns:
            for key in column.foreign_keys:
                yield from _missing(reader, table, column, key.column.table)
    above = turn.alias()
    yield from _stray(reader, turn, above, turn.c.parent, "stands below a turn of another session, or a later one",
                      (above.c.session != turn.c.session) | (above.c.id >= turn.c.id))  # fmt: skip
    for named in (branch, tag, exploration):
        yield from _stray(reader, named, turn, named.c.turn, "points at a turn of another session",
                          turn.c.session != named.c.session)  # fmt: skip
    parent = candidate.alias()
    yield from _stray(reader, candidate, parent, candidate.c.parent, "continues a candidate of another search",
                      (parent.c.exploration != candidate.c.exploration) | (parent.c.id >= candidate.c.id))  # fmt: skip
    yield from _candidates(reader)


def _missing(reader: Reader, table: sa.Table, column: sa.Column[Any], target: sa.Table) -> Iterator[Finding]:
    """Rows that name one that is not there; where rows of a table cannot be read, that was told already."""
    if target.name in reader.torn or table.name in reader.torn:
        return
    there = target.alias()
    keys = [table.columns[each.name] for each in table.primary_key.columns]
    query = sa.select(*keys, column.label("named")).join(there, there.c.id == column, isouter=True)
    for row in reader.ask(query.where(column.is_not(None), there.c.id.is_(None))):
        key = key_of(table, {each.name: cell for each, cell in zip(keys, row, strict=False)})
        if key in reader.damaged.get(table.name, ()):
            continue
        derived = table.name in CACHE_OF_STATE or (table.name, column.name) in RELEASED
        words = f"{column.name} of row {shown(key)} of {table.name} names {target.name} {row.named}, which is not there"
        words += ": that state is computed again" if derived else ": it cannot be used"
        severity = Severity.HEALS if derived else Severity.LOST
        at = reader.at(table, {"turn": None, **dict(row._mapping)}) if "id" in table.columns else None
        yield finding(Kind.POINTER, severity, table, key, at, words)


def _stray(
    reader: Reader,
    table: sa.Table,
    target: sa.FromClause,
    column: sa.Column[Any],
    what: str,
    wrong: sa.ColumnElement[bool],
) -> Iterator[Finding]:
    """Rows whose pointer leads somewhere it must not."""
    query = sa.select(table.c.id, column).join(target, target.c.id == column).where(wrong).order_by(table.c.id)
    named = turn if target is not candidate and table is not candidate else candidate
    for row, to in reader.ask(query):
        if reader.is_damaged(table, row) or reader.is_damaged(named, to):
            continue
        at = reader.at_turn(row if table is turn else to if named is turn else None)
        words = f"{table.name} {row} {what} ({to})"
        yield finding(Kind.POINTER, Severity.LOST, table, (row,), at, words)


def _candidates(reader: Reader) -> Iterator[Finding]:
    """A candidate's turn ends a path that goes through the turn its search began at, and through its parent's."""
    parent, search = candidate.alias(), exploration
    columns = (candidate.c.id, candidate.c.turn, search.c.turn.label("began"), parent.c.turn.label("above"))
    joined = candidate.join(search, search.c.id == candidate.c.exploration)
    joined = joined.outerjoin(parent, parent.c.id == candidate.c.parent)
    for row in reader.ask(sa.select(*columns).select_from(joined).order_by(candidate.c.id)):
        if reader.is_damaged(candidate, row.id) or reader.damaged.get("turn") or "turn" in reader.torn:
            continue
        up = sa.select(turn.c.id, turn.c.parent).where(turn.c.id == row.turn).cte("up", recursive=True)
        up = up.union(sa.select(turn.c.id, turn.c.parent).where(turn.c.id == up.c.parent))
        path = {found for (found,) in reader.ask(sa.select(up.c.id))}
        if path and not {row.began, row.above or row.began} <= path:
            words = f"candidate {row.id} is not on a path from where its search began: the search cannot be resumed"
            yield finding(Kind.POINTER, Severity.LOST, candidate, (row.id,), reader.at_turn(row.turn), words)


def numbers(reader: Reader) -> Iterator[Finding]:
    """The next row id of each table is behind all there are."""
    known = {row["name"]: row["next"] for row in reader.intact(sequence)}
    damaged = {str(key[0]) for key in reader.damaged.get("sequence", ())}
    for table in metadata.tables.values():
        if "id" not in table.columns or table.name in damaged or "sequence" in reader.torn:
            continue
        found = reader.ask(sa.select(sa.func.max(table.c.id)))
        last = (found[0][0] or 0) if found else 0
        if reader.damaged.get(table.name) and known.get(table.name, 0) <= last:
            continue  # the number of the last row may be what is damaged
        if known.get(table.name, 0) <= last:
            words = f"the next number of {table.name} is not behind its last row: it is made anew"
            yield finding(Kind.VALUE, Severity.HEALS, sequence, (table.name,), None, words)
