"""The records of a bundle, and how they become bytes: protobuf or MessagePack, the same fields in both.

Numbers that point at other records (``parent``, ``node``, ``segment`` ...) are places among the records of that kind,
counted from 0. What a number points at comes before, so a bundle is read, and checked, from front to back.
"""

from __future__ import annotations

import enum
import types
import typing
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import msgpack
from google.protobuf.message import DecodeError, Message

from kvloom_proto import bundle_pb2 as pb
from kvloom_proto.errors import FormatError

MAX_INTEGER = (1 << 63) - 1
"""What a database column takes."""


class Encoding(enum.IntEnum):
    """How the records of a bundle are written."""

    PROTOBUF = 1
    MSGPACK = 2


@dataclass(frozen=True, slots=True)
class Head:
    """When (microseconds since 1970) and by what the bundle was written; ``text_only``: without state."""

    created: int
    writer: str
    text_only: bool


@dataclass(frozen=True, slots=True)
class Model:
    """One trie: a model's identity, and what its inputs have besides tokens. ``fields`` is MessagePack."""

    digest: bytes
    name: str
    fields: bytes
    extra: bytes
    salt: bytes


@dataclass(frozen=True, slots=True)
class ProvenanceRecord:
    """A packed ``Provenance``."""

    record: bytes


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The conversation; ``settings`` is MessagePack."""

    name: str
    settings: bytes


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """An edge of a trie, of which the tokens that the bundle needs; ``parent`` None: it begins at the first token."""

    model: int
    parent: int | None
    parent_offset: int
    tokens: bytes
    chain_hash: bytes


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One message; ``message``, ``settings`` and ``timings`` are MessagePack."""

    public_id: bytes
    parent: int | None
    role: str
    continues: bool
    message: bytes
    finish_reason: str | None
    settings: bytes
    timings: bytes
    digest: bytes
    created: int


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """State; the manifest says of which positions. Its last token is in ``node``."""

    node: int
    base: int | None
    schedule: bytes
    provenance: int
    manifest: bytes


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One stored blob of the segment before it."""

    blob: bytes


@dataclass(frozen=True, slots=True)
class StateRecord:
    """What a model made of a turn; ``node`` None: the turn's path has no tokens."""

    turn: int
    model: int
    start: int
    tokens: bytes
    node: int | None
    offset: int
    state_start: int
    state_end: int
    base_state: int | None
    base_segment: int | None
    segment: int | None
    schedule: bytes
    provenance: int
    hidden: bytes | None
    hidden_dtype: str | None
    variant: bool
    scores: bytes | None


@dataclass(frozen=True, slots=True)
class BranchRecord:
    """A branch; ``turn`` None: nothing was said on it."""

    name: str
    turn: int | None


@dataclass(frozen=True, slots=True)
class TagRecord:
    """A tag."""

    name: str
    turn: int


@dataclass(frozen=True, slots=True)
class End:
    """How many records came before this one, and what was in them."""

    records: int
    turns: int
    chunks: int
    chunk_bytes: int


Record: TypeAlias = (
    Head
    | Model
    | ProvenanceRecord
    | SessionRecord
    | NodeRecord
    | TurnRecord
    | SegmentRecord
    | ChunkRecord
    | StateRecord
    | BranchRecord
    | TagRecord
    | End
)

KINDS: tuple[type[Any], ...] = (
    Head,
    Model,
    ProvenanceRecord,
    SessionRecord,
    NodeRecord,
    TurnRecord,
    SegmentRecord,
    ChunkRecord,
    StateRecord,
    BranchRecord,
    TagRecord,
    End,
)
"""The kinds of records in the order in which they follow one another; a kind's number on disk is its place plus one."""

NAMES = {kind: kind.__name__.removesuffix("Record").lower() for kind in KINDS}
"""What each kind is called in errors and in FORMAT.md."""


def to_bytes(record: Record, encoding: Encoding) -> bytes:
    """A record's bytes; fields that are None are left out."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    values = {name: value for name, value in values.items() if value is not None}
    if encoding == Encoding.MSGPACK:
        packed: bytes = msgpack.packb(values)
        return packed
    return _message(type(record))(**values).SerializeToString(deterministic=True)


def from_bytes(kind: type[Any], data: bytes, encoding: Encoding) -> Record:
    """A record of some kind, every field of its type. Raises FormatError."""
    values = _unpacked(kind, data) if encoding == Encoding.MSGPACK else _parsed(kind, data)
    for name, (wanted, optional) in _TYPES[kind].items():
        value, field = values.get(name), f"{NAMES[kind]}.{name}"
        if value is None and optional:
            continue
        if value is None or type(value) is not wanted:
            raise FormatError(f"{field} is {type(value).__name__}, not {wanted.__name__}", field=field)
        if wanted is int and not 0 <= value <= MAX_INTEGER:
            raise FormatError(f"{field} is not a number from 0 to {MAX_INTEGER}", field=field)
    record: Record = kind(**{name: values.get(name) for name in _TYPES[kind]})
    return record


def _unpacked(kind: type[Any], data: bytes) -> dict[str, Any]:
    try:
        values = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"the {NAMES[kind]} is not MessagePack: {error}", field=NAMES[kind]) from error
    if not isinstance(values, dict):
        raise FormatError(f"the {NAMES[kind]} is not a map", field=NAMES[kind])
    return values


def _parsed(kind: type[Any], data: bytes) -> dict[str, Any]:
    message = _message(kind)()
    try:
        message.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"the {NAMES[kind]} is not a protobuf message: {error}", field=NAMES[kind]) from error
    return {
        name: getattr(message, name)
        for name, (_, optional) in _TYPES[kind].items()
        if not optional or message.HasField(name)
    }


def _message(kind: type[Any]) -> type[Message]:
    message: type[Message] = getattr(pb, kind.__name__.removesuffix("Record"))
    return message


def _types(kind: type[Any]) -> dict[str, tuple[type[Any], bool]]:
    """Of each field its type, and whether it may be left out."""
    found: dict[str, tuple[type[Any], bool]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, types.UnionType):
            found[name] = (next(each for each in hint.__args__ if each is not types.NoneType), True)
        else:
            found[name] = (hint, False)
    return found


_TYPES = {kind: _types(kind) for kind in KINDS}
