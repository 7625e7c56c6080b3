"""Every row of every table: can it be read, and is it the one that was written?"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from kvloom_proto.errors import FormatError
from kvloom_proto.records import ChunkSpec, Layers, Manifest, expand, read_manifest
from kvloom_store import fulltext, restore, scan, sqlite
from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.copies import told_elsewhere
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.mending import mended
from kvloom_store.fsck.reading import CACHE_OF_STATE, Progress, Reader, finding, is_intact, key_of, shown
from kvloom_store.schema import chunk, metadata, segment

PROGRESS_BYTES = 16 << 20

_LOSS = {
    "session": "this conversation cannot be opened",
    "turn": "what was said there cannot be read, and nothing below it can be gone on with",
    "turn_state": "which tokens the model made of this turn is not known; its text is kept",
    "node": "the tokens on this path are not known; the texts of its turns are kept",
    "root": "no state of this model can be found",
    "model": "no state of this model can be found",
    "branch": "this name does not say any more where it points; the turns are kept",
    "tag": "this name does not say any more where it points; the turns are kept",
    "pin": "the state of this turn, and of those before it, may be dropped now",
    "exploration": "this search cannot be resumed; its turns are kept",
    "candidate": "this search cannot be resumed; its turns are kept",
    "quarantine": "something that was set aside earlier cannot be read",
}
"""What it means that a row is lost."""


def pages(reader: Reader, *, quick: bool) -> Iterator[Finding]:
    """What SQLite itself finds wrong."""
    try:
        trees = sqlite.tree_names(reader.conn)
    except DBAPIError:
        trees = {}
    for told in sqlite.integrity(reader.conn, quick=quick):
        line = " ".join(told.replace("*** in database main ***", "").split())
        if re.search(r" (missing from index|entries in index|not in index)|entry in index", line):
            words = f"{line}: rows may not be found; the index is made anew from the rows"
            yield finding(Kind.SQL_INDEX, Severity.HEALS, "", None, None, words)
            continue
        named = re.search(r"\b(?:Tree|On tree page) (\d+)\b", line)
        kind, name = trees.get(int(named[1]), ("", "")) if named else ("", "")
        if kind == "index":
            words = f"the file is damaged in an index of {name} ({line}): it is made anew"
            yield finding(Kind.PAGE, Severity.HEALS, name, None, None, words)
        else:
            words = f"the file is damaged{f' in {name}' if name else ''} ({line}): rows that can be read are kept"
            yield finding(Kind.PAGE, Severity.HEALS, name, None, None, words)


def tables(reader: Reader) -> Iterator[Finding]:
    """Every table but that of chunks: each row's checksum, and rows that cannot be read at all."""
    for table in metadata.tables.values():
        if table is not chunk:
            for values in reader.rows_of(table):
                if isinstance(values, scan.Gap):
                    yield _gap(reader, table, values)
                    continue
                reader.rows += 1
                if not is_intact(table, values):
                    yield _damaged(reader, table, values)


def _gap(reader: Reader, table: sa.Table, gap: scan.Gap) -> Finding:
    reader.torn.add(table.name)
    where = f"behind row {gap.after}" if gap.after >= 0 else "from the first one on"
    where += f" and before row {gap.before}" if gap.before is not None else ""
    derived = table.name in CACHE_OF_STATE
    words = f"rows of {table.name} {where} cannot be read ({gap.why})"
    means = "state is computed again" if derived else "what they said is lost, unless a backup has it"
    return finding(Kind.PAGE, Severity.HEALS if derived else Severity.LOST, table, None, None, f"{words}: {means}")


def _damaged(reader: Reader, table: sa.Table, values: dict[str, Any]) -> Finding:
    key = key_of(table, values)
    reader.damaged.setdefault(table.name, set()).add(key)
    what = f"row {shown(key)} of {table.name} is damaged (its checksum does not match)"
    was = mended(table, values) if table is not chunk else None
    if was is not None:
        words = f"{what}: one bit of it has changed, and the checksum says which"
        return finding(Kind.BIT, Severity.HEALS, table, key, reader.at(table, was), words)
    try:
        was = told_elsewhere(reader.conn, table, values)
    except DBAPIError:
        was = None
    if was is not None:
        words = f"{what}: other rows say what it was"
        return finding(Kind.BIT, Severity.HEALS, table, key, reader.at(table, was), words)
    if table.name in ("segment", "chunk"):
        words, severity = f"{what}: it is computed again from the tokens", Severity.HEALS
    elif table.name in ("meta", "sequence", "model_digest"):
        words, severity = f"{what}: it is made anew", Severity.HEALS
    elif table.name == "provenance":
        words = f"{what}: state that was computed so can be read; computed again, it may come out with other bits"
        severity = Severity.HEALS
    else:
        words, severity = f"{what}: {_LOSS.get(table.name, 'it cannot be used')}", Severity.LOST
    return finding(Kind.ROW, severity, table, key, reader.at(table, values), words)


def chunks(reader: Reader, *, blobs: bool, progress: Progress | None) -> Iterator[Finding]:
    """Every chunk: its row, its blob against the digests in its segment's manifest, and what it decodes to.

    Without ``blobs`` the bytes themselves are not read: a row is held against the digest that the manifest has.
    """
    manifests = _Manifests(reader)
    total = sum(size or 0 for (size,) in reader.ask(sa.select(sa.func.sum(chunk.c.length)))) if progress else 0
    told = 0
    for values in reader.rows_of(chunk, lengths=() if blobs else ("blob",)):
        if isinstance(values, scan.Gap):
            yield _gap(reader, chunk, values)
            continue
        reader.rows += 1
        found = manifests.spec_of(values)
        wrong = _chunk(reader, values, found, blobs)
        if wrong is not None:
            yield wrong
        if blobs and isinstance(values["blob"], bytes):
            reader.bytes += len(values["blob"])
        if progress is not None and reader.bytes - told >= PROGRESS_BYTES:
            told = reader.bytes
            progress(told, max(total, told))


_Found = tuple[ChunkSpec, Layers] | None


def _chunk(reader: Reader, values: dict[str, Any], found: _Found, blobs: bool) -> Finding | None:
    key = key_of(chunk, values)
    name = f"chunk {values['layer']} at {values['position']} of segment {values['segment']}"
    if found is None:  # an incomplete segment, a damaged one, or one that has no such chunk
        if blobs and not is_intact(chunk, values):
            return _damaged(reader, chunk, values)
        return None
    spec, layers = found
    if not blobs:
        if values["blob"] == spec.stored_length and is_intact(chunk, values, spec.stored_digest):
            return None
        words = f"{name} is not what was stored: it is computed again from the tokens"
    else:
        try:
            restore.checked_raw(values, layers, int(values["segment"]), spec)
            return None
        except FormatError as error:
            words = f"{error}: it is computed again from the tokens"
    reader.damaged.setdefault("chunk", set()).add(key)
    at = reader.at_segment(values["segment"])
    return finding(Kind.CHUNK, Severity.HEALS, chunk, key, at, words)


class _Manifests:
    """The manifests of the segments whose chunks are being read, the last few of them."""

    KEPT = 16

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._kept: OrderedDict[Any, dict[Any, ChunkSpec]] = OrderedDict()
        self._layers: dict[Any, Layers] = {}

    def spec_of(self, values: dict[str, Any]) -> _Found:
        """What the manifest says of a chunk, and the layers of its segment; None if no sound manifest has it."""
        row = values["segment"]
        if row not in self._kept:
            manifest = manifest_of(self._reader, row)
            chunks = manifest.chunks if manifest is not None else ()
            self._kept[row] = {(int(spec.kind), spec.layer, spec.position): spec for spec in chunks}
            self._layers[row] = expand(manifest.layers) if manifest is not None else Layers()
            if len(self._kept) > self.KEPT:
                self._layers.pop(self._kept.popitem(last=False)[0])
        spec = self._kept[row].get((values["kind"], values["layer"], values["position"]))
        return None if spec is None else (spec, self._layers[row])


def manifest_of(reader: Reader, row: Any) -> Manifest | None:
    """The manifest of a segment, if its row is complete and sound."""
    found = reader.ask(sa.select(segment).where(segment.c.id == row)) if isinstance(row, int) else []
    try:
        values = checked(segment, found[0]) if found else None
        return read_manifest(values["manifest"]) if values is not None and values["complete"] else None
    except (CorruptRow, FormatError):
        return None


def missing_tables(reader: Reader) -> Iterator[Finding]:
    """Tables of the schema that the file does not have."""
    there = {name for kind, name in sqlite.tree_names(reader.conn).values() if kind == "table"}
    for name in metadata.tables:
        if name not in there:
            reader.torn.add(name)
            words = f"the table {name} is not in the file: it is made anew, empty"
            yield finding(Kind.PAGE, Severity.LOST, name, None, None, words)
    made = sqlite.definitions(reader.conn)
    for name, sql in _definitions().items():
        is_index = name not in metadata.tables and fulltext.TABLE not in name
        if made[name] != sql if name in made else is_index:  # of tables that are missing is told above
            words = f"the file does not say of {name} what it was made as: it is written anew"
            yield finding(Kind.PAGE, Severity.HEALS, name, None, None, words)


def _definitions() -> dict[str, str]:
    """What every table and index of the schema is made as."""
    engine = sa.create_engine("sqlite://")
    try:
        with engine.begin() as conn:
            metadata.create_all(conn)
            fulltext.create(conn)
            return sqlite.definitions(conn)
    finally:
        engine.dispose()
