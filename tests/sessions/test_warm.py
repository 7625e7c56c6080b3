"""Warming: state that is missing is computed ahead of time, and what was computed is kept however it ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_llama_folder, tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import ModelMismatch
from kvloom_store import refs, turns
from kvloom_store.schema import chunk

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = " ".join(["the and of to it was"] * 400)


@functools.cache
def engine(kind: str = "llama", seed: int = 0) -> kvloom.TransformersEngine:
    model = tiny_model(kind, seed=seed, max_position_embeddings=16384)
    return kvloom.TransformersEngine(model, tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine()) as opened:
        yield opened


def talk(loom: kvloom.KVLoom, exchanges: int = 3) -> kvloom.Branch:
    branch = loom.session("a", system="be brief").branch()
    for number in range(exchanges):
        branch.say(f"{number}: and what was it that they said?", max_tokens=6)
    return branch


def after(cancel: threading.Event, passes: int):
    """A progress that stops a run after so many passes."""
    seen: list[int] = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        if len(seen) == passes:
            cancel.set()

    return progress


def test_nothing_is_missing_of_a_conversation_that_was_said(loom: kvloom.KVLoom):
    session = talk(loom).session
    loom.flush()
    assert not session.missing(verify=True)
    added = session.warm()
    assert (added.tokens.computed, added.tokens.replayed, added.pending, added.turns) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next"])
def test_an_edit_left_unrun_is_computed_turn_by_turn(store_path: Path, kind: str):
    with kvloom.open(store_path, model=engine(kind)) as loom:
        main = talk(loom)
        session = main.session
        plan = main.edit("it was not so", 3, replay_turns=True, branch="cold")
        assert plan.run(compute=False).pending >= plan.cost.computed, "of some of them the state is held elsewhere"
        assert plan.branch.log()[-1].text == main.log()[-1].text
    with kvloom.open(store_path, model=engine(kind)) as loom:
        session = loom.session("a")
        missing = session.missing("cold")
        assert (missing.cost.kept, missing.cost.computed) == (plan.cost.kept, plan.cost.computed)
        added = session.warm("cold")
        assert (added.tokens.reused, added.tokens.computed) == (missing.cost.kept, missing.cost.computed)
        assert (added.pending, added.turns, added.branch) == (0, 4, "cold")
        assert not session.missing("cold", verify=True)
        assert not session.missing("cold~2", verify=True), "each turn has its own"
        warmed = session.branch("cold").say("and then?", max_tokens=5)
        assert (warmed.tokens.replayed, warmed.tokens.reused) == (0, plan.tokens)
    with kvloom.open(store_path.with_name("straight.db"), model=engine(kind)) as loom:
        straight = talk(loom).edit("it was not so", 3, replay_turns=True)
        straight.run()
        assert straight.branch.say("and then?", max_tokens=5).text == warmed.text


def test_a_message_that_was_interrupted_is_computed(loom: kvloom.KVLoom):
    main = talk(loom, 1)
    stop = threading.Event()
    reply = main.stream(LONG, max_tokens=2, cancel=stop, progress=after(stop, 1)).reply
    assert reply.finish_reason == "interrupted"
    missing = main.session.missing()
    assert missing.cost.computed > 1000
    assert main.session.warm().tokens.computed == missing.cost.computed
    went_on = main.continue_reply(max_tokens=2).reply
    assert went_on.tokens.computed == 0


def test_stopped_it_keeps_the_passes_that_ran_and_goes_on_behind_them(loom: kvloom.KVLoom, store_path: Path):
    main = talk(loom, 1)
    plan = main.edit(LONG, 1, replay_turns=True)
    plan.run(compute=False)
    session, name, stop = main.session, plan.name, threading.Event()
    whole = session.missing(name).cost.computed
    first = session.warm(name, cancel=stop, progress=after(stop, 3))
    assert 1000 < first.tokens.computed < whole
    assert first.pending == session.missing(name).cost.computed == whole - first.tokens.computed
    loom.close()
    with kvloom.open(store_path, model=engine()) as reopened:
        rest = reopened.session("a").warm(name)
        assert (rest.pending, rest.tokens.computed) == (0, whole - first.tokens.computed)
        reply = reopened.session("a").branch(name).say("so?", max_tokens=2)
        assert (reply.tokens.replayed, reply.tokens.reused) == (0, plan.tokens)


@pytest.mark.parametrize("how", ["dropped", "damaged", "never stored"])
def test_state_that_is_gone_is_run_again_and_stored(loom: kvloom.KVLoom, how: str):
    main = talk(loom, 2)
    if how == "never stored":
        main.say("more", max_tokens=4, reuse=False)
    loom.flush()
    path, states = main._path()
    last = states[path[-1].row]
    with loom.database.write() as conn:
        if how == "dropped":
            turns.set_segment(conn, last.row, None, last.base_segment)
        elif how == "damaged":
            conn.execute(chunk.update().where(chunk.c.segment == last.segment).values(blob=b"x"))
    missing = main.session.missing(verify=True)
    assert missing.cost.replayed >= last.state_end - last.state_start
    added = main.session.warm()
    assert added.tokens.replayed == missing.cost.replayed
    assert (added.tokens.computed, added.pending) == (0, 0)
    assert any("damaged" in notice for notice in added.notices) == (how == "damaged")
    assert not main.session.missing(verify=True)
    assert main.say("so?", max_tokens=2, require_reuse=True).tokens.replayed == 0


def test_turns_of_text_alone_get_tokens_and_state(loom: kvloom.KVLoom):
    main = talk(loom, 2)
    path, _ = main._path()
    with loom.database.write() as conn:
        said = path[-1]
        for role, text in (("user", "who was there?"), ("assistant", "They all were.")):
            said = turns.add_turn(conn, said.session, said, {"role": role, "content": text})
        refs.move_branch(conn, main.row.row, path[-1].row, said.row)
    missing = main.session.missing()
    assert (missing.unwritten, missing.cost.computed) == (2, 0)
    assert main.session.warm().tokens.computed > 0
    assert not main.session.missing(verify=True)
    assert main.say("so?", max_tokens=2).tokens.computed < 20


def test_another_model_is_refused(loom: kvloom.KVLoom, store_path: Path):
    talk(loom, 1)
    with kvloom.open(store_path, model=engine(seed=1)) as other, pytest.raises(ModelMismatch):
        other.session("a").warm()


class TestCommand:
    @pytest.fixture(autouse=True)
    def niceness(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        given: list[int] = []
        monkeypatch.setattr(os, "nice", given.append)
        return given

    def test_it_tells_what_it_did_at_low_priority_and_then_that_nothing_is_to_be_done(
        self, trip: Command, niceness: list[int]
    ) -> None:
        trip("edit", "trip~1", "--text", "who is there", "--replay-turns", "--no-run", "--branch", "cold")
        plan = trip("warm", "trip@cold", "--dry-run", "--json").json["points"][0]["plan"]
        assert "to compute" in trip("warm", "trip@cold", "--dry-run").out
        assert niceness == []
        done = trip("warm", "trip@cold")
        assert (done.code, niceness) == (0, [10])
        assert f"trip@cold: reused {plan['kept']}, replayed 0, computed {plan['computed']}" in done.out
        assert trip("warm", "trip@cold", "trip").out == "nothing to do: all state is there\n"
        assert niceness == [10]

    def test_all_warms_every_branch_and_json_tells_of_each(self, trip: Command) -> None:
        trip("edit", "trip~1", "--text", "who is there", "--replay-turns", "--no-run", "--branch", "cold")
        trip("say", "other", "hello", "--max-tokens", "2")
        told = trip("warm", "--all", "--json").json
        done = {(p["session"], p["at"]): p["done"] for p in told["points"]}
        assert done.keys() == {("trip", "main"), ("trip", "cold"), ("other", "main")}
        assert done["trip", "main"] is None
        assert done["trip", "cold"]["pending"] == 0
        assert told["stopped"] is False

    def test_a_dry_run_needs_no_model(self, trip: Command, store_path: Path) -> None:
        trip("edit", "trip~1", "--text", "who is there", "--no-run", "--branch", "cold")
        code = (
            "import sys; from kvloom.cli import run; code = run(['warm', '--all', '--dry-run']);"
            "print(code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
        )
        env = {**os.environ, "KVLOOM_STORE": str(store_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.splitlines()[-1] == "0"

    def test_one_session_that_fails_does_not_keep_the_others_cold(self, trip: Command, tmp_path: Path) -> None:
        gone = tiny_llama_folder(tmp_path / "gone", seed=2)
        trip("say", "other", "hello", "--max-tokens", "2", "--model", str(gone))
        for session in ("other", "trip"):
            trip("edit", f"{session}~1", "--text", "who is there", "--no-run", "--branch", "cold")
        gone.rename(tmp_path / "elsewhere")
        done = trip("warm", "--all", "--json")
        assert done.code == 30
        assert "gone" in done.err
        warmed = {(p["session"], p["at"]) for p in done.json["points"] if p["done"]}
        assert warmed == {("trip", "cold")}

    def test_what_is_wrong_is_told(self, trip: Command) -> None:
        fails(trip("warm"), 2, "--all")
        fails(trip("warm", "trip", "--all"), 2, "--all")
        fails(trip("warm", "trip@none"), 20, "none")


def test_ctrl_c_leaves_what_was_computed(store_path: Path, tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path / "model", max_position_embeddings=1 << 16, hidden_size=256, num_hidden_layers=8)
    env = {**os.environ, "HOME": str(tmp_path), "KVLOOM_MODEL": str(model), "KVLOOM_CONFIG": str(tmp_path / "c.toml")}

    def command(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "kvloom.cli", *args]
        return subprocess.run(call, env=env, capture_output=True, text=True, input=text, check=True)

    command("say", "trip", "hello", "--max-tokens", "2")
    command("edit", "trip~1", "--text", "-", "--no-run", "--branch", "cold", text=" ".join([LONG] * 5))
    call = [sys.executable, "-c", "from kvloom.cli import main; main(['warm', 'trip@cold', '--json'])"]
    watch = f"import kvloom.engine as e, sys; o = e.TransformersEngine.run_pass\n{PASSES}"
    call[2] = f"{watch}\n{call[2]}"
    with subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as warming:
        assert warming.stderr is not None
        while warming.stderr.readline() != "a pass of 1024\n":
            assert warming.poll() is None
        warming.send_signal(signal.SIGINT)
        out, err = warming.communicate()
    assert (warming.returncode, "Traceback" in err) == (130, False)
    with kvloom.open(store_path) as loom:
        left = loom.find("trip").missing("cold", verify=True).cost
    assert left.kept >= 1024
    assert left.computed > 0
    assert '"stopped": true' in out


PASSES = """
def run_pass(self, live, ids):
    found = o(self, live, ids)
    print("a pass of", len(ids), file=sys.stderr, flush=True)
    return found
e.TransformersEngine.run_pass = run_pass
"""
"""Has another process tell of each pass."""
