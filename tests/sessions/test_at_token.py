"""Points at tokens: forking, going on, saying and looking inside a turn; and tokens as text without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tiny import tiny_llama_folder, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models

import kvloom
from kvloom.errors import EngineError, ModelMismatch, RefNotFound
from kvloom.partial import partial
from kvloom.tokens import TextTokenizer, pieces, tokenizer_for
from kvloom_store import schema, spans, trie
from kvloom_store.database import Database
from kvloom_store.turns import Turn


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as opened:
        yield opened


def tokens_of(loom: kvloom.KVLoom, branch: kvloom.Branch) -> list[int]:
    """The token ids of a branch, as the model saw them."""
    path, states = branch._path()
    position = states[path[-1].row].position
    with loom.database.read() as conn:
        return trie.tokens_to(conn, position.node, position.offset)


def ranges(loom: kvloom.KVLoom, branch: kvloom.Branch) -> list[tuple[str, int, int]]:
    """Role, start and end of each turn that has tokens."""
    with loom.database.read() as conn:
        found = spans.of_path(conn, branch._path()[0])
        return [(span.turn.role, span.start, span.end) for span in found]


def counts(database: Database) -> dict[str, int]:
    with database.read() as conn:
        return {
            name: conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in schema.metadata.tables.items()
            if name != "sequence"
        }


def test_forking_at_a_token_writes_a_branch_a_turn_and_its_place_and_no_state(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    main.say("hello", max_tokens=10)
    loom.flush()
    _, start, _ = ranges(loom, main)[-1]
    before = counts(loom.database)
    again = session.fork("again", at=f"main:{start + 4}")
    more = {name: count - before[name] for name, count in counts(loom.database).items() if count != before[name]}
    assert more == {"branch": 1, "turn": 1, "turn_state": 1}
    assert tokens_of(loom, again) == tokens_of(loom, main)[: start + 4]
    assert [turn.role for turn in again.log()] == ["system", "user", "assistant"]
    assert (again.log()[-1].finish_reason, again.log()[-1].tokens, again.log()[-1].cut) == ("cut", 4, True)
    session.fork("and-again", at=f"main:{start + 4}")
    assert counts(loom.database)["turn"] == before["turn"] + 1  # the same cut turn


def test_at_the_end_of_a_turn_nothing_is_cut(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    main.say("hello", max_tokens=5)
    _, start, end = ranges(loom, main)[-1]
    turns_before = len(session.tree())
    assert session.fork("asked", at=f"main:{start}").log()[-1].id == main.log()[1].id
    assert session.fork("whole", at=f"main:{end}").log() == main.log()
    assert session.fork("empty", at="main:0").log() == []
    assert len(session.tree()) == turns_before


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_continuing_from_a_token_keeps_the_path_to_it_and_reuses_its_state(loom: kvloom.KVLoom, kept: int):
    session = loom.session("a", system="be brief")
    main = session.branch()
    whole = main.say("hello", max_tokens=10)
    _, start, _ = ranges(loom, main)[-1]
    again = session.checkout(f"main:{start + kept}")
    rest = again.continue_reply(max_tokens=10 - kept).reply
    assert rest.tokens.reused >= start + kept - 1
    assert rest.tokens.replayed == 0
    # Greedy, the same tokens follow, each from a pass of one token as before.
    assert tokens_of(loom, again) == tokens_of(loom, main)
    # And to the template, the cut reply and its continuation are the one reply they were.
    from kvloom.branch import merged

    joined, _ = merged(*again._path())
    assert joined[-1] == {"role": "assistant", "content": whole.text}


def test_going_on_from_a_token_is_the_same_with_a_store_opened_anew(loom: kvloom.KVLoom, store_path: Path):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=12)
    main.say("and more", max_tokens=12)
    _, start, _ = ranges(loom, main)[-1]
    first = session.checkout(f"main:{start + 5}").continue_reply(max_tokens=6, temperature=1.0, seed=4).reply
    loom.flush()
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as other:
        second = other.find("a").checkout(f"main:{start + 5}").continue_reply(max_tokens=6, temperature=1.0, seed=4)
        assert second.reply.text == first.text
        assert second.reply.tokens.reused >= start + 4


def test_state_that_was_never_stored_is_replayed_up_to_the_token(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=8, reuse=False)
    _, start, end = ranges(loom, main)[-1]
    again = session.checkout(f"main:{start + 3}")
    rest = again.continue_reply(max_tokens=5).reply
    assert rest.tokens.replayed > 0
    assert tokens_of(loom, again) == tokens_of(loom, main)[:end]


def test_a_continuation_can_be_cut_too_and_a_cut_turn_again(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=4)
    main.continue_reply(max_tokens=8).reply  # noqa: B018
    whole = tokens_of(loom, main)
    once = session.checkout(f"main:{len(whole) - 3}")
    assert once.log()[-1].continues
    twice = session.checkout(f"{once.name}:{len(whole) - 6}")
    assert tokens_of(loom, twice) == whole[:-6]
    twice.continue_reply(max_tokens=6).reply  # noqa: B018
    assert tokens_of(loom, twice) == whole


def test_saying_something_at_a_token_comes_after_the_cut_reply(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    main.say("hello", max_tokens=10)
    _, start, _ = ranges(loom, main)[-1]
    other = session.checkout(f"main:{start + 4}")
    reply = other.say("go on", max_tokens=3)
    assert [turn.role for turn in other.log()] == ["system", "user", "assistant", "user", "assistant"]
    assert tokens_of(loom, other)[: start + 4] == tokens_of(loom, main)[: start + 4]
    assert reply.tokens.reused >= start + 3
    text = tiny_tokenizer().decode(tokens_of(loom, other)[start + 4 :])
    assert text.startswith("<|im_end|>\n<|im_start|>user\ngo on<|im_end|>")


def test_a_message_can_be_cut_and_gone_on_from(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    main.say("hello there", max_tokens=4)
    whole = tokens_of(loom, main)
    at = next(n for n in range(len(whole)) if tiny_tokenizer().decode(whole[:n]).endswith("hell"))
    other = session.checkout(f"main:{at}")
    assert [(turn.role, turn.text) for turn in other.log()] == [("system", "be brief"), ("user", "hell")]
    assert other.log()[-1].finish_reason is None
    reply = other.continue_reply(max_tokens=3).reply
    assert reply.tokens.reused >= at - 1
    assert tokens_of(loom, other)[:at] == whole[:at]
    assert other.log()[-1].role == "assistant"
    said = session.checkout(f"main:{at}")
    said.say("and more", max_tokens=2)
    assert "user\nhell<|im_end|>" in tiny_tokenizer().decode(tokens_of(loom, said))


def test_a_message_whose_state_another_session_computed_can_be_cut(loom: kvloom.KVLoom):
    long = " ".join(["the and of to"] * 20)
    loom.session("a").branch().say(long, max_tokens=2)
    session = loom.session("b")
    session.branch().say(long, max_tokens=2)
    other = session.checkout("main:40")
    assert other.continue_reply(max_tokens=2).reply.tokens.reused >= 39
    said = session.checkout("main:50")
    assert said.say("of", max_tokens=2, require_reuse=True).tokens.replayed == 0


def test_a_message_that_was_never_run_can_be_cut(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=3, reuse=False)
    cancel = threading.Event()
    cancel.set()
    main.stream("and more", max_tokens=3, cancel=cancel).reply  # noqa: B018
    _, start, end = ranges(loom, main)[-1]
    assert main.log()[-1].role == "user"
    whole = tokens_of(loom, main)
    other = session.checkout(f"main:{start + 7}")
    reply = other.continue_reply(max_tokens=2).reply
    assert reply.tokens.computed == 8  # with the token of the reply before that was pending
    assert tokens_of(loom, other)[:-2] == whole[: start + 7]
    assert start + 7 < end


def test_regenerating_a_cut_reply_replies_to_its_message_again(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    first = main.say("hello", max_tokens=6)
    _, start, _ = ranges(loom, main)[-1]
    other = session.checkout(f"main:{start + 2}")
    assert other.regenerate(max_tokens=6).reply.text == first.text
    other.undo()
    assert other.log() == []


def test_a_tag_at_a_token_names_the_cut_turn(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=6)
    _, start, _ = ranges(loom, main)[-1]
    session.tag("here", f"main:{start + 2}")
    assert (session.log("here")[-1].tokens, session.log("here")[-1].tags) == (2, ("here",))


def test_a_log_at_a_token_ends_there_and_writes_nothing(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    main.say("hello there", max_tokens=9)
    main.say("and more", max_tokens=9)
    loom.flush()
    before = counts(loom.database)
    full = main.log()
    for role, start, end in ranges(loom, main):
        number = [turn.role for turn in full].index(role)
        for token in range(start + 1, end):
            log = session.log(f"main:{token}")
            turn = next(t for t in full if t.id == log[-1].id)
            assert (log[-1].role, log[-1].tokens, log[-1].cut) == (role, token - start, True)
            assert turn.text.startswith(log[-1].text)
            assert len(log) > number
        assert session.log(f"main:{end}")[-1].cut is False
    assert counts(loom.database) == before
    with pytest.raises(RefNotFound, match="no token"):
        session.log("main:9999")


def turn_saying(role: str, text: str, **more: Any) -> Turn:
    return Turn(1, "ab" * 16, 1, None, role, more.get("continues", False), {"content": text}, None, {}, {}, b"", 0)


def test_a_character_that_is_cut_in_two_is_left_out_and_comes_whole_with_the_rest():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("go 😀 on")["input_ids"]
    first = next(n for n in range(len(tokens)) if tokenizer.decode(tokens[:n]).endswith("\ufffd"))
    for kept in range(first, first + 3):
        said = partial(tokenizer, turn_saying("assistant", "go 😀 on"), tokens, kept, [])
        assert (said.text, said.settings["dropped"]) == ("go ", "\ufffd")
        rest = partial(tokenizer, turn_saying("assistant", "", continues=True), tokens[kept:], 99, tokens[:kept])
        assert said.text + rest.text == "go 😀 on"
        assert rest.settings["reopened"] == "\ufffd"
    message = tokenizer("<|im_start|>user\ngo 😀 on<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    texts = {partial(tokenizer, turn_saying("user", "go 😀 on"), message, n, []).text for n in range(len(message))}
    assert texts == {"", "g", "go", "go ", "go 😀", "go 😀 on"}


@pytest.mark.parametrize("content", ["user", "assistant", "a", " user \n", "im_end"])
def test_a_message_is_found_among_what_the_template_wrote(content: str):
    tokenizer = tiny_tokenizer()
    text = f"<|im_start|>system\na user{'<|im_end|>'}\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text)["input_ids"]
    header = len(tokenizer(text.split(f"\n{content}<|im_end|>")[0] + "\n")["input_ids"])
    assert partial(tokenizer, turn_saying("user", content), tokens, header, []).text == ""
    assert partial(tokenizer, turn_saying("user", content), tokens, len(tokens) - 1, []).text == content


def test_a_message_the_template_rendered_as_something_else_is_told_whole():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("<|im_start|>user\nSOMETHING ELSE<|im_end|>")["input_ids"]
    assert partial(tokenizer, turn_saying("user", "hello"), tokens, 3, []).text == "hello"


def test_a_tokenizer_without_the_model_decodes_as_transformers_does(tmp_path: Path):
    folder = tiny_llama_folder(tmp_path / "m")
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    light = tokenizer_for(str(folder), engine.identity().tokenizer)
    tokenizer = tiny_tokenizer()
    assert light is not None
    assert set(light.all_special_ids) == set(tokenizer.all_special_ids)
    ids = tokenizer("<|im_start|>user\nthe 😀 and more<|im_end|>")["input_ids"]
    for start in range(len(ids)):
        for skip in (True, False):
            expected = tokenizer.decode(ids[start:], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert light.decode(ids[start:], skip_special_tokens=skip) == expected
    assert [light.convert_ids_to_tokens(i) for i in ids] == tokenizer.convert_ids_to_tokens(ids)
    assert "".join(pieces(light, tokenizer("the more")["input_ids"])) == "the more"


def test_pieces_keep_the_space_that_a_decoder_drops_at_the_beginning():
    vocabulary = {"▁the": 0, "▁more": 1, "<unk>": 2}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert pieces(TextTokenizer(backend), [0, 1, 0]) == ["the", " more", " the"]


def spoil(folder: Path, how: str) -> None:
    file = folder / "tokenizer.json"
    if how == "gone":
        file.unlink()
    elif how == "damaged":
        file.write_text("{")
    else:
        file.write_text(file.read_text().replace('"Ġthe"', '"Ġeht"'))


@pytest.mark.parametrize("how", ["gone", "damaged", "another"])
def test_a_tokenizer_that_is_not_the_sessions_is_not_taken(tmp_path: Path, how: str):
    digest = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny").identity().tokenizer
    folder = tiny_llama_folder(tmp_path / "m")
    assert tokenizer_for(str(folder), digest) is not None
    spoil(folder, how)
    assert tokenizer_for(str(folder), digest) is None


def test_a_hub_name_or_a_file_that_was_never_converted_has_no_tokenizer_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name in ("nobody/nothing", str(tmp_path / "m.gguf"), "no such thing"):
        assert tokenizer_for(name, "00") is None
    assert not (tmp_path / "models").exists()


@pytest.fixture
def closed(store_path: Path) -> Callable[[], kvloom.KVLoom]:
    """A store whose session was made with a live model, opened again without one."""
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as loom:
        loom.session("a").branch().say("hello", max_tokens=6)
    return lambda: kvloom.open(store_path)


def test_without_any_tokenizer_a_log_tells_the_whole_text_and_nothing_is_cut(closed: Callable[[], kvloom.KVLoom]):
    with closed() as loom:
        session = loom.find("a")
        whole = session.log()[-1]
        total = sum(turn.tokens for turn in session.log())
        log = session.log(f"main:{total - 2}")
        assert session.tokenizer is None
        assert (log[-1].text, log[-1].tokens, log[-1].cut) == (whole.text, 4, True)
        with pytest.raises(EngineError, match="not here"):
            session.fork("b", f"main:{total - 2}")
        assert session.fork("c", f"main:{total}").log()[-1].id == whole.id
        assert len(session.tree()) == 2


def test_a_store_opened_with_a_model_of_another_tokenizer_does_not_cut(
    closed: Callable[[], kvloom.KVLoom], store_path: Path
):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    engine = kvloom.TransformersEngine(tiny_model("llama"), tokenizer, name="other")
    with kvloom.open(store_path, model=engine) as loom, pytest.raises(ModelMismatch, match="tokenizer"):
        loom.find("a").fork("b", "main:3")
