"""Ctrl-C anywhere, and a reply within another: what is in memory is never half of something, nor two things at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom.live
from kvloom.engine import TransformersEngine
from kvloom.errors import SessionError
from kvloom.loom import KVLoom
from kvloom_store.quota import Limits

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, NEXT = "hello there, who is it?", "and what was that?"


@pytest.fixture(scope="module", params=["llama", "jamba"])
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return TransformersEngine(tiny_model(request.param), tiny_tokenizer(), name=request.param, keyframe_spacing=64)


def bits(loom: KVLoom) -> Any:
    live = loom.resumer.live
    assert live is not None
    return rows_of(live, live.captured)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, engine: TransformersEngine) -> tuple[str, Any]:
    """What is replied to NEXT where nothing comes in between, and the bits that it ends in."""
    with KVLoom(tmp_path_factory.mktemp("undisturbed") / "kvloom.db", model=engine) as loom:
        branch = loom.session("talk").branch()
        branch.say(FIRST, max_tokens=5)
        return branch.say(NEXT, max_tokens=5).text, bits(loom)


@pytest.fixture
def loom(store_path: Path, engine: TransformersEngine) -> Iterator[KVLoom]:
    with KVLoom(store_path, model=engine) as opened:
        opened.session("talk").branch().say(FIRST, max_tokens=5)
        yield opened


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_reply_that_is_still_being_read_is_not_mixed_with_another(loom: KVLoom, undisturbed: tuple[str, Any]) -> None:
    branch = loom.find("talk").branch()
    pieces = iter(branch.stream(NEXT, max_tokens=5))
    said = [next(pieces)]
    with pytest.raises(SessionError, match="still being generated"):
        branch.fork("side", back=2).say("something else", max_tokens=3)
    said += pieces
    assert ("".join(said), bits(loom)) == undisturbed
    branch.fork("other", back=2).say("something else", max_tokens=3)
    assert loom.fsck().sound


def test_a_reply_that_was_given_up_keeps_nobody_from_going_on(loom: KVLoom) -> None:
    branch = loom.find("talk").branch()
    pieces = iter(branch.stream(NEXT, max_tokens=5))
    next(pieces)
    pieces.close()
    assert branch.log()[-1].finish_reason == "interrupted"
    assert branch.fork("side", back=2).say(NEXT, max_tokens=3).text


def test_buffers_that_could_not_grow_hold_what_they_held(
    loom: KVLoom, undisturbed: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = loom.resumer.live
    assert live is not None
    before, capacity = bits(loom), live.capacity
    with monkeypatch.context() as patch:
        patch.setattr(kvloom.live, "rows_of", stop)
        with pytest.raises(KeyboardInterrupt):
            live.reserve(capacity + 1)
    assert (bits(loom), live.capacity) == (before, capacity)
    assert (loom.find("talk").branch().say(NEXT, max_tokens=5).text, bits(loom)) == undisturbed


@pytest.mark.parametrize("where", ["_gone_on_from", "_bring_back", "_load_more"])
def test_stopped_while_state_is_brought_back_it_is_brought_back_from_the_store(
    loom: KVLoom, undisturbed: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    branch = loom.find("talk").branch()
    with monkeypatch.context() as patch:
        patch.setattr(loom.resumer, where, stop)
        with pytest.raises(KeyboardInterrupt):
            branch.say(NEXT, max_tokens=5)
    branch = branch.fork("again", back=1)  # the message is kept
    assert (branch.say(NEXT, max_tokens=5).text, bits(loom)) == undisturbed


def test_stopped_when_state_is_handed_over_it_is_computed_again(
    loom: KVLoom, undisturbed: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loom.flush()
    branch = loom.find("talk").branch()
    with monkeypatch.context() as patch:
        patch.setattr(loom.writer, "submit", stop)
        with pytest.raises(KeyboardInterrupt):
            branch.say(NEXT, max_tokens=5)
    reply = branch.regenerate(max_tokens=5).reply
    assert (reply.text, bits(loom)) == undisturbed
    loom.flush()
    assert loom.fsck().sound


def test_stopped_in_its_prefill_a_run_is_over_and_says_nothing_twice(
    loom: KVLoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = loom.find("talk").branch()
    run = branch.stream(NEXT, max_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(loom.engine, "prefill", stop)
        with pytest.raises(KeyboardInterrupt):
            list(run)
    assert run.reply.finish_reason == "interrupted"
    assert [turn.text for turn in branch.log()].count(NEXT) == 1
    with pytest.raises(SessionError, match="over"):
        list(run)


def test_stopped_while_it_waits_to_commit_a_turn_holds_nobody_up(loom: KVLoom, monkeypatch: pytest.MonkeyPatch) -> None:
    loom.flush()
    with monkeypatch.context() as patch:
        patch.setattr(loom.database._writing, "wait_for", stop)
        with pytest.raises(KeyboardInterrupt), loom.database.write():
            pass
    loom.find("talk").branch().say(NEXT, max_tokens=3)
    loom.flush()  # which waits for state to be written: it gave way to turns that wait


def test_several_replies_are_sampled_though_state_has_no_room(loom: KVLoom) -> None:
    loom.flush()
    loom.set_quota(Limits(max_state=1))
    found = loom.find("talk").branch().sample(NEXT, n=3, max_tokens=4)
    assert [each.tokens > 0 for each in found] == [True, True, True]
