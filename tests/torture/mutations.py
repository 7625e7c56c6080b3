"""What a mutation does to a bundle: to its bytes, its records, their order, their fields; and to any bytes at all."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import msgpack
import xxhash
from golden import records, written

from kvloom.errors import FormatError
from kvloom_proto import bundle as wire
from kvloom_proto.bundle import Encoding, from_bytes, to_bytes
from kvloom_proto.frames import _next_checksum
from kvloom_proto.state_pb2 import Manifest
from kvloom_store.checksum import digest
from kvloom_store.turns import chained_digest

NUMBERS = (0, 1, 2, 3, 5, 8, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1)


def bytes_changed(data: bytes, dice: random.Random) -> bytes:
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
        return bytes_changed(value, dice)
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
    out, checksum = bytearray(start), xxhash.xxh3_128_digest(start)
    for kind, payload in frames:
        frame = struct.pack("<BI", kind, len(payload))
        checksum = _next_checksum(checksum, frame, payload)
        out += frame + payload + checksum
    return bytes(out)


def _payload_changed(data: bytes, dice: random.Random) -> bytes:
    frames = _frames(data)
    at = dice.randrange(len(frames))
    frames[at] = (frames[at][0], bytes_changed(frames[at][1], dice))
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
    bytes_changed,
    _payload_changed,
    _order_changed,
    _fields_changed,
    _fields_changed,
    _consistent,
)


def manifest_changed(data: bytes, dice: random.Random) -> bytes:
    """A manifest's bytes changed, or some of its fields: numbers, and which layers, tensors and chunks there are."""
    if dice.random() < 0.4:
        return bytes_changed(data, dice)
    message = Manifest()
    message.ParseFromString(data)
    for _ in range(dice.choice((1, 1, 2, 3))):
        _message_changed(message, dice)
    return bytes_changed(message.SerializeToString(), dice) if dice.random() < 0.1 else message.SerializeToString()


def _message_changed(message: Any, dice: random.Random) -> None:
    """A field of a protobuf message, or of one inside it."""
    name = dice.choice([field.name for field in message.DESCRIPTOR.fields])
    value = getattr(message, name)
    if isinstance(value, int | str | bytes):
        try:
            setattr(message, name, _value_changed(value, dice))
        except (TypeError, ValueError):  # not a value that this field can have
            return
    elif hasattr(value, "DESCRIPTOR"):
        _message_changed(value, dice)
    elif not len(value):
        return
    elif not hasattr(value[0], "DESCRIPTOR"):
        value[dice.randrange(len(value))] = dice.choice((0, 1, 7, 2**31, 2**32 - 1))
    elif dice.random() < 0.7:
        _message_changed(dice.choice(value), dice)
    elif dice.random() < 0.5:
        del value[dice.randrange(len(value))]
    else:
        value.add().CopyFrom(dice.choice(value))
