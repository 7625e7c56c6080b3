"""Replies whose process was killed: what there was of them is kept, and goes on with the bits it would have had.

Run as a program this file is the process that is killed: its arguments are a store, and after how many tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import sqlalchemy as sa
import torch
from command import Command
from exact import harness, whole
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom.journal
from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.errors import StoreUnavailable
from kvloom.loom import KVLoom
from kvloom_store import database, journal, owner, removal
from kvloom_store.names import parse_ref
from kvloom_store.refs import get_session, resolve
from kvloom_store.schema import journal as table
from kvloom_store.turns import best_state, states_of

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = "When was it that they were all there, and who said that it would be so?"
HOW = {"max_tokens": 40, "temperature": 1.0, "seed": 11}


@functools.cache
def engine(kind: str) -> TransformersEngine:
    return TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}", keyframe_spacing=64)


@pytest.fixture(autouse=True)
def _at_every_eighth_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's tokens come so fast that noting them would take more than its share; on a busy machine so slowly
    that a second is over before there are eight."""
    monkeypatch.setattr(kvloom.journal, "SHARE", float("inf"))
    monkeypatch.setattr(kvloom.journal, "EVERY_S", float("inf"))


def said(path: Path, kind: str, dies_at: int | None = None) -> Branch:
    """Something said in a session, and the process killed, if it is to be, when so many tokens have come."""
    branch = KVLoom(path, model=engine(kind)).session("talk", system="You are brief.").branch()
    branch.say("who is there?", max_tokens=5)
    for number, _ in enumerate(tokens_of(branch), 1):
        if number == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return branch


def sampled(path: Path, kind: str, dies_at: int | None = None) -> Branch:
    """Three replies sampled at once, and the process killed, if it is to be, when so many tokens of all have come."""
    branch = KVLoom(path, model=engine(kind)).session("talk", system="You are brief.").branch()
    seen: list[int] = []

    def told(tokens: int) -> None:
        seen.extend([0] * tokens)
        if dies_at is not None and len(seen) >= dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    branch.sampling(FIRST, n=3, told=told, **HOW).finished()
    return branch


def searched(path: Path, kind: str, dies_at: int | None = None) -> Branch:
    """A beam search, and the process killed, if it is to be, when so many steps are taken."""
    branch = KVLoom(path, model=engine(kind)).session("talk", system="You are brief.").branch()
    seen: list[int] = []

    def told(tokens: int) -> None:
        seen.append(tokens)
        if len(seen) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    branch.beaming(FIRST, width=3, told=told, max_tokens=40).finished()
    return branch


def tokens_of(branch: Branch) -> Any:
    """A run, looked at after every token: pieces of text may have several, or none."""
    run = branch.stream(FIRST, **HOW)
    generate, seen = branch._loom.engine.generate, []

    def watched(*args: Any, **options: Any) -> Any:
        for token in generate(*args, **options):
            yield token
            seen.append(token)

    branch._loom.engine.generate = watched  # type: ignore[method-assign]
    try:
        for _ in run:
            yield from seen
            seen.clear()
    finally:
        del branch._loom.engine.generate


def killed(path: Path, kind: str = "llama", after: int = 27, what: str = "said") -> None:
    done = forked.run([__file__, path, kind, after, what], env=harness.environment())
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose process was killed while it replied."""
    path = tmp_path_factory.mktemp("killed") / "kvloom.db"
    killed(path)
    return path


@pytest.fixture
def path(cut_off: Path, tmp_path: Path) -> Path:
    """A copy of that store."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{cut_off}{suffix}", tmp_path / f"killed.db{suffix}")
    return tmp_path / "killed.db"


def last_state(loom: KVLoom, at: str = "talk") -> Any:
    with loom.database.read() as conn:
        return best_state(states_of(conn, [resolve(conn, parse_ref(at)).turn]), loom.root)


def journalled(loom: KVLoom) -> int:
    with loom.database.read() as conn:
        return conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "jamba"])
def test_a_killed_reply_is_kept_and_goes_on_with_the_bits_it_would_have_had(tmp_path: Path, kind: str) -> None:
    whole_run = said(tmp_path / "whole.db", kind)
    loom = whole_run._loom
    expected = last_state(loom), rows_of(loom.resumer.live, loom.resumer.live.length)
    loom.close()

    killed(tmp_path / "killed.db", kind)
    with KVLoom(tmp_path / "killed.db", model=engine(kind)) as loom:
        [kept] = loom.kept
        assert (kept.session, kept.branch) == ("talk", "main")
        branch = loom.find("talk").branch()
        last = branch.log()[-1]
        assert (last.id, last.role, last.finish_reason) == (kept.turn, "assistant", "interrupted")
        found = last_state(loom)
        assert 16 <= kept.tokens <= 27
        assert found.tokens == expected[0].tokens[: kept.tokens]
        assert found.scores is not None
        reply = branch.continue_reply(**{**HOW, "max_tokens": 40 - kept.tokens}).reply
        assert found.tokens + last_state(loom).tokens == expected[0].tokens
        assert reply.tokens.replayed > 0
        assert rows_of(loom.resumer.live, loom.resumer.live.length) == expected[1]
        assert journalled(loom) == 0
        loom.flush()
        with loom.database.read() as conn:
            whole.check(conn)


@pytest.mark.parametrize(("kind", "after", "lost"), [("llama", 75, 3), ("jamba", 60, 1)])
def test_of_replies_that_were_sampled_and_killed_each_is_kept_on_a_branch_of_its_own(
    tmp_path: Path, kind: str, after: int, lost: int
) -> None:
    """Paths of a model with recurrent state grow one after another: there the first was whole, the last not begun."""
    whole_run = sampled(tmp_path / "whole.db", kind)
    loom = whole_run._loom
    names = [branch.name for branch in loom.find("talk").branches()]
    expected = [state.tokens for state in (last_state(loom, f"talk@{name}") for name in names) if state is not None]
    assert journalled(loom) == 0
    loom.close()

    killed(tmp_path / "killed.db", kind, after, "sampled")
    with KVLoom(tmp_path / "killed.db", model=engine(kind)) as loom:
        assert len(loom.kept) == lost
        assert journalled(loom) == 0
        for kept in loom.kept:
            branch = loom.find("talk").branch(kept.branch)
            assert [turn.role for turn in branch.log()[-2:]] == ["user", "assistant"]
            found = last_state(loom, f"talk@{kept.branch}")
            assert 16 <= len(found.tokens) <= 25
            assert any(tokens[: len(found.tokens)] == found.tokens for tokens in expected)
            reply = branch.continue_reply(max_tokens=2).reply
            assert reply.tokens.replayed > 0
        loom.flush()
        with loom.database.read() as conn:
            whole.check(conn)


def test_of_a_beam_search_that_was_killed_the_best_replies_there_were_are_kept(tmp_path: Path) -> None:
    killed(tmp_path / "killed.db", "llama", 21, "searched")
    with KVLoom(tmp_path / "killed.db", model=engine("llama")) as loom:
        assert journalled(loom) == 0
        found = [last_state(loom, f"talk@{kept.branch}") for kept in loom.kept]
        steps = len(found[0].tokens)
        assert 16 <= steps <= 21
        best = loom.session("again", system="You are brief.").branch().beam(FIRST, width=3, max_tokens=steps)
        assert [each.tokens for each in found] == [last_state(loom, f"again@{b.reply.branch}").tokens for b in best]
        for kept in loom.kept:
            assert loom.find("talk").branch(kept.branch).continue_reply(max_tokens=2).reply.tokens.replayed > 0
        loom.flush()
        with loom.database.read() as conn:
            whole.check(conn)


def test_of_replies_that_grow_together_one_that_had_ended_is_kept_as_ended(tmp_path: Path) -> None:
    with KVLoom(tmp_path / "kvloom.db", model=engine("llama")) as loom:
        branch = loom.session("talk").branch()
        replies = branch.sample(FIRST, n=3, max_tokens=30, temperature=1.0, seed=11)
        shortest = min(replies, key=lambda each: each.reply.text)
        stop = shortest.reply.text[3:5]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvloom.journal.Journal, "ended", lambda *_: None)  # the rows stay, as after a kill
            again = branch.sample(n=3, max_tokens=30, temperature=1.0, seed=11, stop=[stop])
        seen = sorted(each.reply.finish_reason for each in again)
        assert "stop" in seen
    with KVLoom(tmp_path / "kvloom.db", model=engine("llama")) as loom:
        kept = [loom.find("talk").branch(each.branch).log()[-1].finish_reason for each in loom.kept]
        assert len(kept) == 3
        assert "stop" in kept


def test_looking_at_the_store_is_enough_and_says_so(path: Path, kvloom: Command) -> None:
    first = kvloom("log", "talk", "--json", "--store", str(path))
    assert "died" in first.err
    assert "kvloom continue talk@main" in first.err
    turns = json.loads(first.out)["turns"]
    assert [turn["role"] for turn in turns[-2:]] == ["user", "assistant"]
    assert turns[-1]["finish_reason"] == "interrupted"
    assert kvloom("log", "talk", "--store", str(path)).err == ""


def test_a_reply_that_ends_leaves_nothing_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    note = journal.note
    monkeypatch.setattr(journal, "note", lambda *args, **how: seen.append(len(args[2].tokens)) or note(*args, **how))
    branch = said(tmp_path / "kvloom.db", "llama")
    assert 4 <= len(seen) <= 5  # while state is being written it is not waited for, but tried again at the next token
    assert all(after - before >= 8 for before, after in itertools.pairwise([0, *seen]))
    assert journalled(branch._loom) == 0
    branch._loom.close()


def test_noting_takes_no_more_than_its_share_but_happens_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(kvloom.journal, "SHARE", 0.01)
    monkeypatch.setattr(kvloom.journal, "EVERY_S", 1.0)
    monkeypatch.setattr(kvloom.journal.time, "perf_counter", lambda: now)
    with KVLoom(tmp_path / "kvloom.db") as loom:
        noted = kvloom.journal.Journal(loom)
        assert not noted.is_due(0)
        assert [noted.is_due(tokens) for tokens in (7, 8)] == [False, True]
        noted._took = 0.005
        assert not noted.is_due(8)
        now += 0.5
        assert noted.is_due(8)
        noted._took = 0.2
        assert not noted.is_due(8)
        now += 0.5
        assert noted.is_due(1)


def test_a_living_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kvloom.db"
    branch = said(path, "llama")
    run = iter(branch.stream(FIRST, **HOW))
    while not journalled(branch._loom):
        next(run)
    with KVLoom(path) as other:
        assert other.kept == []
        assert journalled(other) == 1
    run.close()
    assert journalled(branch._loom) == 0
    branch._loom.close()


def test_where_the_branch_moved_the_reply_is_kept_on_a_branch_of_its_own(path: Path) -> None:
    database_alone = database.Database(path)
    with database_alone.write() as conn:  # as a process would that does not look at the journal
        from kvloom_store import refs

        main = refs.branches(conn, get_session(conn, "talk").row)[0]
        refs.move_branch(conn, main.row, main.turn, None)
    database_alone.close()
    with KVLoom(path) as loom:
        assert [each.branch for each in loom.kept] == ["main-2"]
        assert loom.find("talk").branch("main-2").log()[-1].finish_reason == "interrupted"
        assert loom.find("talk").branch().log() == []


def test_where_the_session_was_removed_nothing_is_kept(path: Path) -> None:
    database_alone = database.Database(path)
    with database_alone.write() as conn:
        removal.remove_session(conn, get_session(conn, "talk").row)
    database_alone.close()
    with KVLoom(path) as loom:
        assert (loom.kept, loom.sessions(), journalled(loom)) == ([], [], 0)


def test_a_damaged_note_is_never_served_and_opens_the_store_all_the_same(path: Path) -> None:
    database_alone = database.Database(path)
    with database_alone.write() as conn:
        conn.execute(table.update().values(text="something else"))
    database_alone.close()
    with KVLoom(path) as loom:
        assert loom.kept == []
        assert loom.find("talk").log()[-1].role == "user"


def test_a_reply_whose_turn_could_not_be_added_is_kept_as_far_as_it_was_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = said(tmp_path / "kvloom.db", "llama")
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise StoreUnavailable("no space left")

        patch.setattr(journal, "remove", full)
        with pytest.raises(StoreUnavailable):
            branch.say(FIRST, **HOW)
    assert branch.log()[-1].role == "user"
    reply = branch.continue_reply(max_tokens=3).reply
    assert [each.role for each in branch.log()[-3:]] == ["user", "assistant", "assistant"]
    assert [each.tokens for each in branch._loom.kept] == [40]
    assert reply.tokens.replayed > 0
    branch._loom.close()


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    me = owner.this_process()
    where, number, started = me.split(" ")
    assert owner.lives(me) is True
    assert owner.lives(f"{where} {number} {float(started) - 60:.2f}") is False
    assert owner.lives(f"elsewhere {number} {started}") is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert owner.lives(f"{where} {child.pid} {started}") is False


if __name__ == "__main__":
    torch.set_num_threads(1)
    kvloom.journal.SHARE = kvloom.journal.EVERY_S = float("inf")
    {"said": said, "sampled": sampled, "searched": searched}[sys.argv[4]](
        Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    )
