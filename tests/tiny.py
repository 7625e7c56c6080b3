"""Small models and a small tokenizer, made on the spot: the same bits in every process, for the same arguments.

Nothing here knows kvloom: the referee (``reference/replay.py``) builds its models with this module, too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny_configs
import torch
import transformers
from tiny_configs import CONFIGS, TYPES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words, and with them all their beginnings, become tokens; everything else is spelled in bytes.
_WORDS = """the and of to in is that it was for with his her had you not be as at on have him she which but said they
this from all would one there their were been some what when who will more"""
_WHOLE = ("user", "assistant", "system")

KINDS = tuple(CONFIGS)
"""Every kind ``tiny_model`` builds."""

FULL_ATTENTION = tuple(tiny_configs.FULL_ATTENTION)
"""Those that have full attention, and nothing else, in every layer."""

OTHERS = tuple(tiny_configs.OTHERS)
"""Those that keep state inside their modules, or in cache layers of their own."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def tiny_model(kind: str, dtype: str | torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model with random weights that depend on ``kind`` and ``seed``; ``config`` overrides its settings.

    The row of the output head for the end-of-turn token is set so low that only a tampered model ends a reply.
    """
    tokenizer = tiny_tokenizer()
    settings = {
        **CONFIGS.get(kind, {}),
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **config,
    }
    made = transformers.AutoConfig.for_model(TYPES.get(kind, kind), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(made)
        head = model.get_output_embeddings()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Biases and norms begin as zeros and ones: with those a swap of two would go unseen.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                if name.endswith("e_score_correction_bias"):
                    parameter.zero_()
            if not made.tie_word_embeddings:
                head.weight[tokenizer.eos_token_id] = 0.0
    return model.to(_dtype(dtype)).eval()


@functools.cache
def _tokenizer_json() -> str:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    merges: list[tuple[str, str]] = []
    for word in [*("Ġ" + word for word in _WORDS.split()), *_WHOLE]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (IM_START, IM_END)])
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of fewer than 512 tokens with ChatML control tokens and template; ``<|im_end|>`` ends a turn."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token=IM_END,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama_folder(path: Path, dtype: str | torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> Path:
    """Save a tiny Llama with its tokenizer as ``save_pretrained`` does, for the command line; the folder."""
    tiny_model("llama", dtype, seed=seed, **config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
