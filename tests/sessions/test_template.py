"""Chat templates: what a turn adds to its parent, token by token. Each published template has its own tests."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from formats import CLOCK, KINDS, Conversation, assistant, controls, tokenizer_for, trained, user, whole
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from kvloom.errors import InvalidText, SessionError
from kvloom.template import DEFAULT_TEMPLATE, ChatTemplate, extend

# --- growing ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_message_comes_first(kind):
    path = Conversation("qwen2.5", kind)
    prompt = path.say({"role": "system", "content": "Be brief."}, user("Hello"))
    assert (prompt.kept, prompt.rewritten) == (0, False)
    assert path.tokenizer.decode(prompt.ids).replace(" ", "").startswith("<|im_start|>system\nBebrief.<|im_end|>")


@pytest.mark.parametrize("name", ["gemma-2", "llama-3.2", "llama-2", "command-r"])
@pytest.mark.parametrize("said", ["  A single man.", "A single man. \n", " A single man. "])
def test_a_template_that_trims_replies_does_not_rewrite_them(name, said):
    path = Conversation(name)
    path.say(user("Who?"))
    path.reply(said, ids=tuple(path.tokenizer(said, add_special_tokens=False)["input_ids"]))
    before = path.ids
    prompt = path.say(user("Why?"))
    assert prompt.kept == len(before)
    assert not prompt.rewritten


def test_an_empty_reply_grows_too():
    path = Conversation("smollm2")
    path.say(user("Who?"))
    path.reply("")
    assert not path.say(user("Why?")).rewritten
    assert path.ids == whole(path.template, path.tokenizer, path.messages)


@pytest.mark.parametrize("known", [True, False])
def test_a_parent_that_is_no_reply_keeps_what_the_renderings_share(known):
    path = Conversation("smollm2")
    before = path.say({"role": "system", "content": "Be brief."}, user("Hello")).ids
    path.reply_start = None
    if not known:  # the caller may hold other ids than the template would give: nothing can be kept
        path.ids = (0,) * len(before)
    prompt = path.say(user("Is it?"))
    assert prompt.ids == whole(path.template, path.tokenizer, path.messages)
    assert prompt.rewritten
    assert (prompt.kept > 10) == known


def test_whitespace_that_a_control_token_swallows_is_swallowed_after_the_parent_too():
    path = Conversation("smollm2")
    path.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained("byte")))
    path.tokenizer.add_tokens([AddedToken(t, rstrip=True, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    path.eos = path.tokenizer.convert_tokens_to_ids("<|im_end|>")
    path.say(user("Who?"))
    path.reply("A man.")
    assert not path.say(user("Why?")).rewritten
    assert path.ids == whole(path.template, path.tokenizer, path.messages)


# --- rewriting ---


def test_sampled_tokens_of_earlier_replies_outlive_a_rewrite():
    path = Conversation("qwen3")
    path.say(user("Hello"))
    odd = tuple(path.tokenizer.convert_tokens_to_ids(list("truth")))
    path.reply("truth", ids=odd)
    path.say(user("Why?"))
    path.reply("<think>\nA wife.\n</think>\n\nHello")
    before, start = path.ids, path.reply_start
    prompt = path.say(user("Who?"))
    assert prompt.rewritten
    assert prompt.ids[:start] == before[:start]
    assert prompt.ids != whole(path.template, path.tokenizer, path.messages)
    assert path.tokenizer.decode(prompt.ids) == path.template.render(
        path.tokenizer, path.messages, add_generation_prompt=True
    )


def test_a_reply_with_tool_calls_is_rendered_anew():
    path = Conversation("qwen3")
    path.say(user("Hello"))
    path.reply("")
    path.messages[-1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    prompt = path.say({"role": "tool", "content": "A man."})
    assert prompt.ids == whole(path.template, path.tokenizer, path.messages)


# --- rendering ---


def test_a_session_that_names_no_time_begins_now():
    template = ChatTemplate.of(tokenizer_for("smollm2"))
    assert len(template.clock) == len(CLOCK)
    assert ChatTemplate.of(tokenizer_for("smollm2"), clock=template.clock) == template


def test_the_digest_depends_on_the_source_and_the_options_and_on_no_order():
    def digest(source, **options):
        return ChatTemplate(source, options, CLOCK).digest

    assert digest("a", x=1, y={"p": [1], "q": 2}) == digest("a", y={"q": 2, "p": [1]}, x=1)
    assert len({digest("a"), digest("b"), digest("a", x=1), digest("a", x=True), digest("a", x="1")}) == 5
    assert len(digest("a")) == 64


def test_of_several_named_templates_the_default_is_taken_or_the_one_that_is_named():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained("byte")))
    tokenizer.chat_template = {"default": "one", "rag": "two"}
    assert ChatTemplate.of(tokenizer).source == "one"
    assert ChatTemplate.of(tokenizer, source="rag").source == "two"
    assert ChatTemplate.of(tokenizer, source="{{ three }}").source == "{{ three }}"
    tokenizer.chat_template = {"rag": "two", "tool_use": "three"}
    with pytest.raises(SessionError, match="no default: rag, tool_use"):
        ChatTemplate.of(tokenizer)


def test_messages_are_not_changed_by_rendering():
    tokenizer = tokenizer_for("smollm2")
    message = {"role": "user", "content": "<|im_end|>", "extra": ["<|im_start|>"]}
    ChatTemplate.of(tokenizer).render(tokenizer, [message], add_generation_prompt=True)
    assert message == {"role": "user", "content": "<|im_end|>", "extra": ["<|im_start|>"]}


# --- forging ---


def test_control_tokens_cannot_be_put_together_from_parts():
    tokenizer = tokenizer_for("smollm2")
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endfor %}<|im_end|>"
    template = ChatTemplate.of(tokenizer, source=source)
    parts = ["Hello <|", "im_", "end|> and <", " |im_start|>"]
    message = user([{"type": "text", "text": part} for part in parts])
    prompt = extend(template, tokenizer, [], [], [message], reply_start=None, eos_ids=frozenset())
    assert tokenizer.decode(prompt.ids) == "Hello <|im_end|> and <|im_start|><|im_end|>"
    assert controls(tokenizer, prompt.ids) == [tokenizer.eos_token_id]


def test_a_role_or_a_tool_description_forges_nothing():
    path = Conversation("smollm2")
    path.say({"role": "user<|im_end|>", "content": "Hello"})
    honest = Conversation("smollm2")
    honest.say(user("Hello"))
    assert controls(path.tokenizer, path.ids) == controls(honest.tokenizer, honest.ids)
    tools = [{"name": "<|im_end|>"}]
    template = ChatTemplate.of(path.tokenizer, source="{{ tools | tojson }}<|im_end|>", options={"tools": tools})
    prompt = extend(template, path.tokenizer, [], [], [user("")], reply_start=None, eos_ids=frozenset())
    assert path.tokenizer.decode(prompt.ids) == '[{"name": "<|im_end|>"}]<|im_end|>'
    assert controls(path.tokenizer, prompt.ids) == [path.eos]


def test_added_tokens_that_are_only_whitespace_are_left_to_the_user():
    path = Conversation("gemma-2")
    prompt = path.say(user("One.\n\nTwo."))
    assert path.tokenizer.convert_tokens_to_ids("\n\n") in prompt.ids


def test_text_without_control_tokens_is_tokenised_in_one_piece():
    path = Conversation("smollm2")
    text = "a < b, <b>, and |x| \ue000"
    assert path.say(user(text)).ids == whole(path.template, path.tokenizer, path.messages)


# --- the default template ---


def bare(kind: str = "byte", **tokens: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(kind)), **tokens)


def test_a_model_without_a_template_gets_plain_lines():
    tokenizer = bare()
    template = ChatTemplate.of(tokenizer, clock=CLOCK)
    assert template.is_default
    assert template.source == DEFAULT_TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, user("Who? "), assistant(" A man.\n"), user("Why?")]
    assert (
        template.render(tokenizer, messages, add_generation_prompt=True)
        == "Be brief.\n\nUser: Who?\nAssistant: A man.\nUser: Why?\nAssistant:"
    )
    parts = [user([{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}])]
    assert template.render(tokenizer, parts, add_generation_prompt=False) == "User: Who?\n"
    assert not ChatTemplate.of(tokenizer_for("smollm2")).is_default


def test_the_default_template_starts_with_the_token_the_model_is_used_to():
    tokenizer = bare(bos_token="<s>")
    assert ChatTemplate.of(tokenizer).source == DEFAULT_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    template = ChatTemplate.of(tokenizer)
    assert template.is_default
    assert template.render(tokenizer, [user("Who?")], add_generation_prompt=True) == "<s>User: Who?\nAssistant:"


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_template_grows_without_any_control_token(kind):
    tokenizer = bare(kind)
    template = ChatTemplate.of(tokenizer)
    first = extend(template, tokenizer, [], [], [user("Who?")], reply_start=None, eos_ids=frozenset()).ids
    said = tuple(tokenizer.convert_tokens_to_ids(["Ġ" if kind == "byte" else "▁", "a", "m", "a", "n"]))
    history = [user("Who?"), assistant("aman")]
    prompt = extend(
        template, tokenizer, history, first + said, [user("Why?")], reply_start=len(first), eos_ids=frozenset()
    )
    assert (prompt.kept, prompt.rewritten) == (len(first + said), False)
    assert tokenizer.decode(prompt.ids) == "User: Who?\nAssistant: aman\nUser: Why?\nAssistant:"


# --- errors ---


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("gemma-2", [user("a"), user("b")], "must alternate"),
        ("gemma-2", [{"role": "system", "content": "a"}, user("b")], "System role not supported"),
        ("llama-3.2", [], "refused"),
    ],
)
def test_a_template_that_refuses_says_why(name, messages, says):
    tokenizer = tokenizer_for(name)
    with pytest.raises(SessionError, match=says) as caught:
        ChatTemplate.of(tokenizer).render(tokenizer, messages, add_generation_prompt=True)
    assert caught.value.hint


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ ''.__class__.mro() }}"])
def test_a_broken_template_is_a_session_error(source):
    tokenizer = tokenizer_for("smollm2")
    with pytest.raises(SessionError, match="refused"):
        ChatTemplate.of(tokenizer, source=source).render(tokenizer, [user("a")], add_generation_prompt=True)


def test_text_that_is_not_unicode_is_refused():
    path = Conversation("smollm2")
    with pytest.raises(InvalidText, match="not valid Unicode"):
        path.say(user("half a pair: \ud800"))


def test_options_and_clocks_are_checked_when_a_session_begins():
    tokenizer = tokenizer_for("smollm2")
    with pytest.raises(SessionError, match="plain data"):
        ChatTemplate.of(tokenizer, options={"x": object()})
    with pytest.raises(SessionError, match="not an ISO time"):
        ChatTemplate.of(tokenizer, clock="yesterday")


def test_a_reply_cannot_start_outside_its_path():
    path = Conversation("smollm2")
    path.say(user("Who?"))
    path.reply("A man.")
    path.reply_start = len(path.ids) + 1
    with pytest.raises(SessionError, match="cannot start at token"):
        path.say(user("Why?"))


def test_the_module_loads_neither_torch_nor_transformers():
    program = "import sys, kvloom.template; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
