"""Pieces add up to what decoding everything at once gives, never change, and end before stop strings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvloom.errors import SessionError
from kvloom.textstream import TextStream

EMOJI = "😀"


def wrapped(backend: Tokenizer) -> Any:
    backend.add_special_tokens(["<|end|>", "<|tool|>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@functools.cache
def byte_level() -> Any:
    """Every byte, and a few merged tokens, as GPT-2, Llama 3, Qwen and SmolLM2 have them."""
    backend = Tokenizer(models.BPE(vocab=byte_level_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def byte_level_vocabulary() -> dict[str, int]:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spelled(data: str) -> str:
        return "".join(piece for piece, _ in whole.pre_tokenize_str(data))

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    smile = spelled(EMOJI)
    tokens += [spelled(text) for text in ("the", " the", "\n\n", "User", "User:", "a\ufffd", "日本")]
    tokens += [smile[:2], smile[2:], smile[1:3], spelled("x") + smile[:1], smile[3:] + spelled("y"), smile]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


@functools.cache
def sentencepiece(kind: str) -> Any:
    """Pieces with "▁" for a space and byte fallback, decoded as Llama 2 does or by Metaspace."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "a", "▁a", "b", "▁the", "he", "é", "▁é"]
    tokens += ["User", ":", "▁x▁y", "\ufffd", "a\ufffd"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    if kind == "llama":
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrapped(backend)


KINDS = ("byte", "llama", "metaspace")


def tokenizer_of(kind: str) -> Any:
    return byte_level() if kind == "byte" else sentencepiece(kind)


def whole(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def bytes_ids(tokenizer: Any, text: str | bytes) -> list[int]:
    """Ids that spell ``text`` one byte at a time."""
    data = text.encode() if isinstance(text, str) else text
    if tokenizer is byte_level():
        table = byte_alphabet()
        return [tokenizer.convert_tokens_to_ids(table[byte]) for byte in data]
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """Byte to character, by GPT-2's rule: printable ones stand for themselves, the others follow 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def streamed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [stream.push(i) for i in ids] + [stream.finish()]


@st.composite
def id_lists(draw: st.DrawFn, kind: str) -> list[int]:
    """Random ids, with runs of whole characters, broken bytes, special and unknown tokens between them."""
    tokenizer = tokenizer_of(kind)
    one = st.integers(0, len(tokenizer) + 2).map(lambda i: [i])
    text = st.text(alphabet="aé日😀\n �", min_size=1, max_size=4).map(lambda s: bytes_ids(tokenizer, s))
    raw = st.binary(min_size=1, max_size=12).map(lambda data: bytes_ids(tokenizer, data))
    special = st.sampled_from(["<|end|>", "<|tool|>", "<think>"]).map(lambda t: [tokenizer.convert_tokens_to_ids(t)])
    pieces = draw(st.lists(st.one_of(one, one, text, raw, special), max_size=12))
    return [i for piece in pieces for i in piece]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_add_up_to_the_whole_decode(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(id_lists(kind))
    skip = data.draw(st.lists(st.sampled_from(ids), max_size=2)) if ids else []
    stream = TextStream(tokenizer, skip_ids=skip)
    pieces = streamed(stream, ids)
    assert "".join(pieces) == whole(tokenizer, [i for i in ids if i not in skip])
    assert stream.text == "".join(pieces)
    assert stream.stopped is None


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_was_emitted_never_changes(kind, data):
    # Whatever comes next, the emitted text is a prefix of it: push is "certain" for every continuation.
    tokenizer = tokenizer_of(kind)
    first, second = data.draw(id_lists(kind)), data.draw(id_lists(kind))
    stream = TextStream(tokenizer)
    for i in first:
        stream.push(i)
    assert whole(tokenizer, first + second).startswith(stream.text)
    assert whole(tokenizer, first).startswith(stream.text)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_continued_reply_joins(kind, data):
    tokenizer = tokenizer_of(kind)
    first, second = data.draw(id_lists(kind)), data.draw(id_lists(kind))
    earlier = TextStream(tokenizer)
    streamed(earlier, first)
    stream = TextStream(tokenizer, before=first)
    streamed(stream, second)
    assert earlier.text.endswith(stream.reopened)
    assert earlier.text.removesuffix(stream.reopened) + stream.text == whole(tokenizer, first + second)


@given(data=st.data())
def test_the_last_16_tokens_are_enough_to_continue(data):
    tokenizer = byte_level()
    first, second = data.draw(id_lists("byte")), data.draw(id_lists("byte"))
    known = [i for i in first if whole(tokenizer, [i])]  # the promise is about tokens that have text
    stream = TextStream(tokenizer, before=known[-16:])
    streamed(stream, second)
    assert whole(tokenizer, first).removesuffix(stream.reopened) + stream.text == whole(tokenizer, first + second)


def expected_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str | None, int]:
    """By the definition: the first token after which the text contains a stop; the earliest, then longest, wins."""
    for count in range(1, len(ids) + 1):
        text = whole(tokenizer, ids[:count])
        found = [(text.find(s), -len(s), s) for s in stop if s in text]
        if found:
            place, _, which = min(found)
            return text[:place], which, count
    return whole(tokenizer, ids), None, len(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_stops_by_their_definition(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(id_lists(kind))
    stop = data.draw(st.lists(st.text(alphabet="aé😀\n U", min_size=1, max_size=3), min_size=1, max_size=3))
    text, which, count = expected_stop(tokenizer, ids, stop)
    stream = TextStream(tokenizer, stop=stop)
    used = 0
    for i in ids:
        used += 1
        stream.push(i)
        if stream.stopped is not None:
            break
    stream.finish()
    assert (stream.text, stream.stopped, used) == (text, which, count)


@pytest.mark.parametrize("kind", KINDS)
def test_an_emoji_over_four_tokens(kind):
    tokenizer = tokenizer_of(kind)
    ids = [*bytes_ids(tokenizer, EMOJI), tokenizer.convert_tokens_to_ids("a")]
    pieces = streamed(TextStream(tokenizer), ids)
    if kind == "byte":
        assert pieces == ["", "", "", EMOJI, "a", ""]
    else:  # one more byte that is wrong would turn all of the run into replacement characters
        assert pieces == ["", "", "", "", EMOJI + "a", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_never_become_a_character(kind):
    tokenizer = tokenizer_of(kind)
    stream = TextStream(tokenizer)
    ids = bytes_ids(tokenizer, EMOJI)[:3]
    assert [stream.push(i) for i in ids] == ["", "", ""]
    assert stream.finish() == whole(tokenizer, ids)
    assert set(stream.text) == {"\ufffd"}
    assert stream.finish() == ""


def test_a_leading_space_is_kept_inside_a_reply():
    tokenizer = sentencepiece("llama")
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert streamed(TextStream(tokenizer), [the, the]) == ["the", " the", ""]
    assert streamed(TextStream(tokenizer, before=[the]), [the]) == [" the", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_of_two_tokens(kind):
    tokenizer = tokenizer_of(kind)
    newline = bytes_ids(tokenizer, "\n")
    ids = [tokenizer.convert_tokens_to_ids("a"), *newline, tokenizer.convert_tokens_to_ids("User")]
    stream = TextStream(tokenizer, stop=["\nUser"])
    assert [stream.push(i) for i in ids] == ["a", "", ""]
    assert stream.stopped == "\nUser"
    assert stream.push(ids[0]) == ""
    assert stream.finish() == ""
    assert stream.text == "a"


def test_a_newline_stops_at_once_where_it_is_a_byte_token():
    tokenizer = sentencepiece("llama")
    stream = TextStream(tokenizer, stop=["\n"])
    stream.push(tokenizer.convert_tokens_to_ids("a"))
    stream.push(bytes_ids(tokenizer, "\n")[0])
    assert (stream.text, stream.stopped) == ("a", "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_stop_that_is_none_is_released(kind):
    tokenizer = tokenizer_of(kind)
    a, b = (tokenizer.convert_tokens_to_ids(t) for t in "ab")
    stream = TextStream(tokenizer, stop=["aab"])
    # "aa" could begin it, then the first "a" of "aaa" can't, then "aa" again.
    assert [stream.push(i) for i in (a, a, a)] == ["", "", "a"]
    assert stream.push(b) == ""
    assert (stream.text, stream.stopped) == ("a", "aab")
    stream = TextStream(tokenizer, stop=["aab"])
    assert [stream.push(i) for i in (a, b, a)] == ["", "ab", ""]
    assert stream.finish() == "a"


def test_of_two_stops_in_one_token_the_earlier_then_the_longer_wins():
    tokenizer = byte_level()
    token = tokenizer.convert_tokens_to_ids("User:")
    for stop, which, text in ((["er", "se"], "se", "U"), (["se", "ser", "s"], "ser", "U"), ([":", "Us"], "Us", "")):
        stream = TextStream(tokenizer, stop=stop)
        stream.push(token)
        assert (stream.stopped, stream.text) == (which, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_with_an_emoji_inside(kind):
    tokenizer = tokenizer_of(kind)
    a, b = (tokenizer.convert_tokens_to_ids(t) for t in "ab")
    stop = f"a{EMOJI}b"
    stream = TextStream(tokenizer, stop=[stop])
    assert [stream.push(i) for i in (b, a, *bytes_ids(tokenizer, EMOJI), b)] == ["b", "", "", "", "", "", ""]
    assert stream.stopped == stop
    stream = TextStream(tokenizer, stop=[EMOJI])
    pieces = [stream.push(i) for i in (b, *bytes_ids(tokenizer, EMOJI))]
    assert (pieces, stream.stopped) == (["b", "", "", "", ""], EMOJI)


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_skipped_tokens_have_no_text(kind):
    tokenizer = tokenizer_of(kind)
    a, end, tool, think = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "<|end|>", "<|tool|>", "<think>"))
    assert streamed(TextStream(tokenizer), [end, a, tool, think, end]) == ["", "a", "", "<think>", "", ""]
    assert streamed(TextStream(tokenizer, skip_ids={think}), [think, a]) == ["", "a", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_stopped_goes_on(kind):
    tokenizer = tokenizer_of(kind)
    before = [tokenizer.convert_tokens_to_ids("b"), *bytes_ids(tokenizer, "\n")]
    stream = TextStream(tokenizer, stop=["\n"], before=before)
    stream.push(tokenizer.convert_tokens_to_ids("a"))
    assert stream.stopped is None
    assert stream.text == stream.reopened + "a"
    stream.push(bytes_ids(tokenizer, "\n")[0])
    assert stream.stopped == "\n"


def test_continuing_inside_an_emoji():
    tokenizer = byte_level()
    ids = bytes_ids(tokenizer, "é" + EMOJI)
    stream = TextStream(tokenizer, before=ids[:4])
    assert stream.reopened == "\ufffd"
    assert streamed(stream, ids[4:]) == ["", EMOJI, ""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [b"\xff", b"\xf0\x9f", b"\xe2\x82\xe2"])
def test_work_per_token_stays_bounded(kind, broken, monkeypatch):
    tokenizer = tokenizer_of(kind)
    ids = bytes_ids(tokenizer, broken * 200) + [tokenizer.convert_tokens_to_ids("a")] * 50
    longest = []
    stream = TextStream(tokenizer)
    decode = stream._decode
    monkeypatch.setattr(stream, "_decode", lambda window: longest.append(len(window)) or decode(window))
    streamed(stream, ids)
    assert stream.text == whole(tokenizer, ids)
    if kind == "byte":
        assert max(longest) <= 16
    else:  # the run is decoded once, when it ends, and not for each of its bytes
        assert sum(size > 16 for size in longest) == 1


def test_misuse_is_refused():
    tokenizer = byte_level()
    with pytest.raises(SessionError, match="stop"):
        TextStream(tokenizer, stop="abc")
    with pytest.raises(SessionError, match="stop"):
        TextStream(tokenizer, stop=["a", ""])
    stream = TextStream(tokenizer)
    stream.finish()
    with pytest.raises(SessionError, match="finished"):
        stream.push(1)
