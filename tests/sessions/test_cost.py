"""``kvloom cost``: what was reused and computed, what that saved, and what a hosted model would have charged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.cost import Prices, hosted
from kvloom_store import turns
from kvloom_store.rates import Speed


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as opened:
        yield opened


def total(*tokens: kvloom.Tokens) -> kvloom.Tokens:
    names = kvloom.Tokens.__slots__
    return kvloom.Tokens(**{name: sum(getattr(each, name) for each in tokens) for name in names})


def test_the_tokens_of_every_run_are_counted_once(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    runs = [main.say("hello", max_tokens=5).tokens, main.say("and again", max_tokens=4).tokens]
    runs.append(main.regenerate(max_tokens=3).reply.tokens)
    runs.append(main.continue_reply(max_tokens=2).reply.tokens)
    plan = main.edit("hello there", 3, replay_turns=True)
    runs.append(plan.run().tokens)
    runs.append(session.branch(plan.name).say("so?", max_tokens=2).tokens)
    runs.append(main.choosing("which one", ["the one", "that which they said"]).reply.tokens)
    runs.append(main.sampling("and who", n=3, max_tokens=4, seed=1).reply.tokens)
    runs.append(main.sampling(n=2, max_tokens=3, seed=1).reply.tokens)
    runs.append(main.beaming("and when", width=3, max_tokens=4).reply.tokens)
    runs.append(main.beaming(width=2, max_tokens=3).reply.tokens)
    runs.append(main.say("anew", max_tokens=2, reuse=False).tokens)
    found = session.cost()
    assert found.tokens == total(*runs)
    assert found.unrecorded == 0
    assert found.tokens.reused > 0


def test_seconds_saved_follow_from_the_long_prefills_of_this_model(loom: kvloom.KVLoom, store_path: Path):
    session = loom.session("a")
    main = session.branch()
    main.say("hello", max_tokens=2)
    short = session.cost().speed
    assert (short.measurements, short.at_least) == (1, 1)
    loom.session("b").branch().say("and of the one that was " * 30, max_tokens=2)
    main.say("more", max_tokens=2)
    found = session.cost()
    assert (found.speed.measurements, found.speed.at_least) == (1, 64), "another session timed it"
    assert found.speed.tokens_per_second is not None
    assert found.seconds_saved == found.tokens.reused / found.speed.tokens_per_second
    other = kvloom.TransformersEngine(tiny_model("llama", seed=1), tiny_tokenizer(), name="other")
    with kvloom.open(store_path, model=other) as elsewhere:
        empty = elsewhere.session("c").cost()
    assert (empty.speed, empty.seconds_saved) == (Speed(None, 0, 1), None)


def test_a_hosted_model_is_sent_the_whole_path_and_caches_what_it_was_sent_before():
    def turn(row: int, parent: int | None, role: str, generated: int = 0) -> turns.Turn:
        timings = {"tokens": {"generated": generated}} if generated else {}
        return turns.Turn(row, "", 1, parent, role, False, {"role": role}, None, {}, timings, b"", 0)

    said = [
        turn(1, None, "system"),
        turn(2, 1, "user"),
        turn(3, 2, "assistant", 10),
        turn(4, 3, "user"),
        turn(5, 4, "assistant", 20),
        turn(6, 4, "assistant", 5),  # regenerated
        turn(7, 2, "user"),  # given, as an edit does
        turn(8, 7, "assistant"),
        turn(9, 8, "user"),
        turn(10, 9, "assistant", 1),
    ]
    places = {2: (0, 100), 3: (100, 110), 4: (110, 150), 5: (150, 170), 6: (150, 155)}
    places |= {7: (100, 130), 8: (130, 140), 9: (140, 200), 10: (200, 201)}
    found = hosted(said, places, Prices(1, 0.5, 2))
    assert (found.requests, found.output) == (4, 36)
    assert found.input == 100 + 150 + 150 + 200
    assert found.cached == 0 + 110 + 150 + 100
    assert found.charged_uncached == pytest.approx((600 * 1 + 36 * 2) / 1e6)
    assert found.charged_cached == pytest.approx((240 * 1 + 360 * 0.5 + 36 * 2) / 1e6)


class TestCommand:
    def test_it_tells_people_where_its_figures_come_from(self, trip: Command) -> None:
        shown = trip("cost", "trip").out
        for word in ("reused 0", "generated 6", "on this machine", "1 prefill", "1 request,", "$15.00"):
            assert word in shown
        assert "November 2026" in trip("cost", "--help").out

    def test_prices_are_given_a_million_tokens(self, trip: Command) -> None:
        told = trip("cost", "trip", "--price-input", "1000000", "--price-output", "0", "--json").json
        assert told["hosted"]["charged_uncached"] == told["hosted"]["input"] == 27
        assert told["tokens"] == {"reused": 0, "replayed": 0, "computed": 27, "generated": 6}
        assert told["prices"] == {"input": 1e6, "cached": 0.3, "output": 0.0}

    def test_a_session_without_turns_costs_nothing(self, loom: kvloom.KVLoom, kvloom: Command) -> None:
        loom.session("empty", system="be brief")
        told = kvloom("cost", "empty", "--json").json
        assert (told["seconds_saved"], told["hosted"]["requests"], told["unrecorded"]) == (None, 0, 0)
        assert "unknown" in kvloom("cost", "empty").out

    def test_turns_without_figures_are_said_not_to_be_counted(self, loom: kvloom.KVLoom, kvloom: Command) -> None:
        session = loom.session("old")
        with loom.database.write() as conn:
            turns.add_turn(conn, session.row.row, None, {"role": "user", "content": "hello"})
        assert kvloom("cost", "old", "--json").json["unrecorded"] == 1
        assert "not counted: 1" in kvloom("cost", "old").out

    def test_it_needs_no_model(self, trip: Command, store_path: Path) -> None:
        code = (
            "import sys; from kvloom.cli import run; code = run(['cost', 'trip']);"
            "print(code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
        )
        env = {**os.environ, "KVLOOM_STORE": str(store_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.splitlines()[-1] == "0"

    def test_what_is_wrong_is_told(self, trip: Command) -> None:
        fails(trip("cost", "none"), 20, "none")
        fails(trip("cost", "trip", "--price-input", "-1"), 2)
