"""The frame of a bundle: which file it is, then one record after another, each with a checksum of all up to there.

A checksum covers its record and the checksum before it, so a record that is damaged, missing, repeated or in another
place is found at the record itself; the last one has counts, so a file that was cut off is found, too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

import xxhash

from kvloom_proto import limits
from kvloom_proto.bundle import (
    KINDS,
    NAMES,
    ChunkRecord,
    Encoding,
    End,
    Head,
    Record,
    SegmentRecord,
    SessionRecord,
    TurnRecord,
    from_bytes,
    to_bytes,
)
from kvloom_proto.errors import ChecksumMismatch, FormatError, NotABundle, Truncated, UnsupportedVersion
from kvloom_proto.messages import check_limit

MAGIC = b"\x89KVB\r\n\x1a\n"
"""As PNG's: a transfer that takes the file for text damages it, and is found."""

VERSION = 1

_START = struct.Struct("<8sBB")
_FRAME = struct.Struct("<BI")
_CHECKSUM_BYTES = 16
_PIECE_BYTES = 1 << 20
"""Read at once: an announced length sets no memory aside before the bytes are there."""


class Source(Protocol):
    """What a bundle is read from."""

    def read(self, count: int, /) -> bytes: ...


class Sink(Protocol):
    """What a bundle is written to."""

    def write(self, data: bytes, /) -> object: ...


class Writer:
    """Writes records, one at a time; ``finish`` ends the bundle. ``written`` are the bytes so far."""

    def __init__(self, file: Sink, encoding: Encoding) -> None:
        self._file = file
        self._encoding = encoding
        self._counts = [0, 0, 0, 0]
        start = _START.pack(MAGIC, VERSION, encoding)
        self._checksum = xxhash.xxh3_128_digest(start)
        self.written = len(start)
        file.write(start)

    def add(self, record: Record) -> None:
        """Write one record."""
        payload = to_bytes(record, self._encoding)
        frame = _FRAME.pack(KINDS.index(type(record)) + 1, len(payload))
        self._checksum = _next_checksum(self._checksum, frame, payload)
        for part in (frame, payload, self._checksum):
            self._file.write(part)
            self.written += len(part)
        _count(self._counts, record)

    def finish(self) -> None:
        """Write the last record, which says how much there was."""
        self.add(End(*self._counts))


class Reader:
    """Reads records, one at a time. ``offset`` is where the one that was read last begins, ``position`` where it ends.

    Raises (while it is iterated over):
        NotABundle, UnsupportedVersion, Truncated, ChecksumMismatch, LimitExceeded, FormatError: each with its offset.
    """

    def __init__(self, file: Source) -> None:
        self._file = file
        self.offset = 0
        self.position = 0

    def __iter__(self) -> Iterator[Record]:
        try:
            yield from self._records()
        except FormatError as error:
            raise error.at(self.offset) from error.__cause__

    def _records(self) -> Iterator[Record]:
        encoding, checksum = self._start()
        counts, last = [0, 0, 0, 0], 0
        while True:
            self.offset = self.position
            frame = self._take(_FRAME.size)
            kind, length = _FRAME.unpack(frame)
            if not 1 <= kind <= len(KINDS):
                raise FormatError(f"there are no records of kind {kind}", field="kind")
            _check_order(kind, last)
            check_limit(NAMES[KINDS[kind - 1]], length, limits.MAX_RECORD_BYTES)
            payload, stored = self._take(length), self._take(_CHECKSUM_BYTES)
            checksum = _next_checksum(checksum, frame, payload)
            if stored != checksum:
                raise ChecksumMismatch(f"the {NAMES[KINDS[kind - 1]]}", stored, checksum)
            record = from_bytes(KINDS[kind - 1], payload, encoding)
            if isinstance(record, End):
                break
            _count(counts, record)
            last = kind
            yield record
        if (record.records, record.turns, record.chunks, record.chunk_bytes) != tuple(counts):
            raise FormatError("the counts are not those of the records", field="end")
        if self._file.read(1):
            raise FormatError("the file goes on after its last record", field="end")
        yield record

    def _start(self) -> tuple[Encoding, bytes]:
        magic = self._file.read(len(MAGIC))
        if not magic or not MAGIC.startswith(magic):
            raise NotABundle("this is not a bundle", field="magic", hint="kvloom export makes one")
        self.position = len(magic)
        start = magic + self._take(_START.size - len(magic))
        _, version, encoding = _START.unpack(start)
        if version != VERSION:
            raise UnsupportedVersion("bundle", version, VERSION)
        if encoding not in tuple(Encoding):
            raise FormatError(f"unknown encoding {encoding}", field="encoding")
        return Encoding(encoding), xxhash.xxh3_128_digest(start)

    def _take(self, count: int) -> bytes:
        parts: list[bytes] = []
        left = count
        while left:
            part = self._file.read(min(left, _PIECE_BYTES))
            if not part:
                raise Truncated(
                    f"the file ends after {self.position} bytes, within a record",
                    field="length",
                    hint="it was not copied whole: get it again",
                )
            parts.append(part)
            left -= len(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _next_checksum(before: bytes, frame: bytes, payload: bytes) -> bytes:
    hashed = xxhash.xxh3_128(before)
    hashed.update(frame)
    hashed.update(payload)
    return hashed.digest()


def _check_order(kind: int, last: int) -> None:
    """Each kind follows those before it; a segment may follow the chunks of another one."""
    chunk, segment = KINDS.index(ChunkRecord) + 1, KINDS.index(SegmentRecord) + 1
    session = KINDS.index(SessionRecord) + 1
    head = KINDS.index(Head) + 1
    again = kind == last and kind not in (head, session)
    skipped = (last == 0 and kind != head) or (last < session < kind)
    if skipped or not (kind > last or again or (kind == segment and last == chunk)):
        raise FormatError(f"a {NAMES[KINDS[kind - 1]]} cannot stand here", field="kind")


def _count(counts: list[int], record: Record) -> None:
    counts[0] += 1
    counts[1] += isinstance(record, TurnRecord)
    if isinstance(record, ChunkRecord):
        counts[2] += 1
        counts[3] += len(record.blob)
