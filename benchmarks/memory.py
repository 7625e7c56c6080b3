"""Memory of several branches over a common beginning that are open in one process, against their unique state.

Two ways to have them open: gone on from by turns, as a conversation is, and held at once as caches of ``lookup``. What
is counted is the process's own memory (anonymous pages), above what it had with the model loaded and warm; the store's
file, which is mapped, is not in it.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import machine, words
from benchmarks.processes import in_new_process
from benchmarks.report import Bar, Section, Table, number, time
from benchmarks.stored import SESSION

PREFIX, BRANCHES, TOKENS = 2048, 8, 16
QUESTION = "Branch {}: who is it about, and where do they live?"
QUICK = {"prefix": 256, "branches": 3, "tokens": 4}


def prepare(store: str, model: str, dtype: str, prefix: int, branches: int, tokens: int) -> None:
    """A conversation, and branches that each go on from it in a way of their own."""
    import kvloom

    with kvloom.open(store, model=model, dtype=dtype, codec="raw") as loom:
        trunk = loom.session(SESSION).branch()
        trunk.say(words(loom.engine.tokenizer, prefix), max_tokens=1)
        for number in range(branches):
            trunk.fork(f"branch-{number}").say(QUESTION.format(number), max_tokens=tokens)


def measure(store: str, model: str, dtype: str, branches: int) -> dict[str, Any]:
    """In a process of its own: memory with all branches gone on from, and then with all of them looked up."""
    import kvloom
    from benchmarks.stored import path_of
    from kvloom_store.stats import stats

    with kvloom.open(store, model=model, dtype=dtype, codec="raw") as loom:
        session, names = loom.session(SESSION), [f"branch-{number}" for number in range(branches)]
        ids = [path_of(loom, SESSION, name).ids for name in names]
        engine = loom.engine
        engine.prefill(engine.new_state(1), ids[0][:256])  # what passes need for themselves is there now
        row, unique = sum(spec.row_bytes * spec.count for spec in engine.layers), stats(loom.database)["tokens"]
        _ = loom.resumer
        before = _own()
        visits = []
        for _ in range(2):
            for name in names:
                reply = session.branch(name).say("And then?", max_tokens=1)
                visits.append((reply.restored.bytes_read, reply.seconds.restore))
            loom.flush()
        talked = {
            "memory": _own() - before,
            "unique": stats(loom.database)["tokens"] * row,
            "read_again": sum(size for size, _ in visits[branches:]),
            "seconds_again": max(seconds for _, seconds in visits[branches:]),
        }
        loom.resumer.forget()
        before = _own()
        caches = [loom.lookup(each) for each in ids]
        looked = {"memory": _own() - before, "unique": unique * row}
        assert all(length > 0 for _, length in caches)
    return {"branches": branches, "row": row, "prefix": len(ids[0]), "talked": talked, "looked_up": looked}


def _own() -> int:
    """Bytes of this process's own memory, free blocks given back (Linux)."""
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def run(
    model: str = "smollm2",
    dtype: str = "float32",
    prefix: int = PREFIX,
    branches: int = BRANCHES,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """Once: bytes are the same in every run, but for some that the allocator keeps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"store": str(Path(folder) / "kvloom.db"), "model": model, "dtype": dtype, "branches": branches}
        in_new_process(prepare, prefix=prefix, tokens=tokens, **settings)
        return {"dtype": dtype, **in_new_process(measure, **settings)}


def section(found: Mapping[str, Any]) -> Section:
    """Two rows; the bars of show 4."""
    ways = {"talked": "gone on from by turns, twice", "looked_up": "held at once, as caches of `lookup`"}
    rows, bars = [], []
    for name, said in ways.items():
        each = found[name]
        ratio = each["memory"] / each["unique"]
        again = f"{each['read_again'] / 1e6:.0f} MB" if "read_again" in each else ""
        rows.append([said, f"{each['memory'] / 1e6:.0f} MB", f"{each['unique'] / 1e6:.0f} MB", number(ratio), again])
        more = f" ({again} read again)" if again else ""
        figure = f"{found['branches']} branches {said}: memory over their unique state{more}"
        bars.append(Bar(figure, ratio, 1.1, unit=" times"))
    text = (
        f"{found['branches']} branches over some {found['prefix']:,} common tokens, {found['dtype']}, open in one "
        "process: its own memory above what it was with the model loaded, against the state of their distinct tokens. "
        "Read again: from the file, when each was gone on from a second time; a branch waited "
        f"{time(found['talked']['seconds_again'])} at most for its state then."
    )
    return Section(
        "Several branches in memory",
        text,
        [Table(["", "memory", "unique state", "over", "read again"], rows)],
        bars=bars,
    )


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
