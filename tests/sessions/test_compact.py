"""Going on shorter: a new branch of the system prompt and a summary, or the last exchanges."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_llama_folder, tiny_model, tiny_tokenizer

import kvloom
from kvloom.cli import asking
from kvloom.compact import REQUEST
from kvloom.errors import ContextOverflow, NothingToDo, SessionError


@functools.cache
def engine(limit: int = 2048) -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(
        tiny_model("llama", max_position_embeddings=limit), tiny_tokenizer(), name=f"tiny {limit}"
    )


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine()) as opened:
        yield opened


def talk(loom: kvloom.KVLoom, exchanges: int, *, system: str | None = "be brief") -> kvloom.Session:
    session = loom.session("a", system=system)
    for number in range(exchanges):
        session.branch().say(f"{number}: what was it that they said?", max_tokens=6)
    return session


def test_the_last_exchanges_are_kept_with_the_text_and_tokens_they_had(loom: kvloom.KVLoom):
    session = talk(loom, 5)
    plan = session.compact(keep=2)
    added = plan.run()
    assert (added.tokens.reused, added.tokens.computed) == (plan.cost.kept, plan.cost.computed)
    assert plan.cost.kept > 0, "the system prompt is held"
    old, new = session.log(), session.log(added.branch)
    assert [turn.text for turn in new] == [old[0].text, *(turn.text for turn in old[-4:])]
    assert [turn.tokens for turn in new if turn.role == "assistant"] == [6, 6]
    assert new[0].id == old[0].id
    assert sum(turn.tokens for turn in new) == plan.tokens < sum(turn.tokens for turn in old)
    assert session.branch(added.branch).say("so?", max_tokens=2).tokens.reused == plan.tokens


@pytest.mark.parametrize("system", ["be brief", None])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_summary_is_written_from_the_stored_conversation_on_a_branch_of_its_own(
    loom: kvloom.KVLoom, system: str | None, keep: int
):
    session = talk(loom, 3, system=system)
    before = [(turn.id, turn.text) for turn in session.log()]
    length = sum(turn.tokens for turn in session.log())
    plan = session.compact(summary=True, keep=keep, max_tokens=20)
    assert plan.request is not None
    assert plan.cost.generated == 20
    assert plan.request.cost.kept >= length - 1
    run = plan.summarise()
    assert "".join(run) == run.reply.text
    assert (run.reply.branch, run.reply.tokens.generated) == ("summary-of-main", 20)
    added = plan.run()
    head = ["be brief"] if system else []
    texts = [turn.text for turn in session.log(added.branch)]
    assert texts == [*head, REQUEST, run.reply.text, *(text for _, text in before[len(before) - 2 * keep :])]
    assert added.tokens.computed <= plan.cost.computed - plan.request.cost.computed
    assert [(turn.id, turn.text) for turn in session.log()] == before, "the old branch stays"
    assert [branch.name for branch in session.branches()] == ["main", "summary-of-main", "main-2"]
    assert session.branch(added.branch).say("so?", max_tokens=2).tokens.reused == added.tokens.reused + (
        added.tokens.computed
    )


def test_an_interrupted_summary_makes_no_branch_until_it_is_gone_on_with(loom: kvloom.KVLoom):
    session = talk(loom, 2)
    plan = session.compact(summary=True, max_tokens=10)
    stop = threading.Event()
    with pytest.raises(SessionError, match="summary"):
        plan.run()
    for _ in plan.summarise(cancel=stop):
        stop.set()
    with pytest.raises(SessionError, match="not written"):
        plan.run()
    assert [branch.name for branch in session.branches()] == ["main", "summary-of-main"]
    assert session.branch("summary-of-main").continue_reply(max_tokens=4).reply.tokens.generated == 4
    written = session.log("summary-of-main")
    added = plan.run()
    assert session.log(added.branch)[2].tokens == written[-1].tokens + written[-2].tokens


def test_where_nothing_would_be_left_out_it_is_said(loom: kvloom.KVLoom):
    session = talk(loom, 2)
    with pytest.raises(NothingToDo, match="2 exchanges"):
        session.compact(keep=2)
    with pytest.raises(NothingToDo):
        loom.session("empty", system="be brief").compact(summary=True)
    assert [branch.name for branch in session.branches()] == ["main"]


def test_a_conversation_too_long_to_be_summarised_can_be_cut_and_the_hint_says_so(store_path: Path):
    with kvloom.open(store_path, model=engine(128)) as loom:
        session = talk(loom, 3)
        with pytest.raises(ContextOverflow) as refused:
            session.compact(summary=True)
        assert "--summary" in refused.value.hint
        session.compact(keep=1).run()
        assert [branch.name for branch in session.branches()] == ["main", "main-2"]


class TestCommand:
    @pytest.fixture
    def long(self, trip: Command) -> Command:
        for number in range(3):
            assert trip("say", "trip", f"{number}: and then?", "--max-tokens", "4").code == 0
        return trip

    def test_it_tells_the_cost_and_keeps_what_was_asked_for(self, long: Command) -> None:
        done = long("compact", "trip", "--keep", "1", "--branch", "short")
        assert (done.code, done.out) == (0, "")
        assert done.err.index("to compute") < done.err.index("trip@short")
        assert [t["text"] for t in long("log", "trip@short", "--json").json["turns"]][:2] == [
            "Be brief.",
            "2: and then?",
        ]
        fails(long("compact", "trip"), 40, "4 exchanges")

    def test_a_summary_is_printed_and_json_holds_it(self, long: Command) -> None:
        shown = long("compact", "trip@main~2", "--summary", "--max-tokens", "5")
        assert shown.code == 0
        turns = long("log", "trip@main-2", "--json").json["turns"]
        assert shown.out.rstrip("\n") == turns[2]["text"].rstrip("\n")
        told = long("compact", "trip", "--summary", "--keep", "2", "--max-tokens", "5", "--json").json
        assert (told["session"], told["branch"], told["summary"]["branch"]) == ("trip", "main-3", "summary-of-main-2")
        assert told["plan"]["generated"] == 5
        assert told["added"]["pending"] == 0

    def test_it_asks_above_the_threshold(self, long: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asking, "ASK_ABOVE", 5)
        refused = long("compact", "trip", "--keep", "1")
        assert (refused.code, "--yes" in refused.err) == (40, True)
        assert len(long("branches", "trip", "--json").json["branches"]) == 1
        assert long("compact", "trip", "--keep", "1", "--yes").code == 0

    def test_what_is_wrong_is_told(self, long: Command) -> None:
        fails(long("compact", "trip", "--keep", "0"), 2, "--summary")
        fails(long("compact", "trip", "--max-tokens", "9"), 2, "--summary")
        fails(long("compact", "trip@none", "--keep", "1"), 20, "none")


def test_a_chat_proposes_it_when_the_context_is_nearly_full_and_goes_on_shorter(
    kvloom: Command, tmp_path: Path
) -> None:
    model = str(tiny_llama_folder(tmp_path / "small", max_position_embeddings=400))
    lines = [f"{number} and then?" for number in range(20)]
    said = kvloom("chat", "trip", "--model", model, "--max-tokens", "8", stdin="\n".join(lines).encode())
    assert said.code == 30, "it goes on until nothing fits any more"
    proposed = [line for line in said.err.splitlines() if "/compact" in line]
    used = [int(line.split(" of ")[0]) for line in proposed]
    assert used
    assert used[0] >= 360
    assert all(b - a >= 20 for a, b in itertools.pairwise(used)), "once per 5 % further"
    again = kvloom("chat", "trip", "--max-tokens", "4", stdin=b"/compact x\n/compact 2\nso?\n")
    assert again.code == 0
    assert "how many exchanges" in again.err
    assert "trip@main-2" in again.err
    assert len(kvloom("log", "trip@main-2", "--json").json["turns"]) == 6
    short = kvloom("chat", "trip@main-2", stdin=b"/compact\n")
    assert short.code == 0
    assert "summary-of-main-2" in {b["name"] for b in kvloom("branches", "trip", "--json").json["branches"]}
