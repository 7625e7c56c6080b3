"""What a conversation does, as its user sees it: say, fork, regenerate, continue, undo, remove."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import InvalidText, NothingToDo, RefExists, RefNotFound, ReuseRequired, SessionError
from kvloom_store import trie
from kvloom_store.stats import stats


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


def test_a_reply_tells_where_its_tokens_came_from(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    first = main.say("hello there", max_tokens=5)
    assert (first.tokens.reused, first.tokens.replayed, first.tokens.generated) == (0, 0, 5)
    assert first.tokens.computed > 0
    second = main.say("and again", max_tokens=5)
    # All that was run before is reused; the last token of the first reply was still pending.
    assert second.tokens.reused == first.tokens.computed + 4
    assert second.finish_reason == "length"
    assert second.seconds.first_token is not None
    assert second.to_json()["tokens"]["generated"] == 5


def test_streaming_gives_the_text_of_the_reply_in_pieces(loom: kvloom.KVLoom):
    run = loom.session("a").branch().stream("hello", max_tokens=20)
    assert "".join(run) == run.reply.text


def test_forking_writes_one_row_and_no_state(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello", max_tokens=3)
    loom.flush()
    before = stats(loom.database)
    fork = session.fork("other", "main~1")
    after = stats(loom.database)
    assert after["branches"] == before["branches"] + 1
    assert {k: v for k, v in after.items() if k not in ("branches", "bytes")} == {
        k: v for k, v in before.items() if k not in ("branches", "bytes")
    }
    assert [turn.role for turn in fork.log()] == ["user"]


def test_a_second_say_on_another_branch_costs_only_the_tokens_that_differ(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    long = " ".join(["the and of to"] * 60)
    other = main.fork("other")
    first = main.say(f"{long} one", max_tokens=2)
    second = other.say(f"{long} two", max_tokens=2)
    assert second.tokens.reused > 200
    assert second.tokens.computed < 30
    assert first.tokens.computed - second.tokens.reused < 30


def test_a_new_session_reuses_what_another_one_began_with(loom: kvloom.KVLoom):
    long = " ".join(["the and of to"] * 60)
    loom.session("a").branch().say(long, max_tokens=2)
    reply = loom.session("b").branch().say(long, max_tokens=2)
    assert reply.tokens.computed == 0
    assert reply.tokens.reused > 200


def test_regenerating_keeps_the_old_reply_in_the_tree(loom: kvloom.KVLoom):
    session = loom.session("a")
    main = session.branch()
    first = main.say("hello", max_tokens=6)
    second = main.regenerate(temperature=1.5, seed=3, max_tokens=6).reply
    texts = {turn.id: turn for turn in session.tree()}
    assert texts[first.turn].parent == texts[second.turn].parent
    assert [turn.id for turn in main.log()][-1] == second.turn
    again = main.regenerate(temperature=1.5, seed=3, max_tokens=6).reply
    assert again.text == second.text


def test_a_stopped_reply_is_taken_up_where_it_stopped(loom: kvloom.KVLoom):
    session = loom.session("a")
    whole = session.branch().say("hello", max_tokens=20, temperature=1.0, seed=5)
    other = loom.session("b").branch()
    cancel = threading.Event()
    run = other.stream("hello", max_tokens=20, temperature=1.0, seed=5, cancel=cancel)
    for number, _ in enumerate(run):
        if number == 6:
            cancel.set()
    assert run.reply.finish_reason == "interrupted"
    kept = run.reply.tokens.generated
    rest = other.continue_reply(max_tokens=20 - kept, temperature=1.0, seed=5).reply
    assert rest.tokens.generated == 20 - kept
    assert whole.tokens.generated == 20
    assert tokens_of(loom, other) == tokens_of(loom, session.branch())
    # To the template it is one message, and what is said next stands on all of it.
    reply = other.say("more", max_tokens=2)
    assert reply.tokens.reused >= run.reply.tokens.computed + 19


def test_leaving_the_stream_early_keeps_what_was_said(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    run = iter(main.stream("hello", max_tokens=30))
    next(run)
    run.close()  # type: ignore[attr-defined]
    last = main.log()[-1]
    assert (last.role, last.finish_reason) == ("assistant", "interrupted")


def test_cancelled_before_anything_ran_the_message_is_kept(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    cancel = threading.Event()
    cancel.set()
    reply = main.stream("hello", max_tokens=5, cancel=cancel).reply
    assert (reply.text, reply.finish_reason, reply.tokens.computed) == ("", "interrupted", 0)
    assert [turn.text for turn in main.log()] == ["hello"]
    went_on = main.continue_reply(max_tokens=5).reply
    straight = loom.session("b").branch().say("hello", max_tokens=5)
    assert went_on.text == straight.text


def test_cancelled_while_state_is_replayed_the_message_is_kept(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say("hello", max_tokens=3, reuse=False)  # its state was not stored
    cancel = threading.Event()
    cancel.set()
    reply = main.stream("and more", max_tokens=3, cancel=cancel).reply
    assert (reply.finish_reason, reply.tokens.computed) == ("interrupted", 0)
    assert [turn.text for turn in main.log() if turn.role == "user"] == ["hello", "and more"]
    went_on = main.continue_reply(max_tokens=3).reply
    straight = loom.session("b").branch()
    straight.say("hello", max_tokens=3)
    assert went_on.text == straight.say("and more", max_tokens=3).text


def test_text_ends_before_a_stop_string_and_the_next_turn_goes_on_after_it(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    whole = main.say("hello", max_tokens=30).text
    stop = whole[8:11]
    reply = main.regenerate(max_tokens=30, stop=[stop]).reply
    assert reply.finish_reason == "stop"
    assert reply.text == whole[: whole.index(stop)]
    following = main.say("go on", max_tokens=2)
    assert following.tokens.reused >= reply.tokens.generated - 1


def test_undo_goes_back_to_before_the_last_message(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    main.say("one", max_tokens=2)
    main.say("two", max_tokens=2)
    main.undo()
    assert [turn.text for turn in main.log() if turn.role == "user"] == ["one"]
    main.undo()
    assert [turn.role for turn in main.log()] == ["system"]
    with pytest.raises(NothingToDo):
        main.undo()


def test_tags_stay_where_they_are(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("one", max_tokens=2)
    session.tag("good")
    at = session.log("good")[-1].id
    session.branch().say("two", max_tokens=2)
    assert session.log("good")[-1].id == at
    assert session.checkout("good").name == "main-2"


def test_require_reuse_refuses_before_anything_is_replayed(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say("one", max_tokens=3, reuse=False)
    turns = len(main.log())
    with pytest.raises(ReuseRequired):
        main.say("two", max_tokens=3, require_reuse=True)
    assert len(main.log()) == turns
    assert main.say("two", max_tokens=3).tokens.replayed > 0
    assert main.say("three", max_tokens=3, require_reuse=True).tokens.replayed == 0


@pytest.mark.parametrize("text", ["", "  \n", "\ud800"])
def test_text_that_says_nothing_or_is_no_text_is_refused(loom: kvloom.KVLoom, text: str):
    main = loom.session("a").branch()
    with pytest.raises(InvalidText):
        main.say(text)
    assert main.log() == []


def test_there_must_be_something_to_continue_or_regenerate(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    for action in (main.continue_reply, main.regenerate):
        with pytest.raises(NothingToDo):
            action()


def test_settings_out_of_range_are_refused_by_name(loom: kvloom.KVLoom):
    with pytest.raises(SessionError, match="temperature"):
        loom.session("a").branch().say("x", temperature=-1.0)


def test_a_session_keeps_its_system_prompt(loom: kvloom.KVLoom):
    loom.session("a", system="be brief")
    assert loom.session("a", system="be brief").branch().log()[0].text == "be brief"
    with pytest.raises(RefExists):
        loom.session("a", system="be long")


def test_removing_a_session_leaves_the_state_others_stand_on(loom: kvloom.KVLoom):
    long = " ".join(["the and of to"] * 60)
    loom.session("a").branch().say(f"{long} one", max_tokens=4)
    second = loom.session("b").branch()
    before = second.say(f"{long} two", max_tokens=4)
    assert before.tokens.reused > 200
    loom.remove("a")
    with pytest.raises(RefNotFound):
        loom.find("a")
    loom.resumer.forget()
    after = second.regenerate(max_tokens=4).reply
    assert (after.text, after.tokens.computed, after.tokens.replayed) == (before.text, 0, 0)
    loom.remove("b")
    left = stats(loom.database)
    assert (left["sessions"], left["turns"], left["tokens"], left["segments"]) == (0, 0, 0, 0)


def test_figures_count_each_tokens_state_once(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say("hello there", max_tokens=8)
    main.fork("other", back=2).say("hello there", max_tokens=8)
    loom.flush()
    found = stats(loom.database)
    width = 3 * 2 * 2 * 16 * 4  # layers, keys and values, kv_heads, head_dim, float32
    assert found["bytes"]["state_logical"] % width == 0
    assert found["bytes"]["state_logical"] // width == found["tokens"] - 1  # one token is pending
    assert found["bytes"]["state_if_snapshots"] == 2 * found["bytes"]["state_logical"]
    assert stats(loom.database, loom.find("a").row.row)["tokens"] == found["tokens"]
