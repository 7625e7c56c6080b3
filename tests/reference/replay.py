"""The referee: plain transformers, fed the recorded forward passes, against the bits that were stored.

    python replay.py JOB [JOB ...]

It knows nothing of the program whose state it judges. A job is a folder:

job.json             model      {"tiny": kind, "seed": 0, "config": {...}} or {"folder": path}
                     dtype      what the model computes in
                     single     also compare with one single pass over all tokens, as a tolerance
                     passes     each {"keep", "tokens", "positions", "threads"}: forget all rows but the first
                                `keep`, then run the tokens at these positions
expect.safetensors   keys.L, values.L    rows [0, T) of layer L as integers: [heads, tokens, size]
                     hidden.P            the final hidden state after position P, as integers
                     logits.P            the logits after position P, likewise

It prints one JSON verdict a job: elements that differ, by layer, and the first token where one does. The exit
status is 1 if any bit of any job differs.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import DTYPES, tiny_model  # a test makes sure that this module, too, stands by itself

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@functools.lru_cache(maxsize=2)
def build(described: str, dtype: str) -> PreTrainedModel:
    """The model of a job."""
    model = json.loads(described)
    if "tiny" in model:
        return tiny_model(model["tiny"], dtype, seed=model.get("seed", 0), **model.get("config", {}))
    return AutoModelForCausalLM.from_pretrained(model["folder"], dtype=DTYPES[dtype], local_files_only=True).eval()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


class Run:
    """A model with a cache of its own, and what came out after the last pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.hidden = self.logits = torch.empty(0)
        self.takes = inspect.signature(model.forward).parameters

    def step(self, keep: int, tokens: list[int], positions: list[int], threads: int) -> None:
        """Forget all rows but the first ``keep``, then one forward pass."""
        for layer in self.cache.layers:
            if layer.is_initialized and layer.keys.shape[-2] != keep:
                layer.keys = layer.keys[:, :, :keep].contiguous()
                layer.values = layer.values[:, :, :keep].contiguous()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
        if "position_ids" in self.takes:
            inputs["position_ids"] = torch.tensor([positions])
        seen: list[Any] = []
        hook = self.model.base_model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.inference_mode():
            # The output head over many rows rounds otherwise than over one.
            output = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        hook.remove()
        self.hidden, self.logits = seen[0].last_hidden_state[0, -1], output.logits[0, -1]


def difference(name: str, expected: torch.Tensor, found: torch.Tensor, token_axis: int | None) -> dict[str, Any] | None:
    """How two tensors of integers differ; None if they do not."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return {"name": name, "elements": -1, "shapes": [list(expected.shape), list(found.shape)]}
    if torch.equal(expected, found):
        return None
    unequal = expected != found
    at = unequal.nonzero()[:, token_axis].min().item() if token_axis is not None else None
    return {"name": name, "elements": int(unequal.sum()), "first_token": at}


def judge(job: Path) -> dict[str, Any]:
    """Run the passes of a job and compare."""
    described = json.loads((job / "job.json").read_text())
    expect = load_file(job / "expect.safetensors")
    model = build(json.dumps(described["model"], sort_keys=True), described["dtype"])
    run = Run(model)
    compared = 0
    outcomes: dict[str, dict[str, Any] | None] = {}  # a position that is run again counts as it was the last time
    for step in described["passes"]:
        run.step(step["keep"], step["tokens"], step["positions"], step["threads"])
        at = step["keep"] + len(step["tokens"]) - 1
        for name, made in ((f"hidden.{at}", run.hidden), (f"logits.{at}", run.logits)):
            if name in expect:
                compared += expect[name].numel()
                outcomes[name] = difference(name, expect[name], bits(made), None)
    layers: dict[str, int] = {}
    tokens = 0
    for index, layer in enumerate(run.cache.layers):
        for name, held in (("keys", layer.keys[0]), ("values", layer.values[0])):
            expected = expect[f"{name}.{index}"]
            tokens = expected.shape[1]
            compared += expected.numel()
            outcome = difference(f"{name}.{index}", expected, bits(held[:, :tokens]), 1)
            if outcome:
                layers[str(index)] = layers.get(str(index), 0) + outcome["elements"]
                outcomes[f"{name}.{index}"] = outcome
    missing = set(expect) - {f"{name}.{index}" for name in ("keys", "values") for index in range(len(run.cache.layers))}
    missing -= set(outcomes)
    wrong = [outcome for outcome in outcomes.values() if outcome]
    firsts = [d["first_token"] for d in wrong if d.get("first_token") is not None]
    verdict = {
        "job": job.name,
        "ok": not wrong and not missing and compared > 0,
        "tokens": tokens,
        "passes": len(described["passes"]),
        "compared": compared,
        "layers": layers,
        "first_token": min(firsts, default=None),
        "differences": wrong,
        "never_compared": sorted(missing),
    }
    if described.get("single"):
        verdict["single"] = single(run, described["tokens"], expect)
    return verdict


def single(run: Run, tokens: list[int], expect: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the passes are from one single pass over the same tokens: a tolerance, which nobody promises."""
    other = Run(run.model)
    other.step(0, tokens, list(range(len(tokens))), torch.get_num_threads())
    equal = total = 0
    for index, layer in enumerate(other.cache.layers):
        same = bits(layer.keys[0]) == expect[f"keys.{index}"]
        equal, total = equal + int(same.sum()), total + same.numel()
    return {
        "max_logit_difference": (other.logits.float() - run.logits.float()).abs().max().item(),
        "max_logit": run.logits.float().abs().max().item(),
        "equal_keys": equal / total,
    }


def main(jobs: list[str]) -> int:
    """Judge jobs; 0 if no bit differs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    verdicts = [judge(Path(job)) for job in jobs]
    for verdict in verdicts:
        print(json.dumps(verdict))
    return 0 if verdicts and all(verdict["ok"] for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
