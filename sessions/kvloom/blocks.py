"""Layers that compress each block of tokens to one row, beside a window (DeepSeek V4's compressed attention).

Such a layer is three states: the window; a row for each whole block; and, overwritten in place, the tokens of the
block that is not whole yet, with what the next block takes from the last one. It is known by the fields it keeps
them in, so a layer of another model that keeps them so is one, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvloom.errors import UnsupportedInput
from kvloom.row_layers import WindowLayer

if TYPE_CHECKING:
    from kvloom.live import LiveState

_BUFFERS = ("buffer_kv", "buffer_gate")
_OVERLAPS = ("overlap_kv", "overlap_gate")
_FIELDS = ("compressed_kv", "entry_count", "compress_rate", *_BUFFERS)


def compresses(layer: Any) -> bool:
    """Whether a cache layer is of this kind: transformers' own, or one of ours."""
    return isinstance(layer, DynamicSlidingWindowLayer) and all(hasattr(layer, field) for field in _FIELDS)


class BlockLayer(WindowLayer):
    """A window, and one row ``[1, blocks, width]`` by name for each whole block, as views of a ``LiveState``'s buffers.

    The rows of the blocks are the state after the window's. It is used as ``block_layer`` makes it.
    """

    def __init__(self, state: LiveState, number: int, like: Any) -> None:
        self.compress_rate = int(like.compress_rate)
        self._names = tuple(like.compressed_kv)
        for field in (*_BUFFERS, *(field for field in _OVERLAPS if hasattr(like, field))):
            setattr(self, field, dict.fromkeys(self._names))
        self.compressed_kv: dict[str, torch.Tensor] = {}
        self.entry_count: dict[str, int] = {}
        super().__init__(state, number)

    def show(self, length: int) -> None:
        super().show(length)
        for name in self._names:
            self._show_blocks(name, length // self.compress_rate)

    def _show_blocks(self, name: str, blocks: int) -> None:
        self.entry_count[name] = blocks
        self.compressed_kv[name] = self._state.tensors[self._number + 1][self._names.index(name)][:, :blocks]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows of a forward pass into the window; its blocks are told of later."""
        blocks = dict(self.entry_count)
        seen = super().update(key_states, value_states)
        for name, count in blocks.items():
            self._show_blocks(name, count)
        return seen

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """Put the rows of blocks that are whole now behind those that are there; all of them."""
        start, end = self.entry_count[name], self.entry_count[name] + compressed.shape[1]
        self._state.tensors[self._number + 1][self._names.index(name)][:, start:end].copy_(compressed)
        self._show_blocks(name, end)
        return self.compressed_kv[name]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the tokens of a block that was whole are not kept."""
        raise UnsupportedInput(
            "a cache that compresses blocks of tokens cannot be cut back",
            hint="look fewer tokens up again instead",
        )

    def reset(self) -> None:
        super().reset()
        BlockTail(self).put({}, 0)


@functools.cache
def block_layer(kind: type) -> type[BlockLayer]:
    """A BlockLayer that is a layer of a model's own class, too: the model's forward calls what it has besides."""
    # Not registered as what transformers makes for this type of layer: that stays the model's own.
    made = type(f"Block{kind.__name__}", (BlockLayer, kind), {"_layer_type": None})
    assert issubclass(made, BlockLayer)
    return made


@dataclass(frozen=True, slots=True)
class BlockRows:
    """The rows of a layer's whole blocks."""

    layer: Any

    @property
    def block(self) -> int:
        """Tokens that a row stands for."""
        return int(self.layer.compress_rate)

    def tensors(self) -> dict[str, torch.Tensor]:
        """``[1, blocks, width]`` by name."""
        return {f"compressed_kv.{name}": tensor for name, tensor in self.layer.compressed_kv.items()}


@dataclass(frozen=True, slots=True)
class BlockTail:
    """The tokens of the block that is not whole yet, ``[1, block, width]`` with zeros behind them, so that every copy
    has one size; and what the next block takes from the last one, zeros before there is any."""

    every_token: ClassVar[bool] = False

    layer: Any

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, buffered in self.layer.buffer_kv.items():
            if buffered is None:  # before the first pass
                continue
            size = (1, self.layer.compress_rate, buffered.shape[-1])
            for field in _BUFFERS:
                found[f"{field}.{name}"] = _padded(getattr(self.layer, field)[name], buffered, size)
            size = (*size[:2], self.layer.compressed_kv[name].shape[-1])
            for field in _OVERLAPS:
                if hasattr(self.layer, field):
                    found[f"{field}.{name}"] = _padded(getattr(self.layer, field)[name], buffered, size)
        return found

    def put(self, tensors: dict[str, torch.Tensor], position: int) -> None:
        held, block = position % self.layer.compress_rate, self.layer.compress_rate
        for name in self.layer.buffer_kv:
            for field in _BUFFERS:
                buffered = tensors.get(f"{field}.{name}")
                getattr(self.layer, field)[name] = None if buffered is None else buffered[:, :held]
            for field in _OVERLAPS:
                if hasattr(self.layer, field):
                    getattr(self.layer, field)[name] = tensors.get(f"{field}.{name}") if position >= block else None


def _padded(tensor: torch.Tensor | None, like: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    padded = like.new_zeros(size)
    if tensor is not None:
        padded[:, : tensor.shape[1]] = tensor
    return padded
