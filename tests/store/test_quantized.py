"""q8_0 and q4_0: the blocks of llama.cpp, byte for byte, and nothing else taken for them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto.codecs import LOSSY, LOSSY_DTYPES, Q4_0, Q8_0
from kvloom_proto.errors import FormatError
from kvloom_store import quantized

TYPES = {Q8_0: gguf.GGMLQuantizationType.Q8_0, Q4_0: gguf.GGMLQuantizationType.Q4_0}


def floats(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-4, 3, (-(-count // 32), 1))
    return (rng.standard_normal((len(scales), 32)) * scales).astype(np.float32).reshape(-1)[:count]


def as_dtype(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def as_floats(raw: Any, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_those_of_llama_cpp(codec: str, seed: int) -> None:
    values = floats(seed, 64 * 100)
    theirs = gguf.quantize(values.reshape(100, 64), TYPES[codec])
    stored = quantized.encode(values.tobytes(), "float32", codec)
    assert stored == theirs.tobytes()
    decoded = np.frombuffer(quantized.decode(stored, "float32", values.nbytes, codec), np.float32)
    assert np.array_equal(decoded, gguf.dequantize(theirs, TYPES[codec]).reshape(-1))


def test_the_bytes_of_both_are_those_of_version_one() -> None:
    raw = np.arange(-16, 16, dtype=np.float32).tobytes()
    q8, q4 = (quantized.encode(raw, "float32", codec) for codec in (Q8_0, Q4_0))
    assert q8 is not None
    assert q4 is not None
    assert q8.hex() == GOLDEN_Q8
    assert q4.hex() == GOLDEN_Q4
    # -16 is furthest from zero: its scale is 2, and elements 0 and 16 (-16 and 0) share the first byte
    assert (np.frombuffer(q4[:2], "<f2")[0], q4[2]) == (2.0, 8 << 4 | 0)


GOLDEN_Q8 = "083081899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77"
GOLDEN_Q4 = "0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8"


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 200),
    dtype=st.sampled_from(LOSSY_DTYPES),
    codec=st.sampled_from(LOSSY),
)
def test_elements_of_any_number_come_back_within_half_a_step(seed: int, count: int, dtype: str, codec: str) -> None:
    values = as_floats(as_dtype(floats(seed, count), dtype), dtype)
    raw = as_dtype(values, dtype)
    stored = quantized.encode(raw, dtype, codec)
    assert stored is not None
    assert len(stored) == -(-count // 32) * quantized.BYTES[codec]
    back = as_floats(quantized.decode(stored, dtype, len(raw), codec), dtype)
    padded = np.zeros(-(-count // 32) * 32, np.float32)
    padded[:count] = np.abs(values)
    furthest = np.repeat(padded.reshape(-1, 32).max(1), 32)[:count]
    # q4_0 has one step less on one side; half precision scales and the element's own type round once more
    step = furthest * ((1 / 8 + 0.001) if codec == Q4_0 else (0.5 / 127 + 0.001)) + furthest / 128 + 1e-5
    assert (np.abs(back - values) <= step).all()


@pytest.mark.parametrize("dtype", LOSSY_DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_stored_so(dtype: str, codec: str, value: float) -> None:
    values = np.ones(64, np.float32)
    values[40] = value
    with np.errstate(invalid="ignore"):
        assert quantized.encode(as_dtype(values, dtype), dtype, codec) is None


@pytest.mark.parametrize(("codec", "too_large"), [(Q8_0, 1e7), (Q4_0, 1e6)])
def test_what_is_too_large_for_its_scale_is_not_stored_so(codec: str, too_large: float) -> None:
    values = np.full(32, too_large, np.float32)
    assert quantized.encode(values.tobytes(), "float32", codec) is None
    assert quantized.encode((values / 100).tobytes(), "float32", codec) is not None
    largest = np.full(32, 65504, np.float16).tobytes()  # rounding it up once would be infinite
    stored = quantized.encode(largest, "float16", codec)
    assert stored is None or np.isfinite(as_floats(quantized.decode(stored, "float16", 64, codec), "float16")).all()


@pytest.mark.parametrize("codec", LOSSY)
def test_zeros_and_the_tiniest_numbers_come_back_as_zeros(codec: str) -> None:
    for raw in (bytes(128), np.full(32, 1e-45, np.float32).tobytes(), np.full(32, -1e-39, np.float32).tobytes()):
        stored = quantized.encode(raw, "float32", codec)
        assert stored is not None
        assert not np.frombuffer(quantized.decode(stored, "float32", 128, codec), np.float32).any()


@given(
    data=st.binary(max_size=200),
    length=st.integers(0, 4096),
    dtype=st.sampled_from(LOSSY_DTYPES),
    codec=st.sampled_from(LOSSY),
)
def test_bytes_of_another_length_raise_format_errors_and_others_decode(
    data: bytes, length: int, dtype: str, codec: str
) -> None:
    try:
        assert len(quantized.decode(data, dtype, length, codec)) == length
    except FormatError:
        size = 4 if dtype == "float32" else 2
        assert length % size or len(data) != -(-length // size // 32) * quantized.BYTES[codec]
