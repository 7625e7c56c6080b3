"""Segments: rows go in and come back bit for bit, whatever the layers are; what was damaged is never handed out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom_proto import limits
from kvloom_proto.errors import FormatError
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
    read_schedule,
)
from kvloom_store import healing, loading, planner, restore, roots, segments, trie
from kvloom_store.database import Database
from kvloom_store.planner import Link, Read, StateDamaged
from kvloom_store.rows import Captured, RowBuffer
from kvloom_store.schema import chunk, segment

DTYPES = ["float32", "bfloat16", "float16", "float64"]


@st.composite
def tensors(draw: st.DrawFn) -> TensorSpec:
    shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    axis = draw(st.integers(0, len(shape)))
    return TensorSpec(draw(st.sampled_from(["keys", "values", "é"])), draw(st.sampled_from(DTYPES)), tuple(shape), axis)


@st.composite
def layers(draw: st.DrawFn) -> tuple[LayerSpec, ...]:
    made: list[LayerSpec] = []
    index = 0
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 3))
        made.append(LayerSpec(index, count, LayerKind.ROWS, tuple(draw(st.lists(tensors(), min_size=1, max_size=3)))))
        index += count
    return tuple(made)


def filled(specs: tuple[LayerSpec, ...], capacity: int, seed: int, end: int | None = None) -> RowBuffer:
    """A buffer of random bits."""
    buffer = RowBuffer(specs, capacity)
    rng = np.random.default_rng(seed)
    for tensors_of in buffer.tensors:
        for array in tensors_of:
            # Half of the bytes are zeros, so that compression has something to do.
            data = rng.integers(0, 256, array.nbytes, np.uint8) * (rng.integers(0, 2, array.nbytes, np.uint8))
            array[...] = data.view(array.dtype).reshape(array.shape)
    return buffer


def same(a: RowBuffer, b: RowBuffer, start: int, end: int) -> bool:
    return all(
        np.array_equal(a.rows(layer, number, start, end), b.rows(layer, number, start, end))
        for layer, spec in enumerate(expand(a.layers))
        for number in range(len(spec.tensors))
    )


class Store:
    """A store with one trie, and a path of tokens in it."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        with self.database.write() as conn:
            model = roots.add_model(conn, b"m" * 16, "test", {})
            self.root = roots.root_for(conn, model)
            self.node = trie.extend(conn, self.root, list(range(4096))).node
            self.provenance = segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "sdpa", "test"))

    def write(self, source: RowBuffer, start: int, end: int, base: int | None = None, codec_name: str = "raw") -> int:
        draft = self.draft(source, start, end, base)
        return segments.write(self.database, Captured(source, {}), draft, codec_name=codec_name, finish=lambda *_: None)

    def draft(self, source: RowBuffer, start: int, end: int, base: int | None = None) -> segments.Draft:
        schedule = Schedule((Pass(start, end - start),))
        return segments.Draft(self.node, start, end, base, source.layers, schedule, self.provenance)

    def heal(self, source: RowBuffer, segment_id: int, start: int, end: int, base: int | None = None) -> bool:
        draft = self.draft(source, start, end, base)
        return healing.heal(self.database, Captured(source, {}), segment_id, draft, codec_name="lz4")

    def read(self, segment_id: int, upto: int, layers: tuple[LayerSpec, ...]) -> RowBuffer:
        sink = RowBuffer(layers, max(upto, 1))
        with self.database.read() as conn:
            links = restore.chain(conn, segment_id)
            plan = planner.plan(links, upto, layers)
            loading.load(conn, links, plan.rows, plan.windows, sink)
        return sink

    def count(self, table: sa.Table) -> int:
        with self.database.read() as conn:
            return conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


@pytest.fixture
def store(store_path: Path) -> Any:
    made = Store(store_path)
    yield made
    made.database.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Store(tmp_path_factory.mktemp("shared") / "store.db")
    yield made
    made.database.close()


PLAIN = (
    LayerSpec(
        0, 3, LayerKind.ROWS, (TensorSpec("keys", "float32", (2, 4), 1), TensorSpec("values", "float32", (2, 4), 1))
    ),
)


@settings(max_examples=60)
@given(
    specs=layers(),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=5, unique=True),
    position=st.integers(0, 700),
    seed=st.integers(0, 2**32),
    codec_name=st.sampled_from(["raw", "lz4", "zstd", "auto"]),
)
def test_rows_of_any_shape_come_back_bit_for_bit_at_any_position(
    shared: Store, specs: tuple[LayerSpec, ...], cuts: list[int], position: int, seed: int, codec_name: str
) -> None:
    source = filled(specs, 700, seed)
    base, ends = None, sorted(cuts)
    for start, end in itertools.pairwise([0, *ends]):
        base = shared.write(source, start, end, base, codec_name)
    position = min(position, ends[-1])
    assert same(source, shared.read(base, position, specs), 0, position)


@settings(max_examples=60)
@given(
    ends=st.lists(st.integers(2, 600), min_size=1, max_size=6),
    fractions=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    position=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_a_delta_may_begin_inside_its_base(
    shared: Store, ends: list[int], fractions: list[float], position: float, seed: int
) -> None:
    """The model is a list of (segment, row) by position, rewritten from where each delta begins."""
    base: int | None = None
    truth: list[int] = []
    sources: list[RowBuffer] = []
    floor = 0
    for number, (length, fraction) in enumerate(zip(ends, fractions, strict=False)):
        source = filled(PLAIN, 1300, seed + number)
        # at least one row of the segment before stays, as in a conversation
        start = 0 if base is None else floor + 1 + int(fraction * (len(truth) - floor - 1))
        end = start + length
        if end > 1300:
            break
        base = shared.write(source, start, end, base)
        truth = truth[:start] + [number] * length
        sources.append(source)
        floor = start
    upto = int(position * len(truth))
    found = shared.read(base, upto, PLAIN)
    for at, number in enumerate(truth[:upto]):
        assert same(sources[number], found, at, at + 1)


class Counting:
    """A connection, and the bytes of the blobs that came out of it."""

    def __init__(self, conn: sa.Connection) -> None:
        self.conn = conn
        self.bytes = 0

    def execute(self, query: Any) -> Any:
        for row in self.conn.execute(query):
            self.bytes += len(row.blob)
            yield row


GEMMA = tuple(
    LayerSpec(first + at, count, kind, (TensorSpec("keys", "float32", (1, 2), 1),), window)
    for first in (0, 6)
    for at, count, kind, window in ((0, 5, LayerKind.WINDOW, 512), (5, 1, LayerKind.ROWS, 0))
)
"""Twelve layers, five that see a window of 512 tokens to one that sees all, as Gemma 3 has them."""


def test_windows_let_a_restore_read_a_fraction_wherever_a_branch_left_its_path(store: Store) -> None:
    with store.database.write() as conn:
        store.node = trie.extend(conn, store.root, [1, *range(8999)]).node
    source = filled(GEMMA, 9000, 1)
    trunk = store.write(source, 0, 8900)
    draw = random.Random(3)
    row = sum(spec.row_bytes * spec.count for spec in GEMMA)
    # None: on the trunk itself. 7681 and 7713 are the worst places: the first row of a chunk of 256, and of 32.
    for left in (None, 100, 7681, 7713, *(draw.randrange(7500, 8000) for _ in range(8))):
        segment_id = trunk if left is None else store.write(filled(GEMMA, 9000, 2), left, 8900, trunk)
        for position in (8000, 8001, 8191, 8192, 8193, *(draw.randrange(8000, 8900) for _ in range(20))):
            with store.database.read() as conn:
                links = restore.chain(conn, segment_id)
                plan = planner.plan(links, position, GEMMA)
                counting: Any = Counting(conn)
                read = loading.load(counting, links, plan.rows, plan.windows, RowBuffer(GEMMA, position))
            assert counting.bytes == read, "what is not wanted is not fetched either"
            assert position * row / read >= 4.3, (left, position)


def test_equal_content_on_the_same_base_is_stored_once(store: Store) -> None:
    source, other = filled(PLAIN, 300, 1), filled(PLAIN, 300, 1)
    first = store.write(source, 0, 100)
    assert store.write(other, 0, 100) == first
    assert store.write(other, 0, 100, codec_name="lz4") == first
    second = store.write(source, 100, 300, first)
    assert store.write(other, 100, 300, first) == second
    assert store.count(segment) == 2


def test_different_bits_and_other_bases_stay_side_by_side(store: Store) -> None:
    source = filled(PLAIN, 300, 1)
    first, second = store.write(source, 0, 100), store.write(filled(PLAIN, 300, 2), 0, 100)
    source.rows(2, 1, 99, 100)[...] ^= 1
    third = store.write(source, 0, 100)
    on_first, on_second = store.write(source, 100, 200, first), store.write(source, 100, 200, second)
    assert len({first, second, third, on_first, on_second}) == 5
    assert same(store.read(third, 100, PLAIN), source, 0, 100)
    assert not same(store.read(first, 100, PLAIN), source, 99, 100)


def test_a_segment_that_is_not_finished_is_not_read(store: Store) -> None:
    made = store.write(filled(PLAIN, 300, 1), 0, 100)
    with store.database.write() as conn:
        conn.execute(segment.update().values(complete=0))
    with pytest.raises(StateDamaged):
        store.read(made, 100, PLAIN)


def test_what_a_dead_process_left_is_swept_and_what_a_live_one_is_writing_is_not(store: Store) -> None:
    kept = store.write(filled(PLAIN, 300, 1), 0, 100)
    draft = segments.Draft(store.node, 0, 50, None, PLAIN, Schedule(), store.provenance)
    with store.database.write() as conn:
        old = segments._insert_incomplete(conn, draft, b"o" * 16)
        young = segments._insert_incomplete(conn, draft, b"y" * 16)
        conn.execute(segment.update().where(segment.c.id == old).values(created=0))
    with store.database.write() as conn:
        segments.sweep(conn)
    with store.database.read() as conn:
        assert set(conn.execute(sa.select(segment.c.id)).scalars()) == {kept, young}


# Planning


def link(number: int, start: int, end: int) -> Link:
    return Link(number, 1, start, end, None, 1, b"", b"")


def test_a_plan_takes_each_segment_up_to_where_the_next_one_begins() -> None:
    links = [link(1, 0, 100), link(2, 80, 150), link(3, 150, 170)]
    assert planner.reads_of(links, 170) == [Read(1, 0, 80), Read(2, 80, 150), Read(3, 150, 170)]
    assert planner.reads_of(links, 151) == [Read(1, 0, 80), Read(2, 80, 150), Read(3, 150, 151)]
    assert planner.reads_of(links, 150) == [Read(1, 0, 80), Read(2, 80, 150)]
    assert planner.reads_of(links, 81) == [Read(1, 0, 80), Read(2, 80, 81)]
    assert planner.reads_of(links, 80) == [Read(1, 0, 80)]
    assert planner.reads_of(links, 1) == [Read(1, 0, 1)]
    assert planner.reads_of(links, 0) == []


@pytest.mark.parametrize("position", [171, 4096])
def test_a_plan_beyond_what_is_held_is_refused(position: int) -> None:
    with pytest.raises(StateDamaged):
        planner.reads_of([link(1, 0, 100), link(2, 80, 170)], position)


def test_a_plan_over_a_hole_is_refused() -> None:
    with pytest.raises(StateDamaged):
        planner.reads_of([link(1, 0, 100), link(2, 120, 170)], 170)


@given(data=st.data())
def test_a_plan_covers_every_row_exactly_once(data: st.DataObject) -> None:
    links: list[Link] = []
    for number in range(data.draw(st.integers(1, 8))):
        start = 0 if not links else data.draw(st.integers(links[-1].start + 1, links[-1].end))
        links.append(link(number, start, start + data.draw(st.integers(1, 50))))
    position = data.draw(st.integers(0, links[-1].end))
    reads = planner.reads_of(links, position)
    assert [at for read in reads for at in range(read.start, read.end)] == list(range(position))
    for read in reads:
        assert links[read.segment].start <= read.start < read.end <= links[read.segment].end
        assert all(later.start >= read.end for later in links[read.segment + 1 :] if later.start < position)


# Cutting


@given(specs=layers(), start=st.integers(0, 3000), length=st.integers(1, 1500))
def test_chunks_cover_every_row_of_every_layer_exactly_once(
    specs: tuple[LayerSpec, ...], start: int, length: int
) -> None:
    seen: dict[tuple[int, int], int] = {}
    for spec in segments.cut(specs, start, start + length):
        assert spec.position // limits.CHUNK_TOKENS == (spec.position + spec.tokens - 1) // limits.CHUNK_TOKENS
        assert spec.raw_length <= limits.CHUNK_BYTES or spec.layers == 1
        for layer in range(spec.layer, spec.layer + spec.layers):
            for position in range(spec.position, spec.position + spec.tokens):
                seen[layer, position] = seen.get((layer, position), 0) + 1
    assert set(seen.values()) == {1}
    assert len(seen) == len(expand(specs)) * length


def test_chunk_boundaries_are_absolute_so_that_neighbours_never_share_a_chunk() -> None:
    positions = [(spec.position, spec.tokens) for spec in segments.cut(PLAIN, 250, 600)]
    assert positions == [(250, 6), (256, 256), (512, 88)]


def test_layers_share_a_chunk_up_to_its_size_and_no_further() -> None:
    wide = (LayerSpec(0, 5, LayerKind.ROWS, (TensorSpec("keys", "float32", (2048,), 0),)),)
    # one layer of 256 tokens has 2 MiB, so two fill a chunk
    assert [(s.layer, s.layers) for s in segments.cut(wide, 0, 256)] == [(0, 2), (2, 2), (4, 1)]
    assert [(s.layer, s.layers) for s in segments.cut(wide, 0, 10)] == [(0, 5)]


def test_a_chunk_holds_the_layers_of_one_kind_whatever_lies_between() -> None:
    mixed = (replace(PLAIN[0], count=1), LayerSpec(1, 2, LayerKind.EMPTY, ()), replace(PLAIN[0], index=3, count=2))
    chunks = list(segments.cut(mixed, 0, 5))
    assert [(s.layer, s.layers, covered(expand(mixed), s)) for s in chunks] == [(0, 5, (0, 3, 4))]


# Damage


def test_any_flipped_bit_of_a_chunk_is_found(store: Store) -> None:
    made = store.write(filled(PLAIN, 40, 1), 0, 40, codec_name="lz4")
    rng = random.Random(7)
    with store.database.read() as conn:
        row = conn.execute(sa.select(chunk)).one()
    for _ in range(100):
        damaged = bytearray(row.blob)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        with store.database.write() as conn:
            conn.execute(chunk.update().values(blob=bytes(damaged)))
        with pytest.raises(StateDamaged):
            store.read(made, 40, PLAIN)


@pytest.mark.parametrize(
    ("column", "value"),
    [("blob", None), ("blob", "text"), ("blob", b""), ("length", 1), ("place", "external"), ("checksum", b"x" * 16)],
)
def test_a_changed_cell_of_a_chunk_is_found(store: Store, column: str, value: object) -> None:
    made = store.write(filled(PLAIN, 40, 1), 0, 40)
    with store.database.write() as conn:
        conn.exec_driver_sql(f"UPDATE chunk SET {column} = ?", (value,))
    with pytest.raises(StateDamaged):
        store.read(made, 40, PLAIN)


def test_chunks_that_changed_places_are_found(store: Store) -> None:
    first, second = store.write(filled(PLAIN, 40, 1), 0, 40), store.write(filled(PLAIN, 40, 2), 0, 40)
    with store.database.write() as conn:
        for old, new in ((first, 999), (second, first), (999, second)):
            conn.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
            conn.execute(chunk.update().where(chunk.c.segment == old).values(segment=new))
    for made in (first, second):
        with pytest.raises(StateDamaged):
            store.read(made, 40, PLAIN)


@pytest.mark.parametrize("column", ["manifest", "digest", "schedule", "start", "end", "base_segment"])
def test_a_damaged_segment_is_found(store: Store, column: str) -> None:
    source = filled(PLAIN, 300, 1)
    base = store.write(source, 0, 100)
    made = store.write(source, 100, 200, base)
    with store.database.write() as conn:
        at = segment.c.id == made
        value = conn.execute(sa.select(segment.c[column]).where(at)).scalar_one()
        other = (
            value[:-1] + bytes([value[-1] ^ 1])
            if isinstance(value, bytes)
            else None
            if column == "base_segment"
            else value + 1
        )
        conn.execute(segment.update().where(at).values({column: other}))
    with pytest.raises(StateDamaged):
        store.read(made, 200, PLAIN)
    assert same(store.read(base, 100, PLAIN), source, 0, 100)


@pytest.mark.parametrize("codec_name", ["raw", "lz4", "zstd"])
def test_healing_puts_the_very_same_row_back(store: Store, codec_name: str) -> None:
    source = filled(PLAIN, 300, 1)
    made = store.write(source, 0, 300, codec_name=codec_name)
    with store.database.read() as conn:
        before = conn.execute(sa.select(chunk).order_by(chunk.c.position)).all()
    with store.database.write() as conn:
        conn.execute(chunk.update().where(chunk.c.position == 0).values(blob=b"x"))
        conn.execute(chunk.delete().where(chunk.c.position == 256))
    assert store.heal(source, made, 0, 300)
    with store.database.read() as conn:
        assert conn.execute(sa.select(chunk).order_by(chunk.c.position)).all() == before


@pytest.mark.parametrize("column", ["manifest", "schedule", "base_segment"])
def test_a_damaged_segment_is_written_anew_under_its_old_number(store: Store, column: str) -> None:
    source = filled(PLAIN, 300, 1)
    base = store.write(source, 0, 100)
    made = store.write(source, 100, 300, base)
    above = store.write(filled(PLAIN, 400, 2), 250, 400, made)
    with store.database.write() as conn:
        conn.execute(
            segment.update().where(segment.c.id == made).values({column: None if column == "base_segment" else b""})
        )
    with pytest.raises(StateDamaged):
        store.read(above, 400, PLAIN)
    assert store.heal(source, made, 100, 300, base)
    assert same(store.read(above, 400, PLAIN), source, 0, 250)


def test_state_on_another_base_does_not_heal(store: Store) -> None:
    source = filled(PLAIN, 300, 1)
    first, second = store.write(source, 0, 100), store.write(filled(PLAIN, 100, 2), 0, 100)
    made = store.write(source, 100, 200, first)
    assert not store.heal(source, made, 100, 200, second)
    with pytest.raises(StateDamaged):
        store.read(made, 200, PLAIN)


def test_rows_with_other_bits_do_not_heal_and_are_never_read_again(store: Store) -> None:
    source = filled(PLAIN, 300, 1)
    made = store.write(source, 0, 300)
    source.rows(0, 0, 7, 8)[...] ^= 1
    assert not store.heal(source, made, 0, 300)
    with pytest.raises(StateDamaged):
        store.read(made, 300, PLAIN)
    new = store.write(source, 0, 300)
    assert new != made
    assert same(store.read(new, 300, PLAIN), source, 0, 300)


# Bytes that are written into files for good


MANIFEST = Manifest(
    250,
    262,
    256,
    (
        LayerSpec(
            0,
            2,
            LayerKind.ROWS,
            (TensorSpec("keys", "bfloat16", (2, 4), 1), TensorSpec("values", "bfloat16", (2, 3), 1)),
        ),
        LayerSpec(2, 1, LayerKind.EMPTY, ()),
    ),
    (
        ChunkSpec(LayerKind.ROWS, 250, 6, 0, 2, "lz4", 336, 211, bytes(range(16)), bytes(range(16, 32))),
        ChunkSpec(LayerKind.ROWS, 256, 6, 0, 2, "raw", 336, 336, bytes(range(32, 48)), bytes(range(32, 48))),
    ),
)
SCHEDULE = Schedule((Pass(250, 6), Pass(256, 3), Pass(259, 1, 3)))

GOLDEN_MANIFEST = (
    "080110fa011886022080022a361002180122160a046b657973120862666c6f617431361a020204200122180a0676616c"
    "756573120862666c6f617431361a02020320012a060802100118053238080110fa011806280232036c7a3438d00240d3"
    "014a10000102030405060708090a0b0c0d0e0f5210101112131415161718191a1b1c1d1e1f3226080110800218062802"
    "320372617738d00240d0024a10202122232425262728292a2b2c2d2e2f"
)
GOLDEN_SCHEDULE = "08011a0908fa011006180120011a090880021003180120011a09088302100118032001"
GOLDEN_UNKNOWN = "08011001"


def test_the_bytes_of_a_manifest_are_those_of_version_one() -> None:
    assert pack(MANIFEST).hex() == GOLDEN_MANIFEST
    assert read_manifest(bytes.fromhex(GOLDEN_MANIFEST)) == MANIFEST


def test_the_bytes_of_a_schedule_are_those_of_version_one() -> None:
    assert pack(SCHEDULE).hex() == GOLDEN_SCHEDULE
    assert read_schedule(bytes.fromhex(GOLDEN_SCHEDULE)) == SCHEDULE
    assert pack(Schedule(unknown=True)).hex() == GOLDEN_UNKNOWN


def test_every_damaged_manifest_raises_a_format_error_or_reads_within_its_limits() -> None:
    whole = pack(MANIFEST)
    rng = random.Random(11)
    mutants = [whole[:length] for length in range(len(whole))]
    mutants += [_flipped(whole, bit) for bit in range(len(whole) * 8)]
    mutants += [
        _flipped(_flipped(whole, rng.randrange(len(whole) * 8)), rng.randrange(len(whole) * 8)) for _ in range(2000)
    ]
    mutants += [whole[: rng.randrange(len(whole))] + rng.randbytes(rng.randrange(40)) for _ in range(1000)]
    mutants += [rng.randbytes(rng.randrange(200)) for _ in range(1000)]
    refused = 0
    for mutant in mutants:
        try:
            found = read_manifest(mutant)
        except FormatError:
            refused += 1
            continue
        # What is still read is a manifest that holds together: every row once, every length that of its rows.
        assert 0 <= found.start < found.end <= limits.MAX_TOKENS
        specs = expand(found.layers)
        rows = sum(
            c.tokens * sum(specs[at].row_bytes for at in range(c.layer, c.layer + c.layers)) for c in found.chunks
        )
        assert rows == found.raw_bytes
        assert all(t.dtype in ITEM_BYTES for spec in specs for t in spec.tensors)
    assert refused > len(mutants) // 2


def _flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)
