"""Reading hostile bundles: only documented errors, nothing changed, and no memory set aside for what is not there.

``KVLOOM_FUZZ_CASES`` says how many mutated bundles are tried (default 800).
"""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import sqlalchemy as sa
from golden import FILES, golden, records, written
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvloom import KVLoom
from kvloom.bundles import check_settings, check_turn
from kvloom.errors import FormatError, KVLoomError, LimitExceeded, StoreError, Truncated
from kvloom_proto import bundle as wire
from kvloom_proto import limits
from kvloom_proto.bundle import Encoding, from_bytes, to_bytes
from kvloom_proto.frames import Reader, _next_checksum
from kvloom_store import schema
from kvloom_store.bundle_check import Contents, Rules
from kvloom_store.checksum import checked

CASES = int(os.environ.get("KVLOOM_FUZZ_CASES", "800"))
NUMBERS = (0, 1, 2, 3, 5, 8, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1)


def dump(loom: KVLoom) -> list[object]:
    """Every row, its checksum verified."""
    found: list[object] = []
    with loom.database.read() as conn:
        for table in schema.metadata.sorted_tables:
            for row in conn.execute(sa.select(table)):
                found.append(tuple(row) if table.name == "chunk" else checked(table, row))
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_golden_bundle_is_written_as_it_was(name: str) -> None:
    assert written(list(records()), FILES[name]) == golden(name)


@pytest.mark.parametrize("name", FILES)
def test_the_golden_bundle_is_read_as_it_was(name: str, store_path: Path) -> None:
    assert list(Reader(io.BytesIO(golden(name))))[:-1] == list(records())
    with KVLoom(store_path) as loom:
        done = loom.import_bundle(io.BytesIO(golden(name)))
        assert (done.turns, done.states, done.segments) == (3, 3, 3)
        session = loom.find("golden")
        assert [turn.text for turn in session.log()] == ["Who?", "He."]
        assert not session.missing("main", verify=True)
        assert not session.missing("aside", verify=True)
        again = io.BytesIO()
        session.export(again)
        assert list(Reader(io.BytesIO(again.getvalue())))[4:6] == list(records())[4:6]


# What a mutation does


def _bytes_changed(data: bytes, dice: random.Random) -> bytes:
    """Some bytes flipped, set, doubled, taken out, or the end cut off."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(len(out)) if out else 0
        what = dice.randrange(6)
        if not out or what == 0:
            out[at:at] = dice.randbytes(dice.choice((1, 2, 8)))
        elif what == 1:
            out[at] ^= 1 << dice.randrange(8)
        elif what == 2:
            out[at] = dice.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 3:
            del out[at : at + dice.choice((1, 2, 16))]
        elif what == 4:
            del out[at:]
        else:
            out[at:at] = out[at : at + dice.choice((1, 4, 32))]
    return bytes(out)


def _value_changed(value: Any, dice: random.Random) -> Any:
    """Another value: mostly of the same type, sometimes of another."""
    if dice.random() < 0.1:
        return dice.choice((None, True, -1, 1.5, "text", b"bytes", [], {}, [[]] * 3))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice((*NUMBERS, value + 1, max(value - 1, 0)))
    if isinstance(value, str):
        return dice.choice(("", "a/b", "..", "x" * 300, "\x00", "\u202e", value + "é", "/etc/passwd"))
    if isinstance(value, bytes):
        inner = _inner(value)
        if inner is not None and dice.random() < 0.6:
            return msgpack.packb(_value_changed(inner, dice))
        return _bytes_changed(value, dice)
    if isinstance(value, dict) and value:
        key = dice.choice(list(value))
        return (
            {**value, key: _value_changed(value[key], dice)}
            if dice.random() < 0.8
            else {k: v for k, v in value.items() if k != key}
        )
    if isinstance(value, list) and value:
        return [_value_changed(each, dice) for each in value]
    return dice.choice((0, "", b"", [], {}))


def _inner(value: bytes) -> Any:
    try:
        found = msgpack.unpackb(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _frames(data: bytes) -> list[tuple[int, bytes]]:
    """The (kind, payload) of each record."""
    found, at = [], 10
    while at < len(data):
        kind, length = struct.unpack_from("<BI", data, at)
        found.append((kind, data[at + 5 : at + 5 + length]))
        at += 5 + length + 16
    return found


def _sealed(start: bytes, frames: list[tuple[int, bytes]]) -> bytes:
    """A bundle whose checksums fit, whatever its records are."""
    import xxhash

    out, checksum = bytearray(start), xxhash.xxh3_128_digest(start)
    for kind, payload in frames:
        frame = struct.pack("<BI", kind, len(payload))
        checksum = _next_checksum(checksum, frame, payload)
        out += frame + payload + checksum
    return bytes(out)


def _payload_changed(data: bytes, dice: random.Random) -> bytes:
    frames = _frames(data)
    at = dice.randrange(len(frames))
    frames[at] = (frames[at][0], _bytes_changed(frames[at][1], dice))
    return _sealed(data[:10], frames)


def _order_changed(data: bytes, dice: random.Random) -> bytes:
    frames = _frames(data)
    for _ in range(dice.choice((1, 2))):
        a, b = dice.randrange(len(frames)), dice.randrange(len(frames))
        what = dice.randrange(4)
        if what == 0:
            frames[a], frames[b] = frames[b], frames[a]
        elif what == 1:
            frames.insert(a, frames[b])
        elif what == 2 and len(frames) > 1:
            del frames[a]
        else:
            frames[a] = (dice.randrange(256), frames[a][1])
    return _sealed(data[:10], frames)


def _fields_changed(data: bytes, dice: random.Random) -> bytes:
    """A field or two of a record changed; whatever depends on it is as it was."""
    encoding = Encoding(data[9])
    frames = _frames(data)
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.randrange(len(frames))
        kind, payload = frames[at]
        try:
            record = from_bytes(wire.KINDS[kind - 1], payload, encoding)
            name = dice.choice([field.name for field in fields(record)])
            changed = replace(record, **{name: _value_changed(getattr(record, name), dice)})
            frames[at] = (kind, to_bytes(changed, encoding))
        except (TypeError, ValueError, OverflowError, FormatError):  # not a value that this encoding has
            continue
    return _sealed(data[:10], frames)


def _consistent(data: bytes, dice: random.Random) -> bytes:
    """Fields changed, and the digests and counts that depend on them made to fit: what is left are the other checks."""
    from kvloom_store.checksum import digest
    from kvloom_store.turns import chained_digest

    some = list(records())
    at = dice.randrange(len(some))
    name = dice.choice([field.name for field in fields(some[at])])
    some[at] = replace(some[at], **{name: _value_changed(getattr(some[at], name), dice)})
    digests: list[bytes] = []
    for number, record in enumerate(some):
        try:
            if isinstance(record, wire.TurnRecord):
                before = b"" if record.parent is None else digests[record.parent]
                message = msgpack.unpackb(record.message)
                record = replace(record, digest=chained_digest(before, message), role=message["role"])
                digests.append(record.digest)
            elif isinstance(record, wire.NodeRecord) and record.parent is None:
                record = replace(record, chain_hash=digest(record.tokens))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            continue
        some[number] = record
    try:
        return written(some, Encoding(data[9]))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return data


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _bytes_changed,
    _payload_changed,
    _order_changed,
    _fields_changed,
    _fields_changed,
    _consistent,
)


def test_no_mutated_bundle_does_anything_but_be_imported_or_refused(tmp_path: Path) -> None:
    """Refused with an error of ours that names the place, and nothing changed; or sound, and can be looked at."""
    empty = tmp_path / "empty.db"
    with KVLoom(empty):
        pass
    path = tmp_path / "store.db"
    shutil.copy(empty, path)
    state: dict[str, Any] = {"loom": KVLoom(path), "taken": 0, "sound": 0, "refused": 0, "lost": 0}
    state["before"] = dump(state["loom"])

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(FILES)), st.sampled_from(range(len(MUTATIONS))), st.integers(0, 2**63))
    def run(name: str, mutation: int, seed: int) -> None:
        data = MUTATIONS[mutation](golden(name), random.Random(seed))
        loom = state["loom"]
        if seed % 4 and _is_sound(data):  # of these, some are taken in: that is most of the time
            state["sound"] += 1
            return
        try:
            loom.import_bundle(io.BytesIO(data))
        except (FormatError, StoreError) as error:
            located = error.offset is not None and error.offset <= len(data) if isinstance(error, FormatError) else True
            state["refused"] += 1
            state["lost"] += not located
        else:
            state["taken"] += 1
            _look_at(loom)
            loom.close()
            path.unlink()
            shutil.copy(empty, path)
            state["loom"] = KVLoom(path)
            return
        if state["refused"] % 20 == 0:
            assert dump(loom) == state["before"]

    try:
        run()
        assert dump(state["loom"]) == state["before"]
    finally:
        state["loom"].close()
    assert state["refused"] > state["taken"] > 0
    assert state["lost"] == 0


def _is_sound(data: bytes) -> bool:
    try:
        for _ in Contents(Rules(check_settings, check_turn)).read(Reader(io.BytesIO(data))):
            continue
    except FormatError:
        return False
    return True


def _look_at(loom: KVLoom) -> None:
    """What was taken in can be read and written out again, or says why not."""
    dump(loom)
    for session in loom.sessions():
        for branch in session.branches():
            try:
                session.tree()
                session.log(branch.name)
                session.missing(branch.name, verify=True)
                session.cost()
            except KVLoomError:
                continue
        session.export(io.BytesIO())


def test_a_length_that_lies_sets_no_memory_aside(store_path: Path) -> None:
    data = golden("talk.kvb")
    lies = [data[:10] + struct.pack("<BI", kind, 256 << 20) + b"x" * 100 for kind in (1, 4)]
    with KVLoom(store_path) as loom:
        for lie in lies:
            tracemalloc.start()
            with pytest.raises(FormatError) as refused:
                loom.import_bundle(io.BytesIO(lie))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert isinstance(refused.value, Truncated if lie is lies[0] else FormatError)
            assert peak < 8 << 20
        with pytest.raises(LimitExceeded):
            loom.import_bundle(io.BytesIO(data[:10] + struct.pack("<BI", 1, limits.MAX_RECORD_BYTES + 1)))
