"""Paths of many short turns: their small segments become few, and nobody can tell but by the time."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from exact.worker import frame_of, rows_of
from tiny import tiny_model, tiny_tokenizer

from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom_proto.records import LayerKind
from kvloom_store import fsck, healing, merging, refs, trie, turns, writer
from kvloom_store.gathered import MOST_TOKENS
from kvloom_store.names import parse_ref
from kvloom_store.schema import chunk, segment, turn_state

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "gemma3_text", "lfm2", "deepseek_v4")
"""Rows, windows, recurrent state, and blocks of tokens."""

Said = Callable[..., Path]

LONG = " ".join(["they were there"] * 60)
SHORT = ("why?", "and then?", "was she with them?")
EXCHANGES = 26
"""So many that there are twice FEW_SEGMENTS, and a run of them is merged."""


@functools.cache
def engine(kind: str = "llama") -> TransformersEngine:
    return TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}")


def opened(path: Path, kind: str = "llama") -> KVLoom:
    return KVLoom(path, model=engine(kind))


def talk(path: Path, kind: str = "llama", *, exchanges: int = EXCHANGES, each_opened: bool = True) -> None:
    """A long message and many short ones, each said by a process of its own, or all by one."""
    with opened(path, kind) as loom:
        branch = loom.session("talk", system="Be brief.").branch()
        branch.say(LONG, max_tokens=2)
        for number in range(0 if each_opened else exchanges):
            branch.say(SHORT[number % 3], max_tokens=2)
    for number in range(exchanges if each_opened else 0):
        with opened(path, kind) as loom:
            loom.find("talk").branch().say(SHORT[number % 3], max_tokens=2)


def segments(path: Path) -> list[dict[str, Any]]:
    """Those there are, by where they begin."""
    with opened(path) as loom, loom.database.read() as conn:
        return [dict(row._mapping) for row in conn.execute(sa.select(segment).order_by(segment.c.start))]


def bits(loom: KVLoom, ref: str) -> tuple[int, list[str], list[str] | None]:
    """The state at a ref, as a new process brings it back, and where it ends."""
    loom.resumer.forget()
    with loom.database.read() as conn:
        point = refs.resolve(conn, parse_ref(ref))
        [state] = turns.states_of(conn, [point.turn])
        ids = trie.tokens_to(conn, state.position.node, state.position.offset)
    with loom.engine.lock:
        live, account = loom.resumer.resume(ids[: state.state_end], state, room=8, logits=False)
    assert account.notices == []
    assert account.replayed == 0
    return live.length, rows_of(live, live.length), frame_of(live)


def findings(loom: KVLoom) -> list[str]:
    return [each.words for each in fsck.check(loom.database).findings]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A conversation, made once: a function of its kind, of how it was said, and of whether it was merged."""
    folder = tmp_path_factory.mktemp("kept")

    @functools.cache
    def made(kind: str, each_opened: bool, merged: bool) -> Path:
        path = folder / f"{kind}-{each_opened}-{merged}.db"
        with pytest.MonkeyPatch.context() as patch:
            if not merged:  # every turn keeps a segment of its own
                patch.setattr(writer, "FEW_SEGMENTS", 10**9)
                patch.setattr(merging, "FEW_SEGMENTS", 10**9)
            talk(path, kind, each_opened=each_opened)
        return path

    return made


@pytest.fixture
def said(tmp_path: Path, kept: Callable[..., Path]) -> Callable[..., Path]:
    """The same, as a file of this test's own."""

    def copied(kind: str = "llama", *, each_opened: bool = True, merged: bool = True) -> Path:
        path = tmp_path / f"{'merged' if merged else 'apart'}.db"
        shutil.copyfile(kept(kind, each_opened, merged), path)
        return path

    return copied


@pytest.mark.parametrize(
    ("kind", "each_opened"), [*((kind, True) for kind in KINDS), ("gemma3_text", False), ("lfm2", False)]
)
def test_every_turn_comes_back_with_the_bits_it_had(said: Said, kind: str, each_opened: bool) -> None:
    path, apart = (said(kind, each_opened=each_opened, merged=merged) for merged in (True, False))
    assert len(segments(path)) < len(segments(apart)) * (0.6 if each_opened else 0.5)
    with opened(path, kind) as loom, opened(apart, kind) as alone:
        assert findings(loom) == []
        refs_there = [f"talk@main~{back}" for back in range(0, 2 * EXCHANGES + 1, 5)]
        assert [bits(loom, ref) for ref in refs_there] == [bits(alone, ref) for ref in refs_there]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_gone_on_from_and_forked_as_if_nothing_had_been_merged(said: Said, kind: str) -> None:
    found = []
    for each in (said(kind), said(kind, merged=False)):
        with opened(each, kind) as loom:
            session = loom.find("talk")
            tokens = sum(turn.tokens for turn in session.log("main"))
            session.fork("inside", f"main:{tokens - 100}")
            session.fork("between", "main~31")
            for name in ("inside", "between", "main"):
                reply = session.branch(name).say("what of the others?", max_tokens=6, temperature=1.0, seed=5)
                found.append((name, reply.text, bits(loom, f"talk@{name}")))
            receipt = session.verify("between", replay=True)
            assert (receipt.damaged, receipt.difference) == ((), None)
            assert findings(loom) == []
    assert found[:3] == found[3:]


def test_short_turns_wait_for_one_another_so_long_and_no_longer(said: Said) -> None:
    with opened(said(merged=False)) as loom:
        branch, stored = loom.find("talk").branch(), loom.writer
        stored.gather_seconds = 1e6
        for _ in range(3):
            branch.say("why?", max_tokens=2)
        assert len(stored._jobs) == 6
        stored.gather_seconds = 0.01
        branch.say("why?", max_tokens=2)
        with stored._changed:
            assert stored._changed.wait_for(lambda: not stored._jobs and not stored._busy, timeout=60)
        assert findings(loom) == []
    sizes = [row["end"] - row["start"] for row in segments(loom.database.path)]
    assert max(sizes[-3:]) > 40, "what waited was written as one"


def test_no_more_than_half_of_a_path_is_written_again(tmp_path: Path) -> None:
    talk(tmp_path / "s.db", exchanges=2 * EXCHANGES)
    rows = segments(tmp_path / "s.db")
    assert any(row["merged"] for row in rows)
    assert sum(row["merged"] for row in rows) <= 0.5 * sum(row["raw_bytes"] for row in rows)
    assert max(row["end"] - row["start"] for row in rows if row["merged"]) <= MOST_TOKENS


def test_what_several_paths_share_a_part_of_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with opened(path) as loom:
        loom.session("talk", system="Be brief.").branch().say(LONG, max_tokens=2)
    for number in range(EXCHANGES):  # every other turn is answered twice
        with opened(path) as loom:
            branch = loom.find("talk").branch()
            branch.say(SHORT[number % 3], max_tokens=2, temperature=1.0, seed=1)
            if number % 2:
                branch.session.fork(f"other{number}", branch.name).say("no?", max_tokens=2)
    assert not any(row["merged"] for row in segments(path))


@pytest.mark.parametrize("kind", KINDS)
def test_another_path_that_begins_alike_reuses_as_much_as_before(said: Said, kind: str) -> None:
    reused: list[list[int]] = []
    for path in (said(kind), said(kind, merged=False)):
        with opened(path, kind) as loom:
            with loom.database.read() as conn:
                point = refs.resolve(conn, parse_ref("talk"))
                [state] = turns.states_of(conn, [point.turn])
                ids = trie.tokens_to(conn, state.position.node, state.position.offset)
            reused.append([])
            for shared in range(200, len(ids), 37):
                loom.resumer.forget()
                with loom.engine.lock:
                    live, account = loom.resumer.resume([*ids[:shared], 5, 6, 7], None, room=8)
                reused[-1].append(live.length)
                assert account.notices == []
    assert reused[0] == reused[1]


def flip(path: Path, which: dict[str, Any]) -> bytes:
    """Flip a bit in the last rows of a segment; the bytes they had."""
    with opened(path) as loom, loom.database.write() as conn:
        rows = (chunk.c.segment == which["id"]) & (chunk.c.kind != int(LayerKind.KEYFRAME))
        query = sa.select(chunk).where(rows).order_by(chunk.c.position.desc())
        row = conn.execute(query.limit(1)).one()
        key = [column == row._mapping[column.name] for column in chunk.primary_key.columns]
        data = np.frombuffer(row.blob, np.uint8).copy()
        data[len(data) // 2] ^= 4
        conn.execute(chunk.update().where(*key).values(blob=data.tobytes()))
        return bytes(row.blob)


def last_turn(loom: KVLoom, which: dict[str, Any]) -> str:
    """The id of the turn whose state ends a segment."""
    ends = (turn_state.c.segment == which["id"]) & (turn_state.c.state_end == which["end"])
    with loom.database.read() as conn:
        row = conn.execute(sa.select(turn_state.c.turn).where(ends).limit(1)).scalar_one()
        return turns.get(conn, row).id


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_one_is_computed_again_whole_and_is_what_it_was(said: Said, kind: str) -> None:
    path = said(kind)
    merged = next(row for row in segments(path) if row["merged"])
    with opened(path, kind) as loom:
        last = last_turn(loom, merged)
        before = bits(loom, f"talk@{last}")
    was = flip(path, merged)
    with opened(path, kind) as loom:
        assert len(findings(loom)) == 1
        reply = loom.find("talk").fork("again", last).say("so?", max_tokens=2)
        loom.flush()
        assert any("computed again" in notice for notice in reply.notices), reply
        assert findings(loom) == []
        assert bits(loom, f"talk@{last}") == before
        with loom.database.read() as conn:
            assert was in conn.execute(sa.select(chunk.c.blob).where(chunk.c.segment == merged["id"])).scalars().all()


def test_where_a_damaged_one_cannot_be_mended_each_of_its_turns_gets_state_of_its_own(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = said()
    with opened(path) as loom:
        before = bits(loom, "talk")
    merged = next(row for row in segments(path) if row["merged"])
    flip(path, merged)
    with opened(path) as loom:
        with monkeypatch.context() as patch:  # as on another processor
            patch.setattr(healing, "heal", lambda *args, **how: False)
            reply = loom.find("talk").branch().say("so?", max_tokens=2)
        assert any("fresh variant" in notice for notice in reply.notices)
        loom.flush()
        assert bits(loom, "talk~2") == before
        with loom.database.read() as conn:
            named = conn.execute(sa.select(turn_state.c.segment)).scalars().all()
        assert merged["id"] not in named
        assert None not in named


def test_a_repair_mends_a_damaged_one(said: Said) -> None:
    path = said("lfm2")
    merged = next(row for row in segments(path) if row["merged"])
    flip(path, merged)
    with opened(path, "lfm2") as loom:
        told: list[str] = []
        assert loom.repair(told=told.append).findings == ()
        assert told == [f"segment {merged['id']} was computed again, and is what it was, bit for bit"]


def test_who_has_the_path_open_meanwhile_goes_on_and_stores_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    talk(path, exchanges=EXCHANGES // 2)
    with opened(path) as loom:
        branch = loom.find("talk").branch()
        branch.say("why?", max_tokens=2)
        before = {row["id"] for row in segments(path)}
        for _ in range(EXCHANGES):
            with opened(path) as other:
                other.find("talk").branch().say("why?", max_tokens=2)
        assert before - {row["id"] for row in segments(path)}, "some was merged meanwhile"
        reply = loom.find("talk").branch().say("and now?", max_tokens=2)
        assert reply.notices == ()
        loom.flush()
        assert findings(loom) == []


def test_state_that_is_handed_over_while_what_it_stands_on_is_merged_is_stored(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn is committed, and its job waits; another process merges the very segment below it."""
    path = said(merged=False)
    with opened(path) as loom:
        write, merged = loom.writer._write, list[int]()

        def late(jobs: Any) -> None:
            with KVLoom(path) as other:
                merged.append(merging.merge_small(other.database, jobs[0].base.segment, most_bytes=1 << 30))
            write(jobs)

        with monkeypatch.context() as patch:
            patch.setattr(loom.writer, "_write", late)
            patch.setattr(merging, "REWRITTEN", 10.0)
            patch.setattr(merging, "LEAST_TOKENS", 2)
            loom.find("talk").branch().say("and now?", max_tokens=2)
            loom.flush()
        assert max(merged) > 0
        assert findings(loom) == []
        assert bits(loom, "talk")[0] > 0


def test_removing_and_collecting_leave_a_sound_store(said: Said) -> None:
    path = said()
    with opened(path) as loom:
        session = loom.find("talk")
        session.fork("early", "main~40").say("so?", max_tokens=2)
        loom.flush()
        early = bits(loom, "talk@early")
        loom.remove_branch("talk", "main")
        assert findings(loom) == []
        assert bits(loom, "talk@early") == early
        loom.gc(0)
        assert [each for each in findings(loom) if "was dropped" not in each] == []
        assert session.branch("early").say("and?", max_tokens=2).text
