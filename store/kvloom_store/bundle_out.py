"""Writing a bundle: the records of a plan, one row at a time, in one snapshot of the store.

Memory: row ids, one turn, one path of tokens, one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
import sqlalchemy as sa

from kvloom_proto.bundle import (
    BranchRecord,
    ChunkRecord,
    Head,
    Model,
    NodeRecord,
    ProvenanceRecord,
    Record,
    SegmentRecord,
    SessionRecord,
    StateRecord,
    TagRecord,
    TurnRecord,
)
from kvloom_proto.codecs import RAW
from kvloom_proto.errors import FormatError
from kvloom_proto.records import (
    ChunkSpec,
    LayerKind,
    Layers,
    Manifest,
    Pass,
    Schedule,
    covered,
    expand,
    pack,
    read_manifest,
    read_schedule,
)
from kvloom_store import codec, refs, restore, trie
from kvloom_store.bundle_plan import BundlePlan, Chosen, PlannedSegment, PlannedState
from kvloom_store.checksum import checked, digest
from kvloom_store.database import now_us
from kvloom_store.errors import CorruptRow, RefNotFound
from kvloom_store.planner import StateDamaged
from kvloom_store.rows import element_type, shape_with
from kvloom_store.schema import chunk, model, node, provenance, root, segment, session, turn, turn_state
from kvloom_store.turns import path_to


def whole_session(conn: sa.Connection, row: int) -> Chosen:
    """Every turn, branch and tag of a session.

    Raises:
        CorruptRow: a turn is of this session by a damaged index alone, or was before its row was damaged.
    """
    # By the rows: a sum is in no index, and a damaged one hides turns.
    turns = [each.id for each in conn.execute(sa.select(turn).where(turn.c.session + 0 == row).order_by(turn.c.id))]
    listed = conn.execute(sa.select(turn.c.id).where(turn.c.session == row)).scalars()
    for other in set(listed) - set(turns):
        raise CorruptRow(turn.name, (other,))
    branches = tuple((each.name, each.turn) for each in refs.branches(conn, row))
    return Chosen(row, tuple(turns), branches, tuple(refs.tags(conn, row).items()))


def one_path(conn: sa.Connection, point: refs.Point, name: str) -> Chosen:
    """The turns down to a point, and the one name that leads there: of the branch or tag named, else a branch ``name``.

    Raises:
        RefNotFound: nothing was said there yet.
    """
    if point.turn is None:
        raise RefNotFound("turn", f"{point.session.name}@{name}")
    row = point.session.row
    path = tuple(each.row for each in path_to(conn, point.turn))
    if point.branch is None and refs.tags(conn, row).get(name) == point.turn:
        return Chosen(row, path, (), ((name, point.turn),))
    return Chosen(row, path, ((point.branch.name if point.branch else name, point.turn),), ())


def records(
    conn: sa.Connection, plan: BundlePlan, settings: Mapping[str, Any], *, writer: str, text_only: bool
) -> Iterator[Record]:
    """The records of a bundle, but for the last one; ``settings`` are what it says of the session's.

    Raises:
        CorruptRow: a row of text is damaged.
        StateDamaged: state is damaged; with ``text_only`` it is not looked at.
    """
    yield Head(now_us(), writer, text_only)
    for row in plan.roots:
        yield _model(conn, row)
    for row in plan.provenances:
        yield ProvenanceRecord(_row(conn, provenance, row)["record"])
    here = _row(conn, session, plan.chosen.session)
    yield SessionRecord(here["name"], msgpack.packb(dict(settings)))
    numbers = _Numbers.of(plan)
    path: tuple[int, bytes] = (0, b"")
    for row, count in plan.nodes.items():
        made, path = _node(conn, numbers, row, count, path)
        yield made
    for row in plan.chosen.turns:
        yield _turn(conn, numbers, row, plan.chosen.session)
    for part in plan.segments:
        yield from _segment(conn, numbers, part)
    for each in plan.states:
        yield _state(conn, numbers, each, text_only=text_only)
    for name, at in plan.chosen.branches:
        yield BranchRecord(name, None if at is None else numbers.turn(at))
    for name, at in plan.chosen.tags:
        yield TagRecord(name, numbers.turn(at))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The number in the bundle of each row."""

    roots: Mapping[int, int]
    provenances: Mapping[int, int]
    nodes: Mapping[int, int]
    turns: Mapping[int, int]
    segments: Mapping[int, int]
    states: Mapping[int, int]

    @classmethod
    def of(cls, plan: BundlePlan) -> _Numbers:
        return cls(
            _numbered(plan.roots),
            _numbered(plan.provenances),
            _numbered(list(plan.nodes)),
            _numbered(plan.chosen.turns),
            _numbered([each.row for each in plan.segments]),
            _numbered([each.row for each in plan.states]),
        )

    def turn(self, row: int) -> int:
        """Of a turn that something in the bundle names. Raises CorruptRow if it is not in it."""
        if row not in self.turns:
            raise CorruptRow(turn.name, (row,))
        return self.turns[row]


def _numbered(rows: Sequence[int]) -> dict[int, int]:
    return {row: number for number, row in enumerate(rows)}


def _row(conn: sa.Connection, table: sa.Table, row: int) -> dict[str, Any]:
    found = conn.execute(sa.select(table).where(table.c.id == row)).one_or_none()
    if found is None:
        raise CorruptRow(table.name, (row,))
    return checked(table, found)


def _model(conn: sa.Connection, row: int) -> Model:
    here = _row(conn, root, row)
    values = _row(conn, model, here["model"])
    return Model(values["digest"], shown_name(values["name"]), values["fields"], here["extra"], here["salt"])


def shown_name(name: str) -> str:
    """A model's name without the folders it lies in: where they are is nobody else's business."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if name[:1] in "/~\\" or name[1:2] == ":" else name


def _node(
    conn: sa.Connection, numbers: _Numbers, row: int, count: int, before: tuple[int, bytes]
) -> tuple[NodeRecord, tuple[int, bytes]]:
    """The first ``count`` tokens of a node; ``before`` and the other result are a node, and all tokens to its end."""
    values = _row(conn, node, row)
    parent = numbers.nodes.get(values["parent"])
    tokens = values["tokens"][: count * trie.TOKEN_BYTES]
    if before[0] == values["parent"]:  # as it is along a conversation
        path = before[1][: values["start"] * trie.TOKEN_BYTES] + tokens
    else:
        path = trie.pack_tokens(trie.tokens_to(conn, row, count))
    made = NodeRecord(numbers.roots[values["root"]], parent, values["parent_offset"], tokens, digest(path))
    return made, (row, path)


def _turn(conn: sa.Connection, numbers: _Numbers, row: int, owner: int) -> TurnRecord:
    values = _row(conn, turn, row)
    if values["session"] != owner:
        raise CorruptRow(turn.name, (row,))
    return TurnRecord(
        public_id=values["public_id"],
        parent=None if values["parent"] is None else numbers.turn(values["parent"]),
        role=values["role"],
        continues=bool(values["continues"]),
        message=values["message"],
        finish_reason=values["finish_reason"],
        settings=values["settings"],
        timings=values["timings"],
        digest=values["digest"],
        created=values["created"],
    )


def _state(conn: sa.Connection, numbers: _Numbers, planned: PlannedState, *, text_only: bool) -> StateRecord:
    values = _row(conn, turn_state, planned.row)
    pending = planned.pending
    hidden = not (pending or text_only)
    return StateRecord(
        turn=numbers.turn(values["turn"]),
        model=numbers.roots[values["root"]],
        start=values["start"],
        tokens=values["tokens"],
        node=numbers.nodes.get(values["node"]),
        offset=values["offset"],
        state_start=0 if pending else values["state_start"],
        state_end=0 if pending else values["state_end"],
        base_state=None if planned.base_state is None else numbers.states[planned.base_state],
        base_segment=None if planned.base_segment is None else numbers.segments[planned.base_segment],
        segment=None if planned.segment is None else numbers.segments[planned.segment],
        schedule=pack(Schedule()) if pending else values["schedule"],
        provenance=numbers.provenances[values["provenance"]],
        hidden=values["hidden"] if hidden else None,
        hidden_dtype=values["hidden_dtype"] if hidden else None,
        variant=bool(values["variant"]),
        scores=values["scores"],
    )


def _segment(conn: sa.Connection, numbers: _Numbers, part: PlannedSegment) -> Iterator[Record]:
    values = _row(conn, segment, part.row)
    manifest, schedule = read_manifest(values["manifest"]), read_schedule(values["schedule"])
    cut: dict[tuple[int, int, int], bytes] = {}
    if part.end < manifest.end:
        manifest, cut = _cut(conn, part, manifest)
        schedule = _cut_schedule(schedule, part.end)
    base = None if part.base is None else numbers.segments[part.base]
    number = numbers.provenances[values["provenance"]]
    yield SegmentRecord(numbers.nodes[part.node], base, pack(schedule), number, pack(manifest))
    layers = expand(manifest.layers)
    for spec in sorted(manifest.chunks, key=_key):
        made = cut.get(_key(spec))
        yield ChunkRecord(_chunk(conn, part.row, layers, spec)[0] if made is None else made)


def _key(spec: ChunkSpec) -> tuple[int, int, int]:
    return (int(spec.kind), spec.layer, spec.position)


def _chunk(conn: sa.Connection, row: int, layers: Layers, spec: ChunkSpec) -> tuple[bytes, codec.Buffer]:
    """A chunk as it is stored, and its raw bytes. Raises StateDamaged."""
    at = (chunk.c.segment == row) & (chunk.c.kind == int(spec.kind))
    at &= (chunk.c.layer == spec.layer) & (chunk.c.position == spec.position)
    found = conn.execute(sa.select(chunk).where(at)).one_or_none()
    if found is None:
        raise StateDamaged(f"chunk {spec.layer} at {spec.position} of segment {row} is missing", 0)
    values = dict(found._mapping)
    try:
        raw = restore.checked_raw(values, layers, row, spec)
    except FormatError as error:
        raise StateDamaged(str(error), 0) from error
    return values["blob"], raw


def _cut(
    conn: sa.Connection, part: PlannedSegment, manifest: Manifest
) -> tuple[Manifest, dict[tuple[int, int, int], bytes]]:
    """A manifest of what lies before ``part.end``, and the chunks that had to be cut for it (one a run of layers)."""
    layers = expand(manifest.layers)
    specs: list[ChunkSpec] = []
    cut: dict[tuple[int, int, int], bytes] = {}
    for spec in manifest.chunks:
        if spec.kind == LayerKind.KEYFRAME:
            specs += [spec] if spec.position <= part.end else []
        elif spec.position + spec.tokens <= part.end:
            specs.append(spec)
        elif spec.position < part.end:
            raw = _first_rows(_chunk(conn, part.row, layers, spec)[1], layers, spec, part.end)
            new = replace(spec, tokens=part.end - spec.position, codec=RAW, raw_length=len(raw))
            new = replace(new, stored_length=len(raw), raw_digest=digest(raw), stored_digest=digest(raw))
            specs.append(new)
            cut[_key(new)] = raw
    return Manifest(manifest.start, part.end, manifest.chunk_tokens, manifest.layers, tuple(specs)), cut


def _first_rows(raw: codec.Buffer, layers: Layers, spec: ChunkSpec, end: int) -> bytes:
    """The raw bytes of a chunk's rows before ``end``."""
    parts, at = [], 0
    for number in covered(layers, spec):
        layer = layers[number]
        count = layer.rows_between(spec.position, spec.position + spec.tokens)
        keep = layer.rows_between(spec.position, end)
        for tensor in layer.tensors:
            shape = shape_with(tensor, count)
            rows = np.frombuffer(raw, element_type(tensor.dtype), int(np.prod(shape)), at).reshape(shape)
            parts.append(np.ascontiguousarray(rows[(slice(None),) * tensor.token_axis + (slice(keep),)]).tobytes())
            at += tensor.row_bytes * count
    return b"".join(parts)


def _cut_schedule(schedule: Schedule, end: int) -> Schedule:
    """The passes before ``end``; the one that ``end`` is inside of ends there, as in a restore at that point.

    Such a pass was never run, and run alone it can give other bits; what it went on with belongs to another path, and
    is not told. So the passes then count as unknown: the state is restored bit for bit, but cannot be computed again.
    """
    passes: list[Pass] = []
    unknown = schedule.unknown
    for each in schedule.passes:
        whole = max(0, min(each.end, end) - each.start) // each.tokens
        if whole:
            passes.append(replace(each, count=whole))
        rest = each.start + whole * each.tokens
        if rest < end < each.end:
            passes.append(Pass(rest, end - rest))
            unknown = True
    return Schedule(tuple(passes), unknown)
