"""Decoding: kvloom's loop over preallocated layers against transformers' ``generate`` with its dynamic cache.

Both go on greedily from the same state, by turns in one process, and must say the same tokens. kvloom's loop is the one
that a reply is made with: it chooses each token and notes what the model thought of it. Neither side's copy of the
state is timed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import ids, machine, spread, timed
from benchmarks.plot import LinePlot, points
from benchmarks.processes import in_new_process
from benchmarks.report import Bar, Section, Table, ranged

CONTEXTS = (512, 2048, 4096)
TOKENS = 32
QUICK = {"contexts": (512,), "tokens": 12, "rounds": 2, "dtypes": ("float32",)}


def measure(model: str, dtype: str, contexts: Sequence[int], tokens: int, rounds: int) -> dict[str, Any]:
    """In a process of its own: tokens a second of both, by turns, at each context."""
    import torch
    from transformers import DynamicCache

    import kvloom

    engine = kvloom.load_engine(model, dtype=dtype)
    engine.model.generation_config.eos_token_id = None  # it goes on as long as ours does, whatever it says
    given = ids(engine.tokenizer, max(contexts) + 1)
    live = engine.new_state(max(contexts) + tokens + 1)
    engine.prefill(live, given[:-1])
    found: dict[str, Any] = {}
    for context in sorted(contexts, reverse=True):  # a shorter one overwrites the rows of a longer one
        live.show(context)
        held = DynamicCache(config=engine.model.config)
        for number, layer in enumerate(live.cache.layers):
            held.update(layer.keys.clone(), layer.values.clone(), number)
        rows: dict[str, list[float]] = {"kvloom": [], "generate": []}
        for number in range(rounds):
            said = {}
            for side in list(rows)[:: -1 if number % 2 else 1]:  # each comes first by turns
                if side == "kvloom":
                    live.show(context)
                    seconds, said[side] = timed(_ours, engine, live, given[: context + 1], tokens)
                else:
                    cache, asked = copy.deepcopy(held), torch.tensor([given[: context + 1]])
                    seconds, said[side] = timed(_theirs, engine.model, asked, cache, tokens)
                rows[side].append(tokens / seconds)
            assert said["kvloom"] == said["generate"], f"other tokens at {context}: {said}"
        found[str(context)] = {
            **{side: spread(values) for side, values in rows.items()},
            "times": spread([a / b for a, b in zip(rows["kvloom"], rows["generate"], strict=True)]),
        }
    return found


def _ours(engine: Any, live: Any, given: list[int], tokens: int) -> list[int]:
    from kvloom.sampling import SamplingSettings

    logits, said = engine.run_pass(live, given[-1:]), []
    for token in engine.generate(live, logits, SamplingSettings(), seen=given, seed=0, scores=[]):
        said.append(token)
        if len(said) == tokens:
            break
    return said


def _theirs(model: Any, given: Any, cache: Any, tokens: int) -> list[int]:
    made = model.generate(given, past_key_values=cache, do_sample=False, max_new_tokens=tokens)
    said: list[int] = made[0, given.shape[1] :].tolist()
    return said


def run(
    model: str = "smollm2",
    contexts: Sequence[int] = CONTEXTS,
    tokens: int = TOKENS,
    rounds: int = 8,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Both dtypes, each in a process of its own."""
    settings = {"model": model, "contexts": list(contexts), "tokens": tokens, "rounds": rounds}
    return {"tokens": tokens, **{dtype: in_new_process(measure, dtype=dtype, **settings) for dtype in dtypes}}


def section(found: Mapping[str, Any]) -> Section:
    """A table of contexts, a plot, the bars of show 5."""
    dtypes = {name: value for name, value in found.items() if isinstance(value, dict)}
    rows, bars, series = [], [], {}
    for dtype, contexts in dtypes.items():
        for context, each in sorted(contexts.items(), key=lambda item: int(item[0])):
            figures = [ranged(each[side]) for side in ("kvloom", "generate", "times")]
            rows.append([f"{dtype}, {int(context):,}", *figures])
        for side in ("kvloom", "generate"):
            series[f"{side}, {dtype}"] = points({int(n): each[side] for n, each in contexts.items()})
        worst = min(each["times"]["median"] for each in contexts.values())
        bars.append(
            Bar(f"decode, {dtype}: of transformers' generate, at worst", worst, 1, at_least=True, unit=" times")
        )
    at_4096 = found.get("float32", {}).get("4096")
    if at_4096 is not None:
        figure = "decode at 4,096 tokens, float32: of transformers' generate"
        bars.append(Bar(figure, at_4096["times"]["median"], 1.1, at_least=True, wish=1.3, unit=" times"))
    text = (
        f"Tokens a second of {found['tokens']} greedy tokens behind so many that are held, the same tokens from "
        "both: kvloom's own loop, which also scores each token, and transformers' `generate` with its dynamic cache."
    )
    plot = LinePlot("decode", "Decoding", "tokens of context", "tokens a second", series)
    return Section("Decoding", text, [Table(["context", "kvloom", "generate", "times"], rows)], [plot], bars)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
