"""Dropping state to make room: what was said stays, goes on fresh, and comes back bit for bit where it is to."""

from __future__ import annotations

import functools
import io
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from exact.worker import frame_of, rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import EngineError, NoRoom, NothingToDo, ReuseRequired
from kvloom_store import gc, quota, refs, trie, turns
from kvloom_store.checksum import update
from kvloom_store.names import parse_ref
from kvloom_store.quota import Limits
from kvloom_store.schema import chunk, pin, segment, turn_state

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "gemma3_text", "jamba")
SYSTEM = "You are the one who was there with them."
BRANCHES = ("main", "other", "third")


@functools.cache
def engine(kind: str = "llama") -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}")


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


# --- coming back ---


def test_state_that_was_dropped_is_computed_anew_once_and_then_held(store_path: Path):
    with opened(store_path) as loom:
        main = talk(loom).branch()
        as_it_was, _ = bits(loom, "main~1")
        loom.gc(0)
        again = main.regenerate(max_tokens=4).reply
        assert (again.tokens.reused, again.tokens.replayed) == (0, 0)
        assert again.tokens.computed > 50
        loom.flush()
        assert bits(loom, "main~1")[0] != as_it_was, "another way of computing it: replies were read, not said"
        once_more = main.regenerate(max_tokens=4).reply
        assert once_more.tokens.computed <= 1, "it is held under the tokens, whoever had it computed"
        assert bits(loom, "main~1", exact=True)[0] == as_it_was


def test_state_that_was_never_written_comes_back_exactly_though_other_state_was_dropped(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        as_it_was, _ = bits(loom, "other")
        tip = state_of(loom, "other")
        with loom.database.write() as conn:  # as after a crash
            turns.set_segment(conn, tip.row, None, tip.base_segment)
            conn.execute(chunk.delete().where(chunk.c.segment == tip.segment))
            conn.execute(segment.delete().where(segment.c.id == tip.segment))
        loom.gc(None)
        came_back, account = bits(loom, "other")
        assert came_back == as_it_was
        assert account.replayed == tip.state_end - tip.state_start
        assert session.dropped("other") == kvloom.Dropped()


@pytest.mark.parametrize("kind", KINDS)
def test_warm_brings_dropped_state_back_fresh_as_a_variant_and_exactly_in_its_own_place(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        session = talk(loom)
        as_it_was, _ = bits(loom, "main")
        loom.gc(0)
        missing, foretold = session.missing(), session.dropped()
        added = session.warm()
        assert (added.tokens.computed, added.tokens.replayed, added.pending) == (missing.cost.computed, 0, 0)
        assert added.tokens.computed >= foretold.fresh > 100
        assert not session.missing(verify=True)
        fresh = state_of(loom, "main")
        assert fresh.variant
        assert fresh.segment is not None
        assert bits(loom, "main")[0] != as_it_was
    with opened(store_path, kind) as loom:
        session = loom.session("a")
        assert session.branch().say("and then?", max_tokens=3).tokens.computed < 40
        session.branch().undo()
        exactly = session.warm(exact=True)
        assert exactly.tokens.replayed == foretold.exact
        assert not session.missing(verify=True, exact=True)
        own = state_of(loom, "main")
        assert not own.variant, "the first comes before its variants, when both are held"
        assert not own.dropped
        assert bits(loom, "main")[0] == as_it_was


def test_reuse_that_is_required_is_refused_where_state_was_dropped(store_path: Path):
    with opened(store_path) as loom:
        main = talk(loom).branch()
        loom.gc(0)
        with pytest.raises(ReuseRequired):
            main.say("and then?", max_tokens=2, require_reuse=True)
        assert main.log()[-1].role == "assistant"


def test_dropped_state_goes_on_in_every_way_a_branch_can(store_path: Path):
    with opened(store_path) as loom:
        main = talk(loom).branch()
        for act in (
            lambda: main.score(["yes", "no"]),
            lambda: main.continue_reply(max_tokens=3).reply,
            lambda: main.choose("is it?", ["yes", "no"]),
            lambda: main.sample("and then?", n=2, max_tokens=3),
            lambda: main.beam("and then?", width=2, max_tokens=3),
            lambda: main.edit("it was not so", 1).run(),
            lambda: main.session.compact(keep=1).run(),
            lambda: main.session.fork("at-60", "main:60").say("and then?", max_tokens=2),
            lambda: main.why("and then?"),
        ):
            loom.flush()
            loom.gc(0)
            assert stored(loom) == 0
            act()
        said = [turn.text for turn in main.log() if turn.role == "user"]
        assert said[2:] == ["is it?", "and then?", "and then?"]


def test_a_search_goes_on_where_it_was_though_its_state_was_dropped(store_path: Path):
    settings = {"width": 2, "keep": 2, "depth": 2, "step_tokens": 4, "seed": 3, "temperature": 1.0}
    with opened(store_path) as loom:
        session = talk(loom)
        straight = session.explore(prompt="what then?", name="straight", **settings).result
        cancel, steps = threading.Event(), []
        stopped = session.explore(
            prompt="what then?",
            name="stopped",
            cancel=cancel,
            told=lambda tokens: steps.append(tokens) or len(steps) < 6 or cancel.set(),
            **settings,
        )
        assert not stopped.result.finished
        loom.gc(0)
        whole = session.explore(name="stopped", resume=True).result
        assert described(session, whole) == described(session, straight)


def described(session: kvloom.Session, found: kvloom.Found) -> list[Any]:
    return [
        (node.depth, node.score, node.tokens, node.logprob, session.branch(node.branch).log()[-1].text)
        for node in found.nodes
    ]


# --- open conversations, other processes ---


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_conversation_goes_on_when_another_process_drops_its_state(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        main = talk(loom).branch()
        main.say("and then?", max_tokens=4)
        loom.flush()
        with opened(store_path, kind) as other:
            other.gc(0)
        reply = main.say("and who was it?", max_tokens=4)
        assert reply.tokens.reused == 0
        assert reply.notices == ()
        loom.flush()
        assert not main.session.missing(verify=True)
    with opened(store_path, kind) as loom:
        assert loom.session("a").branch().say("who?", max_tokens=2).tokens.computed < 40
        assert [turn.text for turn in loom.session("a").log() if turn.role == "user"][-1] == "who?"


def test_a_reply_during_which_its_base_is_dropped_is_kept_and_computed_again(store_path: Path):
    with opened(store_path) as loom:
        main = talk(loom).branch()
        main.say("and then?", max_tokens=2)
        loom.flush()
        run = main.stream("and who was it?", max_tokens=6)
        pieces = iter(run)
        text = next(pieces)
        with opened(store_path) as other, other.database.write() as conn:
            rows = conn.execute(sa.select(segment.c.id).order_by(segment.c.id.desc())).scalars().all()
            assert gc.drop(conn, rows, newest=1 << 40) == set(rows)
        text += "".join(pieces)
        assert run.reply.text == text
        loom.flush()
        after = main.say("and when?", max_tokens=3)
        assert after.tokens.replayed == 0
        loom.flush()
        assert not main.session.missing(verify=True)
        assert bits(loom, "main~2", exact=True)[1].replayed > 0


def test_what_came_into_use_after_the_plan_was_made_stays(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)

        def meanwhile(planned: gc.Collected) -> bool:
            session.branch("third").say("and then?", max_tokens=3)
            loom.flush()
            return True

        report = loom.gc(0, agree=meanwhile)
        assert report.skipped > 0
        assert not session.missing("third", verify=True)


def test_state_that_is_about_to_be_stored_keeps_what_it_stands_on(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        tip = state_of(loom, "third")
        with loom.database.write() as conn:
            turns.set_segment(conn, tip.row, None, tip.base_segment)
        report = loom.gc(0)
        assert report.kept > 0
        with loom.database.read() as conn:
            assert tip.base_segment in set(conn.execute(sa.select(segment.c.id)).scalars())
        assert session.missing("third").cost.replayed == tip.state_end - tip.state_start


def test_state_that_nobody_may_read_any_more_goes_too_and_never_keeps_a_store_from_opening(store_path: Path):
    with opened(store_path) as loom:
        talk(loom)
        with loom.database.write() as conn:  # as healing marks it, where other bits came out; an hour ago
            row = dict(conn.execute(sa.select(segment).order_by(segment.c.id).limit(1)).one()._mapping)
            row.pop("checksum")
            update(conn, segment, row, complete=0, created=0)
    with opened(store_path) as loom:
        assert loom.root
        assert stored(loom) > 0
        assert loom.gc(0).after == 0
        assert loom.session("a").branch().say("and then?", max_tokens=2).tokens.computed > 50


# --- pins, sessions that share, the quota ---


def test_what_is_pinned_is_never_dropped(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        assert session.pin("main~2")
        assert not session.pin("main~2")
        report = loom.gc(0)
        assert report.after == report.kept > 0
        assert not session.missing("main~2", verify=True)
        assert session.dropped("main").fresh
        assert [turn.pinned for turn in session.log()] == [False, False, True, False, False]
        assert session.unpin("main~2")
        assert not session.unpin("main~2")
        assert loom.gc(0).after == 0


def test_a_pin_goes_with_its_turn(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        session.pin("third")
        loom.remove("a")
        assert count(loom, pin) == count(loom, segment) == 0
        with pytest.raises(NothingToDo):
            loom.session("new").pin()


def test_replies_that_were_taken_back_go_before_what_a_branch_leads_to(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        main = session.branch()
        main.say("this is all taken back later, and nobody wants to know of it", max_tokens=20)
        main.undo()
        loom.flush()
        report = loom.gc(0, keep_branches=True)
        assert report.freed > 0
        assert report.branches == ()
        for name in BRANCHES:
            assert not session.missing(name, verify=True)


def test_what_a_loop_of_ones_own_captured_is_kept_until_room_is_needed(store_path: Path):
    with opened(store_path) as loom:
        ids = engine().tokenizer.encode("when was it that they were all there")
        cache, length = loom.lookup(ids)
        assert length == 0
        with torch.inference_mode():
            engine().model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        loom.capture(ids, cache)
        loom.flush()
        assert loom.gc().segments == 0
        assert loom.lookup(ids)[1] == len(ids) - 1
        assert loom.gc(0).segments == 1


def test_a_session_whose_state_stands_on_a_removed_one_still_comes_back(store_path: Path):
    with opened(store_path) as loom:
        talk(loom, "a")
        beside = loom.session("b", system=SYSTEM).branch()
        beside.say("when was it that they were all there, and who said that it would be so?", max_tokens=16)
        beside.say("and what else?", max_tokens=5)
        as_it_was, _ = bits(loom, "main", "b")
        loom.flush()
        loom.remove("a")
        loom.gc(0)
        assert beside.session.dropped().fresh
        assert bits(loom, "main", "b", exact=True)[0] == as_it_was


def test_a_session_goes_on_fresh_where_nobody_is_left_who_knows_how_its_state_was_computed(store_path: Path):
    with opened(store_path) as loom:
        talk(loom, "a")
        beside = loom.session("b", system=SYSTEM).branch()
        beside.say("when was it that they were all there, and who said that it would be so?", max_tokens=16)
        loom.flush()
        loom.gc(0)
        loom.remove("a")
        lost = beside.session.dropped()
        assert (lost.possible, lost.exact_seconds) == (False, None)
        with pytest.raises(EngineError):
            beside.say("and then?", max_tokens=2, exact=True)
        assert beside.say("and then?", max_tokens=2).tokens.computed > lost.fresh > 0


def test_what_another_process_has_dropped_already_is_not_dropped_twice(store_path: Path):
    with opened(store_path) as loom, opened(store_path) as other:
        talk(loom)

        def meanwhile(planned: gc.Collected) -> bool:
            return other.gc(0).freed == planned.freed

        report = loom.gc(0, agree=meanwhile)
        assert (report.freed, report.segments) == (0, 0)
        assert report.skipped > 0


def imported(loom: kvloom.KVLoom, file: io.BytesIO, **options: Any) -> Any:
    file.seek(0)
    return loom.import_bundle(file, "theirs", **options)


def test_an_import_makes_room_within_the_quota_or_is_refused_whole(store_path: Path, tmp_path: Path):
    with opened(tmp_path / "other.db") as other:
        file = io.BytesIO()
        talk(other).export(file)
        size = stored(other)
    with opened(store_path) as loom:
        mine = loom.session("mine", system="Another one, who knew nobody.").branch()
        mine.say("what was it that they said there, and to whom?", max_tokens=30)
        loom.flush()
        before = stored(loom)
        loom.set_quota(Limits(max_state=size // 2))
        with pytest.raises(NoRoom):
            imported(loom, file)
        assert [each.name for each in loom.sessions()] == ["mine"]
        loom.set_quota(Limits(max_state=max(size, before) + size // 2))
        done = imported(loom, file)
        assert done.new_turns > 0
        assert stored(loom) <= max(size, before) + size // 2
        assert imported(loom, file, text_only=True).bytes == 0


def test_recoding_that_would_take_more_than_the_quota_is_refused_and_what_is_there_stays(store_path: Path):
    with kvloom.open(store_path, model=engine(), codec="zstd") as loom:
        session = talk(loom)
        before = stored(loom)
        loom.set_quota(Limits(max_state=before))
        with pytest.raises(NoRoom):
            session.recode(codec="raw")
        assert stored(loom) <= before
        assert not session.missing(verify=True)
        loom.set_quota(Limits())
        assert session.recode(codec="raw").done.after > 0
        assert stored(loom) > before


def test_a_store_over_its_quota_drops_what_is_worth_least_when_state_is_written(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        loom.set_quota(Limits(max_state=stored(loom) + 1000))
        reply = session.branch("third").say("and then?", max_tokens=6)
        loom.flush()
        assert reply.finish_reason == "length"
        assert stored(loom) <= loom.quota().max_state
        assert any("dropped to keep within the store's quota" in each for each in loom.notices())
        assert not session.missing("third", verify=True), "what was just said is held"


def test_where_nothing_may_go_text_is_kept_and_state_is_not_and_that_is_told_once(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        for name in BRANCHES:
            session.pin(name)
        loom.set_quota(Limits(max_state=stored(loom)))
        before = stored(loom)
        for text in ("and then?", "and who?"):
            session.branch().say(text, max_tokens=4)
        loom.flush()
        assert stored(loom) == before
        said = loom.notices()
        assert len([each for each in said if "not stored any more" in each]) <= 1
    with opened(store_path) as loom:
        session = loom.session("a")
        assert session.log()[-2].text == "and who?"
        assert state_of(loom, "main").dropped, "so that it comes back at the speed of reading"
        loom.set_quota(Limits())
        assert session.branch().say("and when?", max_tokens=2).tokens.replayed == 0
        loom.flush()
        assert not session.missing(verify=True)


def test_no_state_is_written_to_a_disk_that_is_nearly_full(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        loom.set_quota(Limits(min_free=1 << 60))
        before = stored(loom)
        session.branch().say("and then?", max_tokens=4)
        loom.flush()
        told = session.branch().say("and who?", max_tokens=4).notices
        assert [each for each in told if "free on the disk" in each]
        assert session.branch().say("and when?", max_tokens=4).notices == ()
        loom.flush()
        assert stored(loom) == before
        assert session.log()[-2].text == "and when?"


def test_what_a_plan_foretells_is_in_the_units_of_what_is_measured(store_path: Path):
    with opened(store_path) as loom:
        session = talk(loom)
        planned = loom.gc(0, dry_run=True)
        assert stored(loom) == planned.before
        done = loom.gc(0)
        assert (done.freed, done.tokens, done.seconds) == (planned.freed, planned.tokens, planned.seconds)
        assert 0 < done.seconds < done.exact_seconds
        main = next(each for each in done.branches if each.name == "a@main")
        assert main.tokens == session.dropped().fresh
        assert main.seconds == pytest.approx(session.dropped().fresh_seconds)
        assert main.exact_seconds == pytest.approx(session.dropped().exact_seconds)
        reply = session.branch().say("and then?", max_tokens=2)
        assert reply.tokens.computed >= main.tokens
