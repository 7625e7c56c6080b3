"""Adapters, one for each kind of cache layer: the only module that takes transformers' cache layers apart.

What a layer is decides how its state is kept, never the model's name. A layer's *state* (DESIGN.md: layer kinds) is of
one kind: rows that are appended, rows of which only a window is seen, or tensors overwritten in place. A layer that
mixes two kinds is two states; one that holds nothing is one empty state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

from kvloom.errors import EngineError, UnsupportedInput
from kvloom_proto.records import LayerKind, LayerSpec, TensorSpec

if TYPE_CHECKING:
    from kvloom.live import LiveState


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, ``[1, kv_heads, tokens, head_dim]``, as views of a ``LiveState``'s buffers.

    It is a DynamicLayer to everybody else, so ``model.generate`` takes a cache of these as it is. Where values are the
    very keys, they are kept once.
    """

    def __init__(self, state: LiveState, number: int) -> None:
        self._state = state
        self._number = number
        self.length = 0
        spec = state.specs[number].tensors[0]
        self.dtype, self.device = state.torch_dtype(spec), state.device
        self.is_initialized = True
        self.show(0)

    def show(self, length: int) -> None:
        """Let the layer end after ``length`` tokens."""
        self.length = length
        tensors = self._state.tensors[self._number]
        self.keys, self.values = tensors[0][:, :, :length], tensors[self._values][:, :, :length]

    def all_rows(self, length: int) -> dict[str, torch.Tensor]:
        """Rows [0, length) by name, those behind a window among them."""
        specs = self._state.specs[self._number].tensors
        tensors = self._state.tensors[self._number]
        return {s.name: t.narrow(1 + s.token_axis, 0, length) for s, t in zip(specs, tensors, strict=True)}

    @property
    def _values(self) -> int:
        return 1 if len(self._state.specs[self._number].tensors) > 1 else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows of a forward pass behind those that are there; all rows, old and new."""
        if key_states.shape[0] != 1:
            raise UnsupportedInput("a kvloom cache holds one sequence, not a batch")
        start, end = self.length, self.length + key_states.shape[-2]
        self._state.reserve(end)
        tensors = self._state.tensors[self._number]
        tensors[0][:, :, start:end].copy_(key_states)
        if self._values:
            tensors[1][:, :, start:end].copy_(value_states)
        elif not same_bits(key_states, value_states):
            raise EngineError("a layer whose values were its keys computed others: its state would be lost")
        self.show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative count, as transformers passes it.

        Raises:
            UnsupportedInput: what a pass sees there of a window was not read.
        """
        length = max(0, self.length - abs(tokens_to_remove))
        if 0 < length < self.length and not self._state.sees(length):
            raise UnsupportedInput(
                f"this cache holds the rows of its windows from token {self._state.window_base} on",
                hint=f"look {length} tokens up again instead of cutting the cache back to them",
            )
        if length:
            self.show(length)
        else:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.show(0)
        self._state.window_base = 0


class IndexedLayer(RowLayer, DynamicIndexedLayer):  # type: ignore[misc]
    """Rows with an indexer's keys ``[1, tokens, index_head_dim]`` beside them (sparse attention)."""

    def __init__(self, state: LiveState, number: int) -> None:
        self.indexer_position_ids = None
        self.is_indexer_initialized = True
        self.indexed = 0
        super().__init__(state, number)

    def show(self, length: int) -> None:
        super().show(length)
        self.indexed = length
        self.indexer_keys = self._state.tensors[self._number][2][:, :length]

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Put an indexer's new keys behind those that are there; it may be called before or after ``update``."""
        start, end = self.indexed, self.indexed + indexer_key_states.shape[1]
        self._state.reserve(end)
        whole = self._state.tensors[self._number][2]
        whole[:, start:end].copy_(indexer_key_states)
        self.indexed = end
        self.indexer_keys = whole[:, :end]
        return self.indexer_keys

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indexed = self.indexed
        keys, values = super().update(key_states, value_states)
        self.indexed = indexed  # the indexer counts for itself: it is asked first by some models
        self.indexer_keys = self._state.tensors[self._number][2][:, :indexed]
        return keys, values


class WindowLayer(RowLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Rows of which a pass sees the last ``sliding_window`` - 1 besides its own; all of them stay in the buffers."""

    is_sliding = True

    def __init__(self, state: LiveState, number: int) -> None:
        self.sliding_window = state.specs[number].window
        self._sliding_window_tensor = torch.tensor(self.sliding_window, dtype=torch.long)
        self.record_past = False
        super().__init__(state, number)

    @property
    def window_base(self) -> int:
        """From where on all rows are there that a pass sees."""
        return self._state.window_base

    def show(self, length: int) -> None:
        self._seen(max(0, length - self.sliding_window + 1), length)

    def _seen(self, first: int, length: int) -> None:
        self.length = length
        tensors = self._state.tensors[self._number]
        self.keys, self.values = tensors[0][:, :, first:length], tensors[self._values][:, :, first:length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = max(0, self.length - self.sliding_window + 1)
        super().update(key_states, value_states)
        self._seen(first, self.length)
        seen = self.keys, self.values
        self.show(self.length)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that the next pass sees, and the position of the first of them."""
        first = max(0, self.length - self.sliding_window + 1)
        return self.length - first + query_length, first


class MixedRowLayer(RowLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Rows, and tensors overwritten in place, in one layer."""

    def __init__(self, state: LiveState, number: int, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        RowLayer.__init__(self, state, number)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, if the states that are overwritten can be taken back: transformers says."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        RowLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        RowLayer.reset(self)


class MixedWindowLayer(WindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """A window, and tensors overwritten in place, in one layer."""

    def __init__(self, state: LiveState, number: int, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        WindowLayer.__init__(self, state, number)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, if the states that are overwritten can be taken back: transformers says."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        WindowLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        WindowLayer.reset(self)


class Overwritten(Protocol):
    """State that a forward pass overwrites in place: its tensors are read and put back whole."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as they are now (not copies); none before the first pass."""
        ...

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Let these be the tensors; none at all for the state before the first pass."""
        ...


@dataclass(frozen=True, slots=True)
class LinearState:
    """The convolution and recurrent states of a linear-attention layer, several of each, and its flags."""

    layer: LinearAttentionLayer

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for index in range(self.layer.number_of_states):
            for name in ("conv_states", "recurrent_states"):
                tensor = getattr(self.layer, name)[index]
                if tensor is not None and self.layer.has_previous_state[index]:
                    found[f"{name}.{index}"] = tensor
        return found

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        layer = self.layer
        for index in range(layer.number_of_states):
            conv, recurrent = tensors.get(f"conv_states.{index}"), tensors.get(f"recurrent_states.{index}")
            layer.conv_states[index], layer.recurrent_states[index] = conv, recurrent
            layer.is_conv_states_initialized[index] = conv is not None
            layer.is_recurrent_states_initialized[index] = recurrent is not None
            layer.conv_kernel_size[index] = None if conv is None else conv.shape[-1]
            layer.has_previous_state[index] = conv is not None or recurrent is not None
            first = conv if conv is not None else recurrent
            if first is not None and not isinstance(layer, RowLayer):
                layer.dtype, layer.device = first.dtype, first.device


@dataclass(frozen=True, slots=True)
class ListedState:
    """One entry of a cache's list of tensors (lightning attention keeps its states in one)."""

    entries: list[Any]
    index: int

    def tensors(self) -> dict[str, torch.Tensor]:
        entry = self.entries[self.index]
        return {f"linear_cache.{self.index}": entry} if isinstance(entry, torch.Tensor) else {}

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        self.entries[self.index] = tensors.get(f"linear_cache.{self.index}")


@dataclass(slots=True)
class StateList:
    """The state of a model that takes and returns a list of tensors instead of a cache (RWKV)."""

    state: list[torch.Tensor] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"state.{index}": tensor for index, tensor in enumerate(self.state or ())}

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        self.state = list(tensors.values()) or None


def states_of(cache: Any) -> Iterator[tuple[LayerKind, Any]]:
    """Every state of transformers' own cache (or StateList), in order: its kind, and the layer or Overwritten.

    Raises:
        UnsupportedInput: a layer of a class that nothing here knows; the message names it.
    """
    if isinstance(cache, StateList):
        yield LayerKind.KEYFRAME, cache
        return
    for index, layer in enumerate(cache.layers):
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
        else:
            raise UnsupportedInput(f"cache layer {index} is a {kind.__name__}, which this version cannot store")
    entries = getattr(cache, "linear_cache", [])
    for index, entry in enumerate(entries):
        if isinstance(entry, torch.Tensor):
            yield LayerKind.KEYFRAME, ListedState(entries, index)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike in all: values that are the very keys are kept once."""
    return a.shape == b.shape and torch.equal(a, b)


def row_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer of rows by name."""
    found = {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, DynamicIndexedLayer):
        found["indexer_keys"] = layer.indexer_keys
    return found


def layer_specs(cache: Any) -> tuple[LayerSpec, ...]:
    """What a cache that has seen tokens holds, state by state; neighbours that are alike are counted together."""
    specs: list[LayerSpec] = []
    for number, (kind, holder) in enumerate(states_of(cache)):
        window = int(holder.sliding_window) if kind == LayerKind.WINDOW else 0
        tensors = tuple(_tensor_specs(kind, holder))
        if specs and (specs[-1].kind, specs[-1].tensors, specs[-1].window) == (kind, tensors, window):
            last = specs.pop()
            specs.append(LayerSpec(last.index, last.count + 1, kind, tensors, window))
        else:
            specs.append(LayerSpec(number, 1, kind, tensors, window))
    return tuple(specs)


def _tensor_specs(kind: LayerKind, holder: Any) -> Iterator[TensorSpec]:
    if kind == LayerKind.KEYFRAME:
        for name, tensor in holder.tensors().items():
            yield TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape[1:]), 0)
    elif kind != LayerKind.EMPTY:
        for name, tensor in row_tensors(holder).items():
            if name == "values" and same_bits(tensor, holder.keys):
                continue
            if tensor.dim() == 3:  # an indexer has no heads
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
    kind = type(like)
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
        layer = _layer_like(like, state, number)
        made.append(layer)
        if isinstance(layer, RowLayer):
            rows.append(layer)
            number += 1
        if isinstance(layer, LinearAttentionLayer):
            overwritten[number] = LinearState(layer)
            number += 1
        if not isinstance(layer, RowLayer | LinearAttentionLayer):
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
