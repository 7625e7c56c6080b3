"""Rotary embeddings whose frequencies depend on the length: put back before each pass.

Such a module keeps the frequencies of the longest text it has seen, so that running one branch would change another
one's logits. Put back to what the model was loaded with, it computes for each pass what it would compute for a path
that is alone in a fresh process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Parts of the names of rope types that change their frequencies with the length."""


class LengthDependentRope:
    """The rotary embeddings of a model that change with the length; nothing for most models."""

    def __init__(self, model: nn.Module) -> None:
        self._found = [(module, prefix) for module in model.modules() for prefix in _prefixes(module)]

    def reset(self) -> None:
        """Let every such module be as it was when the model was loaded."""
        for module, prefix in self._found:
            original: torch.Tensor = getattr(module, f"{prefix}original_inv_freq")
            current: torch.Tensor = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device).clone(), persistent=False)
            name = f"{prefix}max_seq_len_cached"
            if hasattr(module, name) or prefix:
                setattr(module, name, module.original_max_seq_len)


def _prefixes(module: nn.Module) -> list[str]:
    """The prefix of each length-dependent kind of rope in a module: "" or the layer type's name."""
    kind: Any = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return [""] if _depends(kind) and hasattr(module, "original_inv_freq") else []
    if isinstance(kind, dict):
        return [f"{name}_" for name, value in kind.items() if isinstance(value, str) and _depends(value)]
    return []


def _depends(kind: str) -> bool:
    return any(part in kind for part in LENGTH_DEPENDENT)
