"""Dropping state to make room: what was said stays, goes on fresh, and comes back bit for bit where it is to."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from exact.worker import frame_of, rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom_store import quota, refs, turns
from kvloom_store.names import parse_ref
from kvloom_store.schema import chunk, segment, turn_state

KINDS = ("llama", "gemma3_text", "jamba")
SYSTEM = "You are the one who was there with them."
BRANCHES = ("main", "other", "third")


@functools.cache
def engine(kind: str = "llama") -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Decoding in float32 rounds otherwise with two threads: what is compared here is made with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def opened(path: Path, kind: str = "llama") -> kvloom.KVLoom:
    return kvloom.open(path, model=engine(kind))


def talk(loom: kvloom.KVLoom, session: str = "a") -> kvloom.Session:
    """Three branches: of two exchanges, of one more on it, and one that leaves a reply in the middle."""
    main = loom.session(session, system=SYSTEM).branch()
    main.say("when was it that they were all there, and who said that it would be so?", max_tokens=16)
    main.say("and what would you have said to her?", max_tokens=16)
    main.fork("other").say("who else was there, and what for?", max_tokens=16)
    middle = len(main.log()[-1].text) and main.log()[2].tokens // 2
    third = main.session.fork("third", f"main~2:{_start_of(loom, main.log()[2].id, session) + middle}")
    third.say("no more of that", max_tokens=16)
    loom.flush()
    return main.session


def _start_of(loom: kvloom.KVLoom, turn_id: str, session: str = "a") -> int:
    return state_of(loom, turn_id, session).start


def state_of(loom: kvloom.KVLoom, at: str, session: str = "a") -> turns.TurnState:
    with loom.database.read() as conn:
        row = refs.resolve(conn, parse_ref(f"{session}@{at}")).turn
        return turns.best_state(turns.states_of(conn, [row]), loom.root)


def bits(loom: kvloom.KVLoom, at: str, session: str = "a", **options: Any) -> tuple[Any, Any]:
    """The state at a ref, brought back from nothing: digests of its rows, and of what is overwritten in place."""
    loom.resumer.forget()
    state = state_of(loom, at, session)
    with loom.database.read() as conn:
        from kvloom_store import trie

        ids = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.state_end]
    with loom.engine.lock:
        live, account = loom.resumer.resume(ids, state, room=1, logits=False, **options)
        return (rows_of(live, live.length), frame_of(live)), account


def count(loom: kvloom.KVLoom, table: sa.Table) -> int:
    with loom.database.read() as conn:
        return conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def stored(loom: kvloom.KVLoom) -> int:
    with loom.database.read() as conn:
        return quota.state_bytes(conn)


# --- after gc ---


@pytest.mark.parametrize("kind", KINDS)
def test_after_gc_to_30_percent_every_branch_goes_on_fresh(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        session = talk(loom)
        before, texts = stored(loom), {name: session.branch(name).log()[-1].text for name in BRANCHES}
        report = loom.gc(int(before * 0.3))
        assert (report.before, report.after) == (before, stored(loom))
        assert report.after <= before * 0.3 < report.after + report.freed
        assert report.branches, "what was said last on some has no state any more"
        assert {name: session.branch(name).log()[-1].text for name in BRANCHES} == texts
    with opened(store_path, kind) as loom:
        session = loom.session("a")
        for name in BRANCHES:
            lost = session.dropped(name)
            reply = session.branch(name).say("and then?", max_tokens=6)
            assert reply.tokens.generated == 6
            assert reply.tokens.computed >= lost.fresh
            assert reply.notices == ()
        loom.flush()
        for name in BRANCHES:
            assert not session.missing(name, verify=True)
            assert not session.dropped(name).fresh


@pytest.mark.parametrize("kind", KINDS)
def test_after_gc_every_branch_goes_on_bit_for_bit_where_it_is_asked_to(store_path: Path, tmp_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        session = talk(loom)
        as_it_was = {name: bits(loom, name)[0] for name in BRANCHES}
    copy = tmp_path / "copy.db"
    shutil.copy(store_path, copy)
    with opened(store_path, kind) as loom:
        loom.gc(int(stored(loom) * 0.3))
        for name in BRANCHES:
            loom.flush()
            foretold = loom.session("a").dropped(name)
            came_back, account = bits(loom, name, exact=True)
            assert came_back == as_it_was[name]
            assert account.replayed == foretold.exact or kind == "jamba", "which runs what is between keyframes, too"
    with opened(copy, kind) as loom:
        expected = [loom.session("a").branch(name).say("and then?", max_tokens=8).text for name in BRANCHES]
        loom.resumer.forget()
    with opened(store_path, kind) as loom:
        session, loom_text = loom.session("a"), []
        loom.gc(0)
        assert stored(loom) == 0
        for name in BRANCHES:
            loom_text.append(session.branch(name).say("and then?", max_tokens=8, exact=True).text)
        assert loom_text == expected


def test_nothing_is_left_of_state_that_was_dropped(store_path: Path):
    with opened(store_path) as loom:
        talk(loom)
        said, sizes = count(loom, turn_state), store_path.stat().st_size
        report = loom.gc(0)
        assert (report.after, report.freed, report.kept) == (0, report.before, 0)
        assert (count(loom, segment), count(loom, chunk)) == (0, 0)
        assert count(loom, turn_state) == said
        assert report.file_freed > 0
        assert store_path.stat().st_size < sizes or report.file_freed
        with loom.database.read() as conn:
            states = turns.states_of_session(conn, loom.session("a").row.row)
        assert all(each.dropped for each in states if each.state_end > each.state_start)
        assert loom.gc(0).segments == 0
