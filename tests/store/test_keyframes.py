"""Windows and keyframes in the store: what went in comes back bit for bit, and only what is needed is read.

Rows of full attention have tests of their own (test_segments.py); here they stand beside the other kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from states import FRAME, MIXED, ROW, WINDOW, Store, at, filled, same_frame, same_rows

from kvloom_proto import limits
from kvloom_proto.records import (
    ITEM_BYTES,
    ChunkSpec,
    LayerKind,
    LayerSpec,
    Manifest,
    TensorSpec,
    covered,
    expand,
    pack,
    read_manifest,
)
from kvloom_store import loading, restore, segments
from kvloom_store.checksum import digest
from kvloom_store.planner import Read
from kvloom_store.rows import RowBuffer
from kvloom_store.schema import chunk


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
    codec=st.sampled_from(["raw", "lz4", "zstd", "auto"]),
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


@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd", "auto"])
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
def test_windows_are_cut_at_multiples_of_32_and_every_row_is_there_once(
    layers: tuple[LayerSpec, ...], start: int, length: int
) -> None:
    windows = [n for n, spec in enumerate(expand(layers)) if spec.kind == LayerKind.WINDOW]
    seen: list[tuple[int, int]] = []
    for spec in segments.cut(layers, start, start + length):
        if spec.kind == LayerKind.WINDOW:
            assert 1 <= spec.tokens <= limits.WINDOW_CHUNK_TOKENS == 32
            assert spec.position // 32 == (spec.position + spec.tokens - 1) // 32
            rows = range(spec.position, spec.position + spec.tokens)
            seen += [(layer, at) for layer in covered(expand(layers), spec) for at in rows]
    assert sorted(seen) == [(layer, at) for layer in windows for at in range(start, start + length)]


# What is read


@pytest.mark.parametrize("position", [1, 63, 64, 65, 163, 164, 200, 255, 256, 257, 319, 320, 321, 600, 640])
@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
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
        last = -(-position // 32) * 32
        assert read == ROW * (last + 2 * (last - first // 32 * 32))


def test_of_a_keyframe_its_own_chunks_are_read_and_no_others(store: Store) -> None:
    made = store.write(filled(MIXED, 640, [64, 128, 640]), 0, 640)
    assert [store.frame(made, position)[1] for position in (64, 128, 640)] == [FRAME] * 3


def test_nothing_is_read_that_is_in_memory_already(store: Store) -> None:
    made = store.write(filled(MIXED, 640), 0, 640)
    with store.database.read() as conn:
        links = restore.chain(conn, made)
        assert loading.load(conn, links, [], [], RowBuffer(MIXED, 640)) == 0
        last = loading.load(conn, links, [], [Read(made, 639, 640)], RowBuffer(MIXED, 640))
    assert last == 2 * 32 * ROW


# One or two


def test_equal_content_is_one_segment_and_a_keyframe_that_differs_makes_two(store: Store) -> None:
    first = store.write(filled(MIXED, 90, [40, 90]), 0, 90)
    assert store.write(filled(MIXED, 90, [40, 90]), 0, 90, codec="lz4") == first
    other = filled(MIXED, 90, [40, 90])
    other.frames[40][6][0].view(np.uint32)[...] ^= 1  # type: ignore[index]
    second = store.write(other, 0, 90)
    fewer = filled(MIXED, 90, [40, 90])
    del fewer.frames[40]  # type: ignore[attr-defined]
    third = store.write(fewer, 0, 90)
    assert len({first, second, third}) == 3
    assert same_frame(store.frame(second, 40)[0], other.frames[40])
    assert not same_frame(store.frame(first, 40)[0], other.frames[40])


# Bytes that are written into files for good

GOLDEN = (
    "0801103c183e2080022a361001180122160a046b657973120862666c6f617431361a020204200122180a0676616c7565"
    "73120862666c6f617431361a02020420012a49080110021803221d0a0d636f6e765f7374617465732e30120862666c6f"
    "617431361a02060322220a12726563757272656e745f7374617465732e301207666c6f617433321a030203052a3a0803"
    "1002180222160a046b657973120862666c6f617431361a020204200122180a0676616c756573120862666c6f61743136"
    "1a020204200128642a060805100118052a2a08061001180322220a12726563757272656e745f7374617465732e301207"
    "666c6f617433321a0302030532230801103c180228013203726177384040404a10000102030405060708090a0b0c0d0e"
    "0f32270802103c18022003280232037261773880014080014a10101112131415161718191a1b1c1d1e1f32360803103e"
    "2001280632036c7a3438b003404d4a10202122232425262728292a2b2c2d2e2f5210303132333435363738393a3b3c3d"
    "3e3f"
)


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
            replace(
                made(LayerKind.KEYFRAME, 62, 0, 1, 6, FRAME, 32),
                codec="lz4",
                stored_length=77,
                stored_digest=bytes(range(48, 64)),
            ),
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
