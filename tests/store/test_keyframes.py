"""Windows and keyframes in the store: what went in comes back bit for bit, only what is needed is read, damage is found.

Rows of full attention have tests of their own (test_segments.py); here they stand beside the other kinds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom_proto import limits
from kvloom_proto.records import (
    ITEM_BYTES,
    ChunkSpec,
    LayerKind,
    LayerSpec,
    Manifest,
    Pass,
    Provenance,
    Schedule,
    TensorSpec,
    covered,
    expand,
    pack,
    read_manifest,
)
from kvloom_store import healing, restore, roots, segments, trie
from kvloom_store.checksum import digest
from kvloom_store.database import Database
from kvloom_store.restore import Keyframe, Read, StateDamaged
from kvloom_store.rows import Captured, Frame, RowBuffer, element_type
from kvloom_store.schema import chunk, segment

WINDOW = 100
PAIR = (TensorSpec("keys", "bfloat16", (2, 4), 1), TensorSpec("values", "bfloat16", (2, 4), 1))
STATE = (TensorSpec("conv_states.0", "bfloat16", (6, 3), 0), TensorSpec("recurrent_states.0", "float32", (2, 3, 5), 0))
MIXED = (
    LayerSpec(0, 1, LayerKind.ROWS, PAIR),
    LayerSpec(1, 2, LayerKind.KEYFRAME, STATE),
    LayerSpec(3, 2, LayerKind.WINDOW, PAIR, window=WINDOW),
    LayerSpec(5, 1, LayerKind.EMPTY, ()),
    LayerSpec(6, 1, LayerKind.KEYFRAME, STATE[1:]),
)
"""Keyframes of mixed element sizes, cut by layers of other kinds."""

ROW = 2 * 2 * 4 * 2
"""Bytes that a token adds to a layer of rows or of a window."""
FRAME = 2 * (36 + 120) + 120


def bits(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Any:
    """Random bits, half of them zeros, so that compression has something to do."""
    count = int(np.prod(shape)) * ITEM_BYTES[dtype]
    data = rng.integers(0, 256, count, np.uint8) * rng.integers(0, 2, count, np.uint8)
    return data.view(element_type(dtype)).reshape(tuple(shape))


def filled(layers: tuple[LayerSpec, ...], capacity: int, keyframes: Sequence[int] = (), seed: int = 0) -> Captured:
    rng = np.random.default_rng(seed)
    buffer = RowBuffer(layers, capacity)
    for spec, tensors in zip(expand(layers), buffer.tensors, strict=True):
        for tensor, array in zip(spec.tensors, tensors, strict=False):
            array[...] = bits(rng, tensor.dtype, array.shape)
    frames = {
        position: {
            number: [bits(rng, tensor.dtype, tensor.shape) for tensor in spec.tensors]
            for number, spec in enumerate(expand(layers))
            if spec.kind == LayerKind.KEYFRAME
        }
        for position in keyframes
    }
    return Captured(buffer, frames)


def same_frame(a: Frame, b: Frame) -> bool:
    return list(a) == list(b) and all(
        [x.tobytes() for x in a[n]] == [y.tobytes() for y in b[n]]
        and [x.shape for x in a[n]] == [y.shape for y in b[n]]
        for n in a
    )


def same_rows(a: Any, b: Any, layers: Sequence[int], start: int, end: int) -> bool:
    return all(
        np.array_equal(a.rows(layer, number, start, end), b.rows(layer, number, start, end))
        for layer in layers
        for number in range(len(expand(a.layers)[layer].tensors))
    )


class Store:
    """A store with one trie, and a path of tokens in it."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        with self.database.write() as conn:
            model = roots.add_model(conn, b"m" * 16, "test", {})
            root = roots.root_for(conn, model)
            self.node = trie.extend(conn, root, list(range(4096))).node
            self.provenance = segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "sdpa", "test"))

    def draft(self, source: Captured, start: int, end: int, base: int | None = None) -> segments.Draft:
        layers = source.rows.layers  # type: ignore[attr-defined]
        keyframes = tuple(sorted(source.frames))
        schedule = Schedule((Pass(start, end - start),))
        return segments.Draft(self.node, start, end, base, layers, schedule, self.provenance, keyframes)

    def write(self, source: Captured, start: int, end: int, base: int | None = None, codec: str = "raw") -> int:
        draft = self.draft(source, start, end, base)
        return segments.write(self.database, source, draft, codec_name=codec, finish=lambda *_: None)

    def heal(self, source: Captured, segment_id: int, start: int, end: int) -> bool:
        draft = self.draft(source, start, end)
        return healing.heal(self.database, source, segment_id, draft, codec_name="planes-lz4")

    def manifest(self, segment_id: int) -> Manifest:
        with self.database.read() as conn:
            return read_manifest(conn.execute(sa.select(segment.c.manifest).where(segment.c.id == segment_id)).scalar())

    def load(self, segment_id: int, position: int, layers: tuple[LayerSpec, ...]) -> tuple[RowBuffer, int]:
        """Rows as a plan wants them, and the bytes that were read."""
        sink = RowBuffer(layers, max(position, 1))
        with self.database.read() as conn:
            links = restore.chain(conn, segment_id)
            plan = restore.plan(links, position, layers, in_memory=True)
            return sink, restore.load(conn, links, plan.rows, plan.windows, sink)

    def frame(self, segment_id: int, position: int) -> tuple[Frame, int]:
        with self.database.read() as conn:
            links = restore.chain(conn, segment_id)
            return restore.load_keyframe(conn, links, Keyframe(segment_id, position))


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    made = Store(store_path)
    yield made
    made.database.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store(tmp_path_factory.mktemp("shared") / "store.db")
    yield made
    made.database.close()


# In and out


@st.composite
def tensors(draw: st.DrawFn) -> TensorSpec:
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    return TensorSpec("t", draw(st.sampled_from([*ITEM_BYTES])), tuple(shape), draw(st.integers(0, len(shape))))


@st.composite
def kinds(draw: st.DrawFn) -> tuple[LayerSpec, ...]:
    made: list[LayerSpec] = []
    for kind in draw(st.lists(st.sampled_from([1, 2, 2, 3, 3, 5]), min_size=1, max_size=5)):
        some = () if kind == LayerKind.EMPTY else tuple(draw(st.lists(tensors(), min_size=1, max_size=3)))
        window = draw(st.integers(1, 300)) if kind == LayerKind.WINDOW else 0
        index = made[-1].index + made[-1].count if made else 0
        made.append(LayerSpec(index, draw(st.integers(1, 2)), LayerKind(kind), some, window))
    return tuple(made)


@settings(max_examples=60)
@given(
    layers=kinds(),
    start=st.integers(1, 200),
    length=st.integers(1, 400),
    fractions=st.lists(st.floats(0, 1), max_size=3),
    seed=st.integers(0, 2**32),
    codec=st.sampled_from(["raw", "planes-lz4", "auto"]),
)
def test_every_kind_of_state_comes_back_bit_for_bit(
    shared: Store,
    layers: tuple[LayerSpec, ...],
    start: int,
    length: int,
    fractions: list[float],
    seed: int,
    codec: str,
) -> None:
    keyframes = sorted({start + int(fraction * length) for fraction in fractions})
    keeps = any(spec.kind == LayerKind.KEYFRAME for spec in layers)
    below, source = filled(layers, start, [], seed), filled(layers, start + length, keyframes * keeps, seed + 1)
    base = shared.write(below, 0, start)
    made = shared.write(source, start, start + length, base, codec)
    found, _ = shared.load(made, start + length, layers)
    window = max((spec.window for spec in layers), default=0)
    for number, spec in enumerate(expand(layers)):
        if spec.kind in (LayerKind.ROWS, LayerKind.WINDOW):
            first = max(0, start + length - window + 1) if spec.kind == LayerKind.WINDOW else 0
            assert same_rows(found, below.rows, [number], min(first, start), start)
            assert same_rows(found, source.rows, [number], max(first, start), start + length)
    for position in keyframes * keeps:
        assert same_frame(shared.frame(made, position)[0], source.frames[position])


@pytest.mark.parametrize("codec", ["raw", "planes-lz4", "auto"])
def test_layers_that_lie_between_others_share_a_keyframes_chunk(store: Store, codec: str) -> None:
    source = filled(MIXED, 90, [40, 90])
    made = store.write(source, 0, 90, codec=codec)
    frames = [spec for spec in store.manifest(made).chunks if spec.kind == LayerKind.KEYFRAME]
    assert [(s.position, s.tokens, s.layer, s.layers, s.raw_length) for s in frames] == [
        (40, 0, 1, 6, FRAME),
        (90, 0, 1, 6, FRAME),
    ]
    for position in (40, 90):
        assert same_frame(store.frame(made, position)[0], source.frames[position])


def test_a_keyframe_larger_than_a_chunk_is_cut_by_layers(store: Store) -> None:
    large = (LayerSpec(0, 5, LayerKind.KEYFRAME, (TensorSpec("state", "float32", (1 << 19,), 0),)),)
    source = filled(large, 8, [8])
    made = store.write(source, 0, 8)
    assert [(s.layer, s.layers, s.raw_length) for s in store.manifest(made).chunks] == [
        (0, 2, 4 << 20),
        (2, 2, 4 << 20),
        (4, 1, 2 << 20),
    ]
    assert same_frame(store.frame(made, 8)[0], source.frames[8])


@given(layers=kinds(), start=st.integers(0, 1000), length=st.integers(1, 600))
def test_windows_are_cut_at_multiples_of_64_and_every_row_is_there_once(
    layers: tuple[LayerSpec, ...], start: int, length: int
) -> None:
    windows = [n for n, spec in enumerate(expand(layers)) if spec.kind == LayerKind.WINDOW]
    seen: list[tuple[int, int]] = []
    for spec in segments.cut(layers, start, start + length):
        if spec.kind == LayerKind.WINDOW:
            assert 1 <= spec.tokens <= limits.WINDOW_CHUNK_TOKENS == 64
            assert spec.position // 64 == (spec.position + spec.tokens - 1) // 64
            rows = range(spec.position, spec.position + spec.tokens)
            seen += [(layer, at) for layer in covered(expand(layers), spec) for at in rows]
    assert sorted(seen) == [(layer, at) for layer in windows for at in range(start, start + length)]


# What is read


@pytest.mark.parametrize("position", [1, 63, 64, 65, 163, 164, 200, 255, 256, 257, 319, 320, 321, 600, 640])
@pytest.mark.parametrize("codec", ["raw", "planes-lz4"])
def test_only_the_chunks_that_are_needed_are_read(store: Store, position: int, codec: str) -> None:
    made = store.write(filled(MIXED, 640, [640]), 0, 640, codec=codec)
    _, read = store.load(made, position, MIXED)
    first = max(0, position - WINDOW + 1)
    needed = [
        spec
        for spec in store.manifest(made).chunks
        if (spec.kind == LayerKind.ROWS and spec.position < position)
        or (spec.kind == LayerKind.WINDOW and spec.position + spec.tokens > first and spec.position < position)
    ]
    assert read == sum(spec.stored_length for spec in needed)
    if codec == "raw":
        last = -(-position // 64) * 64
        assert read == ROW * (min(640, -(-position // 256) * 256) + 2 * (last - first // 64 * 64))


def test_of_a_keyframe_its_own_chunks_are_read_and_no_others(store: Store) -> None:
    made = store.write(filled(MIXED, 640, [64, 128, 640]), 0, 640)
    assert [store.frame(made, position)[1] for position in (64, 128, 640)] == [FRAME] * 3


def test_nothing_is_read_that_is_in_memory_already(store: Store) -> None:
    made = store.write(filled(MIXED, 640), 0, 640)
    with store.database.read() as conn:
        links = restore.chain(conn, made)
        assert restore.load(conn, links, [], [], RowBuffer(MIXED, 640)) == 0
        last = restore.load(conn, links, [], [Read(made, 639, 640)], RowBuffer(MIXED, 640))
    assert last == 2 * 64 * ROW


# One or two


def test_equal_content_is_one_segment_and_a_keyframe_that_differs_makes_two(store: Store) -> None:
    first = store.write(filled(MIXED, 90, [40, 90]), 0, 90)
    assert store.write(filled(MIXED, 90, [40, 90]), 0, 90, codec="planes-lz4") == first
    other = filled(MIXED, 90, [40, 90])
    other.frames[40][6][0].view(np.uint32)[...] ^= 1  # type: ignore[index]
    second = store.write(other, 0, 90)
    fewer = filled(MIXED, 90, [40, 90])
    del fewer.frames[40]  # type: ignore[attr-defined]
    third = store.write(fewer, 0, 90)
    assert len({first, second, third}) == 3
    assert same_frame(store.frame(second, 40)[0], other.frames[40])
    assert not same_frame(store.frame(first, 40)[0], other.frames[40])


def test_windows_of_another_size_hold_other_rows(store: Store) -> None:
    """The bits are equal, but not what they stand for."""
    wider = tuple(replace(spec, window=spec.window and 200) for spec in MIXED)
    first = store.write(filled(MIXED, 90, [90]), 0, 90)
    second = store.write(filled(wider, 90, [90]), 0, 90)
    assert store.manifest(second).layers == wider
    assert first != second


# Damage


def at(made: int, kind: LayerKind, position: int) -> Any:
    return (chunk.c.segment == made) & (chunk.c.kind == int(kind)) & (chunk.c.position == position)


DAMAGED = [(LayerKind.WINDOW, 64), (LayerKind.KEYFRAME, 40)]
IDS = ["window", "keyframe"]


def use(store: Store, made: int) -> None:
    """Read all that a turn's state would need, the keyframe at 40 among it."""
    store.load(made, 90, MIXED)
    store.frame(made, 40)


@pytest.mark.parametrize(("kind", "position"), DAMAGED, ids=IDS)
@pytest.mark.parametrize("codec", ["raw", "planes-lz4"])
def test_any_flipped_bit_is_found(store: Store, kind: LayerKind, position: int, codec: str) -> None:
    made = store.write(filled(MIXED, 90, [40, 90]), 0, 90, codec=codec)
    rng = random.Random(3)
    with store.database.read() as conn:
        whole = conn.execute(sa.select(chunk.c.blob).where(at(made, kind, position))).scalar_one()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        with store.database.write() as conn:
            conn.execute(chunk.update().where(at(made, kind, position)).values(blob=bytes(damaged)))
        with pytest.raises(StateDamaged):
            use(store, made)
    with store.database.write() as conn:
        conn.execute(chunk.update().where(at(made, kind, position)).values(blob=whole))
    use(store, made)


@pytest.mark.parametrize(("kind", "position"), DAMAGED, ids=IDS)
@pytest.mark.parametrize(
    "change", [{"blob": None}, {"blob": b""}, {"length": 1}, {"checksum": b"x" * 16}, {"kind": 1, "position": 1}, None]
)
def test_a_changed_or_missing_row_is_found(
    store: Store, kind: LayerKind, position: int, change: dict[str, Any] | None
) -> None:
    made = store.write(filled(MIXED, 90, [40, 90]), 0, 90)
    with store.database.write() as conn:
        if change is None:
            conn.execute(chunk.delete().where(at(made, kind, position)))
        else:
            conn.execute(chunk.update().where(at(made, kind, position)).values(**change))
    with pytest.raises(StateDamaged):
        use(store, made)


def test_keyframes_that_changed_places_are_found(store: Store) -> None:
    made = store.write(filled(MIXED, 90, [40, 90]), 0, 90)
    with store.database.write() as conn:
        for old, new in ((40, 999), (90, 40), (999, 90)):
            conn.execute(chunk.update().where(at(made, LayerKind.KEYFRAME, old)).values(position=new))
    for position in (40, 90):
        with pytest.raises(StateDamaged):
            store.frame(made, position)


# Mending


def rows_of_table(store: Store) -> list[Any]:
    with store.database.read() as conn:
        order = (chunk.c.segment, chunk.c.kind, chunk.c.layer, chunk.c.position)
        return conn.execute(sa.select(chunk).order_by(*order)).all()


@pytest.mark.parametrize(("kind", "position"), DAMAGED, ids=IDS)
@pytest.mark.parametrize("codec", ["raw", "planes-lz4"])
@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_healing_puts_the_very_same_chunk_back(
    store: Store, kind: LayerKind, position: int, codec: str, gone: bool
) -> None:
    source = filled(MIXED, 90, [40, 90])
    made = store.write(source, 0, 90, codec=codec)
    before = rows_of_table(store)
    with store.database.write() as conn:
        some = at(made, kind, position)
        conn.execute(chunk.delete().where(some) if gone else chunk.update().where(some).values(blob=b"x"))
    assert store.heal(source, made, 0, 90)
    assert rows_of_table(store) == before
    use(store, made)


@pytest.mark.parametrize("what", ["a keyframe", "a window"])
def test_other_bits_do_not_heal_and_are_never_read_again(store: Store, what: str) -> None:
    source = filled(MIXED, 90, [40, 90])
    made = store.write(source, 0, 90)
    changed = source.frames[40][1][0] if what == "a keyframe" else source.rows.rows(4, 1, 3, 4)
    changed[...] ^= 1
    assert not store.heal(source, made, 0, 90)
    with pytest.raises(StateDamaged):
        store.load(made, 90, MIXED)
    with pytest.raises(StateDamaged):
        store.frame(made, 90)
    assert store.write(source, 0, 90) != made


def test_a_keyframe_that_was_not_computed_again_does_not_heal(store: Store) -> None:
    """Another spacing may be in use now: the chunk that is damaged would stay as it is."""
    made = store.write(filled(MIXED, 90, [40, 90]), 0, 90)
    fewer = filled(MIXED, 90, [40, 90])
    del fewer.frames[40]  # type: ignore[attr-defined]
    assert not store.heal(fewer, made, 0, 90)
    with pytest.raises(StateDamaged):
        store.load(made, 90, MIXED)


def test_more_keyframes_than_are_stored_do_no_harm(store: Store) -> None:
    made = store.write(filled(MIXED, 90, [40]), 0, 90)
    before = rows_of_table(store)
    with store.database.write() as conn:
        conn.execute(chunk.delete())
    assert store.heal(filled(MIXED, 90, [40, 90]), made, 0, 90)
    assert rows_of_table(store) == before


def test_a_segment_whose_row_is_damaged_is_written_anew_with_its_keyframes(store: Store) -> None:
    source = filled(MIXED, 90, [40, 90])
    made = store.write(source, 0, 90)
    with store.database.write() as conn:
        conn.execute(segment.update().values(manifest=b""))
    with pytest.raises(StateDamaged):
        store.load(made, 90, MIXED)
    assert store.heal(source, made, 0, 90)
    assert same_frame(store.frame(made, 40)[0], source.frames[40])


# Bytes that are written into files for good

GOLDEN = ""


def test_the_bytes_of_a_manifest_with_every_kind_are_those_of_version_one() -> None:
    """Rows, a window and a keyframe, one chunk each; stored digests only where they differ."""

    def made(kind: LayerKind, position: int, tokens: int, layer: int, layers: int, length: int, at: int) -> ChunkSpec:
        some = bytes(range(at, at + 16))
        return ChunkSpec(kind, position, tokens, layer, layers, "raw", length, length, some, some)

    manifest = Manifest(
        60,
        62,
        256,
        MIXED,
        (
            made(LayerKind.ROWS, 60, 2, 0, 1, 2 * ROW, 0),
            made(LayerKind.WINDOW, 60, 2, 3, 2, 4 * ROW, 16),
            replace(made(LayerKind.KEYFRAME, 62, 0, 1, 6, FRAME, 32), codec="planes-lz4", stored_length=77)
            | {"stored_digest": bytes(range(48, 64))},
        ),
    )
    assert pack(manifest).hex() == GOLDEN
    assert read_manifest(bytes.fromhex(GOLDEN)) == manifest


def test_a_keyframes_chunk_holds_its_tensors_one_after_another(store: Store) -> None:
    source = filled(MIXED, 9, [9])
    made = store.write(source, 0, 9)
    expected = b"".join(array.tobytes() for number in (1, 2, 6) for array in source.frames[9][number])
    with store.database.read() as conn:
        stored = conn.execute(sa.select(chunk.c.blob).where(at(made, LayerKind.KEYFRAME, 9))).scalar_one()
    assert stored == expected
    assert digest(stored) == store.manifest(made).chunks[-1].raw_digest
