"""Chat formats for the tests: template files, small tokenizers with their control tokens, and a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvloom.template import ChatTemplate, Message, Prompt, extend

FOLDER = Path(__file__).parent / "data" / "templates"
CLOCK = "2025-01-31T23:59:59"
CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want",
    "of a wife. However little known the feelings or views of such a man may be on his first entering a",
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered",
    "the rightful property of some one or other of their daughters. system user assistant model think Hello",
]
# byte: byte-level BPE, as in GPT-2 and most models since. The others put "▁" where a text begins: first only
# there, always also after every control token, prepend likewise in the normalizer (old Llama tokenizers).
KINDS = ["byte", "first", "always", "prepend"]


@dataclass(frozen=True)
class Format:
    """One template file and the vocabulary it was made for."""

    file: str
    start: str  # the token that starts a text
    end: str  # the token with which the model ends a reply
    # Other control tokens: special ones but for <think> and the like, which published vocabularies add as
    # ordinary ones.
    others: tuple[str, ...] = ()
    lead: str = ""  # what the model says before its text, where history has it too

    @property
    def source(self) -> str:
        return (FOLDER / self.file).read_bytes().decode()

    @property
    def controls(self) -> list[str]:
        return [text for text in (self.start, self.end, *self.others) if text.strip()]


def _published(name: str, start: str, end: str, *others: str, lead: str = "") -> dict[str, Format]:
    return {name: Format(f"published/{name}.jinja", start, end, others, lead)}


PUBLISHED = {
    **_published("smollm2", "", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    **_published("qwen2.5", "", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>"),
    **_published("qwen3", "", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_response>"),
    **_published("llama-3.2", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    **_published("gemma-2", "<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>", "\n\n"),
    **_published("mistral-7b-v0.2", "<s>", "</s>"),
    **_published(
        "mistral-nemo",
        "<s>",
        "</s>",
        *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    **_published("phi-3.5", "", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
    **_published(
        "deepseek-r1-distill",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    **_published("granite-3.3", "", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    # A reply ends with the token that begins what follows it.
    **_published(
        "glm-4.5",
        "",
        "<|user|>",
        *("[gMASK]", "<sop>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>"),
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        lead="\n<think></think>\n",
    ),
    **_published(
        "gpt-oss",
        "",
        "<|return|>",
        *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        lead="<|channel|>final<|message|>",
    ),
}
REWRITTEN = {
    "llama-2": Format("llama-2.jinja", "<s>", "</s>", lead=" "),
    "command-r": Format(
        "command-r.jinja",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ),
}
FORMATS = PUBLISHED | REWRITTEN


@cache
def trained(kind: str) -> str:
    """A small tokenizer of that kind as JSON; training is the slow part."""
    if kind == "byte":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE())
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=True)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = ["▁", "\n", *map(chr, range(0x21, 0x7F)), *"｜é"]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer.to_str()


@cache
def tokenizer_for(name: str, kind: str = "byte") -> Any:
    """A tokenizer of that kind with the control tokens and the template of that format."""
    form = FORMATS[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(kind)), bos_token=form.start or None, eos_token=form.end
    )
    for text in form.others:
        ordinary = "think" in text or "tool" in text or not text.strip()
        tokenizer.add_tokens([AddedToken(text, special=not ordinary, normalized=False)], special_tokens=not ordinary)
    tokenizer.chat_template = form.source
    return tokenizer


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def whole(template: ChatTemplate, tokenizer: Any, messages: list[Message]) -> tuple[int, ...]:
    """The tokens of the whole rendering, tokenised in one piece: what growing a path must come to."""
    text = template.render(tokenizer, messages, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def controls(tokenizer: Any, ids: tuple[int, ...]) -> list[int]:
    vocab = {i for text, i in tokenizer.get_added_vocab().items() if text.strip()}
    return [i for i in ids if i in vocab]


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Conversation:
    """A conversation as the caller of `extend` holds it."""

    def __init__(self, name: str, kind: str = "byte", *, options: dict[str, Any] | None = None) -> None:
        self.form = FORMATS[name]
        self.tokenizer = tokenizer_for(name, kind)
        self.template = ChatTemplate.of(self.tokenizer, options=options, clock=CLOCK)
        self.eos = self.tokenizer.eos_token_id
        self.messages: list[Message] = []
        self.ids: tuple[int, ...] = ()
        self.reply_start: int | None = None

    def say(self, *messages: Message) -> Prompt:
        prompt = extend(
            self.template,
            self.tokenizer,
            self.messages,
            self.ids,
            messages,
            reply_start=self.reply_start,
            eos_ids=frozenset({self.eos}),
        )
        assert prompt.kept == common(prompt.ids, self.ids)
        assert prompt.rewritten == (prompt.kept < len(self.ids))
        self.messages += messages
        self.ids = prompt.ids
        return prompt

    def whole(self) -> tuple[int, ...]:
        return whole(self.template, self.tokenizer, self.messages)

    def reply(
        self, text: str, *, ended: bool = True, lead: str | None = None, ids: tuple[int, ...] | None = None
    ) -> None:
        """The model says ``text``: the tokens that tokenising it in place gives, unless others are given."""
        if ids is None:
            before = self.template.render(self.tokenizer, self.messages, add_generation_prompt=True)
            said = (self.form.lead if lead is None else lead) + text
            joined = tuple(self.tokenizer(before + said, add_special_tokens=False)["input_ids"])
            plain = tuple(self.tokenizer(before, add_special_tokens=False)["input_ids"])
            assert joined[: len(plain)] == plain
            ids = joined[len(plain) :]
        self.reply_start = len(self.ids)
        self.ids += ids + ((self.eos,) if ended else ())
        self.messages.append(assistant(text))
