"""The settings of the tiny models: one small configuration for each kind of state that transformers keeps.

Every kind of layer a model has occurs twice at least, so that two of them can be confused; windows are of 16 tokens,
so that a short conversation leaves them behind.
"""

from __future__ import annotations

from typing import Any

WINDOW = 16
"""Tokens of every sliding window, and of Llama 4's chunks."""

SHORT = 64
"""Tokens that the models with a stretched rope are said to have been trained with."""

_SHAPE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 4096}
_FOUR: dict[str, Any] = {**_SHAPE, "num_hidden_layers": 4}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_DENSE: dict[str, Any] = {**_SHAPE, **_HEADS, "intermediate_size": 128}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
_BLOCKS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_THREE_TO_ONE = [*["linear_attention"] * 2, "full_attention"] * 2


def _stretched(rope: str, factor: float, **parameters: Any) -> dict[str, Any]:
    rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": factor, **parameters}
    return {**_DENSE, "head_dim": 16, "rope_parameters": rope_parameters}


FULL_ATTENTION: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "mistral": {**_DENSE, "sliding_window": None},
    "qwen2": _DENSE,
    "qwen3": {**_DENSE, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096},
    "phi": {**_SHAPE, "num_attention_heads": 4, "intermediate_size": 128, "partial_rotary_factor": 0.5},
    "deepseek_v3": {
        **_SHAPE,
        **_MLA,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}

ROPES: dict[str, dict[str, Any]] = {
    # The length a dynamic rope was trained with is max_position_embeddings; there is no other name for it.
    "llama_dynamic": {**_stretched("dynamic", 32.0), "max_position_embeddings": SHORT},
    "llama_longrope": _stretched(
        "longrope",
        4.0,
        original_max_position_embeddings=SHORT,
        short_factor=[1.0 + 0.05 * n for n in range(8)],
        long_factor=[1.5 + 0.5 * n for n in range(8)],
    ),
    "llama_yarn": _stretched("yarn", 4096 / SHORT, original_max_position_embeddings=SHORT),
}

WINDOWS: dict[str, dict[str, Any]] = {
    "gemma2": {**_FOUR, **_HEADS, "intermediate_size": 128, "head_dim": 16, "query_pre_attn_scalar": 16}
    | {"sliding_window": WINDOW},
    "gemma3_text": {**_DENSE, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16}
    | {"sliding_window": WINDOW, "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2},
    "gemma3n_text": {**_DENSE, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": WINDOW}
    | {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "laurel_rank": 8, "altup_num_inputs": 2}
    | {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]},
    "mistral_window": {**_DENSE, "sliding_window": WINDOW},
    "gpt_oss": {**_FOUR, **_HEADS, **_EXPERTS, "intermediate_size": 64, "head_dim": 16, "sliding_window": WINDOW},
    "llama4_text": {**_FOUR, **_HEADS, "intermediate_size": 64, "intermediate_size_mlp": 128, "head_dim": 16}
    | {"num_local_experts": 2, "moe_layers": [1, 3], "no_rope_layer_interval": 2, "attention_chunk_size": WINDOW}
    | {"floor_scale": 32},
}

INDEXED: dict[str, dict[str, Any]] = {
    "deepseek_v32": {**_SHAPE, **_MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 32, "index_head_dim": 32, "index_n_heads": 2},
}

COMPRESSED: dict[str, dict[str, Any]] = {
    "deepseek_v4": {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 1, "moe_intermediate_size": 32}
    | {"head_dim": 32, "q_lora_rank": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}
    | {"o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "hc_mult": 2}
    | {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}}
    | {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"] * 2}
    | {"num_hidden_layers": 6, "mlp_layer_types": ["moe"] * 6},
}

RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "num_heads": 8, "head_dim": 16}
    | {"n_groups": 2, "chunk_size": 32},
    "falcon_mamba": {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 8},
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 3, "context_length": 4096},
}

HYBRID: dict[str, dict[str, Any]] = {
    "jamba": {**_FOUR, **_HEADS, "intermediate_size": 64, "num_experts": 2, "attn_layer_period": 2}
    | {"attn_layer_offset": 1, "mamba_d_state": 8},
    "bamba": {**_FOUR, **_HEADS, **_MAMBA2, "intermediate_size": 64, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_SHAPE, **_HEADS, **_MAMBA2, "intermediate_size": 64, "mamba_d_ssm": 128, "head_dim": 16},
    "granitemoehybrid": {**_FOUR, **_HEADS, **_MAMBA2, **_EXPERTS, "intermediate_size": 32}
    | {"shared_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"] * 2}
    | {"attention_multiplier": 0.25},
    "zamba": {**_FOUR, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    | {"mamba_d_state": 8, "layers_block_type": _BLOCKS},
    "zamba2": {**_FOUR, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    | {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 32, "layers_block_type": _BLOCKS}
    | {"use_mem_rope": True},
    "nemotron_h": {**_HEADS, "hidden_size": 64, "max_position_embeddings": 4096, "intermediate_size": 64}
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention"] * 2, "head_dim": 16, "ssm_state_size": 16}
    | {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 32},
    "qwen3_next": {**_SHAPE, **_HEADS, "num_hidden_layers": 6, "layer_types": _THREE_TO_ONE, "head_dim": 16}
    | {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    | {"num_experts": 4, "num_experts_per_tok": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "olmo_hybrid": {**_DENSE, "num_hidden_layers": 6, "layer_types": _THREE_TO_ONE, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "kimi_linear": {**_SHAPE, **_MLA, "num_hidden_layers": 6, "layer_types": _THREE_TO_ONE, "q_lora_rank": None}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {**_FOUR, **_HEADS, "intermediate_size": 64, "layer_types": ["conv", "full_attention"] * 2}
    | {"block_auto_adjust_ff_dim": False},
    "minimax": {**_FOUR, **_HEADS, **_EXPERTS, "intermediate_size": 32, "head_dim": 16, "block_size": 32}
    | {"layer_types": ["full_attention", "linear_attention"] * 2},
}

OTHERS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {**_SHAPE, **_HEADS, "num_hidden_layers": 6, "intermediate_size": 128, "lru_width": 64}
    | {"attention_window_size": WINDOW},
}

CONFIGS = FULL_ATTENTION | ROPES | WINDOWS | INDEXED | COMPRESSED | RECURRENT | HYBRID | OTHERS

TYPES = {"mistral_window": "mistral", **dict.fromkeys(ROPES, "llama")}
"""What transformers calls a kind, where it is not the kind's own name."""

RESTARTING = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Mamba-1: a pass of several tokens on state that is there already begins anew, silently. One token a pass is right."""
