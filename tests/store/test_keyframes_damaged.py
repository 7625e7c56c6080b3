"""Windows and keyframes that are damaged: found at every read, and mended with the very same bits or not at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from states import MIXED, Store, at, filled, same_frame

from kvloom_proto.records import LayerKind
from kvloom_store.planner import StateDamaged
from kvloom_store.schema import chunk, segment


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    made = Store(store_path)
    yield made
    made.database.close()


# Damage


DAMAGED = [(LayerKind.WINDOW, 64), (LayerKind.KEYFRAME, 40)]
IDS = ["window", "keyframe"]


def use(store: Store, made: int) -> None:
    """Read all that a turn's state would need, the keyframe at 40 among it."""
    store.load(made, 90, MIXED)
    store.frame(made, 40)


@pytest.mark.parametrize(("kind", "position"), DAMAGED, ids=IDS)
@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
def test_any_flipped_bit_is_found(store: Store, kind: LayerKind, position: int, codec: str) -> None:
    made = store.write(filled(MIXED, 90, [40, 90]), 0, 90, codec=codec)
    rng = random.Random(3)
    with store.database.read() as conn:
        whole = conn.execute(sa.select(chunk.c.blob).where(at(made, kind, position))).scalar_one()
    for _ in range(30):
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
@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
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
