"""Bytes stored over a branching conversation: 8 branches of 10 exchanges of about 60 tokens over a shared prefix."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import machine, words
from benchmarks.plot import BarPlot
from benchmarks.processes import in_new_process
from benchmarks.report import Bar, Section, Table, number

PREFIX = 2000
BRANCHES = 8
EXCHANGES = 10
QUICK = {"prefix": 500, "branches": 2, "exchanges": 2}


def grow(store: str, model: str, dtype: str, codec: str, prefix: int, branches: int, exchanges: int) -> int:
    """In a process of its own: make the tree; bytes of the file before it."""
    import kvloom
    from kvloom_store.stats import stats

    with kvloom.open(store, model=model, dtype=dtype, codec=codec) as loom:
        tokenizer = loom.engine.tokenizer
        empty = int(stats(loom.database)["bytes"]["file"])
        trunk = loom.session("novel").branch()
        trunk.say(words(tokenizer, prefix - 40), max_tokens=1)
        sentences = words(tokenizer, 20_000).split(". ")
        for number in range(branches):
            branch = trunk.fork(f"branch-{number}")
            for exchange in range(exchanges):
                said = f"{number}.{exchange} {sentences[number * exchanges + exchange]}"
                ids = tokenizer(said)["input_ids"][:22]
                branch.say(tokenizer.decode(ids), max_tokens=30, temperature=1.0, seed=number * 100 + exchange)
            print(f"branch {number + 1} of {branches}", file=sys.stderr)
    return empty


def run(
    model: str = "smollm2",
    dtype: str = "bfloat16",
    codec: str = "auto",
    prefix: int = PREFIX,
    branches: int = BRANCHES,
    exchanges: int = EXCHANGES,
) -> dict[str, Any]:
    """How much the file grows, against the unique tokens' state and against one snapshot a reply."""
    import kvloom
    from kvloom_store.stats import stats

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kvloom.db"
        settings = {"model": model, "dtype": dtype, "codec": codec, "prefix": prefix}
        empty = in_new_process(grow, store=str(path), branches=branches, exchanges=exchanges, **settings)
        with kvloom.open(path) as loom:
            found = stats(loom.database)
    sizes = found["bytes"]
    grown = sizes["file"] - empty
    return {
        "dtype": dtype,
        "codec": codec,
        "branches": found["branches"],
        "turns": found["turns"],
        "unique_tokens": found["tokens"],
        "bytes": sizes,
        "grown": grown,
        "file_of_logical": sizes["file"] / sizes["state_logical"],
        "beside_state_of_logical": (grown - sizes["state_stored"]) / sizes["state_logical"],
        "snapshots_of_grown": sizes["state_if_snapshots"] / grown,
    }


def section(found: Mapping[str, Any]) -> Section:
    """Bytes, and the bar of show 8."""
    sizes = found["bytes"]
    groups = {
        "one snapshot a reply": sizes["state_if_snapshots"],
        "unique tokens' state, raw": sizes["state_logical"],
        "the same, as stored": sizes["state_stored"],
        "the whole file": sizes["file"],
    }
    rows = [[name, f"{number(size / 1e6)} MB", number(size / sizes["state_logical"])] for name, size in groups.items()]
    text = (
        f"{found['branches'] - 1} branches over one prefix: {found['turns']} turns, {found['unique_tokens']:,} "
        f"distinct tokens, {found['dtype']}, codec {found['codec']}. What is not state (text, tries, checksums, "
        f"half-filled pages) is {found['beside_state_of_logical']:.2%} of the raw state."
    )
    bars = []
    if found["dtype"] == "bfloat16":
        bars.append(
            Bar("the whole file of the tree, of its raw state, bfloat16", 100 * found["file_of_logical"], 66, unit=" %")
        )
    plot = BarPlot("tree", "Bytes of a branching conversation", "MB", ["MB"], {n: [s / 1e6] for n, s in groups.items()})
    return Section("Bytes over a tree", text, [Table(["", "bytes", "of raw state"], rows)], [plot], bars)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
