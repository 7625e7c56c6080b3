"""The states of a cache: which adapter each kind of cache layer has, and what a cache is rebuilt from.

What a layer is decides how its state is kept, never the model's name. A layer's *state* (DESIGN.md: layer kinds) is of
one kind: rows that are appended, rows of which only a window is seen, or tensors overwritten in place. A layer that
mixes two kinds is two states; one that holds nothing is one empty state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from kvloom.blocks import BlockRows, BlockTail, block_layer, compresses
from kvloom.errors import UnsupportedInput
from kvloom.overwritten import LinearState, ListedState, Overwritten, StateList
from kvloom.row_layers import IndexedLayer, MixedRowLayer, MixedWindowLayer, RowLayer, WindowLayer, same_bits
from kvloom_proto.records import LayerKind, LayerSpec, TensorSpec

if TYPE_CHECKING:
    from kvloom.live import LiveState


def states_of(cache: Any) -> Iterator[tuple[LayerKind, Any]]:
    """Every state of transformers' own cache (or StateList), in order: its kind, and the layer or Overwritten.

    Raises:
        UnsupportedInput: a layer of a class that nothing here knows; the message names it.
    """
    if isinstance(cache, StateList):
        yield LayerKind.KEYFRAME, cache
        return
    for index, layer in enumerate(cache.layers):
        yield from _states_in(index, layer)
    entries = getattr(cache, "linear_cache", [])
    for index, entry in enumerate(entries):
        if isinstance(entry, torch.Tensor):
            yield LayerKind.KEYFRAME, ListedState(entries, index)


def _states_in(index: int, layer: Any) -> Iterator[tuple[LayerKind, Any]]:
    """The states of one cache layer."""
    kind = type(layer)
    if kind is LinearAttentionLayer:
        yield LayerKind.KEYFRAME, LinearState(layer)
    elif kind is DummyLayer or (kind is DynamicLayer and not layer.is_initialized):
        yield LayerKind.EMPTY, layer
    elif kind in (DynamicLayer, DynamicIndexedLayer, RowLayer, IndexedLayer):
        yield LayerKind.ROWS, layer
    elif kind in (DynamicSlidingWindowLayer, WindowLayer):
        yield LayerKind.WINDOW, layer
    elif kind in (LinearAttentionAndFullAttentionLayer, MixedRowLayer):
        yield LayerKind.ROWS, layer
        yield LayerKind.KEYFRAME, LinearState(layer)
    elif kind in (LinearAttentionAndSlidingWindowAttentionLayer, MixedWindowLayer):
        yield LayerKind.WINDOW, layer
        yield LayerKind.KEYFRAME, LinearState(layer)
    elif compresses(layer):
        yield LayerKind.WINDOW, layer
        yield LayerKind.BLOCKS, BlockRows(layer)
        yield LayerKind.KEYFRAME, BlockTail(layer)
    else:
        raise UnsupportedInput(f"cache layer {index} is a {kind.__name__}, which this version cannot store")


def row_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer of rows by name, or those of its blocks."""
    if isinstance(layer, BlockRows):
        return layer.tensors()
    found = {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, DynamicIndexedLayer):
        found["indexer_keys"] = layer.indexer_keys
    return found


def layer_specs(cache: Any) -> tuple[LayerSpec, ...]:
    """What a cache that has seen tokens holds, state by state; neighbours that are alike are counted together."""
    specs: list[LayerSpec] = []
    for number, (kind, holder) in enumerate(states_of(cache)):
        window = int(holder.sliding_window) if kind == LayerKind.WINDOW else 0
        block = holder.block if kind == LayerKind.BLOCKS else 0
        spec = LayerSpec(number, 1, kind, tuple(_tensor_specs(kind, holder)), window, block=block)
        if specs and replace(specs[-1], index=number, count=1) == spec:
            last = specs.pop()
            spec = replace(last, count=last.count + 1)
        specs.append(spec)
    return tuple(specs)


def _tensor_specs(kind: LayerKind, holder: Any) -> Iterator[TensorSpec]:
    if kind == LayerKind.KEYFRAME:
        for name, tensor in holder.tensors().items():
            yield TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape[1:]), 0)
    elif kind != LayerKind.EMPTY:
        for name, tensor in row_tensors(holder).items():
            if name == "values" and same_bits(tensor, holder.keys):
                continue
            if tensor.dim() == 3:  # an indexer has no heads, and blocks have none
                yield TensorSpec(name, dtype_name(tensor.dtype), (tensor.shape[2],), 0)
            else:
                yield TensorSpec(name, dtype_name(tensor.dtype), (tensor.shape[1], tensor.shape[3]), 1)


_OURS = {DynamicLayer: RowLayer, DynamicIndexedLayer: IndexedLayer, DynamicSlidingWindowLayer: WindowLayer}
_MIXED = {
    LinearAttentionAndFullAttentionLayer: MixedRowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: MixedWindowLayer,
}


def _layer_like(like: Any, state: LiveState, number: int) -> Any:
    """An empty layer of the kind of one that has seen tokens; its rows, if it has any, are those of ``state``."""
    kind: Any = type(like)
    if compresses(like):
        return block_layer(kind)(state, number, like)
    if kind in _MIXED:
        return _MIXED[kind](state, number, like.number_of_states)
    if kind is LinearAttentionLayer:
        return LinearAttentionLayer(number_of_states=like.number_of_states)
    if kind in _OURS and like.is_initialized:
        return _OURS[kind](state, number)
    return kind()


def attach(cache: Any, shape_of: Any, state: LiveState) -> tuple[list[RowLayer], dict[int, Overwritten]]:
    """Put layers over a state's buffers into an empty cache like ``shape_of`` (one that has seen tokens).

    Gives the layers that have rows, and by number the states that are overwritten in place.
    """
    rows: list[RowLayer] = []
    overwritten: dict[int, Overwritten] = {}
    if isinstance(cache, StateList):
        return rows, {0: cache}
    made: list[Any] = []
    number = 0
    for like in shape_of.layers:
        made.append(_layer_like(like, state, number))
        for kind, holder in _states_in(len(made) - 1, made[-1]):
            if kind == LayerKind.KEYFRAME:
                overwritten[number] = holder
            elif isinstance(holder, RowLayer):
                rows.append(holder)
            number += 1
    cache.layers = made
    cache.layer_class_to_replicate = None
    listed: Sequence[Any] = getattr(shape_of, "linear_cache", ())
    if listed:
        cache.linear_cache = [None] * max(len(listed), len(made))
        for index, entry in enumerate(listed):
            if isinstance(entry, torch.Tensor):
                overwritten[number] = ListedState(cache.linear_cache, index)
                number += 1
    return rows, overwritten


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of layers that ``states_of`` can walk."""
    return type(value) is DynamicCache or (isinstance(value, DynamicCache) and hasattr(value, "linear_cache"))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")
