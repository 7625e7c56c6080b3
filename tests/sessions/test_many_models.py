"""One tree read by several models: each computes a path once, and finds its own state again, whoever has spoken."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from transformers import DynamicCache

from kvloom import KVLoom, Reply, TransformersEngine
from kvloom.errors import ModelMismatch, ReuseRequired, SessionError
from kvloom.path import said
from kvloom_store import trie, turns

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND, THIRD = "who was there with them?", "and what of the others?", "is there more?"
HOW = {"max_tokens": 6}


@functools.cache
def engine(name: str) -> TransformersEngine:
    """``a`` and ``b`` are alike but for their weights; ``c`` has another tokenizer, and a template of its own."""
    tokenizer = tiny_tokenizer()
    if name == "c":
        tokenizer.add_tokens([AddedToken("there", special=False)])
        tokenizer.chat_template = tokenizer.chat_template.replace("'\\n'", "': '")
    model = tiny_model("llama", seed="abc".index(name), vocab_size=len(tokenizer))
    return TransformersEngine(model, tokenizer, name=name)


def say(path: Path, name: str, text: str, at: str = "main", **options: object) -> Reply:
    """Say something under a model, as a process of its own does: the store is opened, and closed."""
    with KVLoom(path, model=engine(name)) as loom:
        session = loom.session("talk", system="be brief")
        session.add_model()
        return session.branch(at).say(text, **{**HOW, **options})


def state_under(loom: KVLoom, at: str = "main") -> turns.TurnState:
    """What the store's model made of the last turn of a branch."""
    turn = loom.resolve(loom.find("talk").ref(at)).turn
    assert turn is not None
    with loom.database.read() as conn:
        state = turns.best_state(turns.states_of(conn, [turn]), loom.root)
    assert state is not None
    return state


def plain(loom: KVLoom, state: turns.TurnState) -> DynamicCache:
    """The passes that a state is recorded with, run by plain transformers in a cache of its own."""
    chain, upto = [], state.state_end
    with loom.database.read() as conn:
        at: turns.TurnState | None = state
        while at is not None:
            chain.append((at, upto, trie.tokens_to(conn, at.position.node, at.position.offset)))
            upto, at = min(upto, at.state_start), turns.base_of(conn, at)
    model, cache = loom.engine.model, DynamicCache(config=loom.engine.model.config)
    with torch.inference_mode():
        for each, end_here, ids in reversed(chain):
            for start, end in each.schedule.each():
                if start < end_here:
                    positions = torch.arange(start, end)[None]
                    model(torch.tensor([ids[start:end]]), past_key_values=cache, position_ids=positions, use_cache=True)
            for layer in cache.layers:  # a branch that leaves a path begins inside of what was run there
                if layer.keys is not None:
                    layer.keys, layer.values = layer.keys[:, :, :end_here], layer.values[:, :, :end_here]
    return cache


def assert_exact(path: Path, name: str, at: str = "main") -> None:
    """The stored state of a branch under a model is what plain transformers computes, to the bit."""
    with KVLoom(path, model=engine(name)) as loom:
        state = state_under(loom, at)
        with loom.database.read() as conn:
            ids = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.state_end]
        held, count = loom.lookup(ids)
        assert count >= len(ids) - 1
        for mine, expected in zip(held.layers, plain(loom, state).layers, strict=True):
            assert torch.equal(mine.keys, expected.keys[:, :, :count])
            assert torch.equal(mine.values, expected.values[:, :, :count])
        assert loom.fsck().findings == ()


@pytest.mark.parametrize("other", ["b", "c"])
def test_two_models_speak_in_turn_and_each_comes_back_to_its_own_bits(store_path: Path, other: str) -> None:
    first = say(store_path, "a", FIRST)
    answer = say(store_path, other, SECOND)
    assert answer.tokens.reused == 0  # nothing of another model's state
    assert answer.tokens.computed > first.tokens.computed  # it has read all that was said, and says so
    back = say(store_path, "a", THIRD)
    assert back.tokens.reused >= first.tokens.computed + first.tokens.generated - 1
    with KVLoom(store_path, model=engine("a")) as loom:
        loom.find("talk").fork("other-way", "main~2")
    say(store_path, other, THIRD)
    for name in ("a", other):
        # Nothing of what a model has read is read again, on either branch.
        for at in ("main", "other-way"):
            say(store_path, name, "and?", at)
            again = say(store_path, name, "so?", at, require_reuse=True)
            assert again.tokens.replayed == 0
            assert again.tokens.computed < 40
            assert_exact(store_path, name, at)


def test_what_is_said_is_one_text_for_all_models(store_path: Path) -> None:
    replies = [say(store_path, name, text).text for name, text in zip("abc", (FIRST, SECOND, THIRD), strict=True)]
    with KVLoom(store_path) as loom:
        session = loom.find("talk")
        texts = [turn.text for turn in session.log()]
        assert texts == ["be brief", FIRST, replies[0], SECOND, replies[1], THIRD, replies[2]]
        assert [each["model"] for each in session.models] == ["a", "b", "c"]


def test_a_model_with_the_same_tokenizer_reads_the_very_tokens_that_were_sampled(store_path: Path) -> None:
    say(store_path, "a", FIRST, temperature=1.5, seed=5, max_tokens=20)
    say(store_path, "b", SECOND)
    with KVLoom(store_path, model=engine("b")) as loom, loom.database.read() as conn:
        point = loom.resolve(loom.find("talk").ref("main~2")).turn
        assert point is not None
        made, read = turns.states_of(conn, [point])
        assert made.root != read.root
        assert made.tokens == read.tokens


def test_a_stopped_reply_is_gone_on_with_by_another_model_and_then_read_by_the_first(store_path: Path) -> None:
    stopped = say(store_path, "a", FIRST)
    with KVLoom(store_path, model=engine("c")) as loom:
        session = loom.find("talk")
        session.add_model()
        more = session.branch().continue_reply(max_tokens=5).reply
    assert more.tokens.reused == 0
    again = say(store_path, "a", SECOND)
    with KVLoom(store_path, model=engine("a")) as loom:
        state = state_under(loom)
        with loom.database.read() as conn:
            ids = trie.tokens_to(conn, state.position.node, state.position.offset)
            path = turns.path_to(conn, state.turn)
        assert [turn.text for turn in path][2:4] == [stopped.text, more.text]
        whole = said(path)[2].message["content"]  # one reply of two turns
        assert f"assistant\n{whole}<|im_end|>" in loom.engine.tokenizer.decode(ids)
    assert again.tokens.reused > 0
    assert_exact(store_path, "a")


def test_another_model_is_taken_only_when_it_is_asked_for(store_path: Path) -> None:
    say(store_path, "a", FIRST)
    with KVLoom(store_path, model=engine("c")) as loom:
        with pytest.raises(ModelMismatch) as caught:
            loom.find("talk").branch().say(SECOND)
        assert {"weights", "tokenizer"} <= set(caught.value.fields)
        assert all(field in str(caught.value) for field in caught.value.fields)
        assert loom.find("talk").add_model() == list(caught.value.fields)
        assert loom.find("talk").add_model() == []


def test_the_same_weights_with_another_tokenizer_are_no_second_model(store_path: Path) -> None:
    say(store_path, "a", FIRST)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("zebra", special=False)])
    with (
        KVLoom(store_path, model=TransformersEngine(engine("a").model, tokenizer)) as loom,
        pytest.raises(ModelMismatch, match="tokenizer"),
    ):
        loom.find("talk").add_model()


def test_reuse_that_is_required_is_not_met_by_reading_it_all(store_path: Path) -> None:
    say(store_path, "a", FIRST)
    with pytest.raises(ReuseRequired):
        say(store_path, "b", SECOND, require_reuse=True)
    with KVLoom(store_path) as loom:
        assert len(loom.find("talk").log()) == 3


def test_a_search_is_begun_by_any_model_and_gone_on_with_by_its_own(store_path: Path) -> None:
    say(store_path, "a", FIRST)
    how = {"prompt": SECOND, "name": "x", "step_tokens": 4, "width": 2, "depth": 1}
    with KVLoom(store_path, model=engine("c")) as loom:
        session = loom.find("talk")
        session.add_model()
        assert session.explore(**how).result.best is not None
        assert session.explore("main~1", **{**how, "prompt": None, "name": "y"}).result.best is not None
        assert loom.fsck().findings == ()
    with KVLoom(store_path, model=engine("a")) as loom, pytest.raises(SessionError, match="another model"):
        loom.find("talk").explore(name="x", resume=True)


def test_a_turn_is_edited_under_a_model_that_has_not_read_what_is_before_it(store_path: Path) -> None:
    for text in (FIRST, SECOND):
        say(store_path, "a", text)
    with KVLoom(store_path, model=engine("c")) as loom:
        session = loom.find("talk")
        session.add_model()
        plan = session.edit("main~1", THIRD)
        done = plan.run()
        assert done.tokens.reused == 0
        assert done.tokens.computed == plan.cost.computed
        assert plan.branch.regenerate(**HOW).reply.tokens.generated == HOW["max_tokens"]
        assert [turn.text for turn in session.log(plan.name)][:3] == [turn.text for turn in session.log()][:3]
        assert loom.fsck().findings == ()
