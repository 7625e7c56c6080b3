"""Small models with random weights, in the shape of real ones, and a tokenizer of bytes: what counting needs.

Bytes read and tokens replayed depend on what layers a model has and how wide its state is, not on what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from kvloom import TransformersEngine

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template of plain ASCII: with the tokenizer below, a character is a token."""

OPENING = len("<user>")
"""Tokens before the text of a first message."""

_SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 16384}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}

WINDOWS: dict[str, Any] = {
    **_SHAPE,
    **_HEADS,
    "num_hidden_layers": 12,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
    "sliding_window": 512,
    "query_pre_attn_scalar": 16,
}
"""Gemma 3 but for its width: a window of 512 tokens, five local layers to a global one."""

HYBRID: dict[str, Any] = {
    **_SHAPE,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [3],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}
"""Bamba: Mamba-2 layers, and full attention in one of four."""

RECURRENT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "state_size": 64,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 1,
    "chunk_size": 64,
}
"""Mamba-2: no rows at all."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": ("gemma3_text", WINDOWS),
    "hybrid": ("bamba", HYBRID),
    "recurrent": ("mamba2", RECURRENT),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and none for the end of a turn: replies are as long as they are asked to be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE
    return made


def random_engine(kind: str, *, seed: int = 0, spacing: int | None = None) -> TransformersEngine:
    """An engine with a model of one of ``KINDS``, in float32."""
    model_type, settings = KINDS[kind]
    return engine_of(model_type, settings, name=f"random {kind}", seed=seed, spacing=spacing)


def engine_of(
    model_type: str, settings: dict[str, Any], *, name: str, seed: int = 0, spacing: int | None = None
) -> TransformersEngine:
    """An engine with a model of transformers' own class and random weights in float32."""
    import torch
    import transformers

    import kvloom

    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(model_type, **{"vocab_size": 256, **ends, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    options = {} if spacing is None else {"keyframe_spacing": spacing}
    return kvloom.TransformersEngine(model.eval(), byte_tokenizer(), name=name, **options)


@contextmanager
def one_thread() -> Iterator[None]:
    """Counting needs no speed, and passes this small are slower with two threads than with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sentences(count: int, seed: int) -> str:
    """So many characters, which are as many tokens: random words, the same for the same seed."""
    import random

    draw = random.Random(seed)
    text = ""
    while len(text) < count:
        text += "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(2, 9))) + " "
    return text[: count - 1] + "." if count else ""
