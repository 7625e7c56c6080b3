"""Long contexts: how fast they are brought back, and in how much memory beyond their own.

The state is random bits in the shape of a Llama with a small hidden size, 8 KiB a token; each restore has a process of
its own, and fresh memory that the machine has in hand. Three stores are read in turn: one that holds little else; one
of 8 GB with the state at its end, past what SQLite maps; one whose writer was killed with the state still in the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks import report
from benchmarks.common import machine, spread, timed
from benchmarks.processes import BESIDES, bytes_in_hand, read_through
from benchmarks.report import Bar, Section, Table, ranged, rate
from benchmarks.small import engine_of
from kvloom_proto.records import LayerKind, LayerSpec, TensorSpec
from kvloom_store import schema
from kvloom_store.database import Database
from kvloom_store.rows import Captured, RowBuffer

TOKENS = (32_000, 128_000)
STORE_BYTES = 8 << 30
ROUNDS = 3
MOST_BEYOND = 10
"""Per cent of the state that a restore may need beside it."""

QUICK = {"lengths": (2_000,), "rounds": 1, "store_bytes": 32 << 20}

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

PLAIN, FAR, LOG = "plain", "far", "log"
CAPTURE, RESUME = "capture", "resume"
FILL_ROW, FILL_ROWS = 16 << 10, 16 << 10
"""What else is in a large store: segments of at most 256 MiB, in chunks of 4 MiB."""


def run(
    lengths: Sequence[int] = TOKENS, rounds: int = ROUNDS, store_bytes: int = STORE_BYTES
) -> dict[str, dict[str, Any]]:
    """For each length and store: seconds, and what was resident at most, beyond the state and over its bytes.

    ``capture`` and ``resume`` are those of a loop of one's own, with the model's layers over the memory.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokens in lengths:  # each is written behind all that the large store holds
            stores = {PLAIN: folder / f"{tokens}.db", FAR: folder / "far.db", LOG: folder / f"{tokens}-log.db"}
            written = {case: _child("write", store, tokens, case, store_bytes) for case, store in stores.items()}
            rows: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                for case, store in stores.items():
                    _into_page_cache(store, tokens)
                    rows.setdefault(case, []).append(_child("restore", store, tokens, case))
            loop = folder / f"{tokens}-loop.db"
            rows[CAPTURE] = [_child(CAPTURE, loop, tokens)]
            rows[RESUME] = [_child(RESUME, loop, tokens) for _ in range(rounds)]
            found[str(tokens)] = {
                "state": tokens * ROW_BYTES,
                "files": written,
                **{case: _spreads(some) for case, some in rows.items()},
            }
    return found


def _spreads(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


def write(store: Path, tokens: int, case: str, store_bytes: int) -> dict[str, int]:
    """A turn with its state, as the writer stores it; the bytes of the file and of its log."""
    from kvloom_proto.records import Pass, Provenance, Schedule
    from kvloom_store import refs, roots, segments, trie, turns

    empty, database = not store.exists(), Database(store)
    if case == FAR and empty:
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
    with database.read() if case == LOG else contextlib.nullcontext() as reader:
        if reader is not None:
            reader.execute(sa.select(schema.node.c.id)).all()
        segments.write(database, Captured(rows, {}), draft, codec_name="raw", finish=finish)
        if case == LOG:
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

    bytes_in_hand(3 * tokens * ROW_BYTES + BESIDES)
    opened, database = timed(lambda: Database(store))
    with watched() as memory:
        began = time.perf_counter()
        ahead = Prefetch(database, f"long-{tokens}", "main", MODEL)
        taken = ahead.take(LAYERS)
        seconds = time.perf_counter() - began
    assert taken is not None
    (rows, plan), size = taken, tokens * ROW_BYTES
    assert ahead.bytes_read == size
    with database.read() as conn:
        links = stored.chain(conn, plan.rows[-1].segment)
        again = timed(lambda: loading.load(conn, links, plan.rows, plan.windows, rows))[0]
    found = {"open": opened, "seconds": seconds, "again": again} | _over(memory, size)
    if case == LOG:  # closing would move the log into the file, and the next one is to find it as this one did
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


def _into_page_cache(store: Path, tokens: int) -> None:
    """All of a file, or of a large one the end, which the state is in."""
    for path in (store, Path(f"{store}-wal")):
        if path.exists():
            read_through(path, max(0, path.stat().st_size - 2 * tokens * ROW_BYTES))


def _child(what: str, store: Path, *arguments: object) -> dict[str, Any]:
    """One part in a process of its own; one may end by being killed, after it has told what it did."""
    line = [sys.executable, "-m", "benchmarks.long", what, str(store), *map(str, arguments)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    assert done.returncode in (0, -signal.SIGKILL), line
    return dict(json.loads(done.stdout.splitlines()[-1]))


def section(found: Mapping[str, Any]) -> Section:
    """A row a store and a row for a loop of one's own, a table a length; the bound of what is used beside the state."""
    tables, bars = [], []
    for length, each in found.items():
        tokens, files = f"{int(length):,}", each["files"]
        said = {
            PLAIN: "from a store of its own",
            FAR: f"at the end of a store of {files[FAR]['file'] / 1e9:.1f} GB",
            LOG: f"from the log ({files[LOG]['log'] / 1e6:,.0f} MB) of a writer that was killed",
        }
        rows = [[words, *_restored(each["state"], each[case])] for case, words in said.items()]
        resumed, captured = each[RESUME], each[CAPTURE]
        rows.append(["`lookup`, under the model", "", ranged(resumed["seconds"], report.time), "", _percent(resumed)])
        rows.append(["`capture`, until it is stored", "", report.time(captured["seconds"]["median"]), "", ""])
        columns = ["", "opening", "restoring", "", "beyond the state"]
        tables.append(Table(columns, rows, f"**{tokens} tokens**, {each['state'] / 1e6:,.0f} MB"))
        for case, words in said.items():
            beyond = 100 * each[case]["extra"]["median"]
            bars.append(Bar(f"{tokens} tokens {words}: memory beyond the state", beyond, MOST_BEYOND, unit=" %"))
    text = (
        "Random bits in the shape of a Llama with a small hidden size, 8 KiB a token, float32, raw, the page cache "
        "warm; each restore in a new process, in memory the machine has in hand. *Beyond the state*: what was resident "
        "at most while it came back, mapped pages of the file and room for a next turn included. SQLite maps the "
        "first 2 GB of a file, and nothing of its log."
    )
    return Section("Long contexts", text, tables, bars=bars)


def _restored(state: int, row: Mapping[str, Mapping[str, float]]) -> list[str]:
    seconds = row["seconds"]
    opening, restoring = ranged(row["open"], report.time), ranged(seconds, report.time)
    return [opening, restoring, rate(state / seconds["median"]), _percent(row)]


def _percent(row: Mapping[str, Mapping[str, float]]) -> str:
    return f"{report.number(100 * row['extra']['median'])} %"


PARTS = {"write": write, "restore": restore, CAPTURE: capture, RESUME: resume}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        values = [int(each) if each.isdigit() else each for each in sys.argv[3:]]
        print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]), *values)))  # type: ignore[operator]
    else:
        print(json.dumps({"machine": machine(), **run()}, indent=2))
