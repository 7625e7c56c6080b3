"""Attention of several paths over rows they share and rows of their own, each part read once and merged.

The parts are merged by their log-sum-exp, as blocks are in FlashAttention (arXiv 2205.14135) and in cascade inference
(arXiv 2402.05099): softmax over both is exp(l1 - l) * out1 + exp(l2 - l) * out2, with l = log(exp(l1) + exp(l2)).
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from kvloom.errors import UnsupportedInput

NAME = "kvloom_shared"
"""What the attention implementation is called in transformers' registry."""


class Rows(Protocol):
    """What attention is over, besides the keys and values that a layer's ``update`` gave."""

    def shared(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[1, kv_heads, shared, head_dim]`` that all paths see."""
        ...

    def hidden_rows(self, layer: int) -> torch.Tensor:
        """Which of the paths' own rows are not theirs to see: bool ``[paths, 1, 1, own]``."""
        ...


_rows: contextvars.ContextVar[Rows] = contextvars.ContextVar("rows that the paths of a pass share")


@contextmanager
def attending(config: Any, rows: Rows) -> Iterator[None]:
    """Let a model of this config attend over shared rows, for one pass. Put back afterwards."""
    before, token = config._attn_implementation, _rows.set(rows)
    try:
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before
        _rows.reset(token)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: object,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: one query a path, ``[paths, heads, 1, head_dim]``, and the paths' own rows."""
    changed = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if changed:
        raise UnsupportedInput(f"this model's attention has {changed[0]}, which shared rows do not know")
    rows, (paths, heads, _, width) = _rows.get(), query.shape
    kv_heads = key.shape[1]
    scale = scaling if scaling is not None else width**-0.5
    query = query.reshape(paths, kv_heads, heads // kv_heads, width)
    own, own_sum = _plain(query, key, value, scale, rows.hidden_rows(module.layer_idx))
    common = rows.shared(module.layer_idx)
    if not common[0].shape[-2]:  # a window has left them behind
        return own.to(query.dtype).reshape(paths, 1, heads, -1), None
    # All paths' queries are rows of one product with the shared keys, which so are read once.
    together = query.transpose(0, 1).reshape(1, kv_heads, -1, width)
    shared, shared_sum = _over_shared(together, *common, scale)
    shared = shared.reshape(kv_heads, paths, heads // kv_heads, -1).transpose(0, 1)
    shared_sum = shared_sum.reshape(kv_heads, paths, heads // kv_heads).transpose(0, 1)
    weight = torch.sigmoid(shared_sum - own_sum)[..., None]  # exp(l1 - l), with l as above
    merged = weight * shared.float() + (1 - weight) * own
    return merged.to(query.dtype).reshape(paths, 1, heads, -1), None


def _over_shared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask, and the log of the sum of its weights, float32 ``[1, kv_heads, queries]``."""
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = op(query, key, value, scale=scale)
        return out, log_sum
    return _plain(query, key, value, scale, None)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula itself, in float32; rows that are ``hidden`` count for nothing."""
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    log_sum = scores.logsumexp(-1)
    return torch.matmul((scores - log_sum[..., None]).exp(), value.float()), log_sum


AttentionInterface.register(NAME, _attention)
