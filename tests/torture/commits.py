"""Turns that commit while a long prompt's state is being written by the same process: how long each waits.

The state has the shape of SmolLM2-135M's, 4,096 tokens of it, numbers drawn; the turns are those of a tiny model, whose
own state queues up behind.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from exact.worker import WORDS

from kvloom import commit, run
from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom_proto.records import LayerKind, LayerSpec, Pass, Schedule, TensorSpec
from kvloom_store import segments, trie
from kvloom_store.rows import Captured, RowBuffer
from kvloom_store.writer import Handle, Job
from torture import checking, forks, workload
from torture.checking import Acknowledged

TOKENS = 4096
HEADS = TensorSpec("keys", "bfloat16", (3, 64), 1), TensorSpec("values", "bfloat16", (3, 64), 1)
LAYERS = (LayerSpec(0, 30, LayerKind.ROWS, HEADS),)

TURNS = 40
"""Of one conversation; then another one begins."""

PROMISED_MS = 20.0
"""What 99 of 100 turns wait at most."""


@dataclass
class Commits:
    """What was found."""

    rounds: int = 0
    tokens: int = TOKENS
    state_mb: float = 0.0
    written_s: float = 0.0
    commits: int = 0
    median_ms: float = 0.0
    p99_ms: float = 0.0
    worst_ms: float = 0.0
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, engine: TransformersEngine, seed: int, *, rounds: int, timed: bool) -> Commits:
    """So often 4,096 tokens are written while turns commit; then the store is looked at. ``timed``: few may be late."""
    path = folder / "commits.db"
    seen = forks.result(lambda: _measured(path, engine, seed, rounds))
    if "crashed" in seen:
        return Commits(wrong=[seen["crashed"]])
    times = sorted(seen["times"])
    found = Commits(rounds, state_mb=round(seen["bytes"] / 1e6, 1), commits=len(times))
    found.written_s = round(seen["seconds"] / rounds, 2)
    found.median_ms, found.p99_ms, found.worst_ms = (
        round(1000 * times[at], 1) for at in (len(times) // 2, len(times) * 99 // 100, -1)
    )
    if timed and found.p99_ms > PROMISED_MS:
        found.wrong.append(f"99 of 100 turns committed within {found.p99_ms} ms, not {PROMISED_MS}")
    left = forks.result(lambda: checking.check(path, engine, Acknowledged(seen["sessions"])))
    found.wrong += [left["crashed"]] if "crashed" in left else left["wrong"]
    return found


def _measured(path: Path, engine: TransformersEngine, seed: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    buffer = RowBuffer(LAYERS, TOKENS)
    size = TOKENS * LAYERS[0].row_bytes * LAYERS[0].count
    chosen, times, seconds = random.Random(seed), list[float](), 0.0
    with KVLoom(path, model=engine) as loom, _timed(times):
        branch = loom.session("talk", system=workload.SYSTEM).branch()
        branch.say("who?", max_tokens=1)
        loom.flush()
        times.clear()
        for number in range(rounds):
            _fill(buffer, rng)
            job = _job(loom, Captured(buffer, {}), number)
            began = time.perf_counter()
            loom.writer.submit(job)
            while job.handle.segment is None and job.handle.error is None:
                if len(branch.log()) > TURNS:
                    branch = loom.session(f"talk-{len(times)}", system=workload.SYSTEM).branch()
                branch.say(" ".join(chosen.choices(WORDS, k=12)), max_tokens=2)
            seconds += time.perf_counter() - began
            if job.handle.error is not None:
                raise job.handle.error
            loom.flush()
        sessions = checking.listed(loom)
    return {"times": times, "seconds": seconds, "bytes": size, "sessions": sessions}


def _fill(buffer: RowBuffer, rng: np.random.Generator) -> None:
    """Numbers as a model's are: their exponents are alike, the rest is noise."""
    for tensors in buffer.tensors:
        for array in tensors:
            array[...] = (rng.standard_normal(array.shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _job(loom: KVLoom, source: Captured, number: int) -> Job:
    """State of a path that no other round has."""
    with loom.database.write() as conn:
        node = trie.extend(conn, loom.root, [number] * TOKENS).node
        provenance = segments.add_provenance(conn, loom.engine.provenance())
    return Job(Handle(), source, node, 0, TOKENS, None, LAYERS, Schedule((Pass(0, TOKENS),)), provenance)


@contextmanager
def _timed(times: list[float]) -> Iterator[None]:
    """Every commit of a turn is timed: the transaction, and the handing over of its state."""
    real = commit.commit_all

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            times.append(time.perf_counter() - began)

    with mock.patch.object(commit, "commit_all", timed), mock.patch.object(run, "commit_all", timed):
        yield
