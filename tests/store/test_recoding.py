"""Recoding: the same bits in other bytes, in small steps, each of which leaves a good store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from states import MIXED, Store, at, filled, same_frame, same_rows

from kvloom_proto import codecs
from kvloom_proto.errors import FormatError, UnknownCodec
from kvloom_proto.records import ChunkSpec, LayerKind, LayerSpec, Manifest, TensorSpec, pack, read_manifest
from kvloom_store import loading, planner, quantized, recode, restore, segments
from kvloom_store.planner import StateDamaged
from kvloom_store.rows import Captured, RowBuffer
from kvloom_store.schema import chunk, segment

ROWS = [0, 3, 4]
LENGTH = 600


@pytest.fixture
def store(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(segments, "TRANSACTION_BYTES", 8192)
    made = Store(store_path)
    yield made
    made.database.close()


SOURCE = filled(MIXED, LENGTH, [300, LENGTH])


def written(store: Store, codec: str = codecs.RAW) -> int:
    return store.write(SOURCE, 0, LENGTH, codec=codec)


def is_whole(store: Store, made: int) -> bool:
    rows, _ = store.load(made, LENGTH, MIXED)
    some = same_rows(SOURCE.rows, rows, ROWS[:1], 0, LENGTH) and same_rows(SOURCE.rows, rows, ROWS, LENGTH - 90, LENGTH)
    return some and all(same_frame(store.frame(made, where)[0], SOURCE.frames[where]) for where in (300, LENGTH))


def used(store: Store, made: int) -> set[str]:
    return {spec.codec for spec in store.manifest(made).chunks}


@pytest.mark.parametrize("after", codecs.SETTINGS)
@pytest.mark.parametrize("before", codecs.LOSSLESS)
def test_recoded_state_has_the_same_bits_and_digests(store: Store, before: str, after: str) -> None:
    made = written(store, before)
    digests = {(c.kind, c.layer, c.position): c.raw_digest for c in store.manifest(made).chunks}
    size = store.manifest(made).stored_bytes
    done = recode.recode(store.database, [made], after)
    manifest = store.manifest(made)
    assert {(c.kind, c.layer, c.position): c.raw_digest for c in manifest.chunks} == digests
    assert (done.before, done.after, done.damaged, done.stopped) == (size, manifest.stored_bytes, 0, False)
    assert is_whole(store, made)
    assert used(store, made) <= (set(codecs.LOSSLESS) if after == codecs.AUTO else {codecs.RAW, after})
    assert store.write(SOURCE, 0, LENGTH) == made, "it is still the same content"
    assert recode.recode(store.database, [made], after).chunks == 0, "nothing is left to do"


def test_back_and_forth_gives_the_very_same_rows(store: Store) -> None:
    made = written(store)

    def everything() -> list[sa.Row]:
        with store.database.read() as conn:
            return list(conn.execute(sa.select(chunk).order_by(*chunk.primary_key.columns)))

    before = everything()
    recode.recode(store.database, [made], codecs.ZSTD)
    assert everything() != before
    recode.recode(store.database, [made], codecs.RAW)
    assert everything() == before


def test_a_reader_that_began_before_sees_the_old_form_and_a_later_one_the_new(store: Store) -> None:
    made = written(store)
    with store.database.read() as conn:
        links = restore.chain(conn, made)
        plan = planner.plan(links, LENGTH, MIXED, in_memory=True)
        recode.recode(store.database, [made], codecs.ZSTD)
        sink = RowBuffer(MIXED, LENGTH)
        loading.load(conn, links, plan.rows, plan.windows, sink)
    assert same_rows(SOURCE.rows, sink, ROWS[:1], 0, LENGTH)
    assert is_whole(store, made)


def test_stopped_it_keeps_what_was_done_and_goes_on_later(store: Store) -> None:
    made, cancel, seen = written(store), threading.Event(), []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        cancel.set()

    stopped = recode.recode(store.database, [made], codecs.ZSTD, cancel=cancel, progress=progress)
    assert (stopped.stopped, len(seen)) == (True, 1)
    assert 0 < seen[0][0] < seen[0][1] == store.manifest(made).raw_bytes
    assert used(store, made) == {codecs.RAW, codecs.ZSTD}
    assert stopped.after == store.manifest(made).stored_bytes < stopped.before
    assert is_whole(store, made)
    rest = recode.recode(store.database, [made], codecs.ZSTD)
    assert not rest.stopped
    assert used(store, made) == {codecs.ZSTD}
    assert is_whole(store, made)


def test_whatever_breaks_it_off_the_store_is_good(store: Store) -> None:
    made, seen = written(store), []

    def dies(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode.recode(store.database, [made], codecs.LZ4, progress=dies)
    assert is_whole(store, made)


def test_damaged_chunks_are_left_alone_and_counted(store: Store) -> None:
    made = written(store)
    with store.database.write() as conn:
        conn.execute(chunk.update().where(at(made, LayerKind.ROWS, 0)).values(blob=b"x"))
        conn.execute(chunk.delete().where(at(made, LayerKind.WINDOW, 0)))
    done = recode.recode(store.database, [made], codecs.ZSTD)
    assert (done.damaged, done.stopped) == (2, False)
    with pytest.raises(StateDamaged):
        store.load(made, 100, MIXED)
    assert store.heal(SOURCE, made, 0, LENGTH)
    assert is_whole(store, made)


def test_what_another_process_changed_meanwhile_is_not_overwritten(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, encoded = written(store), segments.encoded

    def slowly(*args):
        monkeypatch.setattr(segments, "encoded", encoded)
        recode.recode(store.database, [made], codecs.LZ4)  # the other process, all of it
        return encoded(*args)

    monkeypatch.setattr(segments, "encoded", slowly)
    recode.recode(store.database, [made], codecs.ZSTD)
    assert is_whole(store, made)
    recode.recode(store.database, [made], codecs.ZSTD)
    assert used(store, made) == {codecs.ZSTD}


def test_a_segment_that_was_removed_meanwhile_is_passed_over(store: Store) -> None:
    made = written(store)

    def removes(done: int, total: int) -> None:
        with store.database.write() as conn:
            segments.delete(conn, [made])

    done = recode.recode(store.database, [made, 10_000], codecs.ZSTD, progress=removes)
    assert done.damaged > 0
    with store.database.read() as conn:
        assert conn.execute(sa.select(chunk)).all() == []


# With loss


PLAIN = (LayerSpec(0, 2, LayerKind.ROWS, (TensorSpec("keys", "float32", (2, 64), 1),)),)


def finite(length: int, seed: int = 0) -> Captured:
    source = filled(PLAIN, length, seed=seed)
    rng = np.random.default_rng(seed)
    for tensors in source.rows.tensors:
        for array in tensors:
            array[...] = rng.standard_normal(array.shape, np.float32).view(np.uint32)
    return source


def lossy_of(store: Store, made: int) -> int:
    with store.database.read() as conn:
        return conn.execute(sa.select(segment.c.lossy).where(segment.c.id == made)).scalar_one()


@pytest.mark.parametrize("codec", codecs.LOSSY)
def test_lossy_rows_are_near_the_exact_ones_and_checked_like_them(store: Store, codec: str) -> None:
    source = finite(300)
    made = store.write(source, 0, 300)
    done = recode.recode(store.database, [made], codec)
    blocks = 300 * 2 * 2 * 64 // 32
    assert done.after == store.manifest(made).stored_bytes == blocks * quantized.BYTES[codec]
    assert (lossy_of(store, made), used(store, made)) == (segments.CODED, {codec})
    rows, _ = store.load(made, 300, PLAIN)
    exact, found = (each.rows(1, 0, 0, 300).view(np.float32) for each in (source.rows, rows))
    assert 0 < np.abs(exact - found).max() < 0.5
    with store.database.read() as conn:
        blob = conn.execute(sa.select(chunk.c.blob).where(at(made, LayerKind.ROWS, 256))).scalar_one()
    damaged = bytearray(blob)
    damaged[77] ^= 1
    with store.database.write() as conn:
        conn.execute(chunk.update().where(at(made, LayerKind.ROWS, 256)).values(blob=bytes(damaged)))
    with pytest.raises(StateDamaged):
        store.load(made, 300, PLAIN)


def test_keyframes_other_dtypes_and_what_is_not_finite_stay_exact(store: Store) -> None:
    made = written(store)  # random bits of bfloat16 rows: not numbers, many of them
    recode.recode(store.database, [made], codecs.Q8_0)
    assert used(store, made) == {codecs.RAW}
    assert (lossy_of(store, made), is_whole(store, made)) == (0, True)
    wide = (LayerSpec(0, 1, LayerKind.ROWS, (TensorSpec("keys", "float64", (4,), 0),)),)
    source = filled(wide, 50)
    other = store.write(source, 0, 50)
    assert recode.recode(store.database, [other], codecs.Q8_0).chunks == 0


def test_lossy_state_is_never_taken_for_the_exact_one(store: Store) -> None:
    source = finite(100)
    made = store.write(source, 0, 100)
    recode.recode(store.database, [made], codecs.Q8_0)
    exact = store.write(source, 0, 100)
    assert exact != made
    rows, _ = store.load(exact, 100, PLAIN)
    assert same_rows(source.rows, rows, [0, 1], 0, 100)


@pytest.mark.parametrize("codec", [*codecs.LOSSLESS, codecs.Q4_0])
def test_what_was_lost_is_not_dressed_up_as_something_else(store: Store, codec: str) -> None:
    made = store.write(finite(100), 0, 100)
    recode.recode(store.database, [made], codecs.Q8_0)
    assert recode.recode(store.database, [made], codec).chunks == 0
    assert (lossy_of(store, made), used(store, made)) == (segments.CODED, {codecs.Q8_0})


def test_a_replay_mends_lossy_rows_by_the_digest_of_the_exact_ones(store: Store) -> None:
    source = finite(300)
    made = store.write(source, 0, 300)
    recode.recode(store.database, [made], codecs.Q4_0)
    assert store.heal(source, made, 0, 300)
    rows, _ = store.load(made, 300, PLAIN)
    assert same_rows(source.rows, rows, [0, 1], 0, 300)
    assert lossy_of(store, made) == 0
    assert store.write(source, 0, 300) == made


def test_what_lossy_rows_decode_to_does_not_mend_them(store: Store) -> None:
    made = store.write(finite(300), 0, 300)
    recode.recode(store.database, [made], codecs.Q4_0)
    rows, _ = store.load(made, 300, PLAIN)
    assert not store.heal(Captured(rows, {}), made, 0, 300)
    with pytest.raises(StateDamaged):
        store.load(made, 300, PLAIN)


def test_a_manifest_with_lossy_keyframes_or_integers_is_refused() -> None:
    for kind, dtype, good in (
        (LayerKind.ROWS, "bfloat16", True),
        (LayerKind.ROWS, "int32", False),
        (LayerKind.KEYFRAME, "float32", False),
    ):
        spec = LayerSpec(0, 1, kind, (TensorSpec("keys", dtype, (32,), 0),))
        rows = kind == LayerKind.ROWS
        size = spec.row_bytes * (4 if rows else 1)
        entry = ChunkSpec(kind, 0 if rows else 4, 4 if rows else 0, 0, 1, codecs.Q8_0, size, 34, bytes(16), bytes(16))
        packed = pack(Manifest(0, 4, 256, (spec,), (entry,)))
        if good:
            assert read_manifest(packed).chunks == (entry,)
            continue
        with pytest.raises(FormatError) as error:
            read_manifest(packed)
        assert error.value.field == "chunk.codec"


def test_an_unknown_codec_changes_nothing(store: Store) -> None:
    made = written(store)
    with pytest.raises(UnknownCodec):
        recode.recode(store.database, [made], "zip")
    assert used(store, made) == {codecs.RAW}
