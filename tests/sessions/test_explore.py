"""Searches on tiny models: every candidate a branch, killed and taken up again, scored in every way there is."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import forked
import pytest
from kinds import ending, engine
from tiny import tiny_model, tiny_tokenizer

from kvloom.engine import TransformersEngine
from kvloom.errors import NothingToDo, SessionError
from kvloom.explore.scoring import answer_of
from kvloom.explore.search import Found
from kvloom.loom import KVLoom
from kvloom_store import turns
from kvloom_store.errors import RefExists

PROMPT = "what would she have been"
SMALL = {"width": 3, "keep": 2, "depth": 3, "step_tokens": 6, "seed": 5}

CHILD = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import kvloom, torch
torch.set_num_threads(1)
from tiny import tiny_model, tiny_tokenizer
engine = kvloom.TransformersEngine(tiny_model({kind!r}), tiny_tokenizer(), name="tiny", keyframe_spacing=64)
left = int(sys.argv[1])

def told(tokens):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

with kvloom.open({store!r}, model=engine) as loom:
    session = loom.session("talk")
    search = session.explore(prompt={prompt!r}, resume=True, told=told, **json.loads({settings!r}))
    for event in search:
        if event.kind == "scored":
            told(0)
print("done")
"""


@pytest.fixture(scope="module")
def engines() -> dict[str, TransformersEngine]:
    return {kind: engine(kind) for kind in ("llama", "gemma3_text", "jamba")}


def described(found: Found, loom: KVLoom) -> Any:
    """What a search came to, without ids: nodes with their scores, and what each branch says."""
    session = loom.find("talk")
    said = {node.branch: session.branch(node.branch).log()[-1].text for node in found.nodes}
    return found.nodes, found.path, found.text, said


@pytest.mark.parametrize(
    ("kind", "strategy", "kills"),
    [
        ("llama", "tree", [2, 9, 4]),
        ("gemma3_text", "tree", [5, 11]),
        ("jamba", "tree", [3, 20]),
        ("llama", "tree", [41]),  # right after a round, when its state is hardly written yet
        ("llama", "beam", [2, 41]),
    ],
)
def test_killed_and_taken_up_again_it_ends_with_the_same_tree(
    tmp_path: Path, engines: Any, kind: str, strategy: str, kills: list[int]
) -> None:
    settings = {**SMALL, "strategy": strategy, "step_tokens": 40, "depth": 2}  # of a tree two rounds a step
    with KVLoom(tmp_path / "whole.db", model=engines[kind]) as loom:
        expected = described(loom.session("talk").explore(prompt=PROMPT, **settings).result, loom)
    script = CHILD.format(
        tests=str(Path(__file__).parents[1]),
        kind=kind,
        store=str(tmp_path / "killed.db"),
        prompt=PROMPT,
        settings=json.dumps(settings),
    )
    for steps in kills:
        child = forked.run(["-c", script, steps])
        assert child.returncode == -9, child.stderr
    with KVLoom(tmp_path / "killed.db", model=engines[kind]) as loom:
        search = loom.session("talk").explore(prompt=PROMPT, resume=True, **settings)
        assert described(search.result, loom) == expected
        again = loom.find("talk").explore(resume=True)
        assert described(again.result, loom) == expected
        assert again.result.tokens.computed == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "jamba"])
def test_each_token_is_computed_once(store_path: Path, engines: Any, kind: str) -> None:
    with KVLoom(store_path, model=engines[kind]) as loom:
        found = loom.session("talk", system="be brief").explore(prompt=PROMPT, **SMALL).result
        unique = sum(node.tokens for node in found.nodes)
        ended = sum(node.status == "ended" for node in found.nodes)
        assert unique - ended <= found.tokens.computed <= unique
        assert len(found.nodes) == 3 + 6 + 6


def test_every_candidate_is_a_branch_that_can_be_talked_to(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk", system="be brief")
        session.branch().say("what is it", max_tokens=4)
        search = session.explore(prompt=PROMPT, **SMALL)
        found = search.result
        for node in found.nodes:
            log = session.branch(node.branch).log()
            assert [turn.role for turn in log[:4]] == ["system", "user", "assistant", "user"]
            assert all(turn.role == "assistant" for turn in log[4:])
            assert sum(turn.tokens for turn in log[4:]) >= node.tokens
        reply = session.branch(found.path[0]).say("and then", max_tokens=3)
        assert reply.tokens.replayed == 0
        assert session.branch().log()[-1].role == "assistant", "main is where it was"
        search.accept("main")
        assert session.branch().log()[-1].text == session.branch(found.path[-1]).log()[-1].text
        gone = search.prune()
        left = {branch.name for branch in session.branches()}
        assert left == {"main", "explore", *found.path}
        assert set(gone) == {node.branch for node in found.nodes} - set(found.path)


@pytest.mark.parametrize(("score", "penalty"), [("logprob", 0.0), ("length-normalised", 1.0)])
@pytest.mark.parametrize(("width", "depth", "step_tokens"), [(2, 1, 24), (3, 4, 6), (4, 9, 1), (3, 2, 9)])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_beams_committed_in_steps_find_what_one_beam_search_finds(
    tmp_path: Path, kind: str, width: int, depth: int, step_tokens: int, score: str, penalty: float
) -> None:
    size = {"width": width, "depth": depth, "step_tokens": step_tokens}
    with KVLoom(tmp_path / "beams.db", model=ending(kind)) as loom:
        for number, said in enumerate(("what would she have been", "the", "who was there, and when")):
            session = loom.session(f"talk-{number}")
            found = session.explore(prompt=said, strategy="beam", score=score, **size).result
            branch = session.branch()
            limit = {"max_tokens": depth * step_tokens, "early_stopping": False}
            expected = branch.beam(said, width=width, length_penalty=penalty, **limit)[0]
            assert found.best is not None
            assert (found.text, found.best.score) == (expected.reply.text, pytest.approx(expected.score, abs=1e-4))
            reply = session.branch(found.best.branch).say("and then", max_tokens=2)
            assert reply.tokens.replayed == 0


def test_beams_refuse_what_has_no_part_in_them(store_path: Path, engines: Any) -> None:
    for kind, wrong in (
        ("llama", {"score": "judge"}),
        ("llama", {"step_stop": (".",)}),
        ("llama", {"batch": 2}),
        ("llama", {"top_k": 5}),
        ("llama", {"temperature": 0.5}),
        ("jamba", {}),
    ):
        with KVLoom(store_path, model=engines[kind]) as loom:
            session = loom.session(f"talk-{kind}")
            with pytest.raises(SessionError):
                session.explore(prompt=PROMPT, strategy="beam", **wrong)
            assert len(session.tree()) == 0, "nothing was said"


@pytest.mark.parametrize("score", ["logprob", "length-normalised", "self-consistency", "judge"])
@pytest.mark.parametrize("strategy", ["tree", "best-first", "best-of"])
def test_every_strategy_goes_with_every_score(store_path: Path, engines: Any, strategy: str, score: str) -> None:
    settings = {**SMALL, "depth": 2, "width": 2, "strategy": strategy, "score": score}
    with KVLoom(store_path, model=engines["llama"]) as loom:
        found = loom.session("talk").explore(prompt=PROMPT, **settings).result
        scores = [node.score for node in found.nodes]
        assert None not in scores
        assert found.best is not None
        low, high = {"self-consistency": (0, 1), "judge": (1, 9)}.get(score, (-1e9, 0))
        assert all(low <= each <= high for each in scores if each is not None)
        if score == "judge":
            assert loom.find("talk-explore-judge").branches()


def test_a_function_scores(store_path: Path, engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores.py").write_text("def length(text):\n    return -len(text)\n\ndef bad(text):\n    1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        found = session.explore(prompt=PROMPT, **SMALL, strategy="best-of", score="python:own_scores:length").result
        texts = {node.branch: session.branch(node.branch).log()[-1].text for node in found.nodes}
        assert {node.branch: node.score for node in found.nodes} == {name: -len(text) for name, text in texts.items()}
        for wrong, says in (("own_scores:none", "no function"), ("nosuch_module:f", "cannot import")):
            with pytest.raises(SessionError, match=says):
                session.explore(prompt=PROMPT, name="b", **SMALL, score=f"python:{wrong}")
        with pytest.raises(SessionError, match="ZeroDivisionError"):
            _ = session.explore(prompt=PROMPT, name="c", **SMALL, score="python:own_scores:bad").result


def test_a_judge_is_asked_once(store_path: Path, engines: Any) -> None:
    settings = {**SMALL, "strategy": "best-of", "score": "judge"}
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        found = session.explore(prompt=PROMPT, **settings).result
        judged = loom.find("talk-explore-judge")
        before = len(judged.tree())
        with loom.database.write() as conn:
            conn.exec_driver_sql("DELETE FROM candidate WHERE score IS NULL")
        again = session.explore(resume=True).result
        assert [node.score for node in again.nodes] == [node.score for node in found.nodes]
        assert len(judged.tree()) == before


def test_it_can_be_stopped_between_two_tokens(store_path: Path, engines: Any) -> None:
    cancel, steps = threading.Event(), []

    def told(tokens: int) -> None:
        steps.append(tokens)
        if len(steps) == 9:
            cancel.set()

    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        search = session.explore(prompt=PROMPT, **SMALL, cancel=cancel, told=told)
        assert [event.kind for event in search][-1] == "stopped"
        assert len(search.result.nodes) == 3, "of the round that was stopped nothing is kept"
        assert not search.result.finished
        whole = session.explore(resume=True).result
        assert whole.finished
        assert len(whole.nodes) == 15


def test_a_stopped_reply_is_searched_on(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        began = session.branch().say(PROMPT, max_tokens=5).text
        found = session.explore(**SMALL).result
        log = session.branch(found.path[-1]).log()
        assert log[1].text == began
        assert [turn.role for turn in log] == ["user", *["assistant"] * 4]


def test_what_makes_no_sense_is_refused(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        with pytest.raises(NothingToDo):
            session.explore(**SMALL)
        _ = session.explore(prompt=PROMPT, **SMALL).result
        with pytest.raises(RefExists):
            session.explore(prompt=PROMPT, **SMALL)
        with pytest.raises(SessionError, match="another width"):
            session.explore(prompt=PROMPT, resume=True, **{**SMALL, "width": 2})
        with pytest.raises(SessionError, match="another sampling"):
            session.explore(resume=True, temperature=0.5)


def test_a_step_ends_with_its_stop(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        found = session.explore(prompt=PROMPT, **{**SMALL, "step_tokens": 64, "depth": 2}, step_stop=("e", "t")).result
        shorter = [node for node in found.nodes if node.tokens < 64 and node.status == "open"]
        assert shorter
        for node in shorter:
            assert set(session.branch(node.branch).log()[-1].text) & {"e", "t"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 3 and 4 make 7.", "7"), ("it is 1,024.0", "1024"), ("Paris!", "paris"), ("a\n  The  End. \n", "the end")],
)
def test_what_a_reply_comes_to(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_taking_a_session_away_takes_its_searches(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        _ = loom.session("talk").explore(prompt=PROMPT, **SMALL).result
        loom.remove("talk")
        with loom.database.read() as conn:
            assert turns.count_by_session(conn) == {}
            assert conn.exec_driver_sql("SELECT count(*) FROM candidate").scalar_one() == 0


def test_a_search_begins_at_a_prompt_that_was_said_before_and_at_a_token(store_path: Path, engines: Any) -> None:
    with KVLoom(store_path, model=engines["llama"]) as loom:
        session = loom.session("talk")
        first = session.explore(prompt=PROMPT, **SMALL).result
        again = session.explore(prompt=PROMPT, name="again", **SMALL).result
        assert again.text == first.text
        assert again.tokens == first.tokens
        session.fork("cut", f"{first.path[0]}:20")
        assert session.explore("cut", name="inside", **SMALL).result.finished


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_paths_end_where_the_context_does(store_path: Path, kind: str) -> None:
    small = TransformersEngine(tiny_model(kind, max_position_embeddings=64), tiny_tokenizer(), name="small")
    with KVLoom(store_path, model=small) as loom:
        found = loom.session("talk").explore(prompt=PROMPT, **{**SMALL, "step_tokens": 30, "depth": 9}).result
        assert found.finished
        deepest = loom.find("talk").branch(found.nodes[-1].branch)
        assert found.nodes[-1].status == "ended"
        assert sum(turn.tokens for turn in deepest.log()) < small.context_limit
