"""The limits that a restore is measured against: what this machine can do with as many bytes, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.common import timed
from benchmarks.processes import counted, memory_in_hand

BLOCK = 4 << 20
"""Bytes that are read and hashed at a time, as much as a chunk has."""

ROOM = 256
"""Tokens that a buffer is larger than the state, as where it is read for the next turn (``live.CAPACITY_STEP``)."""

BESIDE = "memory copy"
"""The one that is no stage of a restore: it copies into memory that has been touched."""


def stages(path: str, layers: Sequence[Any], tokens: int, again: int) -> dict[str, float]:
    """Bytes a second of each stage, the best of some tries, in one thread; ``path`` is a file of at least as many."""
    import numpy as np

    from kvloom_store.checksum import digest
    from kvloom_store.rows import RowBuffer

    size = tokens * sum(spec.row_bytes * spec.count for spec in layers)
    there, other = np.ones(size, np.uint8), np.ones(size, np.uint8)
    blocks = [memoryview(there)[at : at + BLOCK] for at in range(0, size, BLOCK)]

    def into_fresh() -> None:
        buffer, at = RowBuffer(tuple(layers), tokens + ROOM), 0
        for held in buffer.tensors:
            for rows in held:
                part = rows[:, :tokens]
                part[...] = there[at : at + part.nbytes].view(part.dtype).reshape(part.shape)
                at += part.nbytes

    def read_file() -> None:
        with open(path, "rb", buffering=0) as file:
            for block in blocks:
                file.readinto(block)

    def hash_all() -> None:
        for block in blocks:
            digest(block)  # type: ignore[arg-type]

    done = {
        BESIDE: lambda: np.copyto(other, there),
        "copy into fresh memory": into_fresh,
        "page cache read": read_file,
        "hash": hash_all,
    }
    return {name: size / min(timed(stage)[0] for _ in range(again)) for name, stage in done.items()}


def disk(path: str) -> dict[str, float]:
    """In a process of its own: bytes a second of a file from its first byte to its last, and how many a disk gave."""
    memory_in_hand(path)
    block = bytearray(b"1" * BLOCK)  # touched
    before = counted("read_bytes")

    def read() -> int:
        total = 0
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while size := file.readinto(block):
                total += size
        return total

    seconds, total = timed(read)
    return {"rate": total / seconds, "from_disk": counted("read_bytes") - before}
