"""What a store holds, in figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from kvloom_proto.errors import FormatError
from kvloom_proto.records import STORED_BY_ROW, LayerKind, LayerSpec, expand, read_manifest
from kvloom_store import roots, sqlite
from kvloom_store.checksum import check_numbers
from kvloom_store.database import Database
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import branch, node, root, segment, session, turn, turn_state


def stats(database: Database, session_row: int | None = None) -> dict[str, Any]:
    """Counts and bytes of a store, or of one session.

    ``tokens`` and ``state_logical`` count each token of each distinct path once: the latter is the uncompressed size
    of the state that is held for them, and of every keyframe. ``state_stored`` is what it takes in the file,
    side-by-side variants and compression included; ``state_lossy`` of that is not exact. ``state_if_snapshots`` is what
    one whole snapshot a reply would take, uncompressed: all rows, of windows those that are still seen, and one
    keyframe. ``file`` is always the whole file with its log.
    """
    with database.read() as conn:
        mine = sa.true() if session_row is None else turn.c.session == session_row
        states = sa.select(turn_state).join(turn, turn.c.id == turn_state.c.turn).where(mine).subquery()
        segments = _segments(conn, None if session_row is None else states)
        layers = _layers(conn, segments)
        widths = {
            row: sum(e.row_bytes / (e.block or 1) for e in some if e.kind in STORED_BY_ROW)
            for row, some in layers.items()
        }
        covered = _covered(conn, segments, widths)
        frames = sum(row.raw_bytes - (row.end - row.start) * widths[row.root] for row in segments)
        logical = sum((end - start) * width for (_, width), spans in covered.items() for start, end in spans) + frames
        replies = conn.execute(
            sa.select(states.c.root, states.c.state_end)
            .select_from(states.join(turn, turn.c.id == states.c.turn))
            .where(turn.c.role == "assistant")
        )
        return {
            "sessions": _count(conn, session, sa.true() if session_row is None else session.c.id == session_row),
            "branches": _count(conn, branch, sa.true() if session_row is None else branch.c.session == session_row),
            "turns": _count(conn, turn, mine),
            "tokens": _tokens(conn, None if session_row is None else states),
            "segments": len(segments),
            "bytes": {
                "file": sqlite.file_bytes(database.path),
                "state_stored": sum(row.stored_bytes for row in segments),
                "state_lossy": sum(row.stored_bytes for row in segments if row.lossy),
                "state_logical": logical,
                "state_if_snapshots": sum(_snapshot(layers.get(root, []), end) for root, end in replies),
            },
        }


def by_model(database: Database) -> list[dict[str, Any]]:
    """Each model the store holds something of, the one seen first first: sessions and turns it has read, distinct
    tokens, and bytes of its state. ``held`` of the turns have state; the others are read again when they are needed."""
    c = turn_state.c
    holds = c.segment.is_not(None) | (c.state_start == c.state_end)
    with database.read() as conn:
        found = []
        for row in roots.models(conn):
            tries = sa.select(root.c.id).where(root.c.model == row["id"])
            read = sa.select(sa.func.count(sa.distinct(c.turn))).where(c.root.in_(tries))
            sessions = sa.select(sa.func.count(sa.distinct(turn.c.session))).join(turn_state, c.turn == turn.c.id)
            tokens = sa.select(sa.func.coalesce(sa.func.sum(node.c.length), 0)).where(node.c.root.in_(tries))
            stored = sa.select(sa.func.coalesce(sa.func.sum(segment.c.stored_bytes), 0)).join(node)
            counts = {
                "sessions": sessions.where(c.root.in_(tries)),
                "turns": read,
                "held": read.where(holds),
                "tokens": tokens,
                "bytes": stored.where(node.c.root.in_(tries), segment.c.complete == 1),
            }
            made = {name: int(conn.execute(query).scalar_one()) for name, query in counts.items()}
            if made["turns"] or made["bytes"]:
                about = {"name": row["name"], "dtype": row["fields"].get("dtype"), "digest": row["digest"].hex()}
                found.append({**about, **made, "fields": row["fields"]})
        return found


def _layers(conn: sa.Connection, segments: list[sa.Row[Any]]) -> dict[int, Sequence[LayerSpec]]:
    """What the layers of each root's model hold, from the first manifest of its segments that can be read."""
    found: dict[int, Sequence[LayerSpec]] = {}
    for row in segments:
        if row.root not in found:
            manifest = conn.execute(sa.select(segment.c.manifest).where(segment.c.id == row.id)).scalar_one()
            with contextlib.suppress(FormatError):  # a damaged one is told of when it is needed
                found[row.root] = expand(read_manifest(manifest).layers)
    return {each: found.get(each, []) for each in {row.root for row in segments}}


def _snapshot(layers: Sequence[LayerSpec], tokens: int) -> int:
    """Bytes of one whole snapshot of the state after so many tokens."""
    size = 0
    for each in layers:
        if each.kind in (LayerKind.ROWS, LayerKind.BLOCKS):
            size += each.row_bytes * each.rows_before(tokens)
        elif each.kind == LayerKind.WINDOW:
            size += each.row_bytes * min(tokens, each.window - 1)
        else:
            size += each.row_bytes if tokens else 0
    return size


def _count(conn: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool]) -> int:
    return int(conn.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one())


def _segments(conn: sa.Connection, states: sa.Subquery | None) -> list[sa.Row[Any]]:
    """The complete segments, of one session those its turns stand on, without their manifests."""
    c = segment.c
    columns = (c.id, c.node, c.start, c.end, c.raw_bytes, c.stored_bytes, c.lossy, node.c.root)
    query = sa.select(*columns).join(node, node.c.id == c.node).where(c.complete == 1)
    if states is None:
        return _numbers(conn.execute(query))
    up = sa.select(states.c.segment.label("id")).where(states.c.segment.is_not(None)).cte("up", recursive=True)
    up = up.union(sa.select(c.base_segment).where(c.id == up.c.id, c.base_segment.is_not(None)))
    return _numbers(conn.execute(query.where(c.id.in_(sa.select(up.c.id)))))


def _numbers(rows: Iterable[sa.Row[Any]]) -> list[sa.Row[Any]]:
    found = list(rows)
    for row in found:
        check_numbers(segment, row.id, row)
    return found


def _nodes(conn: sa.Connection, start: sa.Select[Any]) -> dict[int, Any]:
    """Nodes and all their ancestors, without their tokens."""
    c = node.c
    up = start.cte("up", recursive=True)
    up = up.union(sa.select(c.parent).where(c.id == up.c.id, c.parent.is_not(None)))
    query = sa.select(c.id, c.parent, c.parent_offset, c.start, c.length).where(c.id.in_(sa.select(up.c.id)))
    return {row.id: row for row in conn.execute(query)}


def _covered(
    conn: sa.Connection, segments: list[sa.Row[Any]], widths: Mapping[int, float]
) -> dict[tuple[int, float], list[tuple[int, int]]]:
    """For each node, the spans of positions whose state is held, and the bytes of one position's rows."""
    found = _nodes(conn, sa.select(segment.c.node.label("id")).where(segment.c.complete == 1)) if segments else {}
    spans: dict[tuple[int, float], list[tuple[int, int]]] = {}
    for row in segments:
        at, end, seen = row.node, row.end, set[int]()
        while end > row.start:  # a segment may span ancestors of its node
            if at not in found or at in seen:
                raise CorruptRow(node.name, (at,))
            seen.add(at)
            edge = found[at]
            first = max(row.start, edge.start)
            if end > first:
                spans.setdefault((at, widths[row.root]), []).append((first, end))
            at, end = edge.parent, min(end, edge.start)
    return {key: _union(value) for key, value in spans.items()}


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _tokens(conn: sa.Connection, states: sa.Subquery | None) -> int:
    """Distinct tokens: of the whole store every edge of its tries, of a session the edges on its paths."""
    if states is None:
        return int(conn.execute(sa.select(sa.func.coalesce(sa.func.sum(node.c.length), 0))).scalar_one())
    found = _nodes(conn, sa.select(states.c.node.label("id")))
    taken: dict[int, int] = {}
    for row in conn.execute(sa.select(states.c.node, sa.func.max(states.c.offset)).group_by(states.c.node)):
        taken[row[0]] = row[1]
    for edge in found.values():
        if edge.parent is not None:
            taken[edge.parent] = max(taken.get(edge.parent, 0), edge.parent_offset)
    return sum(taken.values())
