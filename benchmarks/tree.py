"""Bytes stored over a branching conversation: 8 branches of 10 exchanges of about 60 tokens over a shared prefix."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, words

PREFIX = 2000
BRANCHES = 8
EXCHANGES = 10


def run(
    model: str = "smollm2", dtype: str = "float32", branches: int = BRANCHES, exchanges: int = EXCHANGES
) -> dict[str, Any]:
    """How much the file grows, against the unique tokens' state and against one snapshot a reply."""
    import kvloom
    from kvloom_store.stats import stats

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kvloom.db"
        with kvloom.open(path, model=model, dtype=dtype, codec="raw") as loom:
            tokenizer = loom.engine.tokenizer
            empty = stats(loom.database)["bytes"]["file"]
            trunk = loom.session("novel").branch()
            trunk.say(words(tokenizer, PREFIX - 40), max_tokens=1)
            sentences = words(tokenizer, 20_000).split(". ")
            for number in range(branches):
                branch = trunk.fork(f"branch-{number}")
                for exchange in range(exchanges):
                    said = f"{number}.{exchange} {sentences[number * exchanges + exchange]}"
                    ids = tokenizer(said)["input_ids"][:22]
                    branch.say(tokenizer.decode(ids), max_tokens=30, temperature=1.0, seed=number * 100 + exchange)
                print(f"branch {number + 1} of {branches}", file=sys.stderr)
        with kvloom.open(path) as loom:
            found = stats(loom.database)
    sizes = found["bytes"]
    return {
        "machine": machine(),
        "dtype": dtype,
        "turns": found["turns"],
        "unique_tokens": found["tokens"],
        "bytes": sizes,
        "grown": sizes["file"] - empty,
        "grown_of_logical": (sizes["file"] - empty) / sizes["state_logical"],
        "snapshots_of_grown": sizes["state_if_snapshots"] / (sizes["file"] - empty),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
