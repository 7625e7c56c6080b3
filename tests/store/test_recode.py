"""Recoding: the same bits in other bytes, in small steps, each of which leaves a good store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from states import MIXED, Store, at, filled, same_frame, same_rows

from kvloom_proto import codecs
from kvloom_proto.errors import UnknownCodec
from kvloom_proto.records import LayerKind
from kvloom_store import planner, recode, restore, segments
from kvloom_store.planner import StateDamaged
from kvloom_store.rows import RowBuffer
from kvloom_store.schema import chunk

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
        restore.load(conn, links, plan.rows, plan.windows, sink)
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


def test_an_unknown_codec_changes_nothing(store: Store) -> None:
    made = written(store)
    with pytest.raises(UnknownCodec):
        recode.recode(store.database, [made], "zip")
    assert used(store, made) == {codecs.RAW}
