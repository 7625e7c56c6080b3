"""The referee: plain transformers, fed the recorded forward passes, against the bits that were stored.

    python replay.py JOB [JOB ...]

It knows nothing of the program whose state it judges. A job is a folder:

job.json             model      {"tiny": kind, "seed": 0, "config": {...}} or {"folder": path}
                     dtype      what the model computes in
                     single     also compare with one single pass over all tokens, as a tolerance
                     passes     each {"keep", "tokens", "positions", "threads"}: go back to the state after the first
                                `keep` tokens, then run the tokens at these positions
expect.safetensors   keys.N, values.N    all rows [0, T) of state part N as integers, also those that a window has left
                                         behind: [heads, tokens, size]
                     indexer_keys.N      likewise, [tokens, size]
                     frame.P.NAME.N      a tensor that is overwritten in place, as it was after the first P tokens
                     hidden.P            the final hidden state after position P, as integers
                     logits.P            the logits after position P, likewise

Going back into the middle of a pass is a matter of definition where state is overwritten in place: rows stay as the
pass made them; a frame is what the pass gives when it is run from its own beginning to that point and no further.

Jobs that differ in nothing but what they expect are run once. It prints one JSON verdict a job: elements that differ,
by part, and the first token where one does. The exit status is 1 if any bit of any job differs.
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
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))
# A test makes sure that these modules, too, stand by themselves.
from tiny import DTYPES, tiny_model

from reference.state import Held, Stretch, Tensors, decoder, reset_rope

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


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
    """A model with state of its own, and what came out after the last pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.held = Held(model)
        self.hidden = self.logits = torch.empty(0)
        self.takes = inspect.signature(model.forward).parameters

    def step(self, keep: int, tokens: list[int], positions: list[int], threads: int) -> None:
        """Go back to the state after ``keep`` tokens, then one forward pass."""
        if keep != self.held.length:
            self.go_back(keep)
        self.run(Stretch(keep, tokens, threads), positions)

    def run(self, stretch: Stretch, positions: list[int]) -> None:
        """One forward pass behind what is held."""
        reset_rope(self.model)
        if torch.get_num_threads() != stretch.threads:
            torch.set_num_threads(stretch.threads)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([stretch.tokens]), **self.held.inputs()}
        if "position_ids" in self.takes:
            inputs["position_ids"] = torch.tensor([positions])
        if "logits_to_keep" in self.takes:  # the output head over many rows rounds otherwise than over one
            inputs["logits_to_keep"] = 1
        seen: list[Any] = []
        hook = decoder(self.model).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.inference_mode():
            output = self.model(**inputs, use_cache=True)
        hook.remove()
        self.held.ran(stretch, output)
        self.hidden, self.logits = seen[0].last_hidden_state[0, -1], output.logits[0, -1]

    def go_back(self, keep: int) -> None:
        """Rows are cut; what is overwritten in place is put back, and in the middle of a pass made again."""
        held = self.held
        assert 0 <= keep < held.length
        boundary = max(at for at in (0, *held.frames) if at <= keep)
        if boundary == keep or not any(held.frames[held.length]):
            held.put_back(keep, held.frames.get(keep, {}))
            return
        within = next(each for each in held.path if each.start == boundary)
        rows, blocks = held.log, held.blocks
        held.put_back(boundary, held.frames.get(boundary, {}))
        part = Stretch(boundary, within.tokens[: keep - boundary], within.threads)
        self.run(part, list(range(boundary, keep)))
        held.log, held.blocks = rows, blocks
        held.put_back(keep, held.frames[keep])


def difference(name: str, expected: torch.Tensor, found: torch.Tensor, token_axis: int | None) -> dict[str, Any] | None:
    """How two tensors of integers differ; None if they do not."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return {"name": name, "elements": -1, "shapes": [list(expected.shape), list(found.shape)]}
    if torch.equal(expected, found):
        return None
    unequal = expected != found
    at = unequal.nonzero()[:, token_axis].min().item() if token_axis is not None else None
    return {"name": name, "elements": int(unequal.sum()), "first_token": at}


def compare_pass(run: Run, expect: Tensors, outcomes: dict[str, dict[str, Any] | None]) -> None:
    """What is expected after the pass that was run last, against what came out of it."""
    length = run.held.length
    for name, made in ((f"hidden.{length - 1}", run.hidden), (f"logits.{length - 1}", run.logits)):
        if name in expect:
            outcomes[name] = difference(name, expect[name], bits(made), None)
    compare_frames(run, length, expect, outcomes)


def compare_frames(run: Run, length: int, expect: Tensors, outcomes: dict[str, dict[str, Any] | None]) -> None:
    """The frames that are expected after ``length`` tokens, where the state stands now."""
    if not any(name.startswith(f"frame.{length}.") for name in expect):
        return
    for part in range(len(run.held.parts())):
        for tensor, made in run.held.frame(part, length).items():
            name = f"frame.{length}.{tensor}.{part}"
            if name in expect:
                outcomes[name] = difference(name, expect[name], bits(made), None)


def compare_rows(run: Run, expect: Tensors, outcomes: dict[str, dict[str, Any] | None]) -> int:
    """Every row of every part; how many tokens were compared. What nobody expects counts as a difference."""
    tokens = 0
    for part in range(len(run.held.parts())):
        for tensor, log in run.held.rows(part).items():
            name = f"{tensor}.{part}"
            if name not in expect:
                outcomes[name] = {"name": name, "elements": -1, "shapes": [None, list(log.shape)]}
                continue
            count = expect[name].shape[-2]
            tokens = max(tokens, count)  # a row of a block stands for several
            outcomes[name] = difference(name, expect[name], bits(log[..., :count, :]), log.dim() - 2)
    return tokens


def judge(jobs: list[Path]) -> list[dict[str, Any]]:
    """Run the passes of jobs that have the same ones, and compare with what each expects."""
    described = json.loads((jobs[0] / "job.json").read_text())
    model = build(json.dumps(described["model"], sort_keys=True), described["dtype"])
    run = Run(model)
    expected = [load_file(job / "expect.safetensors") for job in jobs]
    outcomes: list[dict[str, dict[str, Any] | None]] = [{} for _ in jobs]  # of a position run again the last counts
    for step in described["passes"]:
        if step["keep"] != run.held.length:
            run.go_back(step["keep"])
            for expect, found in zip(expected, outcomes, strict=True):
                compare_frames(run, step["keep"], expect, found)
        run.step(step["keep"], step["tokens"], step["positions"], step["threads"])
        for expect, found in zip(expected, outcomes, strict=True):
            compare_pass(run, expect, found)
    return [verdict(*each, run, described) for each in zip(jobs, expected, outcomes, strict=True)]


def verdict(
    job: Path, expect: Tensors, outcomes: dict[str, dict[str, Any] | None], run: Run, described: dict[str, Any]
) -> dict[str, Any]:
    """What is to be said of a job whose passes were run and compared, its rows not yet."""
    tokens = compare_rows(run, expect, outcomes)
    wrong = [outcome for outcome in outcomes.values() if outcome]
    by_part: dict[str, int] = {}
    for outcome in wrong:
        if outcome["name"].split(".")[0] not in ("hidden", "logits"):
            part = outcome["name"].rsplit(".", 1)[1]
            by_part[part] = by_part.get(part, 0) + outcome["elements"]
    firsts = [d["first_token"] for d in wrong if d.get("first_token") is not None]
    compared = sum(expect[name].numel() for name in outcomes if name in expect)
    missing = set(expect) - set(outcomes)
    made = {
        "job": job.name,
        "ok": not wrong and not missing and compared > 0 and run.held.as_logged(),
        "tokens": tokens or run.held.length,
        "passes": len(described["passes"]),
        "compared": compared,
        "frames": len({name.split(".")[1] for name in outcomes if name.startswith("frame.")}),
        "layers": by_part,
        "first_token": min(firsts, default=None),
        "differences": wrong,
        "never_compared": sorted(missing),
    }
    if described.get("single"):
        made["single"] = single(run, described["tokens"], expect)
    return made


def single(run: Run, tokens: list[int], expect: Tensors) -> dict[str, float | None]:
    """How far the passes are from one single pass over the same tokens: a tolerance, which nobody promises."""
    other = Run(run.model)
    other.step(0, tokens, list(range(len(tokens))), torch.get_num_threads())
    equal = total = 0
    for part in range(len(other.held.parts())):
        keys = other.held.rows(part).get("keys")
        if keys is not None:
            same = bits(keys) == expect[f"keys.{part}"]
            equal, total = equal + int(same.sum()), total + same.numel()
    return {
        "max_logit_difference": (other.logits.float() - run.logits.float()).abs().max().item(),
        "max_logit": run.logits.float().abs().max().item(),
        "equal_keys": equal / total if total else None,
    }


def main(jobs: list[str]) -> int:
    """Judge jobs; 0 if no bit differs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    alike: dict[str, list[Path]] = {}
    for job in map(Path, jobs):
        alike.setdefault((job / "job.json").read_text(), []).append(job)
    verdicts = {str(job): made for same in alike.values() for job, made in zip(same, judge(same), strict=True)}
    for job in jobs:
        print(json.dumps(verdicts[str(Path(job))]))
    return 0 if jobs and all(made["ok"] for made in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
