"""Which models kvloom runs: every other one is refused by name, before it runs.

What counts is what a model's cache layers are, and where it keeps state, not what the model is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvloom.bits import TORCH_DTYPES
from kvloom.errors import UnsupportedInput, UnsupportedModel
from kvloom.layers import dtype_name, is_cache, row_tensors, states_of
from kvloom_proto.records import STORED_BY_ROW, LayerKind

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""How models name the argument that takes their cache."""


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be one kvloom runs, before it has run at all.

    Raises:
        UnsupportedModel: with the reason.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(name, "it has an encoder, whose outputs are not tokens")
    if not model.can_generate():
        raise UnsupportedModel(name, "it is not a language model that generates text")
    if cache_argument(model) is None:
        raise UnsupportedModel(name, "its forward takes no cache")


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name of the argument of a model's forward that takes its cache."""
    return next((name for name in CACHE_ARGUMENTS if takes(model, name)), None)


def check_kinds(model: PreTrainedModel, cache: Any) -> list[tuple[LayerKind, Any]]:
    """The states of a cache, before it has seen a token or after: all must be of a kind that can be stored.

    Raises:
        UnsupportedModel: with the layer that is the reason.
    """
    name = type(model).__name__
    if hasattr(cache, "layers") and not is_cache(cache):
        raise UnsupportedModel(name, f"it brings a cache of its own, {type(cache).__name__}")
    try:
        return list(states_of(cache))
    except UnsupportedInput as error:
        raise UnsupportedModel(name, str(error)) from error


def check_cache(model: PreTrainedModel, cache: Any, tokens: int) -> None:
    """After a first forward pass: every state must hold what its kind says.

    Raises:
        UnsupportedModel: with the layer that is the reason.
    """
    name = type(model).__name__
    found = check_kinds(model, cache)
    for index, (kind, holder) in enumerate(found):
        tensors: Mapping[str, torch.Tensor] = {}
        if kind == LayerKind.KEYFRAME:
            tensors = holder.tensors()
        elif kind == LayerKind.BLOCKS:
            tensors = holder.tensors()
            if any(tensor.shape[1] != tokens // holder.block for tensor in tensors.values()):
                raise UnsupportedModel(name, f"layer state {index} does not hold one row per {holder.block} tokens")
        elif kind in STORED_BY_ROW:
            if holder.get_seq_length() != tokens:
                raise UnsupportedModel(name, f"layer state {index} does not hold one row per token")
            tensors = row_tensors(holder)
        for tensor_name, tensor in tensors.items():
            empty = not tensor.numel() and kind != LayerKind.BLOCKS  # no block may be whole yet
            if dtype_name(tensor.dtype) not in TORCH_DTYPES or tensor.shape[0] != 1 or empty:
                shape = tuple(tensor.shape)
                raise UnsupportedModel(name, f"layer state {index} holds {tensor_name} {tensor.dtype} {shape}")
    if not any(kind != LayerKind.EMPTY for kind, _ in found):
        raise UnsupportedModel(name, "its cache holds nothing")


def tensors_in_modules(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that modules hold besides their parameters and buffers, by name.

    Compared before and after a pass they show a model that keeps state in its modules, where no cache has it.
    Frequencies of rotary embeddings are not state: ``rope`` puts them back.
    """
    return {
        f"{module_name}.{name}": value
        for module_name, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not name.endswith("inv_freq")
    }


def context_limit(config: Any) -> int:
    """Tokens the model was made for; kvloom never runs past it."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Dynamic scaling is what takes a model beyond its own length; the other types count it in already.
    factor = float(rope.get("factor") or 1) if rope.get("rope_type") == "dynamic" else 1.0
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return int(value * factor)
    return 1 << 24


def takes(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    return parameter in inspect.signature(model.forward).parameters


def cpu_capability() -> str:
    """The instruction set torch's CPU kernels use."""
    return torch.backends.cpu.get_cpu_capability()


def device_name(device: torch.device) -> str:
    """What a device is called in provenance."""
    if device.type == "cuda":  # pragma: no cover - no such device where the tests run
        return f"cuda {torch.cuda.get_device_name(device)}"
    return device.type
