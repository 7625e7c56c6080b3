"""What another process does while a reply is being generated: the turn is kept, or the error says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exact import whole
from tiny import tiny_model, tiny_tokenizer

from kvloom import binding
from kvloom.engine import TransformersEngine
from kvloom.errors import RefNotFound, RemovedMeanwhile, SessionError
from kvloom.loom import KVLoom
from kvloom_store import refs


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path, engine: TransformersEngine) -> Iterator[KVLoom]:
    with KVLoom(store_path, model=engine) as opened:
        opened.session("talk").branch().say("who?", max_tokens=3)
        opened.flush()
        yield opened


@pytest.fixture
def other(loom: KVLoom) -> Iterator[KVLoom]:
    """The same store, as another process has it."""
    with KVLoom(loom.database.path) as opened:
        yield opened


def test_a_reply_on_a_branch_that_was_removed_is_kept_on_another_one(loom: KVLoom, other: KVLoom) -> None:
    run = loom.find("talk").branch().fork("side").stream("and then?", max_tokens=12)
    for number, _ in enumerate(run):
        if number == 0:
            there = other.find("talk")
            assert there.discard(there.branch("side"))
    assert run.reply.branch == "side-2"
    [notice] = run.reply.notices
    assert "'side' was removed meanwhile" in notice
    assert "'side-2'" in notice
    assert loom.find("talk").branch("side-2").log()[-1].text == run.reply.text
    with pytest.raises(RefNotFound):
        loom.find("talk").branch("side")


def test_the_slower_of_two_is_told_what_happened_and_what_to_do(loom: KVLoom, other: KVLoom) -> None:
    run = loom.find("talk").branch().stream("and then?", max_tokens=12)
    for number, _ in enumerate(run):
        if number == 0:
            other.find("talk").branch().move_to("main~1")
    [notice] = run.reply.notices
    assert "moved meanwhile, by another process" in notice
    assert "kept on branch 'main-2': go on there, or say it again" in notice


def test_a_reply_in_a_session_that_was_removed_says_so(loom: KVLoom, other: KVLoom) -> None:
    loom.session("keeps").branch().say("who?", max_tokens=3)  # the same words: its state is the other session's
    pieces = iter(loom.find("talk").branch().stream("and then?", max_tokens=12))
    next(pieces)
    other.remove("talk")
    with pytest.raises(RemovedMeanwhile) as caught:
        list(pieces)
    assert caught.value.exit_code == 20
    assert "kvloom ls" in caught.value.hint
    assert loom.find("keeps").branch().say("and then?", max_tokens=3).notices == ()
    loom.flush()
    with loom.database.read() as conn:
        whole.check(conn, crashed=True)


def test_a_session_removed_here_is_not_stood_on_by_the_next_one_that_says_the_same(loom: KVLoom) -> None:
    loom.session("keeps").branch().say("who?", max_tokens=3)
    loom.find("keeps").branch().say("and then?", max_tokens=3)
    loom.find("talk").branch().say("and then?", max_tokens=9)
    loom.remove("talk")
    assert loom.session("new").branch().say("who?", max_tokens=3).notices == ()
    assert loom.find("keeps").branch().regenerate(max_tokens=3).reply.notices == ()


def test_a_session_whose_name_is_anothers_by_now_is_told(loom: KVLoom, other: KVLoom) -> None:
    session = loom.find("talk")
    branch = session.branch()
    other.find("talk").rename("old")
    with other.database.write() as conn:
        refs.create_session(conn, "talk", {})
    for use in (lambda: branch.say("and then?"), lambda: session.fork("side"), lambda: session.tag("here")):
        with pytest.raises(RemovedMeanwhile):
            use()
    assert other.find("talk").tree() == []
    assert loom.find("old").branch().say("and then?", max_tokens=2).text is not None


def test_settings_that_another_process_changed_are_not_written_over(loom: KVLoom, other: KVLoom) -> None:
    session = loom.find("talk")
    with other.database.write() as conn:
        refs.change_settings(conn, session.row.row, {**session.row.settings, "model": "moved"})
    with pytest.raises(SessionError, match="another process"):
        binding._remember(session, dict(session.row.settings))
