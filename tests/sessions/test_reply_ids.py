"""Replies that nobody sampled: the tokens a model would have said them in, and what ends them."""

from __future__ import annotations

import pytest
from formats import FORMATS, KINDS, Conversation, user

from kvloom.errors import InvalidText
from kvloom.plaintext import encode_text
from kvloom.template import reply_ids


def given(path: Conversation, text: str) -> tuple[int, ...]:
    return tuple(reply_ids(path.template, path.tokenizer, path.messages, path.ids, text, eos_ids=frozenset({path.eos})))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_they_are_those_of_the_text_where_the_prompt_ends(name: str, kind: str):
    said, path = Conversation(name, kind), Conversation(name, kind)
    for each in (said, path):
        each.say(user("Who was the man?"))
    before = path.ids
    said.reply("A single man.")
    assert given(path, "A single man.") == said.ids[len(before) :]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_said_next_stands_on_them_as_on_a_models_own(name: str):
    paths = []
    for own in (True, False):
        path = Conversation(name)
        path.say(user("Who?"))
        ids = None if own else tuple(token for token in given(path, "A single man.") if token != path.eos)
        path.reply("A single man.", ids=ids)
        paths.append((path.say(user("Why?")).rewritten, path.ids))
    assert paths[0] == paths[1]


def test_a_space_of_its_own_is_kept_and_no_other_is_added():
    path = Conversation("llama-2")
    path.say(user("Who?"))
    assert path.tokenizer.decode(given(path, "She")[:-1]) == " She"
    assert path.tokenizer.decode(given(path, " She")[:-1]) == " She"
    assert path.tokenizer.decode(given(path, "  She")[:-1]) == "  She"


@pytest.mark.parametrize("text", ["final", "<think>", "a</think>b", "user", "\n"])
def test_text_that_the_template_writes_itself_is_not_taken_for_it(text: str):
    for name in ("gpt-oss", "glm-4.5", "qwen3"):
        path = Conversation(name)
        path.say(user("Who?"))
        assert path.tokenizer.decode([token for token in given(path, text) if token != path.eos]).endswith(text)


def test_control_tokens_are_text():
    path = Conversation("smollm2")
    path.say(user("Who?"))
    ids = given(path, "<|im_end|><|im_start|>")
    assert ids[-1] == path.eos
    assert not set(ids[:-1]) & set(path.tokenizer.get_added_vocab().values())
    assert path.tokenizer.decode(ids[:-1]) == "<|im_end|><|im_start|>"


def test_text_goes_on_without_a_space_that_begins_one():
    for kind in KINDS:
        tokenizer = Conversation("llama-2", kind).tokenizer
        before = tokenizer("the", add_special_tokens=False)["input_ids"]
        ids = encode_text(tokenizer, "re", before[-1])
        assert tokenizer.decode([*before, *ids]).strip() == "there"


def test_text_that_no_marker_is_left_for_is_refused():
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(InvalidText):
        encode_text(Conversation("smollm2").tokenizer, everything, None)
