"""Which models kvloom runs: every other one is refused by name, before it runs.

What counts is what a model's cache layers are, not what the model is called.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvloom.errors import UnsupportedModel
from kvloom.live import TORCH_DTYPES, dtype_name

LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rope types whose frequencies change with the length: running one branch would change another one's logits."""


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose state could not be captured exactly.

    Raises:
        UnsupportedModel: with the layer or setting that is the reason.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(name, "it has an encoder, whose outputs are not tokens")
    if not model.can_generate():
        raise UnsupportedModel(name, "it is not a language model that generates text")
    for rope_type in rope_types(config):
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise UnsupportedModel(
                name, f"its rope type {rope_type!r} depends on the length and is kept outside the cache"
            )
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModel(name, "it brings a cache of its own")
    _check_layers(name, DynamicCache(config=model.config))


def _check_layers(name: str, cache: DynamicCache) -> None:
    if not cache.layers:
        raise UnsupportedModel(name, "transformers does not say what its cache layers are")
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise UnsupportedModel(
                name, f"cache layer {index} is a {type(layer).__name__}; this version stores full-attention layers"
            )


def check_probe(model: PreTrainedModel, cache: DynamicCache, tokens: int) -> None:
    """After a first forward pass: each layer must hold one row per token, of a dtype that can be stored."""
    name = type(model).__name__
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized or layer.keys.shape[-2] != tokens or layer.values.shape[-2] != tokens:
            raise UnsupportedModel(name, f"cache layer {index} does not hold one row per token")
        if dtype_name(layer.keys.dtype) not in TORCH_DTYPES or layer.keys.dtype != layer.values.dtype:
            raise UnsupportedModel(name, f"cache layer {index} holds {layer.keys.dtype} and {layer.values.dtype}")


def rope_types(config: Any) -> set[str]:
    """Every rope type a config names; models with several kinds of layer may name several."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            kind = value.get("rope_type", value.get("type"))
            if isinstance(kind, str):
                found.add(kind)
            for inner in value.values():
                look(inner)

    look(getattr(config, "rope_parameters", None))
    look(getattr(config, "rope_scaling", None))
    return found


def context_limit(config: Any) -> int:
    """Tokens the model was made for; kvloom never runs past it."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 24


def takes(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the model's forward has a parameter of that name."""
    return parameter in inspect.signature(model.forward).parameters


def cpu_capability() -> str:
    """The instruction set torch's CPU kernels use."""
    return torch.backends.cpu.get_cpu_capability()
