"""Jobs for the referee made by plain transformers, sound ones and ones that are wrong in a known way.

The recorder shares nothing with the referee but the models: windows keep their past by transformers' own switch for
it, and a state to go back to is a deep copy of the whole cache. So a sound job that the referee accepts says something
about both, and a mutant that it accepts says that the referee is blind.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_model
from tiny_configs import RESTARTING
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACache

from reference.replay import bits
from reference.state import TAIL_FIELDS, decoder, new_cache, reset_rope, tails

Tensors = dict[str, torch.Tensor]
Fault = Callable[["Recorder", int], None]


class Recorder:
    """A model that runs, with a copy of its whole state after every pass of the path it is on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.takes = inspect.signature(model.forward).parameters
        cache: Any = new_cache(model)
        for layer in getattr(cache, "layers", ()):
            if isinstance(layer, DeepseekV4HCACache):
                layer.__class__ = recording(type(layer))
            elif isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()
        self.saved: dict[int, Any] = {0: cache}  # RWKV's state is a list, and None to begin with
        self.state = copy.deepcopy(cache)
        self.trusting = False  # take positions from what the cache says it holds
        self.tokens: list[int] = []
        self.passes: list[dict[str, Any]] = []
        self.out: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(self, tokens: list[int]) -> None:
        """One recorded pass."""
        start = len(self.tokens)
        positions = list(range(start, start + len(tokens)))
        self.passes.append({"keep": start, "tokens": tokens, "positions": positions, "threads": 1})
        self.state, self.out[start + len(tokens)] = self.forward(self.state, tokens, start)
        self.tokens += tokens
        self.saved[len(self.tokens)] = copy.deepcopy(self.state)

    def forward(self, state: Any, tokens: list[int], start: int) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """Run tokens behind a state, which is changed; the new state, and what came out at the end."""
        reset_rope(self.model)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([tokens]), "use_cache": True}
        if "position_ids" in self.takes and not self.trusting:
            inputs["position_ids"] = torch.arange(start, start + len(tokens))[None]
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        name = next(name for name in ("cache_params", "past_key_values", "state") if name in self.takes)
        seen: list[Any] = []
        hook = decoder(self.model).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.inference_mode():
            output = self.model(**inputs, **{name: state})
        hook.remove()
        out = seen[0].last_hidden_state[0, -1].clone(), output.logits[0, -1].clone()
        return (output.state if name == "state" else state), out

    def back(self, keep: int, fault: Fault | None = None) -> None:
        """Go back to the state after ``keep`` tokens; ``fault`` then does something wrong to it."""
        boundary = max(at for at in self.saved if at <= keep)
        old, self.state = self.state, copy.deepcopy(self.saved[boundary])
        if boundary < keep:
            self.state, _ = self.forward(self.state, self.tokens[boundary:keep], boundary)
            for layer, whole in zip(getattr(self.state, "layers", ()), getattr(old, "layers", ()), strict=True):
                if isinstance(layer, DeepseekV4HCACache):
                    layer.go_back(whole, keep)
                    continue
                for name in ("keys", "values", "indexer_keys"):
                    if getattr(whole, name, None) is not None:
                        setattr(layer, name, getattr(whole, name)[..., :keep, :])
        self.saved = {at: state for at, state in self.saved.items() if at < keep}
        self.saved[keep] = copy.deepcopy(self.state)
        self.out = {at: out for at, out in self.out.items() if at <= min(keep, boundary)}
        after = self.tokens[keep] if keep < len(self.tokens) else 0
        self.tokens = self.tokens[:keep]
        if fault is not None:
            with torch.inference_mode():
                fault(self, after)

    def expectations(self) -> Tensors:
        """Rows and frames of the path by part, hidden states and logits, as integers."""
        named: Tensors = {}
        for at, state in self.saved.items():
            if at:
                named |= {f"frame.{at}.{name}": tensor for name, tensor in frames(state).items()}
        named |= rows(self.state)
        for at, (hidden, logits) in self.out.items():
            named |= {f"hidden.{at - 1}": hidden, f"logits.{at - 1}": logits}
        return {name: bits(tensor).clone() for name, tensor in named.items()}


@functools.cache
def recording(kind: type[DeepseekV4HCACache]) -> type[DeepseekV4HCACache]:
    """A layer of that kind that keeps what its window drops: it does not know transformers' own switch for it."""

    def update(layer: Any, keys: torch.Tensor, *rest: Any, **named: Any) -> Any:
        past = getattr(layer, "past", None)
        layer.past = keys if past is None else torch.cat([past, keys], dim=-2)
        return kind.update(layer, keys, *rest, **named)

    def go_back(layer: Any, whole: Any, keep: int) -> None:
        layer.past = whole.past[..., :keep, :]
        layer.keys = layer.values = layer.past[..., max(0, keep - layer.sliding_window + 1) :, :]
        for name, rows in whole.compressed_kv.items():
            layer.compressed_kv[name] = rows[:, : keep // layer.compress_rate]

    return type(kind.__name__, (kind,), {"_layer_type": None, "update": update, "go_back": go_back})


def parts(state: Any) -> list[tuple[str, Any]]:
    """("rows" or "frame" or "empty", the object that holds it) for each part."""
    if isinstance(state, list):
        return [("frame", {f"state.{n}": tensor for n, tensor in enumerate(state)})]
    found: list[tuple[str, Any]] = []
    for layer in state.layers:
        attention, linear = hasattr(layer, "keys"), hasattr(layer, "conv_states")
        if attention or not linear:
            found.append(("rows", layer) if getattr(layer, "keys", None) is not None else ("empty", None))
        if isinstance(layer, DeepseekV4HCACache):
            held = {field: getattr(layer, field) for field in TAIL_FIELDS if hasattr(layer, field)}
            frame = {name: tensor[None] for name, tensor in tails(layer, held).items()}
            found += [("blocks", layer), ("frame", frame)]
        if linear:
            tensors = {}
            for n in range(layer.number_of_states):
                tensors |= {
                    f"conv_states.{n}": layer.conv_states[n],
                    f"recurrent_states.{n}": layer.recurrent_states[n],
                }
            found.append(("frame", {name: tensor for name, tensor in tensors.items() if tensor is not None}))
    for n, tensor in enumerate(getattr(state, "linear_cache", [])):
        if not isinstance(tensor, list):
            found.append(("frame", {f"linear_cache.{n}": tensor}))
    return found


def rows(state: Any) -> Tensors:
    """All rows of a state: its windows have kept theirs."""
    names = ("keys", "values", "indexer_keys")
    found: Tensors = {}
    for part, (kind, layer) in enumerate(parts(state)):
        if kind == "blocks":
            found |= {f"compressed_kv.{name}.{part}": tensor[0] for name, tensor in layer.compressed_kv.items()}
        elif kind == "rows" and isinstance(layer, DeepseekV4HCACache):
            found[f"keys.{part}"] = layer.past[0]
        elif kind == "rows":
            held = {name: getattr(layer, name, None) for name in names}
            if held["values"].shape == held["keys"].shape and torch.equal(held["keys"], held["values"]):
                del held["values"]  # they are the keys, and stored once
            found |= {f"{name}.{part}": tensor[0] for name, tensor in held.items() if tensor is not None}
    return found


def frames(state: Any) -> Tensors:
    """All tensors of a state that are overwritten in place."""
    return {
        f"{name}.{part}": tensor[0]
        for part, (kind, tensors) in enumerate(parts(state))
        if kind == "frame"
        for name, tensor in tensors.items()
    }


def late_counter(run: Recorder, _after: int) -> None:
    """Windows that think they hold one token more, and positions that are counted from there.

    The counter alone changes nothing once a sliding window is full: the mask's two ends move together.
    """
    run.trusting = True
    for layer in getattr(run.state, "layers", ()):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += 1


def shifted_row(run: Recorder, _after: int) -> None:
    """Rows that stand one place too far."""
    layer = next(layer for kind, layer in parts(run.state) if kind == "rows")
    layer.keys = torch.roll(layer.keys, 1, dims=-2)


def swapped_layers(run: Recorder, _after: int) -> None:
    """Two layers that got each other's state."""
    found = parts(run.state)
    for kind in ("rows", "frame"):
        alike = [held for each, held in found if each == kind]
        if kind == "rows" and len(alike) > 1:
            a, b = next((a, b) for n, a in enumerate(alike) for b in alike[n + 1 :] if type(a) is type(b))
            a.keys, b.keys, a.values, b.values = b.keys, a.keys, b.values, a.values
        elif kind == "frame" and len(alike) > 1 and alike[0].keys() == alike[1].keys():
            _exchange(alike[0], alike[1])
        elif kind == "frame" and alike:  # RWKV's tensors hold all layers
            for tensor in alike[0].values():
                tensor.copy_(tensor.flip(-1).clone())


def late_frame(run: Recorder, after: int) -> None:
    """Frames of one token later than the rows they come with."""
    later, _ = run.forward(copy.deepcopy(run.state), [after], len(run.tokens))
    for layer, new in zip(getattr(run.state, "layers", ()), getattr(later, "layers", ()), strict=True):
        if isinstance(layer, DeepseekV4HCACache):
            vars(layer).update({field: getattr(new, field) for field in TAIL_FIELDS if hasattr(new, field)})
    for (kind, old), (_, new) in zip(parts(run.state), parts(later), strict=True):
        if kind == "frame":
            for name, tensor in old.items():
                tensor.copy_(new[name])


def _exchange(one: Tensors, other: Tensors) -> None:
    for name, mine in zip(one, other, strict=True):
        kept = one[name].clone()
        one[name].copy_(other[mine])
        other[mine].copy_(kept)


FAULTS: dict[str, Fault] = {
    "row shifted": shifted_row,
    "counter off by one": late_counter,
    "layers swapped": swapped_layers,
    "keyframe one token late": late_frame,
}


def faults_of(kind: str) -> list[str]:
    """Those of the faults that a kind of model can have."""
    run = Recorder(tiny_model(kind))
    run.step([1, 2, 3])
    kinds = {kind for kind, _ in parts(run.state)}
    windows = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in getattr(run.state, "layers", ()))
    possible = {
        "row shifted": "rows" in kinds,
        "counter off by one": windows,
        "keyframe one token late": "frame" in kinds,
    }
    return [name for name in FAULTS if possible.get(name, True)]


def record(
    kind: str, dtype: str, folder: Path, *, seed: int = 0, fault: Fault | None = None, single: bool = False
) -> Path:
    """A job of random passes that go back three times: into a pass, to the end of one, and into one again."""
    rng = random.Random(f"{kind} {dtype} {seed}")
    run = Recorder(tiny_model(kind, dtype))
    one_by_one = kind in RESTARTING  # several tokens at once would lose the state, for transformers itself

    def several(count: int, size: int = 1) -> None:
        for _ in range(count * size if one_by_one else count):
            run.step([rng.randrange(300) for _ in range(1 if one_by_one else size)])

    run.step([rng.randrange(300) for _ in range(rng.randrange(38, 46))])
    several(3)
    run.back(rng.randrange(24, 34), fault)
    several(1, rng.randrange(20, 30))
    several(4)
    run.back(len(run.tokens) - 2, fault)
    several(1, rng.randrange(14, 22))
    inside = len(run.tokens) - rng.randrange(3, 10)
    several(2)
    run.back(inside, fault)
    several(3)
    several(1, rng.randrange(8, 20))
    several(4)
    folder.mkdir(parents=True)
    job = {"model": {"tiny": kind}, "dtype": dtype, "passes": run.passes, "tokens": run.tokens, "single": single}
    (folder / "job.json").write_text(json.dumps(job))
    save_file(run.expectations(), folder / "expect.safetensors")
    return folder
