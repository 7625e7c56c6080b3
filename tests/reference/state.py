"""State as the referee sees it: what a cache of transformers holds, and how a path is gone back on.

A state *part* is a run of rows, a window of rows, or a set of tensors that are overwritten in place (a frame). A cache
layer is one part, or two if it mixes attention with recurrent state. Windows forget rows and frames are overwritten, so
a log of every row, and a copy of every frame at the end of every pass, are kept on the side.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

KNOWN = (
    DeepseekV4CSACache,
    DeepseekV4HCACache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
FRAME_FIELDS = ("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized")
FRAME_FIELDS += ("has_previous_state", "conv_kernel_size", "dtype", "device")
TAIL_FIELDS = ("buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate")
"""What a layer that compresses blocks of tokens keeps of the block that is not whole yet."""

Tensors = dict[str, torch.Tensor]


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """The cache a model wants; None for one that takes a list of states."""
    if model.config.model_type == "rwkv":
        return None
    cache = MiniMaxCache() if model.config.model_type == "minimax" else DynamicCache(config=model.config)
    for layer in cache.layers:
        if type(layer) not in KNOWN:
            raise NotImplementedError(f"the referee does not know what a {type(layer).__name__} holds")
    return cache


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that gives the final hidden state. Llama 4's is not where the model says it is."""
    return model.base_model if model.base_model is not model else model.model


@dataclass(frozen=True)
class Stretch:
    """One forward pass, or what is left of it after going back into its middle."""

    start: int
    tokens: list[int]
    threads: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Held:
    """The state of one path, the log of its rows, and its frames at every end of a pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.log: dict[int, Tensors] = {}  # by cache layer: every row of the path, those a window dropped, too
        self.blocks: dict[int, Tensors] = {}  # by cache layer: the row of every whole block of the path
        self.states: list[torch.Tensor] | None = None  # RWKV's
        self.cache = self._new_cache()
        self.path: list[Stretch] = []
        self.frames: dict[int, Any] = {}  # by length

    @property
    def length(self) -> int:
        return self.path[-1].end if self.path else 0

    def _new_cache(self) -> DynamicCache | None:
        cache = new_cache(self.model)
        if cache is None:
            return None
        update, update_indexer = cache.update, cache.update_indexer

        def logged(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *rest: Any, **named: Any) -> Any:
            same = keys.data_ptr() == values.data_ptr() and keys.shape == values.shape
            self._note(layer_idx, {"keys": keys} if same else {"keys": keys, "values": values})
            return update(keys, values, layer_idx, *rest, **named)

        def logged_indexer(keys: torch.Tensor, layer_idx: int) -> Any:
            self._note(layer_idx, {"indexer_keys": keys})
            return update_indexer(keys, layer_idx)

        cache.update, cache.update_indexer = logged, logged_indexer  # type: ignore[method-assign]
        return cache

    def _note(self, layer: int, rows: Tensors) -> None:
        log = self.log.setdefault(layer, {})
        for name, new in rows.items():
            log[name] = torch.cat([log[name], new], dim=-2) if name in log else new.clone()

    def inputs(self) -> dict[str, Any]:
        """How the state is handed to the model; RWKV writes into what it is given."""
        if self.cache is None:
            return {"state": copy.deepcopy(self.states)}
        takes = inspect.signature(self.model.forward).parameters
        return {"cache_params" if "cache_params" in takes else "past_key_values": self.cache}

    def ran(self, stretch: Stretch, output: Any) -> None:
        """A pass was run over ``inputs()``."""
        if self.cache is None:
            self.states = copy.deepcopy(output.state)
        self.path.append(stretch)
        self.frames[self.length] = self._frame()
        for index, layer in self._compressing():
            self.blocks[index] = dict(layer.compressed_kv)

    def _compressing(self) -> list[tuple[int, DeepseekV4HCACache]]:
        layers = self.cache.layers if self.cache is not None else ()
        return [(index, layer) for index, layer in enumerate(layers) if isinstance(layer, DeepseekV4HCACache)]

    def parts(self) -> list[tuple[str, int | str | None]]:
        """Every part: "rows", "window", "frame" or "empty", and the cache layer it belongs to (or "own")."""
        if self.cache is None:
            return [("frame", "own")]
        found: list[tuple[str, int | str | None]] = []
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, DynamicLayer):
                kind = "window" if isinstance(layer, DynamicSlidingWindowLayer) else "rows"
                found.append((kind, index) if index in self.log else ("empty", None))
            if isinstance(layer, DeepseekV4HCACache):
                found += [("blocks", index), ("frame", index)]
            if isinstance(layer, LinearAttentionLayer):
                found.append(("frame", index))
            if isinstance(layer, DummyLayer):
                found.append(("empty", None))
        for index, tensor in enumerate(getattr(self.cache, "linear_cache", ())):
            if isinstance(tensor, torch.Tensor):
                found.append(("frame", f"linear_cache.{index}"))
        return found

    def rows(self, part: int) -> Tensors:
        """All rows of a part by name, without the batch; nothing for a frame."""
        kind, layer = self.parts()[part]
        if kind == "blocks":
            return {f"compressed_kv.{name}": rows[0] for name, rows in self.blocks[layer].items()}  # type: ignore[index]
        return {name: log[0] for name, log in self.log[layer].items()} if kind in ("rows", "window") else {}  # type: ignore[index]

    def frame(self, part: int, length: int | None = None) -> Tensors:
        """The tensors of a frame by name, without the batch; nothing for rows."""
        kind, layer = self.parts()[part]
        if kind != "frame":
            return {}
        kept = self.frames[self.length if length is None else length]
        if isinstance(layer, str):
            named = {f"state.{n}": t for n, t in enumerate(kept["own"])} if layer == "own" else {layer: kept[layer]}
        else:
            fields = kept[layer]
            if "buffer_kv" in fields:
                return tails(self.cache.layers[layer], fields)  # type: ignore[union-attr,index]
            pairs = [(n, field) for n in fields["conv_states"] for field in ("conv_states", "recurrent_states")]
            named = {f"{field}.{n}": fields[field][n] for n, field in pairs if fields[field][n] is not None}
        return {name: tensor[0] for name, tensor in named.items()}

    def _frame(self) -> dict[int | str, Any]:
        """A copy of everything that is overwritten in place."""
        if self.cache is None:
            return {"own": copy.deepcopy(self.states)}
        kept: dict[int | str, Any] = {
            index: copy.deepcopy({field: getattr(layer, field) for field in FRAME_FIELDS})
            for index, layer in enumerate(self.cache.layers)
            if isinstance(layer, LinearAttentionLayer)
        }
        kept |= {
            index: copy.deepcopy({field: getattr(layer, field) for field in TAIL_FIELDS if hasattr(layer, field)})
            for index, layer in self._compressing()
        }
        for index, tensor in enumerate(getattr(self.cache, "linear_cache", ())):
            if isinstance(tensor, torch.Tensor):
                kept[f"linear_cache.{index}"] = tensor.clone()
        return kept

    def put_back(self, length: int, frames: Any) -> None:
        """A new cache that ends after ``length`` tokens: rows from the log, which is cut, and these frames."""
        self.path = [s for s in self.path if s.start < length]
        if self.path and self.length > length:
            last = self.path.pop()
            self.path.append(Stretch(last.start, last.tokens[: length - last.start], last.threads))
        self.frames = {at: frame for at, frame in self.frames.items() if at < length}
        if length:
            self.frames[length] = frames
        self.log = {index: {name: t[..., :length, :] for name, t in log.items()} for index, log in self.log.items()}
        rates = {index: layer.compress_rate for index, layer in self._compressing()}
        self.blocks = {
            index: {name: t[:, : length // rates[index]] for name, t in rows.items()}
            for index, rows in self.blocks.items()
        }
        self.cache, self.states = self._new_cache(), None
        if self.cache is None:
            self.states = copy.deepcopy(frames["own"]) if length else None
        elif length:
            self._fill(length, frames)

    def _fill(self, length: int, frames: Any) -> None:
        assert self.cache is not None
        own = [key for key in frames if isinstance(key, str)]
        if isinstance(self.cache, MiniMaxCache):
            self.cache.layers += [DynamicLayer() for _ in range(1 + max(self.log, default=-1))]
            for name in own:
                self.cache.set_linear_cache(int(name.removeprefix("linear_cache.")), frames[name].clone())
        for index, log in self.log.items():
            layer = self.cache.layers[index]
            first = max(0, length - layer.sliding_window + 1) if isinstance(layer, DynamicSlidingWindowLayer) else 0
            values = log.get("values", log["keys"])
            DynamicLayer.lazy_initialization(layer, log["keys"], values)
            layer.keys, layer.values = (tensor[..., first:, :].contiguous() for tensor in (log["keys"], values))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
            if "indexer_keys" in log:
                layer.lazy_initialization_indexer(log["indexer_keys"])
                layer.indexer_keys = log["indexer_keys"].clone()
        for index, fields in frames.items():
            if isinstance(index, int):
                vars(self.cache.layers[index]).update(copy.deepcopy(fields))
        for index, rows in self.blocks.items():
            layer = self.cache.layers[index]
            layer.compressed_kv = dict(rows)
            layer.entry_count = {name: tensor.shape[1] for name, tensor in rows.items()}

    def as_logged(self) -> bool:
        """Whether the cache holds what the log says: all rows, or the last of a window."""
        return self.cache is None or all(
            torch.equal(getattr(self.cache.layers[index], name).float(), held[..., first:, :].float())
            for index, log in self.log.items()
            for name, held in log.items()
            for first in [held.shape[-2] - getattr(self.cache.layers[index], name).shape[-2]]
        )


def tails(layer: DeepseekV4HCACache, fields: dict[str, dict[str, torch.Tensor | None]]) -> Tensors:
    """What is kept of a block that is not whole, without the batch: as long as a block, with zeros behind it."""
    named: Tensors = {}
    for name, buffered in fields["buffer_kv"].items():
        assert buffered is not None
        for field in fields:
            width = layer.compressed_kv[name].shape[-1] if field.startswith("overlap") else buffered.shape[-1]
            held = fields[field][name]
            whole = buffered.new_zeros((layer.compress_rate, width))
            if held is not None:
                whole[: held.shape[1]] = held[0]
            named[f"{field}.{name}"] = whole
    return named


def reset_rope(model: PreTrainedModel) -> None:
    """Put the buffers back that some kinds of rope change with the length, so that no path feels another one."""
    for module in model.modules():
        for name, original in list(module.named_buffers(recurse=False)):
            if not name.endswith("original_inv_freq"):
                continue
            prefix = name.removesuffix("original_inv_freq")
            kinds = module.rope_type
            kind = kinds[prefix.removesuffix("_")] if prefix else kinds
            if kind == "longrope" or "dynamic" in kind:
                setattr(module, f"{prefix}inv_freq", torch.nn.Buffer(original.clone(), persistent=False))
                if hasattr(module, f"{prefix}max_seq_len_cached"):
                    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
