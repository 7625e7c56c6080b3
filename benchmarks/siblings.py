"""Eight siblings over a shared prefix, decoded together, against transformers' own batch on the same prefix's cache.

Each side runs in a process of its own, turn by turn, so that the peak of one's memory is not the other's. Both sample
the same number of tokens a path; no path ends early. The greedy paths of siblings are compared with each decoded alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, words
from benchmarks.processes import in_new_process

PATHS, PREFIX, STEPS = 8, 2048, 64
DECIDED = 1e-3
"""Logits that lie nearer to each other than this are told apart by rounding."""
QUICK = {"rounds": 1, "steps": 16, "dtypes": ("float32",)}


def ours(dtype: str, paths: int, prefix: int, steps: int) -> dict[str, Any]:
    """Sampled together; then greedy from the likeliest first tokens, together and each alone."""
    from kvloom.growing import Growing, grow
    from kvloom.sampling import SamplingSettings
    from kvloom.siblings import Siblings
    from kvloom.textstream import TextStream

    engine, ids, live, logits = _at_prefix(dtype, prefix)
    assert engine.apart is None
    before = _peak(reset=True)
    began = time.perf_counter()
    siblings = Siblings(engine, live, live.length, [0] * paths, steps)
    settings = SamplingSettings(temperature=1.0)
    growing = [
        Growing(list(ids), settings, seed, steps, TextStream(engine.tokenizer), frozenset()) for seed in range(paths)
    ]
    grow(siblings, growing, logits.expand(paths, -1))
    seconds = time.perf_counter() - began
    peak = _peak() - before
    return {
        "tokens_per_second": paths * steps / seconds,
        "peak_mb": peak / 1e6,
        "greedy": _greedy(engine, live, logits, paths, steps),
    }


def theirs(dtype: str, paths: int, prefix: int, steps: int) -> dict[str, Any]:
    """``generate(num_return_sequences=...)``, handed a cache of the prefix for each of the paths."""
    import torch
    from transformers import DynamicCache

    engine, ids, _, _ = _at_prefix(dtype, prefix)
    model, cache = engine.model, DynamicCache(config=engine.model.config)
    with torch.inference_mode():
        model(torch.tensor([ids[:-1]]), past_key_values=cache, logits_to_keep=1)
    torch.manual_seed(0)
    before = _peak(reset=True)
    began = time.perf_counter()
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(paths)
    made = model.generate(
        torch.tensor([ids]),
        past_key_values=cache,
        num_return_sequences=paths,
        do_sample=True,
        top_k=0,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - began
    assert made.shape == (paths, len(ids) + steps)
    return {"tokens_per_second": paths * steps / seconds, "peak_mb": (_peak() - before) / 1e6}


def _at_prefix(dtype: str, prefix: int) -> Any:
    import kvloom

    engine = kvloom.load_engine("smollm2", dtype=dtype)
    ids = engine.tokenizer(words(engine.tokenizer, prefix + 50))["input_ids"][:prefix]
    live = engine.new_state(prefix + STEPS + 1)
    return engine, ids, live, engine.prefill(live, ids)


def _greedy(engine: Any, live: Any, logits: Any, paths: int, steps: int) -> dict[str, int]:
    """How many paths are the same to the last token, and how many part where rounding decides."""
    from kvloom.siblings import Siblings

    firsts, prefix = logits.topk(paths).indices.tolist(), live.length
    siblings = Siblings(engine, live, prefix, [0] * paths, steps)
    said, tokens = [[first] for first in firsts], firsts
    for _ in range(steps - 1):
        tokens = siblings.step(tokens).argmax(-1).tolist()
        for path, token in zip(said, tokens, strict=True):
            path.append(token)
    found = {"same": 0, "parted_by_rounding": 0, "differ": 0}
    for path in said:
        live.truncate(prefix)
        found[_compared(engine, live, path)] += 1
    live.truncate(prefix)
    return found


def _compared(engine: Any, live: Any, path: list[int]) -> str:
    for at, token in enumerate(path[:-1]):
        best = engine.run_pass(live, [token]).float().topk(2)
        if int(best.indices[0]) != path[at + 1]:
            return "parted_by_rounding" if float(best.values[0] - best.values[1]) < DECIDED else "differ"
    return "same"


def _peak(*, reset: bool = False) -> int:
    """The most memory this process has had since the last reset, in bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run(rounds: int = 3, *, steps: int = STEPS, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> dict[str, Any]:
    """Both sides by turns, each in new processes."""
    results: dict[str, Any] = {"machine": machine(), "paths": PATHS, "prefix": PREFIX, "steps": steps}
    for dtype in dtypes:
        settings = {"dtype": dtype, "paths": PATHS, "prefix": PREFIX, "steps": steps}
        rows = [{side.__name__: in_new_process(side, **settings) for side in (ours, theirs)} for _ in range(rounds)]
        results[dtype] = {
            "ours": spread([row["ours"]["tokens_per_second"] for row in rows]),
            "generate": spread([row["theirs"]["tokens_per_second"] for row in rows]),
            "times": spread([row["ours"]["tokens_per_second"] / row["theirs"]["tokens_per_second"] for row in rows]),
            "peak_mb": {side: max(row[side]["peak_mb"] for row in rows) for side in ("ours", "theirs")},
            "memory": max(row["ours"]["peak_mb"] / row["theirs"]["peak_mb"] for row in rows),
            "greedy": rows[0]["ours"]["greedy"],
        }
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    print(json.dumps(run(steps=parser.parse_args().steps), indent=2))
