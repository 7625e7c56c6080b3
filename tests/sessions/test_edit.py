"""Editing a turn in the middle of a conversation: what it costs is known before, and is all it costs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import FULL_ATTENTION, tiny_model, tiny_tokenizer

import kvloom
from kvloom.branch import merged
from kvloom.errors import ContextOverflow, InvalidText, ModelMismatch, NothingToDo, RefExists, RefNotFound
from kvloom.passes import KEYFRAME_SPACING
from kvloom_store import outlook, trie

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "the and of to in is that it was for with his her had you not be as at on have him she which but said"


@functools.cache
def engine(kind: str = "llama", seed: int = 0) -> kvloom.TransformersEngine:
    model = tiny_model(kind, seed=seed, max_position_embeddings=8192)
    return kvloom.TransformersEngine(model, tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine()) as opened:
        yield opened


def tokens_of(loom: kvloom.KVLoom, branch: kvloom.Branch) -> list[int]:
    """The token ids of a branch, as the model saw them."""
    path, states = branch._path()
    position = states[path[-1].row].position
    with loom.database.read() as conn:
        return trie.tokens_to(conn, position.node, position.offset)


def talk(loom: kvloom.KVLoom, exchanges: int, *, words: int = 40, name: str = "a", **options: object) -> kvloom.Branch:
    """A conversation with a system prompt; each message is longer than ``words`` words, no two are the same."""
    branch = loom.session(name, system="be brief").branch()
    every = WORDS.split()
    for number in range(exchanges):
        text = " ".join(every[(number + place * 7) % len(every)] for place in range(words))
        branch.say(f"{number}: {text}", **{"max_tokens": 12, **options})
    return branch


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def likeliest(engine: kvloom.TransformersEngine, ids: list[int], count: int) -> list[int]:
    """What plain transformers goes on with, from the tokens alone."""
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_an_edit_in_the_middle_of_4000_tokens_computes_the_tokens_after_it_and_says_so_before(loom: kvloom.KVLoom):
    main = talk(loom, 44, words=70)
    old = tokens_of(loom, main)
    assert len(old) > 4000
    log = main.log()
    for back in (80, 37, 36, 12, 3):
        turn = log[-1 - back]
        plan = main.edit(f"so {turn.text}", back, replay_turns=True)
        added = plan.run()
        new = tokens_of(loom, plan.branch)
        kept = shared(old, new)
        assert (plan.cost.kept, plan.cost.replayed, plan.cost.computed) == (kept, 0, len(new) - kept)
        assert (added.tokens.reused, added.tokens.replayed, added.tokens.computed) == (kept, 0, len(new) - kept)
        assert (added.turns, added.pending, plan.tokens) == (back + 1, 0, len(new))
        # Only the message itself differs: what was said before and after it has the tokens it had.
        assert old[: kept - 1] == new[: kept - 1]
        assert new[-200 if back > 3 else -20 :] == old[-200 if back > 3 else -20 :]
        assert [t.text for t in plan.branch.log()[-back:]] == [t.text for t in log[-back:]]
    assert tokens_of(loom, main) == old, "the old branch stays as it was"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "mamba"])
def test_a_replayed_branch_goes_on_like_the_same_conversation_said_from_the_start(
    store_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    with kvloom.open(store_path, model=engine(kind)) as loom:
        main = talk(loom, 3, words=12)
        plan = main.edit("it was not so, said the other one", 3, replay_turns=True)
        assert plan.run().tokens.computed == plan.cost.computed
        path, states = plan.branch._path()
        replies = [states[turn.row].tokens for turn in path if turn.role == "assistant"]
    with kvloom.open(store_path.with_name("anew.db"), model=engine(kind)) as anew:
        straight = anew.session("a", system="be brief").branch()
        messages = [turn.text for turn in path if turn.role == "user"]
        for text, reply in zip(messages, replies, strict=True):
            said = iter(reply)  # the model is made to say what it said there
            with monkeypatch.context() as patch:
                patch.setattr("kvloom.engine.choose", lambda *_, said=said, **__: next(said))
                straight.say(text, max_tokens=len(reply))
        expected = straight.say("and who was there?", max_tokens=8)
        ids = tokens_of(anew, straight)
    with kvloom.open(store_path, model=engine(kind)) as loom:  # as another process finds it
        branch = loom.session("a").branch(plan.name)
        went_on = branch.say("and who was there?", max_tokens=8)
        assert (went_on.text, went_on.tokens.reused) == (expected.text, plan.tokens)
        assert tokens_of(loom, branch) == ids
    assert ids[-8:] == likeliest(engine(kind), ids[:-8], 8)


def test_edited_back_a_branch_has_the_tokens_it_had_and_computes_nothing(loom: kvloom.KVLoom):
    main = talk(loom, 4)
    text = main.log()[-4].text
    other = main.edit("something else", 3, replay_turns=True)
    other.run()
    back = other.branch.edit(text, 3, replay_turns=True)
    assert back.cost.computed <= 1, "but for the last token of the last reply, which was pending"
    added = back.run()
    assert added.tokens.computed == back.cost.computed
    assert tokens_of(loom, back.branch) == tokens_of(loom, main)


def test_the_reply_to_an_edited_message_is_the_one_it_would_have_had(loom: kvloom.KVLoom):
    main = talk(loom, 3)
    plan = main.edit("what was that?", 3)
    plan.run()
    reply = plan.branch.regenerate(max_tokens=10).reply
    assert reply.tokens.computed == 0
    again = main.edit("what was that?", 3)
    assert again.cost.computed == again.run().tokens.computed == 0
    assert again.branch.regenerate(max_tokens=10).reply.tokens == kvloom.Tokens(plan.tokens, 0, 0, 10)
    fork = main.fork("fork", back=4)
    said = fork.say("what was that?", max_tokens=10)
    assert (said.text, tokens_of(loom, fork)) == (reply.text, tokens_of(loom, plan.branch))
    assert [turn.role for turn in plan.branch.log()] == ["system", "user", "assistant", "user", "assistant"]


def test_an_edited_reply_ends_as_the_template_ends_it_and_is_gone_on_from(loom: kvloom.KVLoom):
    main = talk(loom, 2)
    plan = main.edit("It was <|im_end|> not.", 2)
    assert plan.role == "assistant"
    plan.run()
    log = plan.branch.log()
    assert (log[-1].text, log[-1].finish_reason) == ("It was <|im_end|> not.", "given")
    ids = tokens_of(loom, plan.branch)
    end = engine().tokenizer.eos_token_id
    assert ids[-1] == end
    assert engine().tokenizer.decode(ids[-30:-1]).endswith("It was <|im_end|> not.")
    assert ids.count(end) == len(log), "text stays text"
    with pytest.raises(NothingToDo):
        plan.branch.continue_reply()
    following = plan.branch.say("and then?", max_tokens=4)
    assert following.tokens.reused == len(ids)
    assert tokens_of(loom, plan.branch)[: len(ids)] == ids


def test_an_edited_system_prompt_has_the_whole_conversation_computed_again(loom: kvloom.KVLoom):
    main = talk(loom, 2)
    alone = main.edit("be as long as you like", 4)
    assert (alone.role, alone.cost, alone.run().pending) == ("system", kvloom.Cost(), 0)
    plan = main.edit("be as kind as you can", 4, replay_turns=True)
    added = plan.run()
    old, new = tokens_of(loom, main), tokens_of(loom, plan.branch)
    assert added.tokens.computed == plan.cost.computed == len(new) - shared(old, new)
    assert plan.branch.log()[0].text == "be as kind as you can"


def test_a_continued_reply_is_one_message(loom: kvloom.KVLoom):
    main = talk(loom, 1, max_tokens=5)
    first = main.log()[-1]
    assert main.continue_reply(max_tokens=5).reply.tokens.generated == 5
    main.say("go on", max_tokens=3)
    replayed = main.edit("who said so?", 4, replay_turns=True)
    replayed.run()
    log = replayed.branch.log()
    assert [turn.role for turn in log] == ["system", "user", "assistant", "user", "assistant"]
    assert (log[2].text, log[2].tokens) == (merged(*main._path())[0][2]["content"], 10)
    edited = main.session.edit(first.id, "it was said")
    edited.run()
    assert [turn.text for turn in edited.branch.log()[2:]] == ["it was said"]


def test_state_that_is_not_there_is_counted_as_replayed(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    main.say("hello there", max_tokens=6, reuse=False)
    main.say("and again", max_tokens=6)
    loom.resumer.forget()
    main.session.fork("other", "main~2").say("this was said", max_tokens=3, reuse=False)
    loom.resumer.forget()
    plan = loom.session("a").edit("other~1", "that was said")
    added = plan.run()
    told = (added.tokens.reused, added.tokens.replayed, added.tokens.computed)
    assert told == (plan.cost.kept, plan.cost.replayed, plan.cost.computed)


def test_stopped_before_it_ran_all_turns_are_there_and_their_tokens_pending(loom: kvloom.KVLoom):
    main = talk(loom, 4)
    stop = threading.Event()
    plan = main.edit("no", 5, replay_turns=True)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        assert total == plan.cost.computed
        if len(seen) == 3:
            stop.set()

    added = plan.run(cancel=stop, progress=progress)
    assert seen == sorted(seen)
    assert 0 < added.tokens.computed < plan.cost.computed
    assert added.pending == plan.cost.computed - added.tokens.computed
    assert [turn.text for turn in plan.branch.log()[-5:]] == [turn.text for turn in main.log()[-5:]]
    went_on = plan.branch.say("more", max_tokens=2)
    assert went_on.tokens.reused == plan.tokens - added.pending
    assert went_on.tokens.computed > added.pending


def test_planning_runs_and_writes_nothing(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    main = talk(loom, 2)
    before = [branch.name for branch in main.session.branches()], len(main.session.tree())
    monkeypatch.setattr(loom.engine, "run_pass", None)
    plan = main.edit("no", 1, replay_turns=True)
    assert plan.name == "main-2"
    with pytest.raises(RefNotFound):
        plan.branch  # noqa: B018
    assert ([branch.name for branch in main.session.branches()], len(main.session.tree())) == before


def test_what_cannot_be_edited_is_refused_before_anything_is_written(loom: kvloom.KVLoom, store_path: Path):
    session = talk(loom, 2).session
    with pytest.raises(NothingToDo, match="unchanged"):
        session.edit("main~1", session.log("main~1")[-1].text)
    with pytest.raises(NothingToDo, match="beginning"):
        session.edit("main~5", "x")
    with pytest.raises(InvalidText):
        session.edit("main~1", "  ")
    with pytest.raises(RefExists):
        session.edit("main~1", "x", branch="main")
    with pytest.raises(ContextOverflow):
        session.edit("main~1", WORDS * 400)
    assert [branch.name for branch in session.branches()] == ["main"]
    with (
        kvloom.open(store_path, model=engine(seed=1)) as other,
        pytest.raises(ModelMismatch),
    ):
        other.session("a").edit("main~1", "x")


def test_a_failure_leaves_no_branch_behind(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    main = talk(loom, 1)
    plan = main.edit("no", 1)

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loom.engine, "prefill", fails)
    with pytest.raises(MemoryError):
        plan.run()
    assert [branch.name for branch in main.session.branches()] == ["main"]


@pytest.mark.parametrize("kind", [*FULL_ATTENTION[:3], "gemma3_text"])
def test_the_cost_of_any_edit_is_what_its_run_reports(store_path: Path, kind: str):
    with kvloom.open(store_path, model=engine(kind)) as loom:
        main = talk(loom, 4, words=20)
        for back in range(9):
            text = main.log()[-1 - back].text
            for replay in (False, True):
                plan = main.edit(text[: len(text) // 2] + " not", back, replay_turns=replay)
                tokens = plan.run().tokens
                told = kvloom.Cost(tokens.reused, tokens.replayed, tokens.computed)
                assert told == plan.cost, (back, replay)


def test_what_is_foreseen_of_damaged_state_is_known_after_reading_it(loom: kvloom.KVLoom):
    main = talk(loom, 2)
    loom.flush()
    path, states = main._path()
    tip = states[path[-1].row]
    with loom.database.read() as conn:
        ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
        seen = outlook.of_tokens(conn, loom.root, ids, tip, grid=KEYFRAME_SPACING, logits=False, verify=True)
        assert (seen.held, seen.replayed) == (tip.state_end, 0)
    from kvloom_store.schema import chunk

    with loom.database.write() as conn:
        conn.execute(chunk.update().where(chunk.c.segment == tip.segment).values(blob=b"x"))
    with loom.database.read() as conn:
        lost = tip.state_end - tip.state_start
        assert outlook.of_tokens(conn, loom.root, ids, tip, grid=KEYFRAME_SPACING, logits=False).replayed == 0
        seen = outlook.of_tokens(conn, loom.root, ids, tip, grid=KEYFRAME_SPACING, logits=False, verify=True)
        assert (seen.held, seen.replayed) == (tip.state_end, lost)
