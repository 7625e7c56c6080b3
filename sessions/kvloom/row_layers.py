"""Cache layers of rows, over a ``LiveState``'s buffers: to transformers each is a layer of the kind it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from kvloom.errors import EngineError, UnsupportedInput

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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike in all: values that are the very keys are kept once."""
    return a is b or (a.shape == b.shape and torch.equal(a, b))
