"""State that a forward pass overwrites in place, wherever a cache keeps it: read and put back whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from transformers.cache_utils import LinearAttentionLayer

from kvloom.row_layers import RowLayer


class Overwritten(Protocol):
    """State that a forward pass overwrites in place: its tensors are read and put back whole.

    ``every_token``: each token looks at it, so that a pass whose logits do not depend on it has forgotten it.
    """

    every_token: ClassVar[bool]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as they are now (not copies); none before the first pass."""
        ...

    def put(self, tensors: dict[str, torch.Tensor], position: int) -> None:
        """Let these be the tensors after so many tokens; none at all for the state before the first pass."""
        ...


@dataclass(frozen=True, slots=True)
class LinearState:
    """The convolution and recurrent states of a linear-attention layer, several of each, and its flags."""

    every_token: ClassVar[bool] = True

    layer: LinearAttentionLayer

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for index in range(self.layer.number_of_states):
            for name in ("conv_states", "recurrent_states"):
                tensor = getattr(self.layer, name)[index]
                if tensor is not None and self.layer.has_previous_state[index]:
                    found[f"{name}.{index}"] = tensor
        return found

    def put(self, tensors: dict[str, torch.Tensor], position: int) -> None:
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

    every_token: ClassVar[bool] = True

    entries: list[Any]
    index: int

    def tensors(self) -> dict[str, torch.Tensor]:
        entry = self.entries[self.index]
        return {f"linear_cache.{self.index}": entry} if isinstance(entry, torch.Tensor) else {}

    def put(self, tensors: dict[str, torch.Tensor], position: int) -> None:
        self.entries[self.index] = tensors.get(f"linear_cache.{self.index}")


@dataclass(slots=True)
class StateList:
    """The state of a model that takes and returns a list of tensors instead of a cache (RWKV)."""

    every_token: ClassVar[bool] = True

    state: list[torch.Tensor] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"state.{index}": tensor for index, tensor in enumerate(self.state or ())}

    def put(self, tensors: dict[str, torch.Tensor], position: int) -> None:
        self.state = list(tensors.values()) or None
