"""Deleting for good: what was said, its tokens and its state are nowhere in the file or its log; the rest goes on."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from command import Command, fails
from tiny import tiny_model, tiny_tokenizer

from kvloom import KVLoom, TransformersEngine
from kvloom.errors import NothingToDo, StoreLocked
from kvloom_store import turns
from kvloom_store.fsck.findings import Severity
from kvloom_store.schema import chunk
from kvloom_store.trie import pack_tokens

SECRET = "xylophone zephyr quartz"
SYSTEM = "be brief and say who was there with them"
HOW = {"max_tokens": 6}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_model("llama"), tiny_tokenizer())


def opened(path: Path, engine: TransformersEngine) -> KVLoom:
    return KVLoom(path, model=engine, codec="raw")


def told(path: Path) -> bytes:
    """All bytes of the store: the file and its log."""
    return b"".join(each.read_bytes() for each in (path, Path(f"{path}-wal")) if each.exists())


def marks(loom: KVLoom, session: str, at: str) -> list[bytes]:
    """What would give a turn away: its words, any four tokens of all but the first of them, rows of its state."""
    loom.flush()
    with loom.database.read() as conn:
        row = loom.resolve(loom.find(session).ref(at)).turn
        assert row is not None
        turn, state = turns.get(conn, row), turns.states_of(conn, [row])[0]
        assert turn.text == SECRET
        blobs = conn.execute(sa.select(chunk.c.blob).where(chunk.c.segment == state.segment)).scalars().all()
    ids = loom.engine.tokenizer(SECRET.removeprefix("xylophone"))["input_ids"]
    tokens = [pack_tokens(ids[first : first + 4]) for first in range(len(ids) - 3)]
    assert all(some in pack_tokens(state.tokens) for some in tokens)
    assert blobs
    return [*(word.encode() for word in SECRET.split()), *tokens, *(blob[-256:] for blob in blobs)]


def test_of_an_erased_session_nothing_is_left_and_the_others_go_on(
    store_path: Path, engine: TransformersEngine
) -> None:
    with opened(store_path, engine) as loom:
        for name, text in (("secret", SECRET), ("open", "who is there?"), ("late", SECRET[:9] + " is a word")):
            branch = loom.session(name, system=SYSTEM).branch()
            branch.say(text, **HOW)
            branch.say("and what then?", **HOW)
        loom.flush()
        before = {name: [turn.text for turn in loom.find(name).log()] for name in ("open", "late")}
        gone = marks(loom, "secret", "main~3")
        assert all(mark in told(store_path) for mark in gone)
        made = loom.remove("secret", erase=True)
        assert made.dropped > 0  # both others begin as it did, and stood on its state
        found = told(store_path)
        assert [mark for mark in gone if mark in found] == [b"xylophone"]  # another session says that, too
        assert Path(f"{store_path}-wal").stat().st_size == 0
        assert {finding.severity for finding in loom.fsck().findings} == {Severity.NOTE}  # what is computed anew
        assert {name: [turn.text for turn in loom.find(name).log()] for name in before} == before
        assert loom.search("zephyr").hits == ()
    with opened(store_path, engine) as loom:
        reply = loom.find("open").branch().say("more?", **HOW)
        assert reply.tokens.computed > 40  # anew, all of it
        assert loom.find("open").branch().say("more?", require_reuse=True, **HOW).tokens.reused > 40
        assert {finding.severity for finding in loom.fsck().findings} <= {Severity.NOTE}


def test_a_branch_is_erased_and_what_other_branches_say_is_kept(store_path: Path, engine: TransformersEngine) -> None:
    with opened(store_path, engine) as loom:
        session = loom.session("talk", system=SYSTEM)
        session.branch().say("who is there?", **HOW)
        aside = session.fork("aside")
        aside.say(SECRET, **HOW)
        gone = marks(loom, "talk", "aside~1")
        start = sum(turn.tokens for turn in session.log("aside")[:-2])
        session.fork("cut", f"aside:{start + 6}")  # two tokens into the secret: that much of it is another branch's now
        kept = session.branch("cut").log()[-1].text
        assert session.only_on("aside") == 2
        made = loom.remove_branch("talk", "aside", erase=True)
        assert made.dropped == 1
        found = told(store_path)
        assert [mark for mark in gone if mark in found] == []
        assert [branch.name for branch in session.branches()] == ["main", "cut"]
        assert session.branch("cut").log()[-1].text == kept
        assert loom.fsck().findings == ()
        assert session.branch("cut").continue_reply(**HOW).reply.text
        assert session.branch().say("go on", require_reuse=True, **HOW).tokens.reused > 40
        loom.remove_branch("talk", "cut")
        with pytest.raises(NothingToDo, match="only branch"):
            loom.remove_branch("talk", "main")
        assert loom.fsck().findings == ()


def test_a_branch_goes_with_its_turns_and_leaves_what_others_lead_to(
    store_path: Path, engine: TransformersEngine
) -> None:
    with opened(store_path, engine) as loom:
        session = loom.session("talk")
        main = session.branch()
        main.say("one", **HOW)
        aside = session.fork("aside")
        aside.say("two", **HOW)
        session.tag("kept", "aside")
        aside.say("three", **HOW)
        assert aside.regenerate(**HOW).reply.text
        loom.remove_branch("talk", "aside")
        assert [turn.text for turn in session.tree() if turn.role == "user"] == ["one", "two"]
        assert len(session.log("kept")) == 4
        assert loom.fsck().findings == ()


def test_bytes_stay_until_nobody_reads_them_and_that_is_said(store_path: Path, engine: TransformersEngine) -> None:
    with opened(store_path, engine) as loom:
        loom.session("secret").branch().say(SECRET, **HOW)
        loom.flush()
        reader = sqlite3.connect(store_path, timeout=0)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turn").fetchone()
        with loom.database.engine.begin() as conn:
            conn.exec_driver_sql("PRAGMA busy_timeout=50")
        with pytest.raises(StoreLocked):
            loom.remove("secret", erase=True)
        assert loom.sessions() == []
        reader.close()
        loom.scrub()
        assert SECRET.encode() not in told(store_path)


def test_the_command_erases_and_says_what_it_cost(trip: Command, store_path: Path) -> None:
    trip("say", "other", "hello again", "--system", "Be brief.", "--max-tokens", "3")
    trip("fork", "trip", "aside")
    trip("say", "trip@aside", SECRET, "--max-tokens", "3")
    fails(trip("rm"), 2, "name what to delete")
    fails(trip("rm", "trip@aside~1", "--yes"), 2, "not a branch")
    done = trip("rm", "trip@aside", "--erase", "--yes", "--json").json
    assert (done["branch"], done["turns"], done["erased"]) == ("aside", 2, True)
    assert SECRET.encode() not in told(store_path)
    assert trip("rm", "trip", "--yes").code == 0
    assert trip("rm", "--erase").out == "the file was written anew\n"
    assert b"hello there" not in told(store_path)
    assert trip("fsck").code == 0
    assert trip("say", "other", "more", "--max-tokens", "2").code == 0
