"""A receipt for a point: what is stored was read back and checked, and, if asked for, computed again and compared.

The first (L0) says that the bits are those that were written, and needs no model. The second (L2) runs the recorded
passes from the first token on in memory of its own, and compares every row and every keyframe with what is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvloom.errors import CorruptRow, EngineError
from kvloom.translated import root_of
from kvloom_proto.records import ChunkSpec, LayerKind, LayerSpec, Pass, Provenance, Schedule, covered, expand
from kvloom_store import planner, refs, restore, roots, segments, spans, trie, turns
from kvloom_store.planner import StateDamaged
from kvloom_store.rows import Rows, element_type, shape_with

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.engine import Progress, TransformersEngine
    from kvloom.live import LiveState
    from kvloom.session import Session
    from kvloom_store.codec import Buffer
    from kvloom_store.names import Ref
    from kvloom_store.planner import Link, Read


@dataclass(frozen=True, slots=True)
class Difference:
    """Where state computed again first differs from what is stored: the ``token`` (counted from 0), the ``layer`` and
    the ``tensor`` there, how many ``tokens`` differ anywhere, and by how much at most (``largest``)."""

    token: int
    layer: int
    tensor: str
    tokens: int
    largest: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was checked of the path to a point.

    Of its ``tokens``, the state of ``held`` ones is stored, in ``segments`` of which ``bytes`` were read back and
    checked; ``pending`` ones were never run, and ``unwritten`` ones were, but their state was not stored. ``damaged``
    says what was not as it was written. ``replayed`` tokens were computed again (None: that was not asked for), and
    ``difference`` says where they came out otherwise (None: they are identical). ``model`` is the model's name,
    ``digest`` its identity; ``provenances`` are what the state was computed on.
    """

    session: str
    at: str
    turn: str | None
    turns: int
    tokens: int
    held: int
    pending: int
    unwritten: int
    segments: int
    bytes: int
    model: str | None
    digest: str | None
    dtype: str | None
    provenances: tuple[Provenance, ...]
    damaged: tuple[str, ...] = ()
    replayed: int | None = None
    difference: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether all state there should be is stored and sound, and came out the same if it was computed again."""
        return not self.damaged and not self.unwritten and self.difference is None

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    session: Session,
    ref: Ref,
    *,
    replay: bool = False,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """The receipt of the path to a ref. Without ``replay`` no model is needed.

    Raises:
        CorruptRow: text or tokens on the path are damaged; nothing else can be said of it then.
        ModelMismatch, EngineError: ``replay``, and the model is not the session's own, or the passes are not known.
        Cancelled
    """
    session.loom.flush()
    with session.loom.database.read() as conn:
        receipt, links, reads = _read_back(conn, session, ref)
    if not replay or receipt.damaged or not links:
        return receipt
    from kvloom.binding import check_model

    check_model(session)
    if receipt.digest != session.settings["model_digest"]:
        raise EngineError(
            f"this path ends with a turn that only {receipt.model} has state of",
            hint=f"kvloom verify {ref} --replay --model {receipt.model}, or kvloom warm {ref} first",
        )
    with session.loom.engine.lock:
        return _replayed(session, receipt, links, reads, cancel, progress)


def _read_back(conn: sa.Connection, session: Session, ref: Ref) -> tuple[Receipt, list[Link], list[Read]]:
    point = refs.resolve(conn, ref)
    path = turns.path_to(conn, point.turn)
    # A token is counted as refs count it; else the model in use comes first.
    own = root_of(conn, session.settings) if point.token is None else None
    found = spans.of_path(conn, path, own)
    tokens = point.token or (found[-1].end if found else 0)
    last = path[-1] if path else None
    receipt = Receipt(
        session.name,
        ref.at or "main",
        last.id if last else None,
        len(path),
        tokens,
        0,
        0,
        0,
        0,
        0,
        None,
        None,
        None,
        (),
    )
    if not found:
        return receipt, [], []
    tip = found[-1].state
    ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
    for span in found:
        if ids[span.start : span.end] != span.state.tokens[: span.end - span.start]:
            raise CorruptRow("turn_state", (span.state.row,))
    model = roots.model_of_root(conn, tip.root)
    run = min(tokens, tip.state_end)
    segment, held = _stored(conn, tip, run)
    receipt = replace(
        receipt,
        held=held,
        pending=tokens - run,
        unwritten=run - held,
        model=model["name"],
        digest=model["digest"].hex(),
        dtype=model["fields"].get("dtype"),
    )
    if segment is None:
        return receipt, [], []
    damaged, size = [], 0
    try:
        links = restore.chain(conn, segment)
        reads = planner.reads_of(links, held)
    except StateDamaged as error:
        return replace(receipt, damaged=(str(error),)), [], []
    used = [(next(link for link in links if link.id == read.segment), read) for read in reads]
    for link, read in used:
        try:
            for spec, _ in restore.read_back(conn, link, read.end):
                size += spec.stored_length
        except StateDamaged as error:
            damaged.append(str(error))
    by = dict.fromkeys(segments.provenance_of(conn, link.provenance) for link, _ in used)
    receipt = replace(receipt, segments=len(used), bytes=size, provenances=tuple(by), damaged=tuple(damaged))
    return receipt, [link for link, _ in used], reads


def _stored(conn: sa.Connection, state: turns.TurnState, upto: int) -> tuple[int | None, int]:
    """The segment that holds most of the first ``upto`` tokens of a turn's path, and how many of them."""
    below: turns.TurnState | None = state
    while below is not None:
        if upto > below.state_start:
            if below.segment is not None:
                return below.segment, upto
            upto = below.state_start
        state = below
        below = turns.base_of(conn, below)
    return state.base_segment, upto if state.base_segment is not None else 0


# Computing it again


def _replayed(
    session: Session,
    receipt: Receipt,
    links: Sequence[Link],
    reads: Sequence[Read],
    cancel: threading.Event | None,
    progress: Progress | None,
) -> Receipt:
    loom = session.loom
    if any(link.schedule.unknown for link in links):
        raise EngineError(
            "the passes of some of this state are not known: another loop ran them, or a bundle cut one of them",
            hint="kvloom verify without --replay checks that it is what was stored",
        )
    if any(link.manifest.layers != loom.engine.layers for link in links):
        raise EngineError(
            "this state was stored in another layout than the one this version of transformers keeps it in"
        )
    found = _Compared()
    live = loom.engine.new_state(receipt.held)
    for number, (link, read) in enumerate(zip(links, reads, strict=True)):
        with loom.database.read() as conn:
            ids = trie.tokens_before(conn, link.node, link.end)
            recorded = segments.provenance_of(conn, link.provenance)
            _go_back(conn, loom.engine, live, links[: number + 1], link.start)
        live.keep_frame()
        schedule = _upto(link.schedule, read.end)
        loom.engine.replay(live, ids, schedule, recorded, cancel=cancel, progress=progress)
        live.keep_frame()
        with loom.database.read() as conn:
            for spec, raw in restore.read_back(conn, link, read.end):
                found.compare(live, link, spec, raw, read.end)
    return replace(receipt, replayed=receipt.held, difference=found.difference())


def _upto(schedule: Schedule, end: int) -> Schedule:
    """The passes that begin before a position."""
    cut = [
        replace(entry, count=min(entry.count, -(-(end - entry.start) // entry.tokens)))
        for entry in schedule.passes
        if entry.start < end
    ]
    return Schedule(tuple(cut))


def _go_back(
    conn: sa.Connection, engine: TransformersEngine, live: LiveState, links: Sequence[Link], start: int
) -> None:
    """Let ``live`` stand where a segment begins, which may be inside what it was computed on."""
    live.truncate(start)
    if live.ready:
        return
    below = links[:-1]
    reads = planner.reads_of(below, start)
    frames = {position for position in live.frames if position <= start}
    at = max(frames, default=0)
    live.put_frame(live.frames.get(at), at)
    by_id = {link.id: link for link in below}
    steps = []
    for read in reads:
        passes: Iterator[Pass] = iter(_upto(by_id[read.segment].schedule, read.end).passes)
        threads = segments.provenance_of(conn, by_id[read.segment].provenance).threads
        steps += [
            (max(begin, at), min(end, read.end), threads)
            for entry in passes
            for begin, end in entry.each()
            if end > max(at, read.start) and begin < read.end
        ]
    ids = trie.tokens_before(conn, below[-1].node, below[-1].end)
    if steps:
        engine.bring_forward(live, ids, steps)


class _Compared:
    """Rows and keyframes held against those that are stored, and where they differ."""

    def __init__(self) -> None:
        self._first: tuple[int, int, str] | None = None
        self._tokens: set[int] = set()
        self._largest = 0.0

    def difference(self) -> Difference | None:
        """Where and by how much; None if nowhere."""
        if self._first is None:
            return None
        token, layer, tensor = self._first
        return Difference(token, layer, tensor, len(self._tokens), self._largest)

    def compare(self, live: LiveState, link: Link, spec: ChunkSpec, raw: Buffer, end: int) -> None:
        """One chunk of a segment, as far as it lies before position ``end``."""
        layers = expand(link.manifest.layers)
        at = 0
        for layer in covered(layers, spec):
            for number, tensor in enumerate(layers[layer].tensors):
                if spec.kind == LayerKind.KEYFRAME:
                    shape = tensor.shape
                else:
                    rows = layers[layer].rows_between(spec.position, spec.position + spec.tokens)
                    shape = shape_with(tensor, rows)
                count = int(np.prod(shape))
                stored = np.frombuffer(raw, element_type(tensor.dtype), count, at).reshape(shape)
                at += stored.nbytes
                if spec.kind == LayerKind.KEYFRAME:
                    self._frame(live, spec.position, layer, number, tensor.name, stored, tensor.dtype)
                else:
                    self._rows(live, spec, layers[layer], layer, number, stored, end)

    def _rows(
        self, live: LiveState, spec: ChunkSpec, layer: LayerSpec, index: int, number: int, stored: Rows, end: int
    ) -> None:
        tensor = layer.tensors[number]
        last = min(spec.position + spec.tokens, end)
        made = np.moveaxis(live.source.rows(index, number, spec.position, last), tensor.token_axis, 0)
        kept = np.moveaxis(stored, tensor.token_axis, 0)[: len(made)]
        differ = np.any((made != kept).reshape(len(made), -1), axis=1).nonzero()[0] if len(made) else []
        for row in differ:
            token = (layer.rows_before(spec.position) + int(row)) * (layer.block or 1)
            self._note(token, index, tensor.name, made[row], kept[row], tensor.dtype)

    def _frame(
        self, live: LiveState, position: int, index: int, number: int, name: str, stored: Rows, dtype: str
    ) -> None:
        if position not in live.frames:
            return  # kept at another spacing: the rows that follow from it are compared
        made = live.frames[position][index][number]
        if not np.array_equal(made, stored):
            self._note(max(position - 1, 0), index, name, made, stored, dtype)

    def _note(self, token: int, layer: int, name: str, made: Rows, kept: Rows, dtype: str) -> None:
        here = (token, layer, name)
        self._first = here if self._first is None else min(self._first, here)
        self._tokens.add(token)
        apart = np.abs(_numbers(made, dtype) - _numbers(kept, dtype))
        self._largest = max(self._largest, float(np.nanmax(apart, initial=0.0)))


def _numbers(bits: Rows, dtype: str) -> Any:
    """Elements as numbers: numpy has no bfloat16, which is the upper half of a float32."""
    bits = np.ascontiguousarray(bits)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.dtype(dtype)).astype(np.float64)
