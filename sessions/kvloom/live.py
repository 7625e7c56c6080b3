"""State in use: cache layers that grow in place, over memory that can be captured from and restored into.

transformers' own dynamic layer concatenates, which copies the whole cache for every token. Here each layer is a view of
a preallocated buffer; a forward pass writes its new rows behind the old ones, where they stay until they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom.errors import UnsupportedInput
from kvloom_proto.records import LayerKind, LayerSpec, TensorSpec, expand
from kvloom_store.rows import RowBuffer, Rows, RowSource
from kvloom_store.writer import Handle

CAPACITY_STEP = 1024
"""Buffers hold a multiple of this many tokens."""

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def to_bits(tensor: torch.Tensor) -> Rows:
    """A CPU tensor's elements as unsigned integers, without a copy."""
    array = tensor.view(_BITS[tensor.element_size()]).numpy()
    return array.view(np.dtype(f"u{tensor.element_size()}"))


def from_bits(array: Rows, dtype: str) -> torch.Tensor:
    """The inverse of ``to_bits``: a tensor over the same memory."""
    signed = array if array.itemsize == 1 else array.view(np.dtype(f"i{array.itemsize}"))
    return torch.from_numpy(signed).view(TORCH_DTYPES[dtype])


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer, ``[1, kv_heads, tokens, head_dim]``, as views of a ``LiveState``'s buffers.

    It is a DynamicLayer to everybody else, so ``model.generate`` takes a cache of these as it is.
    """

    def __init__(self, state: LiveState, index: int) -> None:
        super().__init__()
        self._state = state
        self._index = index
        self.length = 0
        spec = state.specs[index].tensors[0]
        self.dtype, self.device = TORCH_DTYPES[spec.dtype], state.device
        self.is_initialized = True
        self.show(0)

    def show(self, length: int) -> None:
        """Let the layer end after ``length`` tokens."""
        self.length = length
        keys, values = self._state.tensors[self._index]
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows of a forward pass behind those that are there; all rows, old and new."""
        if key_states.shape[0] != 1:
            raise UnsupportedInput("a kvloom cache holds one sequence, not a batch")
        start, end = self.length, self.length + key_states.shape[-2]
        self._state.reserve(end)
        keys, values = self._state.tensors[self._index]
        keys[:, :, start:end].copy_(key_states)
        values[:, :, start:end].copy_(value_states)
        self.show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative count, as transformers passes it."""
        self.show(max(0, self.length - abs(tokens_to_remove)))

    def reset(self) -> None:
        """Forget everything."""
        self.show(0)


@dataclass(frozen=True, slots=True)
class Link:
    """Rows [start, end) of the live state belong to this stored, or about to be stored, segment."""

    handle: Handle
    start: int
    end: int


@dataclass(eq=False)
class _DeviceRows:
    """Rows of tensors that are not in the machine's own memory, fetched as they are asked for."""

    tensors: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        return to_bits(self.tensors[layer][tensor][0, :, start:end].contiguous().cpu())

    def block(self, layer: int, layers: int, start: int, end: int) -> Rows | None:
        return None


class LiveState:
    """The attention state of one path while it is being extended.

    ``chain`` says which segment each row belongs to; rows behind its end are not captured yet. ``hidden``
    is the final hidden state ``[1, 1, hidden_size]`` of the last position, from which the next token is chosen.
    """

    def __init__(
        self, layers: tuple[LayerSpec, ...], capacity: int, device: torch.device, buffer: RowBuffer | None = None
    ) -> None:
        """Room for ``capacity`` tokens; in ``buffer``, if there is one already (on the CPU)."""
        self.layers = layers
        self.specs = expand(layers)
        self.device = device
        self.capacity = 0
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.source: RowSource
        if buffer is not None:
            self._use(buffer)
        else:
            self._allocate(capacity)
        self._row_layers = [RowLayer(self, index) for index in range(len(self.specs))]
        self.cache = DynamicCache()
        self.cache.layers = self._row_layers
        self.cache.layer_class_to_replicate = None
        self.chain: list[Link] = []
        self.hidden: torch.Tensor | None = None

    def _allocate(self, capacity: int) -> None:
        self.capacity = -(-max(capacity, 1) // CAPACITY_STEP) * CAPACITY_STEP
        if self.device.type == "cpu":
            self._use(RowBuffer(self.layers, self.capacity))
        else:
            self.tensors = [(self._empty(s.tensors[0]), self._empty(s.tensors[1])) for s in self.specs]
            self.source = _DeviceRows(self.tensors)

    def _use(self, buffer: RowBuffer) -> None:
        self.capacity = buffer.capacity
        self.tensors = [
            (self._tensor(arrays[0], spec.tensors[0]), self._tensor(arrays[1], spec.tensors[1]))
            for arrays, spec in zip(buffer.tensors, self.specs, strict=True)
        ]
        self.source = buffer

    @staticmethod
    def _tensor(array: Rows, spec: TensorSpec) -> torch.Tensor:
        return from_bits(array, spec.dtype)[None]

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        shape = (1, *spec.shape[: spec.token_axis], self.capacity, *spec.shape[spec.token_axis :])
        return torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=self.device)

    @property
    def length(self) -> int:
        """Tokens held: those of the layer that has fewest, so that a pass that was cut short counts for nothing."""
        return min(layer.length for layer in self._row_layers)

    @property
    def captured(self) -> int:
        """Tokens whose rows belong to a segment."""
        return self.chain[-1].end if self.chain else 0

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens; what is held is copied if the buffers must grow."""
        if tokens <= self.capacity:
            return
        old, held = self.tensors, max(layer.length for layer in self._row_layers)
        self._allocate(max(tokens, self.capacity + self.capacity // 2))
        for (new_keys, new_values), (keys, values) in zip(self.tensors, old, strict=True):
            new_keys[:, :, :held].copy_(keys[:, :, :held])
            new_values[:, :, :held].copy_(values[:, :, :held])
        for layer in self._row_layers:
            layer.show(layer.length)

    def truncate(self, tokens: int) -> None:
        """Forget everything behind so many tokens. Rows that wait to be stored must not be among them."""
        for layer in self._row_layers:
            layer.show(min(layer.length, tokens))
        self.chain = [Link(k.handle, k.start, min(k.end, tokens)) for k in self.chain if k.start < tokens]
        self.hidden = None

    def take(self, rows: RowBuffer, start: int, end: int) -> None:
        """Copy rows [start, end) that were loaded into another buffer (needed where the device is not the CPU)."""
        for index, spec in enumerate(self.specs):
            for number, tensor in enumerate(spec.tensors):
                loaded = from_bits(np.ascontiguousarray(rows.rows(index, number, start, end)), tensor.dtype)
                self.tensors[index][number][0, :, start:end].copy_(loaded)

    def show(self, tokens: int) -> None:
        """Let every layer end after so many tokens, whose rows have been put in place."""
        for layer in self._row_layers:
            layer.show(tokens)


def layer_specs(cache: DynamicCache) -> tuple[LayerSpec, ...]:
    """What a cache that has seen a token holds, layer by layer; layers that are alike are counted together."""
    specs: list[LayerSpec] = []
    for index, layer in enumerate(cache.layers):
        tensors = tuple(
            TensorSpec(name, dtype_name(tensor.dtype), (tensor.shape[1], tensor.shape[3]), 1)
            for name, tensor in (("keys", layer.keys), ("values", layer.values))
        )
        if specs and specs[-1].tensors == tensors:
            last = specs.pop()
            specs.append(LayerSpec(last.index, last.count + 1, LayerKind.ROWS, tensors))
        else:
            specs.append(LayerSpec(index, 1, LayerKind.ROWS, tensors))
    return tuple(specs)
