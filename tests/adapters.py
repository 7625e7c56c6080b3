"""Adapters as PEFT puts them onto a model, without PEFT."""

from __future__ import annotations

from typing import Any

import torch


class LoraLinear(torch.nn.Module):
    """The shape of PEFT's LoRA layer: names, attributes and arithmetic."""

    def __init__(self, base_layer: torch.nn.Module, **seeds: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict()
        self.lora_B = torch.nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active_adapter = [next(iter(seeds))]
        self.disable_adapters = False
        self.merged_adapters: list[str] = []
        for name, seed in seeds.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.lora_A[name] = torch.nn.Linear(base_layer.in_features, 2, bias=False)
                self.lora_B[name] = torch.nn.Linear(2, base_layer.out_features, bias=False)
            self.scaling[name] = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = self.active_adapter[0]
        return self.base_layer(x) + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]


def with_adapters(model: Any, **seeds: int) -> LoraLinear:
    """Put adapters onto a model's first layer, the first of them active."""
    attention = model.model.layers[0].self_attn
    attention.q_proj = LoraLinear(attention.q_proj, **seeds).eval()
    return attention.q_proj
