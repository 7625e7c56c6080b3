"""Long contexts: how fast they are brought back, and in how much memory beyond their own.

The state is random bits in the shape of a Llama with a small hidden size, 8 KiB a token; each restore has a process of
its own, and fresh memory. Three stores are read in turn: one that holds little else; one of 8 GB with the state at its
end, past what SQLite maps; one whose writer was killed with the state still in the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.common import machine, main, table, timed
from benchmarks.small import engine_of
from kvloom_proto.records import LayerKind, LayerSpec, TensorSpec
from kvloom_store import schema
from kvloom_store.database import Database
from kvloom_store.rows import Captured, RowBuffer

TOKENS = (32_000, 128_000)
STORE_BYTES = 8 << 30
ROUNDS = 3
QUICK = {"quick": True}

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 262_144,
}
PAIR = (TensorSpec("keys", "float32", (2, 64), 1), TensorSpec("values", "float32", (2, 64), 1))
LAYERS = (LayerSpec(0, 8, LayerKind.ROWS, PAIR),)
"""Its state, in float32."""

MODEL = b"l" * 16
"""The digest of the model whose state it is said to be."""

ROW_BYTES = sum(spec.row_bytes * spec.count for spec in LAYERS)

CASES = ("plain", "far", "log")
FILL_ROW, FILL_ROWS = 16 << 10, 16 << 10
"""What else is in a large store: segments of at most 256 MiB, in chunks of 4 MiB."""


def run(quick: bool = False) -> dict[str, Any]:
    """For each length and store: seconds, and what was resident at most, over the bytes of the state.

    ``capture`` and ``resume`` are those of a loop of one's own, with the model's layers over the memory.
    """
    lengths, rounds, store_bytes = ((2_000,), 1, 32 << 20) if quick else (TOKENS, ROUNDS, STORE_BYTES)
    found: dict[str, Any] = {"machine": machine(), "lengths": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokens in lengths:  # each is written behind all that the large store holds
            stores = {"plain": folder / f"{tokens}.db", "far": folder / "far.db", "log": folder / f"{tokens}-log.db"}
            written = {case: _child("write", store, tokens, case, store_bytes) for case, store in stores.items()}
            rows: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                for case, store in stores.items():
                    _into_page_cache(store)
                    rows.setdefault(case, []).append(_child("restore", store, tokens, case))
            loop = folder / f"{tokens}-loop.db"
            rows["capture"] = [_child("capture", loop, tokens)]
            rows["resume"] = [_child("resume", loop, tokens) for _ in range(rounds)]
            found["lengths"][str(tokens)] = {
                "state": tokens * ROW_BYTES,
                "files": written,
                **{case: _medians(some) for case, some in rows.items()},
            }
    return found


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def write(store: Path, tokens: int, case: str, store_bytes: int) -> dict[str, int]:
    """A turn with its state, as the writer stores it; the bytes of the file and of its log."""
    from kvloom_proto.records import Pass, Provenance, Schedule
    from kvloom_store import refs, roots, segments, trie, turns

    empty, database = not store.exists(), Database(store)
    if case == "far" and empty:
        fill(database, store_bytes)
    with database.write() as conn:
        root = roots.root_for(conn, roots.add_model(conn, MODEL, "long", {}))
        provenance = segments.add_provenance(conn, Provenance(1, "", "", "", "", "", ""))
        session = refs.create_session(conn, f"long-{tokens}", {})
        turn = turns.add_turn(conn, session.row, None, {"role": "user", "content": "x"})
        ids, schedule = range(tokens), Schedule((Pass(0, tokens),))
        at = trie.extend(conn, root, ids)
        state = turns.add_state(
            conn, turn.row, root, ids, 0, at, state_start=0, state_end=tokens, base_state=None, base_segment=None,
            schedule=schedule, provenance=provenance, hidden=None, hidden_dtype=None,
        )  # fmt: skip
        refs.move_branch(conn, refs.branches(conn, session.row)[0].row, None, turn.row)
    rows = random_rows(LAYERS, tokens)
    draft = segments.Draft(at.node, 0, tokens, None, LAYERS, schedule, provenance)

    def finish(conn: sa.Connection, segment: int) -> None:
        turns.set_segment(conn, state.row, segment, None)

    # As long as somebody reads an older state of a store, its log is not moved into the file.
    with database.read() if case == "log" else contextlib.nullcontext() as reader:
        if reader is not None:
            reader.execute(sa.select(schema.node.c.id)).all()
        segments.write(database, Captured(rows, {}), draft, codec_name="raw", finish=finish)
        if case == "log":
            _told_and_killed(_sizes(store))
    database.checkpoint()
    database.close()
    return _sizes(store)


def fill(database: Database, size: int) -> None:
    """Other state in the store: segments of random bytes, one after another."""
    from kvloom_proto.records import Provenance, Schedule
    from kvloom_store import roots, segments, trie

    layers = (LayerSpec(0, 1, LayerKind.ROWS, (TensorSpec("keys", "uint8", (FILL_ROW,), 0),)),)
    tokens = min(FILL_ROWS, size // FILL_ROW)
    rows = random_rows(layers, tokens)
    with database.write() as conn:
        root = roots.root_for(conn, roots.add_model(conn, b"f" * 16, "others", {}))
        provenance = segments.add_provenance(conn, Provenance(1, "", "", "", "", "", ""))
    for number in range(size // (FILL_ROW * tokens)):
        with database.write() as conn:
            node = trie.extend(conn, root, [number, *range(tokens - 1)]).node
        draft = segments.Draft(node, 0, tokens, None, layers, Schedule(unknown=True), provenance)
        segments.write(database, Captured(rows, {}), draft, codec_name="raw", finish=lambda *_: None)


def random_rows(layers: tuple[LayerSpec, ...], tokens: int) -> RowBuffer:
    """Rows of random bits."""
    import numpy as np

    rows, draw = RowBuffer(layers, tokens), np.random.default_rng(0)
    for tensors in rows.tensors:
        for tensor in tensors:
            tensor[...] = np.frombuffer(draw.bytes(tensor.nbytes), tensor.dtype).reshape(tensor.shape)
    return rows


def restore(store: Path, tokens: int, case: str) -> dict[str, float]:
    """What is read ahead of a turn while a model is being loaded, here with nothing beside it; then once more into the
    same memory."""
    from kvloom.prefetch import Prefetch
    from kvloom_store import loading
    from kvloom_store import restore as stored

    opened, database = timed(lambda: Database(store))
    with watched() as memory:
        began, used = time.perf_counter(), time.process_time()
        ahead = Prefetch(database, f"long-{tokens}", "main", MODEL)
        taken = ahead.take(LAYERS)
        seconds, processor = time.perf_counter() - began, time.process_time() - used
    assert taken is not None
    (rows, plan), size = taken, tokens * ROW_BYTES
    assert ahead.bytes_read == size
    with database.read() as conn:
        links = stored.chain(conn, plan.rows[-1].segment)
        used = time.process_time()
        again = timed(lambda: loading.load(conn, links, plan.rows, plan.windows, rows))[0]
        again_processor = time.process_time() - used
    found = {"open": opened, "seconds": seconds, "processor": processor} | _over(memory, size)
    found |= {"again": again, "again_processor": again_processor}
    if case == "log":  # closing would move the log into the file, and the next one is to find it as this one did
        _told_and_killed(found)
    return found


def capture(store: Path, tokens: int) -> dict[str, float]:
    """Store a cache of somebody's own; ``extra`` is beyond their cache and our copy of it."""
    import torch
    from transformers import DynamicCache

    import kvloom

    engine = engine_of("llama", SHAPE, name="long llama")
    draw, shape = torch.Generator().manual_seed(1), (1, 2, tokens, 64)
    cache = DynamicCache(config=engine.model.config)
    for layer in range(SHAPE["num_hidden_layers"]):
        cache.update(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw), layer)
    with kvloom.open(store, model=engine, codec="raw") as loom, watched() as memory:
        began = time.perf_counter()
        loom.capture(_ids(tokens), cache)
        loom.flush()
        seconds = time.perf_counter() - began
    return {"seconds": seconds} | _over(memory, tokens * ROW_BYTES)


def resume(store: Path, tokens: int) -> dict[str, float]:
    """Bring it back under the model, with room for a reply; then let it grow once."""
    import kvloom

    with kvloom.open(store, model=engine_of("llama", SHAPE, name="long llama")) as loom:
        resumer = loom.resumer
        with watched() as memory:
            seconds, (live, account) = timed(lambda: resumer.resume(_ids(tokens), None, room=512, logits=False))
        assert (live.length, account.bytes_read) == (tokens, tokens * ROW_BYTES)
        with watched() as growth:
            grow = timed(lambda: live.reserve(live.capacity + 1))[0]
    size = tokens * ROW_BYTES
    return {"seconds": seconds, "grow": grow, "grow_extra": growth["peak"] / size} | _over(memory, size)


def _ids(tokens: int) -> list[int]:
    return [number % 251 for number in range(tokens)]


def _over(memory: dict[str, int], size: int) -> dict[str, float]:
    return {"extra": (memory["peak"] - size) / size, "mapped": memory["mapped"] / size}


def _told_and_killed(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """What the block makes resident: ``peak`` bytes at most, and ``mapped`` ones of the file at its end (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, found = _status(), {}
    yield found
    after = _status()
    found["peak"] = after["VmHWM"] - before["VmRSS"]
    found["mapped"] = after["RssFile"] - before["RssFile"]


def _status() -> dict[str, int]:
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, _, value in lines if value.endswith("kB")}


def _sizes(store: Path) -> dict[str, int]:
    log = Path(f"{store}-wal")
    return {"file": store.stat().st_size, "log": log.stat().st_size if log.exists() else 0}


def _into_page_cache(store: Path) -> None:
    for path in (store, Path(f"{store}-wal")):
        if path.exists():
            with path.open("rb", buffering=0) as file:
                block = bytearray(16 << 20)
                while file.readinto(block):
                    pass


def _child(what: str, store: Path, *arguments: object) -> dict[str, Any]:
    """One part in a process of its own; one may end by being killed, after it has told what it did."""
    line = [sys.executable, "-m", "benchmarks.long", what, str(store), *map(str, arguments)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    assert done.returncode in (0, -signal.SIGKILL), line
    return dict(json.loads(done.stdout.splitlines()[-1]))


RATES = ("seconds", "processor", "again", "again_processor")


def show(found: dict[str, Any]) -> str:
    """The figures as a table: the stores, and a loop of one's own.

    GB/s into fresh memory, and once more into the same; beyond the state: what was resident at most.
    """
    head = ["", "state MB", "file MB", "log MB", "open ms", "ms", "GB/s", "of proc.", "again", "of proc."]
    head += ["beyond %", "grow ms", "beyond %"]
    rows: list[list[object]] = []
    for tokens, each in found["lengths"].items():
        for name in (*CASES, "resume", "capture"):
            row, files = each[name], each["files"].get(name, {})
            values = [each["state"] / 1e6, *(files[kind] / 1e6 if files else None for kind in ("file", "log"))]
            values += [row["open"] * 1e3 if "open" in row else None, row["seconds"] * 1e3]
            values += [each["state"] / 1e9 / row[part] if part in row else None for part in RATES]
            values += [row["extra"] * 100, row["grow"] * 1e3 if "grow" in row else None]
            values += [row["grow_extra"] * 100 if "grow_extra" in row else None]
            rows.append([f"{int(tokens):,} tokens, {name}", *values])
    return table(head, rows)


PARTS = {"write": write, "restore": restore, "capture": capture, "resume": resume}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        values = [int(each) if each.isdigit() else each for each in sys.argv[3:]]
        print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]), *values)))  # type: ignore[operator]
    else:
        main(run, show)
