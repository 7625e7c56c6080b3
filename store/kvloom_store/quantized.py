"""Rows stored with loss, only ever where a user asked for it: llama.cpp's q8_0 and q4_0.

32 elements one after another share a scale d, a float16. q8_0: d, then 32 signed bytes q, each standing for d q.
q4_0: d, then 16 bytes; byte j holds element j in its low half and element j + 16 in its high half, each standing for
d (q - 8). What is decoded is the same on every machine: d q is exact in float32, and is rounded once to the element's
type, to the nearest, ties to even.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvloom_proto.codecs import Q8_0
from kvloom_proto.errors import FormatError, Truncated
from kvloom_proto.records import ITEM_BYTES
from kvloom_store.codec import Buffer

BLOCK = 32
"""Elements that share a scale."""

BYTES = {"q8_0": 2 + BLOCK, "q4_0": 2 + BLOCK // 2}
"""Bytes of a block."""

_Floats = npt.NDArray[np.float32]


def encode(raw: Buffer, dtype: str, codec: str) -> bytes | None:
    """Elements in blocks, the last one filled up with zeros; None where one of them cannot be stored so.

    Those are elements that are not finite, or too large for a float16 scale, or for their type once decoded.
    """
    values = _to_float32(raw, dtype)
    if not np.isfinite(values).all():
        return None
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK), np.float32)
    blocks.reshape(-1)[: len(values)] = values
    with np.errstate(over="ignore", invalid="ignore"):
        stored = (_q8_0 if codec == Q8_0 else _q4_0)(blocks).tobytes()
        back = _to_float32(decode(stored, dtype, len(raw), codec), dtype)
    return stored if np.isfinite(back).all() else None


def decode(stored: bytes, dtype: str, raw_length: int, codec: str) -> Buffer:
    """The raw bytes of a chunk, ``raw_length`` of them (already checked against its limit).

    Raises:
        FormatError: the stored bytes are not as many as that takes.
    """
    elements, rest = divmod(raw_length, ITEM_BYTES[dtype])
    count = -(-elements // BLOCK)
    if rest:
        raise FormatError("a chunk is not a whole number of elements", field="chunk.raw_length")
    if len(stored) != count * BYTES[codec]:
        raise Truncated(f"a chunk has {len(stored)} bytes instead of {count * BYTES[codec]}", field="chunk")
    blocks = np.frombuffer(stored, np.uint8).reshape(count, BYTES[codec])
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    values = np.empty((count, BLOCK), np.float32)
    if codec == Q8_0:
        values[...] = blocks[:, 2:].view(np.int8)
    else:
        values[:, : BLOCK // 2] = blocks[:, 2:] & 0x0F
        values[:, BLOCK // 2 :] = blocks[:, 2:] >> 4
        values -= 8
    with np.errstate(over="ignore", invalid="ignore"):
        values *= scale
        return _from_float32(values.reshape(-1)[:elements], dtype)


def _q8_0(blocks: _Floats) -> npt.NDArray[np.uint8]:
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    whole = np.floor(np.abs(scaled))
    rounded = np.copysign(whole + np.floor(2 * (np.abs(scaled) - whole)), scaled)  # halves away from zero: C's roundf
    return np.concatenate([_half(scale), rounded.astype(np.int8).view(np.uint8)], 1)


def _q4_0(blocks: _Floats) -> npt.NDArray[np.uint8]:
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = furthest / np.float32(-8)
    codes = np.minimum((blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8), 15)
    return np.concatenate([_half(scale), codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4], 1)


def _inverse(scale: _Floats) -> _Floats:
    """1 / scale, 0 for 0. A scale so small that its inverse is infinite stands for zeros, too."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(scale: _Floats) -> npt.NDArray[np.uint8]:
    return scale.astype("<f2").view(np.uint8)


def _to_float32(raw: Buffer, dtype: str) -> _Floats:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32)


def _from_float32(values: _Floats, dtype: str) -> Buffer:
    if dtype == "bfloat16":
        bits = values.view("<u4")
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even; what is decoded here is finite
        return (bits >> 16).astype("<u2").view(np.uint8).data
    return np.ascontiguousarray(values, {"float32": "<f4", "float16": "<f2"}[dtype]).view(np.uint8).data
