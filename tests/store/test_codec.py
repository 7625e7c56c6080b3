"""Codecs: what goes in comes out, what no codec wrote is refused, and the bytes are those of version one."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.config import CHOICES
from kvloom_proto import codecs
from kvloom_proto.errors import FormatError, UnknownCodec
from kvloom_store import codec

RAW = bytes(byte for at in range(1, 41) for byte in (at * 5 % 256, 60 + at // 30))
KEPT = 0x80000000
GOLDEN_LZ4 = (
    "2800008011000000050a0f14191e23282d32373c41464b50555a5f64696e73787d82878c91969ba0a5aaafb4b9bec3c8"
    "1f3c010009b03d3d3d3d3d3d3d3d3d3d3d"
)
GOLDEN_ZSTD = (
    "280000801f000000050a0f14191e23282d32373c41464b50555a5f64696e73787d82878c91969ba0a5aaafb4b9bec3c8"
    "28b52ffd20289c0000683c3c3d3d3d3d3d3d3d3d3d3d3d010021c002010000"
)


def test_the_bytes_of_lz4_are_those_of_version_one() -> None:
    """Plane 0 is noise and kept; plane 1 is an LZ4 block."""
    stored = bytes.fromhex(GOLDEN_LZ4)
    assert bytes(codec.decode(stored, 2, len(RAW), codecs.LZ4)) == RAW
    assert codec.encode(RAW, 2, codecs.LZ4) == (codecs.LZ4, stored)
    lengths = struct.unpack_from("<2I", stored)
    assert lengths == (KEPT | 40, len(stored) - 8 - 40)
    assert stored[8:48] == RAW[::2]


def test_the_bytes_of_zstd_are_those_of_version_one() -> None:
    """Plane 0 is noise and kept; plane 1 is a zstd frame that says its size and carries no checksum."""
    stored = bytes.fromhex(GOLDEN_ZSTD)
    assert bytes(codec.decode(stored, 2, len(RAW), codecs.ZSTD)) == RAW
    lengths = struct.unpack_from("<2I", stored)
    assert lengths == (KEPT | 40, len(stored) - 8 - 40)
    assert stored[8:48] == RAW[::2]
    assert stored[48:54].hex() == "28b52ffd2028"  # magic, one segment, 40 bytes


@given(
    data=st.binary(max_size=600),
    item=st.sampled_from([1, 2, 4, 8]),
    name=st.sampled_from(codecs.SETTINGS),
)
def test_what_a_codec_stores_it_gives_back(data: bytes, item: int, name: str) -> None:
    raw = (data * 3)[: len(data) * 3 // item * item]
    used, stored = codec.encode(raw, item, name)
    assert used in codecs.LOSSLESS
    assert bytes(codec.decode(stored, item, len(raw), used)) == raw
    assert len(stored) <= len(raw)


@pytest.mark.parametrize("item", [2, 4, 8])
@pytest.mark.parametrize("name", [codecs.LZ4, codecs.ZSTD])
def test_planes_of_several_blocks_come_back(item: int, name: str) -> None:
    rng = np.random.default_rng(5)
    planes = rng.integers(0, 256, (3 * codec.BLOCK_BYTES + 77, item), np.uint8)
    planes[:, -1] //= 50  # an exponent, as it were
    raw = planes.tobytes()
    used, stored = codec.encode(raw, item, name)
    assert (used, bytes(codec.decode(stored, item, len(raw), used)) == raw) == (name, True)
    assert len(stored) < len(raw)


def test_auto_takes_a_slower_codec_only_where_that_saves_a_tenth_more() -> None:
    rng = np.random.default_rng(1)
    noise, exponents = rng.integers(0, 256, 40_000, np.uint8), rng.integers(0, 8, 40_000, np.uint8)
    state = np.stack([noise, exponents], 1).tobytes()
    assert codec.encode(noise.tobytes(), 2, codecs.AUTO)[0] == codecs.RAW
    assert codec.encode(bytes(80_000), 2, codecs.AUTO)[0] == codecs.LZ4  # zstd has no tenth left to save
    assert codec.encode(state, 2, codecs.AUTO)[0] == codecs.ZSTD
    assert codec.encode(np.stack([noise] * 3 + [exponents], 1).tobytes(), 4, codecs.AUTO)[0] == codecs.ZSTD


@given(data=st.binary(max_size=200), item=st.sampled_from([1, 2, 4, 8]), length=st.integers(0, 4096))
def test_bytes_no_codec_wrote_raise_only_format_errors(data: bytes, item: int, length: int) -> None:
    for name in (*codecs.LOSSLESS, codecs.AUTO, "zip"):
        try:
            assert len(codec.decode(data, item, length, name)) == length
        except FormatError:
            continue
        assert name in codecs.LOSSLESS


@given(data=st.data())
def test_mutilated_chunks_raise_a_format_error_or_have_their_length(data: st.DataObject) -> None:
    """A flipped bit may give other bytes of the right length: the digest finds those."""
    name = data.draw(st.sampled_from([codecs.LZ4, codecs.ZSTD]))
    _, stored = codec.encode(RAW, 2, name)
    mutant = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(mutant[: data.draw(st.integers(0, len(mutant)))])
    for each in (bytes(mutant), cut, cut + b"x"):
        try:
            assert len(codec.decode(each, 2, len(RAW), name)) == len(RAW)
        except FormatError:
            continue


def _frame(header: str, body: bytes = b"\x01\x00\x00") -> bytes:
    frame = bytes.fromhex("28b52ffd" + header) + body
    return struct.pack("<I", len(frame)) + frame


@pytest.mark.parametrize(
    "stored",
    [
        _frame("e0" + (1 << 40).to_bytes(8, "little").hex()),  # a terabyte
        _frame("e0" + ((1 << 64) - 1).to_bytes(8, "little").hex()),
        _frame("00f8"),  # a window of two terabytes, and no size
        _frame("c0f8" + (40).to_bytes(8, "little").hex()),  # the same, of forty bytes
        _frame("2129" + "28"),  # a dictionary
        _frame("2028") + _frame("2028"),  # two frames
        struct.pack("<I", 12) + bytes.fromhex("502a4d1804000000") + b"skip",
    ],
    ids=["terabyte", "no end", "window", "window of forty", "dictionary", "two frames", "skippable"],
)
def test_a_frame_that_asks_for_more_than_its_plane_is_refused(stored: bytes) -> None:
    with pytest.raises(FormatError):
        codec.decode(stored, 1, 40, codecs.ZSTD)


def test_a_codec_nobody_knows_is_named() -> None:
    with pytest.raises(UnknownCodec) as error:
        codec.decode(b"", 1, 0, "zip")
    assert error.value.codec == "zip"
    with pytest.raises(UnknownCodec):
        codec.encode(b"", 1, "zip")


def test_the_command_line_offers_the_names_that_manifests_have() -> None:
    assert CHOICES["codec"] == codecs.SETTINGS == (*codecs.LOSSLESS, codecs.AUTO)
