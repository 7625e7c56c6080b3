"""What the wire format says, as plain records: manifest, schedule, provenance.

``pack`` turns a record into its canonical bytes; ``read_manifest``, ``read_schedule`` and ``read_provenance``
turn bytes from outside back into records and refuse whatever FORMAT.md does not allow. Only this module and
``scores`` touch the generated protobuf code.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from google.protobuf.message import Message

from kvloom_proto import codecs, limits
from kvloom_proto import state_pb2 as pb
from kvloom_proto.errors import FormatError
from kvloom_proto.messages import VERSION, check_limit, parse

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}
"""Bytes of one element of each dtype name."""


class LayerKind(enum.IntEnum):
    """What a layer's state is like, and so how it is restored (DESIGN.md, section 1)."""

    ROWS = 1
    WINDOW = 2
    KEYFRAME = 3
    SHARED = 4
    EMPTY = 5
    OPAQUE = 6
    BLOCKS = 7


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer; ``shape`` leaves out the batch (always 1) and the token dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    token_axis: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerSpec:
    """``count`` layers in a row, from ``index`` on, that are alike.

    A layer here is state of one kind: a model's layer that keeps both keys and values and a recurrent state is two.
    """

    index: int
    count: int
    kind: LayerKind
    tensors: tuple[TensorSpec, ...]
    window: int = 0
    shares: int = 0
    block: int = 0

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row of one of these layers; of a keyframe, all its bytes."""
        return sum(tensor.row_bytes for tensor in self.tensors)

    def rows_before(self, position: int) -> int:
        """Rows there are after so many tokens: one for each, or for each whole block of them."""
        return position // self.block if self.block else position

    def rows_between(self, start: int, end: int) -> int:
        """Rows that the tokens of positions [start, end) add."""
        return self.rows_before(end) - self.rows_before(start)


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """One stored blob: of those of the layers [layer, layer + layers) that are of this kind, the rows
    [position, position + tokens), or the whole state as it was after ``position`` tokens (a keyframe; ``tokens`` is 0).
    """

    kind: LayerKind
    position: int
    tokens: int
    layer: int
    layers: int
    codec: str
    raw_length: int
    stored_length: int
    raw_digest: bytes
    stored_digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one segment holds: positions [start, end) of every layer, and the chunks they are stored in."""

    start: int
    end: int
    chunk_tokens: int
    layers: tuple[LayerSpec, ...]
    chunks: tuple[ChunkSpec, ...]

    @property
    def raw_bytes(self) -> int:
        """Uncompressed bytes of state."""
        return sum(chunk.raw_length for chunk in self.chunks)

    @property
    def stored_bytes(self) -> int:
        """Bytes as stored."""
        return sum(chunk.stored_length for chunk in self.chunks)

    @property
    def keyframes(self) -> list[int]:
        """The positions at which the layers that are overwritten in place are stored whole, in order."""
        return sorted({chunk.position for chunk in self.chunks if chunk.kind == LayerKind.KEYFRAME})


@dataclass(frozen=True, slots=True)
class Pass:
    """``count`` forward passes one after another of ``tokens`` tokens each, the first from ``start`` on.

    Of a ``batch`` of several paths this is one: number ``path``. All of them begin with the same ``shared`` tokens, and
    the longest had ``own`` columns of rows behind those when the first pass began.
    """

    start: int
    tokens: int
    count: int = 1
    batch: int = 1
    path: int = 0
    shared: int = 0
    own: int = 0

    @property
    def end(self) -> int:
        return self.start + self.tokens * self.count

    @property
    def is_sibling(self) -> bool:
        """Whether it ran in a batch over shared tokens: one path alone there rounds otherwise than a plain pass."""
        return self.batch > 1 or self.shared > 0

    def each(self) -> Iterator[tuple[int, int]]:
        """Each single forward pass as (start, end)."""
        for start in range(self.start, self.end, self.tokens):
            yield start, start + self.tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where each forward pass began and ended; ``unknown`` when somebody else's loop ran them, or one was cut."""

    passes: tuple[Pass, ...] = ()
    unknown: bool = False

    def each(self) -> Iterator[tuple[int, int]]:
        """Each single forward pass as (start, end)."""
        for entry in self.passes:
            yield from entry.each()


@dataclass(frozen=True, slots=True)
class Provenance:
    """What changes only the rounding: recorded, set again by an exact replay, never a reason to refuse."""

    threads: int
    torch: str
    transformers: str
    device: str
    cpu_capability: str
    attention: str
    engine: str


class Layers(tuple[LayerSpec, ...]):
    """The spec of each single layer, in order.

    What a run of them holds of a kind is worked out once: a path of hundreds of small segments asks hundreds of times.
    """

    @cached_property
    def _parts(self) -> dict[tuple[LayerKind, int, int], tuple[tuple[int, ...], int]]:
        return {}

    @cached_property
    def by_row(self) -> tuple[int, ...]:
        """Those that add rows."""
        return tuple(n for n, spec in enumerate(self) if spec.kind in STORED_BY_ROW)

    def part(self, kind: LayerKind, first: int, count: int) -> tuple[tuple[int, ...], int]:
        """Those of ``count`` layers from ``first`` on that are of a kind, and the bytes of one row of all of them."""
        key = (kind, first, count)
        if key not in self._parts:
            here = tuple(n for n in range(first, first + count) if self[n].kind == kind)
            self._parts[key] = here, sum(self[n].row_bytes for n in here)
        return self._parts[key]


@lru_cache(maxsize=64)
def expand(layers: tuple[LayerSpec, ...]) -> Layers:
    """The spec of each single layer, in order."""
    return Layers(spec for spec in layers for _ in range(spec.count))


def covered(layers: Layers, chunk: ChunkSpec) -> tuple[int, ...]:
    """The layers whose state is in a chunk: those of its range that are of its kind, in order."""
    return layers.part(chunk.kind, chunk.layer, chunk.layers)[0]


def dtype_of(layers: Layers, chunk: ChunkSpec) -> str:
    """The dtype of all elements of a chunk; "" where they differ."""
    dtypes = {tensor.dtype for number in covered(layers, chunk) for tensor in layers[number].tensors}
    return dtypes.pop() if len(dtypes) == 1 else ""


def may_be_lossy(layers: Layers, chunk: ChunkSpec) -> bool:
    """Whether a chunk holds what a lossy codec may be asked for."""
    return chunk.kind in STORED_BY_ROW and dtype_of(layers, chunk) in codecs.LOSSY_DTYPES


def chunk_raw_bytes(layers: Layers, chunk: ChunkSpec) -> int:
    """Raw bytes of a chunk."""
    here, row_bytes = layers.part(chunk.kind, chunk.layer, chunk.layers)
    if chunk.kind == LayerKind.BLOCKS:
        end = chunk.position + chunk.tokens
        return sum(layers[n].row_bytes * layers[n].rows_between(chunk.position, end) for n in here)
    return row_bytes * (1 if chunk.kind == LayerKind.KEYFRAME else chunk.tokens)


def pack(record: Manifest | Schedule | Provenance) -> bytes:
    """The canonical bytes of a record: the same record always gives the same bytes."""
    if isinstance(record, Manifest):
        message: Message = _manifest_message(record)
    elif isinstance(record, Schedule):
        message = pb.Schedule(
            version=VERSION,
            unknown=record.unknown,
            passes=[_pass_message(entry) for entry in record.passes],
        )
    else:
        message = pb.Provenance(
            version=VERSION,
            threads=record.threads,
            torch=record.torch,
            transformers=record.transformers,
            device=record.device,
            cpu_capability=record.cpu_capability,
            attention=record.attention,
            engine=record.engine,
        )
    return message.SerializeToString(deterministic=True)


def _pass_message(entry: Pass) -> pb.Pass:
    return pb.Pass(
        start=entry.start,
        tokens=entry.tokens,
        count=entry.count,
        batch=entry.batch,
        path=entry.path,
        shared=entry.shared,
        own=entry.own,
    )


def _manifest_message(record: Manifest) -> pb.Manifest:
    message = pb.Manifest(version=VERSION, start=record.start, end=record.end, chunk_tokens=record.chunk_tokens)
    for spec in record.layers:
        message.layers.add(
            index=spec.index,
            count=spec.count,
            kind=pb.LayerKind.ValueType(spec.kind),
            window=spec.window,
            shares=spec.shares,
            block=spec.block,
            tensors=[
                pb.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape, token_axis=t.token_axis) for t in spec.tensors
            ],
        )
    for chunk in record.chunks:
        message.chunks.add(
            kind=pb.LayerKind.ValueType(chunk.kind),
            position=chunk.position,
            tokens=chunk.tokens,
            layer=chunk.layer,
            layers=chunk.layers,
            codec=chunk.codec,
            raw_length=chunk.raw_length,
            stored_length=chunk.stored_length,
            raw_digest=chunk.raw_digest,
            stored_digest=b"" if chunk.stored_digest == chunk.raw_digest else chunk.stored_digest,
        )
    return message


def read_manifest(data: bytes) -> Manifest:
    """Read and check a manifest.

    Raises:
        FormatError: the bytes do not follow FORMAT.md (LimitExceeded, UnsupportedVersion among them).
    """
    message = pb.Manifest()
    parse(message, data, "manifest")
    check_limit("manifest.layers", len(message.layers), limits.MAX_LAYERS)
    check_limit("manifest.chunks", len(message.chunks), limits.MAX_CHUNKS)
    check_limit("manifest.end", message.end, limits.MAX_TOKENS)
    if message.start >= message.end:
        raise FormatError("a manifest must cover at least one position", field="manifest.end")
    if message.chunk_tokens == 0 or message.chunk_tokens % 16:
        raise FormatError("chunk_tokens must be a multiple of 16", field="manifest.chunk_tokens")
    layers = _read_layers(tuple(layer.SerializeToString(deterministic=True) for layer in message.layers))
    chunks = tuple(_read_chunk(chunk) for chunk in message.chunks)
    manifest = Manifest(message.start, message.end, message.chunk_tokens, layers, chunks)
    _check_covered_once(manifest)
    return manifest


@lru_cache(maxsize=16)
def _read_layers(packed: tuple[bytes, ...]) -> tuple[LayerSpec, ...]:
    """Runs of layers, read and checked once: hundreds of small segments of a path all say the same of them."""
    layers = tuple(_read_layer(pb.LayerSpec.FromString(each)) for each in packed)
    index = 0
    for layer in layers:
        if layer.index != index or layer.count == 0:
            raise FormatError("layers must follow one another without a hole", field="manifest.layers")
        index += layer.count
        check_limit("manifest.layers", index, limits.MAX_LAYERS)
    return layers


def _read_layer(message: pb.LayerSpec) -> LayerSpec:
    check_limit("layer.tensors", len(message.tensors), limits.MAX_TENSORS_PER_LAYER)
    tensors = []
    for tensor in message.tensors:
        check_limit("tensor.shape", len(tensor.shape), limits.MAX_DIMENSIONS)
        check_limit("tensor.name", len(tensor.name), limits.MAX_NAME_BYTES)
        if tensor.dtype not in ITEM_BYTES:
            raise FormatError(f"unknown dtype {tensor.dtype[:32]!r}", field="tensor.dtype")
        if not tensor.name or 0 in tensor.shape or tensor.token_axis > len(tensor.shape):
            raise FormatError("a tensor needs a name, a shape without zeros and its token axis", field="tensor")
        check_limit("tensor.shape", math.prod(tensor.shape), limits.MAX_CHUNK_BYTES)
        tensors.append(TensorSpec(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.token_axis))
    kind = _read_kind(message.kind, "layer.kind")
    if kind == LayerKind.WINDOW and not message.window:
        raise FormatError("a window has at least one token", field="layer.window")
    if (kind == LayerKind.BLOCKS) != bool(message.block):
        raise FormatError("blocks, and nothing else, have a length of at least one token", field="layer.block")
    return LayerSpec(
        message.index,
        message.count,
        kind,
        tuple(tensors),
        message.window,
        message.shares,
        message.block,
    )


def _read_kind(value: int, field: str) -> LayerKind:
    try:
        return LayerKind(value)
    except ValueError as error:
        raise FormatError(f"unknown layer kind {value}", field=field) from error


def _read_chunk(message: pb.ChunkSpec) -> ChunkSpec:
    check_limit("chunk.raw_length", message.raw_length, limits.MAX_CHUNK_BYTES)
    check_limit("chunk.stored_length", message.stored_length, limits.MAX_CHUNK_BYTES)
    check_limit("chunk.codec", len(message.codec), limits.MAX_NAME_BYTES)
    stored_digest = message.stored_digest or message.raw_digest
    if len(message.raw_digest) != 16 or len(stored_digest) != 16:
        raise FormatError("a digest has 16 bytes", field="chunk.raw_digest")
    if message.HasField("reference"):
        raise FormatError("chunks coded against a reference are not known yet", field="chunk.reference")
    return ChunkSpec(
        _read_kind(message.kind, "chunk.kind"),
        message.position,
        message.tokens,
        message.layer,
        message.layers,
        message.codec,
        message.raw_length,
        message.stored_length,
        message.raw_digest,
        stored_digest,
    )


STORED_BY_ROW = (LayerKind.ROWS, LayerKind.WINDOW, LayerKind.BLOCKS)
"""Kinds of layers that add rows, for each token or for each block of them."""


def _check_covered_once(manifest: Manifest) -> None:
    """Each row, and each layer of each keyframe, must stand in exactly one chunk, of the length its specs announce."""
    layers = expand(manifest.layers)
    # How far each layer's rows reach, when the chunks are taken in order: an overlap and a hole could hide in a sum.
    reach = dict.fromkeys(layers.by_row, manifest.start)
    frames: set[tuple[int, int]] = set()
    for chunk in sorted(manifest.chunks, key=lambda chunk: chunk.position):
        if chunk.layer + chunk.layers > len(layers):
            raise FormatError("a chunk names layers that are not there", field="chunk.layers")
        if chunk.kind in STORED_BY_ROW:
            _check_rows(manifest, chunk)
        elif chunk.kind != LayerKind.KEYFRAME:
            raise FormatError(f"chunks of kind {chunk.kind.name} are not known yet", field="chunk.kind")
        elif chunk.tokens or not manifest.start <= chunk.position <= manifest.end:
            raise FormatError("a keyframe lies outside its segment", field="chunk.position")
        here = covered(layers, chunk)
        if chunk.kind == LayerKind.KEYFRAME:
            held = {(chunk.position, n) for n in here}
            twice = not frames.isdisjoint(held)
            frames |= held
        else:
            upto = {reach[n] for n in here}
            twice = max(upto, default=0) > chunk.position
            if min(upto, default=chunk.position) < chunk.position:
                raise FormatError("the chunks do not cover every row", field="manifest.chunks")
            reach.update(dict.fromkeys(here, chunk.position + chunk.tokens))
        if not here or twice:
            raise FormatError("state is stored twice, or for no layer", field="chunk.layer")
        if chunk.codec in codecs.LOSSY and not may_be_lossy(layers, chunk):
            raise FormatError("only rows of floating-point numbers may be stored with loss", field="chunk.codec")
        if chunk.raw_length != chunk_raw_bytes(layers, chunk):
            raise FormatError("a chunk's length is not that of its state", field="chunk.raw_length")
    if set(reach.values()) - {manifest.end}:
        raise FormatError("the chunks do not cover every row", field="manifest.chunks")
    whole = sum(spec.kind == LayerKind.KEYFRAME for spec in layers) if frames else 0
    if len(frames) != whole * len({position for position, _ in frames}):
        raise FormatError("a keyframe lacks some of its layers", field="manifest.chunks")


def _check_rows(manifest: Manifest, chunk: ChunkSpec) -> None:
    if not manifest.start <= chunk.position < chunk.position + chunk.tokens <= manifest.end:
        raise FormatError("a chunk lies outside its segment", field="chunk.position")
    if chunk.position // manifest.chunk_tokens != (chunk.position + chunk.tokens - 1) // manifest.chunk_tokens:
        raise FormatError("a chunk crosses a chunk boundary", field="chunk.tokens")


def read_schedule(data: bytes) -> Schedule:
    """Read and check a schedule. Raises FormatError."""
    message = pb.Schedule()
    parse(message, data, "schedule")
    check_limit("schedule.passes", len(message.passes), limits.MAX_PASSES)
    passes: list[Pass] = []
    for entry in message.passes:
        check_limit("pass.count", entry.count, limits.MAX_TOKENS)
        check_limit("pass.tokens", entry.tokens, limits.MAX_TOKENS)
        if not entry.tokens or not entry.count or not entry.batch:
            raise FormatError("a pass has at least one token", field="schedule.passes")
        read = Pass(entry.start, entry.tokens, entry.count, entry.batch, entry.path, entry.shared, entry.own)
        _check_batch(read)
        check_limit("pass.end", read.end, limits.MAX_TOKENS)
        if passes and read.start != passes[-1].end:
            raise FormatError("passes must follow one another", field="schedule.passes")
        passes.append(read)
    return Schedule(tuple(passes), message.unknown)


def _check_batch(entry: Pass) -> None:
    check_limit("pass.batch", entry.batch, limits.MAX_BATCH)
    alone = (entry.batch, entry.path, entry.shared, entry.own) == (1, 0, 0, 0)
    behind = entry.start - entry.shared  # the path's own tokens before the first pass
    if not alone and not (entry.path < entry.batch and entry.tokens == 1 and 0 <= behind <= entry.own):
        raise FormatError("a pass of a batch does not fit the batch", field="schedule.passes")
    check_limit("pass.own", entry.own, limits.MAX_TOKENS)


def read_provenance(data: bytes) -> Provenance:
    """Read and check a provenance. Raises FormatError."""
    message = pb.Provenance()
    parse(message, data, "provenance")
    texts = (
        message.torch,
        message.transformers,
        message.device,
        message.cpu_capability,
        message.attention,
        message.engine,
    )
    for text in texts:
        check_limit("provenance", len(text), limits.MAX_NAME_BYTES)
    return Provenance(message.threads, *texts)
