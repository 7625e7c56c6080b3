"""What cutting prefill into passes costs, against one single pass, in plain transformers."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import common
from benchmarks.common import machine, recompute, spread, timed

TOKENS = 4096
GRIDS = (4096, 1024, 512, 256)
QUICK = {"rounds": 1}


def run(rounds: int = 3) -> dict[str, Any]:
    """Seconds of a prefill of 4,096 tokens per grid and dtype, rounds interleaved."""
    from kvloom import load_engine

    results: dict[str, Any] = {"machine": machine()}
    for dtype in ("float32", "bfloat16"):
        engine = load_engine("smollm2", dtype=dtype)
        ids = common.ids(engine.tokenizer, TOKENS)
        times: dict[int, list[float]] = {grid: [] for grid in GRIDS}
        for _ in range(rounds):
            for grid in GRIDS:
                times[grid].append(timed(recompute, engine.model, ids, grid)[0])
        results[dtype] = {str(grid): spread(values) for grid, values in times.items()}
    return results


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
