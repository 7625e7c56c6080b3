"""The wire format's limits: a record that is over one of them, or contradicts itself, is refused with its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto import limits, records
from kvloom_proto import state_pb2 as pb
from kvloom_proto.errors import FormatError, LimitExceeded, Truncated, UnsupportedVersion
from kvloom_proto.records import (
    ChunkSpec,
    LayerKind,
    LayerSpec,
    Manifest,
    Pass,
    Provenance,
    Schedule,
    TensorSpec,
    pack,
    read_manifest,
    read_provenance,
    read_schedule,
)

TENSOR = TensorSpec("keys", "float32", (2, 4), 1)
LAYERS = (LayerSpec(0, 2, LayerKind.ROWS, (TENSOR,)),)
DIGEST = bytes(16)


def whole() -> pb.Manifest:
    """A manifest that is right: 20 positions of two layers in two chunks."""
    chunks = tuple(
        ChunkSpec(LayerKind.ROWS, at, tokens, 0, 2, "raw", tokens * 64, tokens * 64, DIGEST, DIGEST)
        for at, tokens in ((250, 6), (256, 14))
    )
    message = pb.Manifest()
    message.ParseFromString(pack(Manifest(250, 270, 256, LAYERS, chunks)))
    return message


def test_a_manifest_reads_back_as_it_was() -> None:
    manifest = read_manifest(whole().SerializeToString())
    assert (manifest.start, manifest.end, manifest.raw_bytes, manifest.stored_bytes) == (250, 270, 1280, 1280)
    assert pack(manifest) == whole().SerializeToString(deterministic=True)


def _set(path: str, value: Any) -> Callable[[pb.Manifest], None]:
    def change(message: pb.Manifest) -> None:
        at: Any = message
        *steps, last = path.split(".")
        for step in steps:
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        setattr(at, last, value)

    return change


def _shape(*shape: int) -> Callable[[pb.Manifest], None]:
    def change(message: pb.Manifest) -> None:
        message.layers[0].tensors[0].shape[:] = shape

    return change


def _repeat(field: str, times: int) -> Callable[[pb.Manifest], None]:
    def change(message: pb.Manifest) -> None:
        holder = message.layers[0] if field == "tensors" else message
        some = getattr(holder, field)
        for _ in range(times):
            some.add().CopyFrom(some[0])

    return change


def _drop_chunk(message: pb.Manifest) -> None:
    del message.chunks[1]


OVER = [
    ("end", _set("end", limits.MAX_TOKENS + 1), "manifest.end"),
    ("layers", _set("layers.0.count", limits.MAX_LAYERS + 1), "manifest.layers"),
    ("layer specs", _repeat("layers", limits.MAX_LAYERS), "manifest.layers"),
    ("tensors", _repeat("tensors", limits.MAX_TENSORS_PER_LAYER), "layer.tensors"),
    ("dimensions", _shape(*[1] * (limits.MAX_DIMENSIONS + 1)), "tensor.shape"),
    ("elements", _shape(1 << 20, 1 << 20), "tensor.shape"),
    ("tensor name", _set("layers.0.tensors.0.name", "x" * (limits.MAX_NAME_BYTES + 1)), "tensor.name"),
    ("codec name", _set("chunks.0.codec", "x" * (limits.MAX_NAME_BYTES + 1)), "chunk.codec"),
    ("raw length", _set("chunks.0.raw_length", limits.MAX_CHUNK_BYTES + 1), "chunk.raw_length"),
    ("stored length", _set("chunks.0.stored_length", limits.MAX_CHUNK_BYTES + 1), "chunk.stored_length"),
]


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in OVER], ids=[row[0] for row in OVER])
def test_a_manifest_over_a_limit_is_refused(change: Callable[[pb.Manifest], None], field: str) -> None:
    message = whole()
    change(message)
    with pytest.raises(LimitExceeded) as error:
        read_manifest(message.SerializeToString())
    assert error.value.field == field
    assert error.value.value > error.value.limit


WRONG = [
    ("empty", _set("end", 250), "manifest.end"),
    ("chunk tokens zero", _set("chunk_tokens", 0), "manifest.chunk_tokens"),
    ("chunk tokens odd", _set("chunk_tokens", 100), "manifest.chunk_tokens"),
    ("layers with a hole", _set("layers.0.index", 1), "manifest.layers"),
    ("no layer", _set("layers.0.count", 0), "manifest.layers"),
    ("unknown kind of layer", _set("layers.0.kind", 77), "layer.kind"),
    ("unknown kind of chunk", _set("chunks.0.kind", 77), "chunk.kind"),
    ("a kind of chunk of a later version", _set("chunks.0.kind", int(LayerKind.OPAQUE)), "chunk.kind"),
    ("a chunk of no layer of its kind", _set("chunks.0.kind", int(LayerKind.WINDOW)), "chunk.layer"),
    ("a keyframe with rows", _set("chunks.0.kind", int(LayerKind.KEYFRAME)), "chunk.position"),
    ("unknown dtype", _set("layers.0.tensors.0.dtype", "float8"), "tensor.dtype"),
    ("no name", _set("layers.0.tensors.0.name", ""), "tensor"),
    ("zero in the shape", _shape(2, 0), "tensor"),
    ("token axis outside", _set("layers.0.tensors.0.token_axis", 3), "tensor"),
    ("short digest", _set("chunks.0.raw_digest", b"x" * 15), "chunk.raw_digest"),
    ("chunk before the segment", _set("chunks.0.position", 249), "chunk.position"),
    ("chunk behind the segment", _set("chunks.1.tokens", 15), "chunk.position"),
    ("chunk without tokens", _set("chunks.0.tokens", 0), "chunk.position"),
    ("chunk over a boundary", _set("chunks.0.tokens", 7), "chunk.tokens"),
    ("layers that are not there", _set("chunks.0.layers", 3), "chunk.layers"),
    ("layer that is not there", _set("chunks.0.layer", 2), "chunk.layers"),
    ("length of other rows", _set("chunks.0.raw_length", 383), "chunk.raw_length"),
    ("rows that are missing", _drop_chunk, "manifest.chunks"),
    ("rows stored twice", _repeat("chunks", 1), "chunk.layer"),
]


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_manifest_that_contradicts_itself_is_refused(change: Callable[[pb.Manifest], None], field: str) -> None:
    message = whole()
    change(message)
    with pytest.raises(FormatError) as error:
        read_manifest(message.SerializeToString())
    assert error.value.field == field


KEPT = TensorSpec("recurrent_states.0", "bfloat16", (2, 3), 0)
KINDS = (
    LayerSpec(0, 1, LayerKind.ROWS, (TENSOR,)),
    LayerSpec(1, 2, LayerKind.KEYFRAME, (KEPT,)),
    LayerSpec(3, 1, LayerKind.WINDOW, (TENSOR,), window=4),
    LayerSpec(4, 1, LayerKind.KEYFRAME, (KEPT,)),
)
FIRST_FRAME, LAST_FRAME = 3, 5
"""Where the keyframe at the start stands among the chunks, and that at the end, which is cut in two."""


def mixed() -> pb.Manifest:
    """A manifest that is right: 20 positions of rows, a window and two keyframes, one of them in two chunks."""

    def made(kind: LayerKind, position: int, tokens: int, layer: int, layers: int, size: int) -> ChunkSpec:
        return ChunkSpec(kind, position, tokens, layer, layers, "raw", size, size, DIGEST, DIGEST)

    chunks = (
        made(LayerKind.ROWS, 100, 20, 0, 1, 640),
        made(LayerKind.WINDOW, 100, 12, 3, 1, 384),
        made(LayerKind.WINDOW, 112, 8, 3, 1, 256),
        made(LayerKind.KEYFRAME, 100, 0, 1, 4, 36),
        made(LayerKind.KEYFRAME, 120, 0, 1, 2, 24),
        made(LayerKind.KEYFRAME, 120, 0, 4, 1, 12),
    )
    message = pb.Manifest()
    message.ParseFromString(pack(Manifest(100, 120, 256, KINDS, chunks)))
    return message


def _drop(number: int) -> Callable[[pb.Manifest], None]:
    def change(message: pb.Manifest) -> None:
        del message.chunks[number]

    return change


def _again(number: int) -> Callable[[pb.Manifest], None]:
    return lambda message: message.chunks.add().CopyFrom(message.chunks[number])


def _overlap(message: pb.Manifest) -> None:
    """As many rows as there are to be, but some twice and others not at all."""
    message.chunks[2].position = 111


MIXED = [
    ("a keyframe without some of its layers", _drop(LAST_FRAME), "manifest.chunks"),
    ("a keyframe with a layer twice", _again(LAST_FRAME), "chunk.layer"),
    ("a keyframe twice", _again(FIRST_FRAME), "chunk.layer"),
    ("a keyframe before the segment", _set("chunks.3.position", 99), "chunk.position"),
    ("a keyframe behind the segment", _set("chunks.5.position", 121), "chunk.position"),
    ("half a keyframe somewhere else", _set("chunks.5.position", 110), "manifest.chunks"),
    ("a keyframe with tokens", _set("chunks.3.tokens", 1), "chunk.position"),
    ("a keyframe of another length", _set("chunks.3.raw_length", 35), "chunk.raw_length"),
    ("a keyframe of layers that are no keyframes", _set("chunks.3.layers", 0), "chunk.layer"),
    ("a keyframe of layers that are not there", _set("chunks.5.layers", 2), "chunk.layers"),
    ("a window that is missing", _drop(1), "manifest.chunks"),
    ("the end of a window that is missing", _drop(2), "manifest.chunks"),
    ("rows of a window in place of those of rows", _set("chunks.0.kind", int(LayerKind.WINDOW)), "chunk.layer"),
    ("an overlap as long as the hole behind it", _overlap, "chunk.layer"),
    ("a window of no tokens", _set("layers.2.window", 0), "layer.window"),
]


def test_a_manifest_of_every_kind_reads_back_as_it_was() -> None:
    manifest = read_manifest(mixed().SerializeToString())
    assert (manifest.layers, manifest.keyframes) == (KINDS, [100, 120])
    assert manifest.raw_bytes == 640 + 640 + 72
    assert pack(manifest) == mixed().SerializeToString(deterministic=True)


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in MIXED], ids=[row[0] for row in MIXED])
def test_a_keyframe_or_a_window_that_is_not_whole_is_refused(change: Callable[[pb.Manifest], None], field: str) -> None:
    message = mixed()
    change(message)
    with pytest.raises(FormatError) as error:
        read_manifest(message.SerializeToString())
    assert error.value.field == field


def test_chunks_may_stand_in_any_order() -> None:
    message = mixed()
    chunks = list(message.chunks)
    del message.chunks[:]
    message.chunks.extend(reversed(chunks))
    assert sorted(read_manifest(message.SerializeToString()).chunks, key=repr) == sorted(
        read_manifest(mixed().SerializeToString()).chunks, key=repr
    )


@pytest.mark.parametrize("version", [0, 2, 4_000_000_000])
def test_another_version_is_refused_by_number(version: int) -> None:
    for read, message in (
        (read_manifest, pb.Manifest(version=version)),
        (read_schedule, pb.Schedule(version=version)),
        (read_provenance, pb.Provenance(version=version)),
    ):
        with pytest.raises(UnsupportedVersion) as error:
            read(message.SerializeToString())
        assert (error.value.found, error.value.supported) == (version, records.VERSION)


def test_a_message_over_its_limit_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MESSAGE_BYTES", 100)
    for read, field in ((read_manifest, "manifest"), (read_schedule, "schedule"), (read_provenance, "provenance")):
        with pytest.raises(LimitExceeded) as error:
            read(b"\xff" * 101)
        assert error.value.field == field


def _schedule(*passes: dict[str, int]) -> bytes:
    return pb.Schedule(version=1, passes=[pb.Pass(**each) for each in passes]).SerializeToString()


@pytest.mark.parametrize(
    "passes",
    [
        [{"start": 0, "tokens": limits.MAX_TOKENS + 1, "count": 1, "batch": 1}],
        [{"start": 0, "tokens": 1, "count": limits.MAX_TOKENS + 1, "batch": 1}],
        [{"start": 0, "tokens": 1 << 20, "count": 1 << 20, "batch": 1}],
        [{"start": limits.MAX_TOKENS, "tokens": 1, "count": 1, "batch": 1}],
    ],
    ids=["tokens", "count", "tokens times count", "end"],
)
def test_a_schedule_over_a_limit_is_refused(passes: list[dict[str, int]]) -> None:
    with pytest.raises(LimitExceeded):
        read_schedule(_schedule(*passes))


def test_a_schedule_of_too_many_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PASSES", 3)
    with pytest.raises(LimitExceeded) as error:
        read_schedule(pack(Schedule(tuple(Pass(at, 1) for at in range(4)))))
    assert error.value.field == "schedule.passes"


@pytest.mark.parametrize("field", ["tokens", "count", "batch"])
def test_a_pass_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(FormatError):
        read_schedule(_schedule({"start": 0, "tokens": 1, "count": 1, "batch": 1, field: 0}))


def test_passes_with_a_hole_or_an_overlap_are_refused() -> None:
    for start in (3, 5):
        with pytest.raises(FormatError) as error:
            read_schedule(pack(Schedule((Pass(0, 2, 2), Pass(start, 1)))))
        assert error.value.field == "schedule.passes"


def test_each_pass_of_a_schedule_is_told_in_order() -> None:
    assert list(Schedule((Pass(0, 3, 2), Pass(6, 1, 3))).each()) == [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9)]


@pytest.mark.parametrize("field", ["torch", "transformers", "device", "cpu_capability", "attention", "engine"])
def test_a_provenance_with_a_long_text_is_refused(field: str) -> None:
    values = dict.fromkeys(["torch", "transformers", "device", "cpu_capability", "attention", "engine"], "x")
    assert read_provenance(pack(Provenance(threads=2, **values))) == Provenance(threads=2, **values)
    with pytest.raises(LimitExceeded):
        read_provenance(pack(Provenance(threads=2, **{**values, field: "x" * 257})))


passes = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 50), st.integers(1, 8)), max_size=20)


@given(start=st.integers(0, 1000), each=passes, unknown=st.booleans())
def test_any_schedule_reads_back_as_it_was(start: int, each: list[tuple[int, int, int]], unknown: bool) -> None:
    made: list[Pass] = []
    for tokens, count, batch in each:
        at = made[-1].end if made else start
        of_batch = Pass(at, 1, count, batch, batch - 1, at - min(at, tokens), tokens)
        made.append(of_batch if batch > 1 else Pass(at, tokens, count))
    schedule = Schedule(tuple(made), unknown)
    assert read_schedule(pack(schedule)) == schedule
    assert pack(read_schedule(pack(schedule))) == pack(schedule)


@pytest.mark.parametrize(
    "wrong",
    [{"path": 4}, {"tokens": 2}, {"shared": 9}, {"own": 2}, {"batch": 1}, {"batch": limits.MAX_BATCH + 1}],
    ids=str,
)
def test_a_pass_that_does_not_fit_its_batch_is_refused(wrong: dict[str, int]) -> None:
    sound = {"start": 8, "tokens": 1, "count": 5, "batch": 4, "path": 3, "shared": 5, "own": 3}
    assert read_schedule(_schedule(sound)).passes == (Pass(8, 1, 5, 4, 3, 5, 3),)
    with pytest.raises(FormatError):
        read_schedule(_schedule({**sound, **wrong}))


@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_record_raise_only_format_errors(data: bytes) -> None:
    for read in (read_manifest, read_schedule, read_provenance):
        for candidate in (data, b"\x08\x01" + data):  # without and with version 1 in front
            try:
                read(candidate)
            except FormatError:
                continue


def test_every_error_of_reading_is_a_format_error() -> None:
    for kind in (LimitExceeded, UnsupportedVersion, Truncated):
        assert issubclass(kind, FormatError)
