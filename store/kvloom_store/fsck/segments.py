"""State: what each segment says it holds, what it stands on, and whether all its chunks are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.records import Manifest, read_manifest, read_schedule
from kvloom_store import restore, trie
from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.paths import same_path, tiles
from kvloom_store.fsck.reading import Reader, finding
from kvloom_store.planner import StateDamaged
from kvloom_store.schema import chunk, node, provenance, segment


def segments(reader: Reader) -> Iterator[Finding]:
    """Every complete segment: its manifest, its schedule, its chunks, its place on the path and what is below it."""
    for row in reader.intact(segment):
        if not row["complete"]:
            continue
        for wrong in _wrong(reader, row):
            words = f"segment {row['id']} (tokens {row['start']} to {row['end']}) {wrong}"
            words += ": it is computed again from the tokens"
            yield finding(Kind.STATE, Severity.HEALS, segment, (row["id"],), reader.at_segment(row["id"]), words)


def is_whole(conn: sa.Connection, row: int) -> bool:
    """Whether a segment is there, all it says is right, and all its chunks are what was written."""
    try:
        [values] = [checked(segment, each) for each in conn.execute(sa.select(segment).where(segment.c.id == row))]
        link = restore.link_of(conn, row)
        trie.tokens_before(conn, link.node, link.end)
        for _ in restore.read_back(conn, link, link.end):
            pass
    except (CorruptRow, StateDamaged, ValueError):
        return False
    return bool(values["complete"]) and not any(_wrong(Reader(conn), values))


def _wrong(reader: Reader, row: dict[str, Any]) -> Iterator[str]:
    try:
        manifest = read_manifest(row["manifest"])
    except FormatError as error:
        yield f"has a manifest that cannot be read ({error})"
        return
    if (manifest.start, manifest.end) != (row["start"], row["end"]):
        yield "has the manifest of other tokens"
    if (manifest.raw_bytes, manifest.stored_bytes) != (row["raw_bytes"], row["stored_bytes"]):
        yield "does not have the size its manifest says"
    try:
        if not tiles(read_schedule(row["schedule"]), row["start"], row["end"]):
            yield "has recorded passes that do not cover it"
    except FormatError as error:
        yield f"has recorded passes that cannot be read ({error})"
    yield from _pieces(reader, row["id"], manifest)
    if not reader.ask(sa.select(provenance.c.id).where(provenance.c.id == row["provenance"])):
        yield "was computed on nobody knows what"
    place = reader.ask(sa.select(node.c.start, node.c.length).where(node.c.id == row["node"]))
    if place and not reader.is_damaged(node, row["node"]) and not place[0][0] < row["end"] <= sum(place[0]):
        yield "does not end in the edge it says"
    yield from _base(reader, row)


def _pieces(reader: Reader, row: int, manifest: Manifest) -> Iterator[str]:
    """Chunks that the manifest names and that are not there. (Those that are there were read.)"""
    columns = (chunk.c.kind, chunk.c.layer, chunk.c.position)
    there = {tuple(each) for each in reader.ask(sa.select(*columns).where(chunk.c.segment == row))}
    missing = [spec for spec in manifest.chunks if (int(spec.kind), spec.layer, spec.position) not in there]
    if missing:
        first = missing[0]
        yield f"lacks {len(missing)} of its {len(manifest.chunks)} chunks, the first at token {first.position}"
    if len(there) > len(manifest.chunks) - len(missing):
        yield "has chunks that its manifest does not name"


def _base(reader: Reader, row: dict[str, Any]) -> Iterator[str]:
    """What a segment stands on: nothing at position 0, else one that is whole and holds its path up to there."""
    if row["base_segment"] is None:
        if row["start"] != 0:
            yield "stands on nothing, and does not begin at the first token"
        return
    if reader.is_damaged(segment, row["base_segment"]):
        return
    columns = (segment.c.node, segment.c.start, segment.c.end, segment.c.complete)
    for at, start, end, complete in reader.ask(sa.select(*columns).where(segment.c.id == row["base_segment"])):
        if not complete:
            yield f"stands on segment {row['base_segment']}, which was given up"
        elif not start < row["start"] <= end:
            yield f"stands on segment {row['base_segment']}, which does not reach to where it begins"
        elif not same_path(reader, at, row["node"], row["start"]):
            yield f"stands on segment {row['base_segment']}, which is of another path"
