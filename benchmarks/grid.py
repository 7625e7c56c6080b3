"""What cutting prefill into passes costs, against one single pass, in plain transformers."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import machine, spread, timed, words

TOKENS = 4096
GRIDS = (4096, 1024, 512, 256)


def run(rounds: int = 3) -> dict[str, Any]:
    """Seconds of a prefill of 4,096 tokens per grid and dtype, rounds interleaved."""
    import torch
    from transformers import DynamicCache

    from kvloom import load_engine

    results: dict[str, Any] = {"machine": machine()}
    for dtype in ("float32", "bfloat16"):
        engine = load_engine("smollm2", dtype=dtype)
        ids = engine.tokenizer(words(engine.tokenizer, TOKENS), return_tensors="pt")["input_ids"][:, :TOKENS]
        times: dict[int, list[float]] = {grid: [] for grid in GRIDS}

        def prefill(grid: int, engine: Any = engine, ids: Any = ids) -> None:
            cache = DynamicCache(config=engine.model.config)
            with torch.inference_mode():
                for start in range(0, TOKENS, grid):
                    positions = torch.arange(start, start + grid)[None]
                    part = ids[:, start : start + grid]
                    engine.model(part, past_key_values=cache, position_ids=positions, logits_to_keep=1)

        for _ in range(rounds):
            for grid in GRIDS:
                times[grid].append(timed(lambda grid=grid: prefill(grid))[0])  # type: ignore[misc]
        results[dtype] = {str(grid): spread(values) for grid, values in times.items()}
    return results


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
