"""State stored with loss: only where asked for, always told, never taken for exact state, brought back by replay."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from command import Command, fails
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom_proto.codecs import LOSSY
from kvloom_store.schema import chunk, segment
from kvloom_store.segments import CODED, DERIVED
from kvloom_store.stats import stats

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = " ".join(["the and of to it was"] * 100)


@functools.cache
def engine(kind: str = "llama") -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model(kind), tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine(), codec="raw") as opened:
        yield opened


def talk(loom: kvloom.KVLoom, name: str = "a") -> kvloom.Branch:
    branch = loom.session(name, system="be brief").branch()
    branch.say(LONG, max_tokens=4)
    branch.say("and what was it that they said?", max_tokens=4)
    return branch


def marks(loom: kvloom.KVLoom) -> list[int]:
    loom.flush()
    with loom.database.read() as conn:
        query = sa.select(segment.c.lossy).where(segment.c.complete == 1).order_by(segment.c.id)
        return list(conn.execute(query).scalars())


@pytest.mark.parametrize("codec", LOSSY)
def test_every_reply_from_lossy_state_says_so_in_any_process(store_path: Path, codec: str) -> None:
    with kvloom.open(store_path, model=engine()) as loom:
        branch = talk(loom)
        held = sum(1 for _ in marks(loom))
        branch.session.recode(codec=codec)
        loom.resumer.forget()
        for _ in range(2):  # from the store, then from memory
            reply = branch.say("go on", max_tokens=3)
            assert any("lossy" in notice for notice in reply.notices)
            assert reply.restored.lossy == reply.tokens.reused > 0
        assert marks(loom) == [CODED] * held + [DERIVED] * (len(marks(loom)) - held)
    with kvloom.open(store_path, model=engine()) as loom:
        reply = loom.find("a").branch().say("go on", max_tokens=3)
        assert any("lossy" in notice for notice in reply.notices)
        assert reply.to_json()["restored"]["lossy"] > 0


def test_what_other_branches_stand_on_stays_exact_unless_it_is_asked_for(loom: kvloom.KVLoom) -> None:
    main = talk(loom)
    other = main.fork("other", back=2)
    own = loom.find("a").survey("main")
    assert own.shared
    assert main.session.recode("main", codec="q8_0").done.chunks == len(own.segments) - len(own.shared)
    loom.resumer.forget()
    assert other.say("something else", max_tokens=3).notices == ()
    assert any("lossy" in notice for notice in main.say("go on", max_tokens=3).notices)
    main.session.recode("other", codec="q8_0", shared=True)
    loom.resumer.forget()
    assert any("lossy" in notice for notice in other.say("something else", max_tokens=3).notices)


def test_nobody_else_is_given_lossy_state(loom: kvloom.KVLoom) -> None:
    first = talk(loom)
    first.session.recode(codec="q8_0")
    loom.resumer.forget()
    second = loom.session("b", system="be brief").branch()
    reply = second.say(LONG, max_tokens=2)
    assert (reply.tokens.reused, reply.notices) == (0, ())
    third = loom.session("c", system="be brief").branch().say(LONG, max_tokens=2)
    assert third.tokens.reused > 100, "the exact one that was stored since"
    assert third.notices == ()


def test_a_loop_of_ones_own_is_never_handed_lossy_state(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    state = branch.session.log()[-1]
    assert state.tokens
    ids = [token for turn in branch.session.log() for token in _tokens(loom, turn.id)]
    assert loom.lookup(ids)[1] > 100
    branch.session.recode(codec="q4_0")
    loom.resumer.forget()
    assert loom.lookup(ids)[1] == 0


def _tokens(loom: kvloom.KVLoom, turn: str) -> list[int]:
    from kvloom_store import turns

    with loom.database.read() as conn:
        row = next(each.row for each in turns.of_session(conn, 1) if each.id == turn)
        return [token for state in turns.states_of(conn, [row]) for token in state.tokens]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bamba"])
def test_warming_exactly_brings_the_very_rows_back(store_path: Path, kind: str) -> None:
    with kvloom.open(store_path, model=engine(kind)) as loom:
        branch = talk(loom)
        twin = loom.find("a").fork("twin")
        before = len(marks(loom))
        branch.session.recode("main", codec="q8_0", shared=True)
        assert branch.session.missing("main").cost.to_run == 0
        assert branch.session.missing("main", exact=True).cost.replayed > 0
        added = branch.session.warm("main", exact=True)
        assert (added.pending, added.notices) == (0, ())
        assert added.tokens.replayed > 0
        assert marks(loom) == [0] * before, "under their old numbers"
        loom.resumer.forget()
        reply = twin.say("go on", max_tokens=8)
        assert (reply.notices, reply.tokens.replayed) == ((), 0)
    with kvloom.open(store_path.with_name("exact.db"), model=engine(kind)) as loom:
        assert talk(loom).say("go on", max_tokens=8).text == reply.text


def test_what_follows_from_lossy_state_is_computed_again_too(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    branch.session.recode(codec="q4_0")
    loom.resumer.forget()
    said = branch.say("go on", max_tokens=5).text
    assert branch.session.warm("main", exact=True).pending == 0
    loom.resumer.forget()
    reply = branch.say("go on", max_tokens=5)
    assert (reply.notices, reply.tokens.replayed) == ((), 0)
    assert [turn.text for turn in branch.session.log()][-3] == said, "what was said stays said"


def test_damage_in_lossy_state_is_mended_with_exact_rows(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    branch.session.recode(codec="q8_0")
    with loom.database.write() as conn:
        conn.execute(chunk.update().values(blob=b"x"))
    loom.resumer.forget()
    reply = branch.say("go on", max_tokens=3)
    assert reply.tokens.replayed > 0
    assert not any("lossy" in notice for notice in reply.notices)
    assert set(marks(loom)) == {0}


def test_a_search_from_lossy_state_says_so(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    branch.session.recode(codec="q8_0")
    loom.resumer.forget()
    search = branch.session.explore(prompt="and now?", width=1, keep=1, depth=1, step_tokens=2)
    list(search)
    assert any("lossy" in notice for notice in search.result.notices)


# From the command line


def test_loss_is_asked_about_and_told_by_everything_that_reports(trip: Command) -> None:
    fails(trip("recode", "trip", "--codec", "q8_0"), 2, "--yes")
    done = trip("recode", "trip", "--codec", "q8_0", "--yes", "--json")
    assert done.json["bytes"]["after"] < done.json["bytes"]["raw"] * 0.55
    assert trip("recode", "trip", "--dry-run", "--json").json["lossy"] == done.json["segments"]
    assert "not exact" in trip("recode", "trip", "--dry-run").out
    assert trip("show", "trip", "--json").json["turn"]["states"][0]["lossy"] is True
    assert "lossy" in trip("show", "trip").out
    assert trip("stats", "--json").json["bytes"]["state_lossy"] == done.json["bytes"]["after"]
    assert "lossy" in trip("stats").out
    said = trip("say", "trip", "go on", "--max-tokens", "2", "--json")
    assert said.json["restored"]["lossy"] > 0
    assert any("lossy" in notice for notice in said.json["notices"])
    assert "lossy" in said.err


def test_the_exact_rows_can_be_asked_for_again(trip: Command) -> None:
    trip("recode", "trip", "--codec", "q4_0", "--yes")
    assert "nothing to do" in trip("warm", "trip", "--dry-run").out
    assert "nothing to do" not in trip("warm", "trip", "--exact", "--dry-run").out
    assert trip("warm", "trip", "--exact").code == 0
    assert trip("stats", "--json").json["bytes"]["state_lossy"] == 0
    assert trip("say", "trip", "go on", "--max-tokens", "2", "--require-reuse").code == 0
    assert "lossy" not in trip("show", "trip").out


def test_bytes_of_lossy_state_are_counted(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    done = branch.session.recode(codec="q4_0").done
    assert stats(loom.database)["bytes"]["state_lossy"] == done.after
    assert done.after == pytest.approx(done.before * 18 / 32 / 4, rel=0.02)
