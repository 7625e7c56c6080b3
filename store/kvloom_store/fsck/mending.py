"""Mending a row in which one bit has changed: the checksum says which one it was.

A checksum of 128 bits cannot be met by chance, so of all rows that differ from the one found in a single bit, the one
that fits is the one that was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store.checksum import digest

MEND_BYTES = 64 << 10
"""Rows larger than this are not tried: a bit more is one hash over all of them more."""


def mended(table: sa.Table, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row as it was written, if one bit of what was found makes the difference; None otherwise.

    ``values`` holds every column, ``checksum`` among them, as ``scan.scan`` gives them; of a chunk, its blob's
    digest.
    """
    names = [column.name for column in table.columns if column.name != "checksum"]
    wanted = values["checksum"]
    try:
        cells = [_packed(values[name]) for name in names]
    except (TypeError, ValueError):
        return None
    head = msgpack.Packer().pack_array_header(len(names) + 1) + msgpack.packb(table.name)
    if not isinstance(wanted, bytes) or len(wanted) != 16 or sum(map(len, cells)) > MEND_BYTES:
        return None
    found = digest(head + b"".join(cells))
    if (int.from_bytes(found) ^ int.from_bytes(wanted)).bit_count() <= 1:  # it was the checksum that changed
        return {**values, "checksum": found}
    for number, name in enumerate(names):
        before, behind = head + b"".join(cells[:number]), b"".join(cells[number + 1 :])
        for other, packed in _others(table.columns[name], values[name], before, behind, wanted):
            if digest(before + packed + behind) == wanted:
                return {**values, name: other}
    return None


def _packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def _others(
    column: sa.Column[Any], value: Any, before: bytes, behind: bytes, wanted: bytes
) -> Iterator[tuple[Any, bytes]]:
    """What a cell may have been before one bit of it changed, and that packed."""
    if isinstance(value, int):
        for number in _integers(value):
            yield number, _packed(number)
    elif isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        text = isinstance(column.type, sa.Text)
        if isinstance(value, str) is not text:  # the bit that tells text from bytes
            other = data if not text else data.decode(errors="replace")
            yield other, _packed(other)
        header = _header(data, text)
        at = _flipped(before + header, data, behind, wanted)
        if at is not None:
            whole = bytearray(data)
            whole[at // 8] ^= 1 << at % 8
            yield (whole.decode(errors="replace") if text else bytes(whole)), header + whole


def _header(data: bytes, text: bool) -> bytes:
    """What stands before bytes, or a text of so many bytes, when they are packed."""
    alike = _packed("x" * len(data) if text else bytes(len(data)))
    return alike[: len(alike) - len(data)]


def _flipped(before: bytes, data: bytes, behind: bytes, wanted: bytes) -> int | None:
    """Which bit of some bytes must change for the checksum to fit."""
    whole = bytearray(before + data + behind)
    for at in range(len(data) * 8):
        place, bit = len(before) + at // 8, 1 << at % 8
        whole[place] ^= bit
        if digest(whole) == wanted:  # type: ignore[arg-type]
            return at
        whole[place] ^= bit
    return None


def _integers(value: int) -> Iterator[int]:
    """Numbers that differ in one bit, in whichever width they are stored."""
    for bit in range(63):
        yield value ^ (1 << bit)
    for bit in (7, 15, 23, 31, 47):  # the sign of a shorter number
        yield value + (1 << bit)
        yield value - (1 << bit)
