"""Dropped state beside all else a store does: checks, bundles, state stored with loss, what is in memory."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exact.worker import frame_of, rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom_store import refs, trie, turns
from kvloom_store.fsck import Severity
from kvloom_store.names import parse_ref
from kvloom_store.quota import Limits
from kvloom_store.schema import meta, pin

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def engine() -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine()) as opened:
        yield opened


def talk(loom: kvloom.KVLoom) -> kvloom.Session:
    main = loom.session("a", system="You are the one who was there.").branch()
    main.say("when was it that they were all there, and who said that it would be so?", max_tokens=12)
    main.say("and what would you have said to her?", max_tokens=12)
    loom.flush()
    return main.session


def bits(loom: kvloom.KVLoom, at: str = "a", **options: Any) -> tuple[Any, Any]:
    """The state at a ref, from what is in memory or stored: digests of its rows, and of what is overwritten."""
    with loom.database.read() as conn:
        row = refs.resolve(conn, parse_ref(at)).turn
        state = turns.best_state(turns.states_of(conn, [row]), loom.root)
        state = turns.original_of(conn, state)
        ids = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.state_end]
    with loom.engine.lock:
        live, _ = loom.resumer.resume(ids, state, room=1, logits=False, **options)
        return rows_of(live, live.length), frame_of(live)


def wrong(loom: kvloom.KVLoom) -> list[str]:
    return [each.words for each in loom.fsck().findings if each.severity != Severity.NOTE]


def test_a_check_finds_nothing_wrong_with_dropped_state_and_says_that_it_was_dropped(loom: kvloom.KVLoom) -> None:
    session = talk(loom)
    session.pin("main~2")
    loom.set_quota(Limits(max_state=1 << 30))
    loom.gc(0)
    assert wrong(loom) == []
    assert any("was dropped to make room" in each.words for each in loom.fsck().findings)
    session.branch().say("and then?", max_tokens=4)
    session.warm(exact=True)
    assert wrong(loom) == []


def test_a_damaged_pin_or_quota_is_found_and_repaired(loom: kvloom.KVLoom) -> None:
    session = talk(loom)
    session.pin()
    loom.set_quota(Limits(max_state=1 << 30))
    with loom.database.write() as conn:
        conn.execute(pin.update().values(checksum=bytes(16), created=-1))
        conn.execute(meta.update().where(meta.c.key == "max_state_bytes").values(checksum=bytes(16), value=b"\x00"))
    assert len(wrong(loom)) == 2
    loom.repair()
    assert wrong(loom) == []
    assert loom.quota() == Limits()
    assert not any(turn.pinned for turn in session.tree())


def test_a_conversation_whose_state_was_dropped_goes_into_a_bundle_and_on_from_there(
    loom: kvloom.KVLoom, store_path: Path
) -> None:
    session, file = talk(loom), io.BytesIO()
    as_it_was = bits(loom)
    loom.gc(0)
    session.export(file)
    file.seek(0)
    with kvloom.open(store_path.with_name("there.db"), model=engine()) as there:
        there.import_bundle(file)
        assert [turn.text for turn in there.find("a").log()] == [turn.text for turn in session.log()]
        assert bits(there) == as_it_was
        assert there.find("a").branch().say("and then?", max_tokens=3).notices == ()


def test_a_bundle_brings_dropped_state_back(loom: kvloom.KVLoom) -> None:
    session, file = talk(loom), io.BytesIO()
    as_it_was = bits(loom)
    session.export(file)
    loom.gc(0)
    assert session.dropped().fresh > 0
    file.seek(0)
    loom.import_bundle(file)
    loom.resumer.forget()
    assert session.dropped().fresh == 0
    assert not session.missing(exact=True, verify=True)
    assert bits(loom) == as_it_was
    assert wrong(loom) == []


def test_dropped_state_that_followed_from_lossy_state_comes_back_exact(loom: kvloom.KVLoom) -> None:
    session = talk(loom)
    as_it_was = bits(loom)
    session.recode(codec="q8_0")
    loom.resumer.forget()
    assert any("lossy" in notice for notice in session.branch().say("go on", max_tokens=3).notices)
    loom.gc(0)
    loom.resumer.forget()
    reply = session.branch().say("and then?", max_tokens=3)
    assert (reply.notices, reply.restored.lossy) == ((), 0)
    assert bits(loom, "a@main~4", exact=True) == as_it_was


def test_what_is_in_memory_is_not_gone_on_from_where_it_is_to_be_exact(loom: kvloom.KVLoom) -> None:
    session = talk(loom)
    as_it_was = bits(loom)
    loom.gc(0)
    loom.resumer.forget()
    session.warm()
    assert bits(loom, exact=True) == as_it_was, "not the fresh state, which is in memory"
    session.recode(codec="q8_0")
    loom.resumer.forget()
    assert session.branch().say("go on", max_tokens=3).restored.lossy > 0
    assert bits(loom, "a@main~2", exact=True) == as_it_was, "not the lossy state, which is in memory"
    assert session.branch().say("and then?", max_tokens=3, exact=True).restored.lossy == 0
