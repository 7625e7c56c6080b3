"""Coming back: after a crash, after damage, on another branch, in another process, and not under another model.

Run as a program this file is the other process: its first argument names what to do, the second one says how.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import forked
import pytest
import sqlalchemy as sa
import torch
from exact import harness, whole
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer
from tokenizers import AddedToken

import kvloom.passes
from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.errors import (
    ContextOverflow,
    CorruptRow,
    ModelMismatch,
    NothingToDo,
    ReuseRequired,
    StoreError,
    StoreUnavailable,
    UnsupportedModel,
)
from kvloom.loom import KVLoom
from kvloom_store import refs, schema, segments, trie, turns
from kvloom_store.names import parse_ref
from kvloom_store.schema import chunk, node, segment, turn, turn_state
from kvloom_store.turns import TurnState

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = "You are the one who was there with them."
FIRST = "When was it that they were all there, and who said that it would be so?"
SECOND = "And what would you have said to her, had you been there?"
THIRD = "Who else was there?"


@functools.cache
def engine(kind: str = "llama", dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(tiny_model(kind, dtype), tiny_tokenizer(), name=f"tiny {kind}")


def opened(path: Path) -> KVLoom:
    """The store as a new process finds it, but for the model, which stays loaded."""
    return KVLoom(path, model=engine())


def talk(loom: KVLoom, *texts: str, session: str = "talk", **options: Any) -> Branch:
    branch = loom.session(session, system=SYSTEM).branch()
    for text in texts:
        branch.say(text, **{"max_tokens": 12, **options})
    return branch


def state_of(loom: KVLoom, turn_id: str, session: str = "talk") -> tuple[TurnState, list[int]]:
    """What the model made of a turn, and the tokens of its path."""
    with loom.database.read() as conn:
        row = refs.resolve(conn, parse_ref(f"{session}@{turn_id}")).turn
        state = turns.best_state(turns.states_of(conn, [row]), loom.root)
        return state, trie.tokens_to(conn, state.position.node, state.position.offset)


def brought_back(loom: KVLoom, turn_id: str, session: str = "talk") -> tuple[list[str], Any]:
    """Digests of a turn's rows, brought back from nothing, and what that cost."""
    loom.resumer.forget()
    state, ids = state_of(loom, turn_id, session)
    with loom.engine.lock:
        live, account = loom.resumer.resume(ids[: state.state_end], state, room=1)
        return rows_of(live, state.state_end), account


def live_rows(loom: KVLoom) -> list[str]:
    live = loom.resumer.live
    return rows_of(live, live.captured)


def chunks_of(loom: KVLoom, segment_id: int) -> list[Any]:
    with loom.database.read() as conn:
        return conn.execute(sa.select(chunk).where(chunk.c.segment == segment_id).order_by(chunk.c.layer)).all()


def flip(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def child(action: str, path: Path, **spec: Any) -> forked.Program:
    """Another process, started."""
    return forked.start([__file__, action, json.dumps({"path": str(path), **spec})], env=harness.environment())


def finished(process: forked.Program, *, killed: bool = False) -> dict[str, Any]:
    """What another process printed last."""
    done = process.finished()
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def counted(loom: KVLoom, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each forward pass meanwhile."""
    passes: list[int] = []
    run = loom.engine.run_pass
    with monkeypatch.context() as patch:
        patch.setattr(loom.engine, "run_pass", lambda live, ids: passes.append(len(ids)) or run(live, ids))
        yield passes


def check_clean(loom: KVLoom) -> None:
    """Every row's checksum holds, the trie is one, and every segment is whole."""
    loom.flush()
    with loom.database.read() as conn:
        whole.check(conn)


# State that was never written


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store whose process was killed after a turn and before its state was written, and what that process saw."""
    path = tmp_path_factory.mktemp("crash") / "kvloom.db"
    return path, finished(child("crash", path), killed=True)


@pytest.fixture
def lost(crash: tuple[Path, dict[str, Any]], store_path: Path) -> dict[str, Any]:
    """A copy of that store, at ``store_path``."""
    store_path.parent.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{crash[0]}{suffix}", f"{store_path}{suffix}")
    return crash[1]


def test_state_lost_in_a_crash_is_replayed_exactly_and_reported(store_path: Path, lost: dict[str, Any]) -> None:
    with opened(store_path) as loom:
        states = [state_of(loom, each.id)[0] for each in loom.find("talk").tree()[1:]]
        assert [state.segment is None for state in states] == [False, False, True, True]
        missing = sum(state.state_end - state.state_start for state in states[2:])
        rows, account = brought_back(loom, lost["turn"])
        assert rows == lost["rows"]
        assert account.replayed == missing
        assert account.reused == states[1].state_end
    with opened(store_path) as loom:
        reply = loom.find("talk").branch().say(THIRD, max_tokens=3)
        assert reply.tokens.replayed == 0
        assert reply.tokens.reused == states[3].state_end
        check_clean(loom)


def test_a_run_after_a_crash_reports_what_it_replayed(store_path: Path, lost: dict[str, Any]) -> None:
    with opened(store_path) as loom:
        reply = loom.find("talk").branch().say(THIRD, max_tokens=3)
        assert reply.tokens.replayed == lost["lost"] > 0
        check_clean(loom)


@pytest.mark.usefixtures("lost")
def test_requiring_reuse_refuses_to_replay_and_stores_nothing(store_path: Path) -> None:
    with opened(store_path) as loom:
        before = len(loom.find("talk").tree())
        with pytest.raises(ReuseRequired):
            loom.find("talk").branch().say(THIRD, require_reuse=True)
        assert len(loom.find("talk").tree()) == before
        assert loom.find("talk").branch().say(THIRD, max_tokens=2).tokens.replayed > 0


def test_a_variant_without_state_is_replayed_exactly_later(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST)
        seen: list[list[str]] = []
        forget = loom.resumer.forget
        monkeypatch.setattr(loom.resumer, "forget", lambda: seen.append(live_rows(loom)) or forget())
        reply = branch.say(SECOND, max_tokens=9, reuse=False)
        assert (reply.tokens.reused, reply.tokens.replayed) == (0, 0)
        state, ids = state_of(loom, reply.turn)
        assert (state.segment, state.variant) == (None, True)
        assert reply.tokens.computed == len(ids) - reply.tokens.generated
    with opened(store_path) as loom:
        rows, account = brought_back(loom, reply.turn)
        assert rows == seen[0]
        assert (account.reused, account.replayed) == (0, state.state_end)
    with opened(store_path) as loom:
        rows, account = brought_back(loom, reply.turn)
        assert rows == seen[0]
        assert (account.reused, account.replayed) == (state.state_end, 0)
        check_clean(loom)


# Damage


@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_flipped_bit_of_a_chunk_is_found_mended_and_reported(store_path: Path, which: int, codec: str) -> None:
    with KVLoom(store_path, model=engine(), codec=codec) as loom:
        branch = talk(loom, FIRST, SECOND)
        turn_id = branch.log()[-1].id
        rows = live_rows(loom)
        loom.flush()
        link = loom.resumer.live.chain[which]
        before = chunks_of(loom, link.handle.segment)
        bit = len(before[0].blob) * 8 // 3
        with loom.database.write() as conn:
            at = (chunk.c.segment == link.handle.segment) & (chunk.c.layer == before[0].layer)
            at &= chunk.c.position == before[0].position
            conn.execute(chunk.update().where(at).values(blob=flip(before[0].blob, bit)))
    with opened(store_path) as loom:
        reply = loom.find("talk").branch().say(THIRD, max_tokens=3)
        assert any("damaged" in notice for notice in reply.notices)
        assert reply.tokens.replayed >= link.end - link.start
        assert chunks_of(loom, link.handle.segment) == before
        check_clean(loom)
    with opened(store_path) as loom:
        found, account = brought_back(loom, turn_id)
        assert found == rows
        assert (account.replayed, account.notices) == (0, [])


def test_mending_one_segment_replays_only_that_segment(store_path: Path) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST, SECOND)
        loom.flush()
        link = loom.resumer.live.chain[0]
        with loom.database.write() as conn:
            conn.execute(chunk.delete().where(chunk.c.segment == link.handle.segment))
        turn_id = branch.log()[-1].id
    with opened(store_path) as loom:
        _, account = brought_back(loom, turn_id)
        assert account.replayed == link.end - link.start


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_a_damaged_manifest_is_found_and_its_state_stored_anew(store_path: Path, which: int) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST, SECOND)
        turn_id = branch.log()[-1].id
        rows = live_rows(loom)
        loom.flush()
        link = loom.resumer.live.chain[which]
        with loom.database.write() as conn:
            at = segment.c.id == link.handle.segment
            manifest = conn.execute(sa.select(segment.c.manifest).where(at)).scalar_one()
            conn.execute(segment.update().where(at).values(manifest=flip(manifest, 77)))
    with opened(store_path) as loom:
        reply = loom.find("talk").branch().say(THIRD, max_tokens=3)
        assert any("damaged" in notice for notice in reply.notices)
        assert reply.tokens.replayed >= link.end - link.start
    with opened(store_path) as loom:
        found, account = brought_back(loom, turn_id)
        assert found == rows
        assert (account.replayed, account.notices) == (0, [])


@pytest.mark.parametrize("column", ["message", "role", "settings", "digest"])
def test_a_damaged_turn_is_reported_and_never_served(store_path: Path, column: str) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST, SECOND)
        damaged = branch.log()[-2].id
        talk(loom, THIRD, session="other")
        with loom.database.write() as conn:
            at = turn.c.public_id == bytes.fromhex(damaged)
            value = conn.execute(sa.select(turn.c[column]).where(at)).scalar_one()
            other = value[:-1] + "t" if isinstance(value, str) else flip(value, 8 * len(value) - 3)
            conn.execute(turn.update().where(at).values({column: other}))
    with opened(store_path) as loom:
        session = loom.find("talk")
        for use in (session.log, session.tree, lambda: session.branch().say(THIRD), session.branch().regenerate):
            with pytest.raises(CorruptRow) as error:
                use()
            assert error.value.table == "turn"
        talk(loom, SECOND, session="other")


@pytest.mark.parametrize("table", [turn_state, node], ids=["turn_state", "node"])
def test_damaged_tokens_are_reported_and_never_run(store_path: Path, table: sa.Table) -> None:
    with opened(store_path) as loom:
        talk(loom, FIRST, SECOND)
        loom.flush()
        with loom.database.write() as conn:
            row = conn.execute(sa.select(table).order_by(table.c.id.desc())).first()
            conn.execute(table.update().where(table.c.id == row.id).values(tokens=flip(row.tokens, 1)))
    with opened(store_path) as loom:
        with pytest.raises(CorruptRow) as error:
            loom.find("talk").branch().say(THIRD)
        assert error.value.table == table.name
        assert [each.role for each in loom.find("talk").log()] == ["system", *["user", "assistant"] * 2]


# Branches


def test_switching_between_branches_keeps_both_exact(store_path: Path) -> None:
    seen: dict[str, list[str]] = {}
    with opened(store_path) as loom:
        branch = talk(loom, FIRST)
        other = branch.fork("other")
        for number in range(3):
            for each, text in ((branch, SECOND), (other, THIRD)):
                reply = each.say(f"{text} {number}", max_tokens=7, temperature=1.0, seed=number)
                assert reply.tokens.replayed == 0
                assert reply.branch == each.name
                seen[reply.turn] = live_rows(loom)
        for turn_id, rows in seen.items():
            state, ids = state_of(loom, turn_id)
            live, _ = loom.resumer.resume(ids[: state.state_end], state, room=1)  # from whatever is in memory
            assert rows_of(live, state.state_end) == rows
    with opened(store_path) as loom:
        for turn_id, rows in seen.items():
            assert brought_back(loom, turn_id)[0] == rows
        check_clean(loom)


def test_the_same_text_on_another_branch_computes_only_what_differs(store_path: Path) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST)
        other = branch.fork("other")
        first = branch.say(SECOND, max_tokens=9)
        again = other.say(SECOND, max_tokens=9)
        assert (again.tokens.computed, again.text) == (0, first.text)
        assert first.tokens.computed > 10
        third = branch.fork("third", back=2)
        changed = third.say(SECOND.replace("been there?", "been away?"), max_tokens=2)
        _, old = state_of(loom, first.turn)
        _, new = state_of(loom, changed.turn)
        common = next(at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        assert changed.tokens.computed == len(new) - 2 - common
        assert changed.tokens.reused == common
        check_clean(loom)


def test_a_new_session_with_the_same_beginning_reuses_it(store_path: Path) -> None:
    with opened(store_path) as loom:
        talk(loom, FIRST)
        same = talk(loom, session="same").say(FIRST, max_tokens=4)
        assert (same.tokens.computed, same.tokens.reused) == (0, len(state_of(loom, same.turn, "same")[1]) - 4)
    with opened(store_path) as loom:
        near = talk(loom, session="near").say(FIRST.replace("so?", "not?"), max_tokens=1)
        total = near.tokens.reused + near.tokens.computed
        assert total == len(state_of(loom, near.turn, "near")[1]) - 1
        assert near.tokens.computed < 20 < near.tokens.reused


def test_what_a_cancelled_prefill_computed_is_reused_by_whoever_shares_its_tokens(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State counts for every path it lies on, also for those that part from its turn's before the turn's end."""
    monkeypatch.setattr(kvloom.passes, "GRID", 16)
    with opened(store_path) as loom:
        talk(loom, session="known").say(FIRST + SECOND, max_tokens=1, reuse=False)  # tokens without state
        cancel = threading.Event()
        talk(loom, session="cancelled").say(
            FIRST + THIRD, cancel=cancel, progress=lambda done, _: cancel.set() if done else None
        )
        state, _ = state_of(loom, loom.find("cancelled").log()[-1].id, "cancelled")
        assert state.state_end == 32  # the check comes before each pass: two had run
        reply = talk(loom, session="after").say(FIRST + SECOND + THIRD, max_tokens=1)
        assert reply.tokens.reused == 32


# Regenerating


def test_regenerating_runs_no_forward_pass_before_its_first_token(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST)
        with counted(loom, monkeypatch) as passes:
            assert branch.regenerate(max_tokens=1).reply.tokens.generated == 1
        assert passes == []
    with opened(store_path) as loom, counted(loom, monkeypatch) as passes:
        reply = loom.find("talk").branch().regenerate(max_tokens=1, temperature=1.0).reply
        assert passes == []
        assert (reply.tokens.computed, reply.tokens.replayed, reply.tokens.generated) == (0, 0, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_regeneration_gives_the_same_tokens_fifty_times_of_fifty(store_path: Path, dtype: str) -> None:
    with KVLoom(store_path, model=engine("qwen3", dtype)) as loom:
        reply = talk(loom, FIRST, max_tokens=20).log()[-1]
        tokens = state_of(loom, reply.id)[0].tokens
    same = 0
    for _ in range(50):
        with KVLoom(store_path, model=engine("qwen3", dtype)) as loom:
            again = loom.find("talk").branch().regenerate(max_tokens=20).reply
            same += state_of(loom, again.turn)[0].tokens == tokens
    assert same == 50
    with KVLoom(store_path, model=engine("qwen3", dtype)) as loom, loom.database.read() as conn:
        # All of them are one: equal content on the same base is stored once.
        assert conn.execute(sa.select(sa.func.count()).select_from(segment)).scalar_one() == 2


def test_greedy_regeneration_in_a_new_process_gives_the_same_tokens(store_path: Path) -> None:
    with opened(store_path) as loom:
        reply = talk(loom, FIRST, max_tokens=20).log()[-1]
        tokens = state_of(loom, reply.id)[0].tokens
    for _ in range(2):
        assert finished(child("regenerate", store_path))["tokens"] == [tokens] * 5


# Several processes


def test_two_processes_with_one_and_two_threads_say_the_same_at_once_and_both_go_on_exactly(store_path: Path) -> None:
    with opened(store_path):
        pass
    texts = [FIRST * 4, SECOND, THIRD]
    both = {
        name: child("say", store_path, session=name, texts=texts, threads=threads)
        for name, threads in (("one", 1), ("two", 2))
    }
    for process in both.values():
        assert process.stdout.readline() == "ready\n"
    for process in both.values():
        process.stdin.write("go\n")
        process.stdin.flush()
    seen = {name: finished(process) for name, process in both.items()}
    for threads in (1, 2):
        name = ("one", "two")[threads - 1]
        again = finished(child("look", store_path, session=name, turn=seen[name]["turn"], threads=threads))
        assert again["rows"] == seen[name]["rows"]
        assert again["next"] == seen[name]["next"]
        assert again["replayed"] == 0
    with opened(store_path) as loom:
        check_clean(loom)
        assert {session.name for session in loom.sessions()} == {"one", "two"}


@pytest.mark.parametrize("when", ["before the message", "before the reply"])
def test_the_turn_of_the_slower_of_two_processes_is_kept_on_a_branch_of_its_own(store_path: Path, when: str) -> None:
    with opened(store_path) as loom:
        branch = talk(loom, FIRST)
        loom.flush()
        other: list[dict[str, Any]] = []

        def meanwhile(*_: int) -> None:
            if not other:
                process = child("say", store_path, session="talk", texts=[THIRD], threads=1)
                process.stdin.write("go\n")
                other.append(finished(process))

        run = branch.stream(SECOND, max_tokens=30, progress=meanwhile if when == "before the message" else None)
        for _ in run:
            meanwhile()
        assert run.reply.branch == "main-2"
        assert any("main-2" in notice for notice in run.reply.notices)
        session = loom.find("talk")
        assert session.branch().log()[-1].id == other[0]["turn"]
        mine = session.branch("main-2").log()
        assert (mine[-1].id, mine[-2].text) == (run.reply.turn, SECOND)
        rows = live_rows(loom)
        assert brought_back(loom, other[0]["turn"])[0] == other[0]["rows"]
        assert brought_back(loom, run.reply.turn)[0] == rows
        check_clean(loom)


# What is refused


def _counts(loom: KVLoom) -> dict[str, int]:
    with loom.database.read() as conn:
        return {
            name: conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in schema.metadata.tables.items()
        }


def test_context_overflow_leaves_nothing_behind(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = TransformersEngine(tiny_model("llama", max_position_embeddings=160), tiny_tokenizer())
    with KVLoom(store_path, model=small) as loom:
        branch = talk(loom, FIRST, max_tokens=3)
        loom.flush()
        before = _counts(loom)
        with counted(loom, monkeypatch) as passes, pytest.raises(ContextOverflow) as error:
            branch.say(FIRST * 9)
        assert (passes, error.value.limit, error.value.have > 160) == ([], 160, True)
        assert _counts(loom) == before
        reply = branch.say("Who?", max_tokens=500)
        state, ids = state_of(loom, reply.turn)
        assert (reply.finish_reason, len(ids), state.state_end) == ("length", 160, 159)
        for use in (lambda: branch.say("Who?"), lambda: branch.continue_reply().reply):
            with pytest.raises(ContextOverflow):
                use()
        assert branch.regenerate(max_tokens=1).reply.finish_reason == "length"


def _other(change: str) -> TransformersEngine:
    tokenizer = tiny_tokenizer()
    if change == "tokenizer":
        tokenizer.add_tokens([AddedToken("zebra", special=False)])
    made = {
        "weights": lambda: tiny_model("llama", seed=1),
        "dtype": lambda: tiny_model("llama", "bfloat16"),
        "rope": lambda: tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 20_000.0}),
        "tokenizer": lambda: tiny_model("llama"),
        "same": lambda: tiny_model("llama"),
    }[change]()
    return TransformersEngine(made, tokenizer)


@pytest.mark.parametrize("change", ["weights", "dtype", "rope", "tokenizer"])
def test_another_model_is_refused_with_the_field_that_differs(store_path: Path, change: str) -> None:
    with opened(store_path) as loom:
        talk(loom, FIRST)
        loom.flush()
    with KVLoom(store_path, model=_other(change)) as loom:
        branch = loom.find("talk").branch()
        before = _counts(loom)
        for use in (lambda: branch.say(SECOND), branch.regenerate, branch.continue_reply):
            with pytest.raises(ModelMismatch) as error:
                use()
            assert change in error.value.field
            assert error.value.field in str(error.value)
        assert {**before, **_counts(loom)} == before or change == "tokenizer"
        assert len(branch.log()) == 3


def test_the_same_model_in_another_object_is_not_refused(store_path: Path) -> None:
    with opened(store_path) as loom:
        talk(loom, FIRST)
    with KVLoom(store_path, model=_other("same")) as loom:
        assert loom.find("talk").branch().say(SECOND, max_tokens=2, require_reuse=True).tokens.replayed == 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("recurrent_gemma", "keeps state inside its modules"),
    ],
)
def test_a_model_whose_state_cannot_be_kept_is_refused_by_name(kind: str, reason: str) -> None:
    model = tiny_model(kind)
    with pytest.raises(UnsupportedModel) as error:
        TransformersEngine(model, tiny_tokenizer())
    assert type(model).__name__ in str(error.value)
    assert reason in error.value.reason


def test_what_cannot_be_taken_up_says_so(store_path: Path) -> None:
    with opened(store_path) as loom:
        branch = loom.session("talk", system=SYSTEM).branch()
        for use in (branch.regenerate, branch.continue_reply, branch.undo):
            with pytest.raises(NothingToDo):
                use()


# The other process


def _child_crash(spec: dict[str, Any]) -> None:
    """Say something, and die when the turns have committed and their state is not yet written."""
    loom = opened(Path(spec["path"]))
    branch = talk(loom, FIRST)
    loom.flush()
    lost: list[int] = []
    loom.writer.submit = lambda job: lost.append(job.end - job.start)  # type: ignore[method-assign]
    reply = branch.say(SECOND, max_tokens=12, temperature=1.0, seed=4)
    print(json.dumps({"turn": reply.turn, "rows": live_rows(loom), "lost": sum(lost)}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _go_on(loom: KVLoom, turn_id: str, session: str) -> dict[str, Any]:
    """What a turn's state is, and twenty tokens that follow, with their logits."""
    from exact.worker import bits, sha

    from kvloom.sampling import SamplingSettings

    state, ids = state_of(loom, turn_id, session)
    live, account = loom.resumer.resume(ids, state, room=20)
    rows, tokens = rows_of(live, state.state_end), []
    logits = loom.engine.prefill(live, ids[live.length :])
    first = sha(bits(logits))
    for token in loom.engine.generate(live, logits, SamplingSettings(), seen=ids, seed=0):
        tokens.append(token)
        if len(tokens) == 20:
            break
    hidden = sha(bits(live.hidden))
    live.truncate(live.captured)
    return {"turn": turn_id, "rows": rows, "next": [first, tokens, hidden], "replayed": account.replayed}


def _child_say(spec: dict[str, Any]) -> None:
    """Say some texts when told to."""
    torch.set_num_threads(spec["threads"])
    with opened(Path(spec["path"])) as loom:
        engine()
        print("ready", flush=True)
        sys.stdin.readline()
        branch = talk(loom, *spec["texts"], session=spec["session"])
        print(json.dumps(_go_on(loom, branch.log()[-1].id, spec["session"])))


def _child_look(spec: dict[str, Any]) -> None:
    """Bring a turn back and go on from it."""
    torch.set_num_threads(spec["threads"])
    with opened(Path(spec["path"])) as loom:
        print(json.dumps(_go_on(loom, spec["turn"], spec["session"])))


def _child_regenerate(spec: dict[str, Any]) -> None:
    """Regenerate the last reply, five times."""
    torch.set_num_threads(1)
    found = []
    for _ in range(5):
        with opened(Path(spec["path"])) as loom:
            reply = loom.find("talk").branch().regenerate(max_tokens=20).reply
            found.append(state_of(loom, reply.turn)[0].tokens)
    print(json.dumps({"tokens": found}))


def test_rows_that_wait_to_be_stored_are_not_overwritten_by_those_of_a_branch_that_left_them(store_path: Path):
    """Neither turn was stored, as after a crash: one is replayed, cut where the other left it, and that one runs."""
    with opened(store_path) as loom:
        main = talk(loom, FIRST)
        reply, said = main.log()[-1], main.log()[-2]
        start = state_of(loom, said.id)[0].start
        aside = main.session.fork("aside", f"main:{start + said.tokens // 2}")
        aside.say(SECOND, max_tokens=6)
        loom.flush()
        tips = [reply.id, aside.log()[-1].id]
        as_it_was = [brought_back(loom, tip)[0] for tip in tips]
        with loom.database.write() as conn:
            conn.execute(chunk.delete())
            for state in [state_of(loom, turn.id)[0] for turn in loom.find("talk").tree()[1:]]:
                turns.set_segment(conn, state.row, None, None)
            conn.execute(segment.delete())
    with opened(store_path) as loom:
        asked, write, flush = threading.Event(), segments.write, loom.writer.flush

        def slow(*args: Any, **options: Any) -> int:
            assert asked.wait(60)
            return write(*args, **options)

        def waited_for() -> None:
            asked.set()
            flush()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "write", slow)
            patch.setattr(loom.writer, "flush", waited_for)
            assert brought_back(loom, tips[1])[0] == as_it_was[1]
        loom.flush()
        for tip, was in zip(tips, as_it_was, strict=True):
            came_back, account = brought_back(loom, tip)
            assert account.notices == []
            assert came_back == was


def test_a_store_that_could_not_be_closed_for_want_of_room_is_still_written_to(store_path: Path):
    def full(*_: Any, **__: Any) -> int:
        raise StoreUnavailable("no space left")

    loom = opened(store_path)
    main = talk(loom, FIRST)
    loom.flush()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "write", full)
        main.say(SECOND, max_tokens=3)
        with pytest.raises(StoreUnavailable):
            loom.close()

    def go_on() -> None:
        main.say(THIRD, max_tokens=3)
        with suppress(StoreError):  # what it stands on was not stored: it is replayed when it is needed
            loom.flush()

    going_on = threading.Thread(target=go_on, daemon=True)
    going_on.start()
    going_on.join(60)
    assert not going_on.is_alive()
    assert main.log()[-2].text == THIRD
    loom.writer.close()
    loom.database.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"_child_{sys.argv[1]}"](json.loads(sys.argv[2]))
