"""A tensor's elements as bits and back, and where in a tensor the rows of some positions are."""

from __future__ import annotations

import numpy as np
import torch

from kvloom_proto.records import LayerSpec
from kvloom_store.rows import Rows

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def to_bits(tensor: torch.Tensor) -> Rows:
    """A CPU tensor's elements as unsigned integers, without a copy."""
    array = tensor.view(_BITS[tensor.element_size()]).numpy()
    return array.view(np.dtype(f"u{tensor.element_size()}"))


def from_bits(array: Rows, dtype: str) -> torch.Tensor:
    """The inverse of ``to_bits``: a tensor over the same memory."""
    signed = array if array.itemsize == 1 else array.view(np.dtype(f"i{array.itemsize}"))
    return torch.from_numpy(signed).view(TORCH_DTYPES[dtype])


def rows_of(spec: LayerSpec, tensors: list[torch.Tensor], number: int, start: int, end: int) -> torch.Tensor:
    """A view of the rows that positions [start, end) have in one of a layer's tensors, the batch included."""
    first, count = spec.rows_before(start), spec.rows_between(start, end)
    return tensors[number].narrow(1 + spec.tensors[number].token_axis, first, count)
