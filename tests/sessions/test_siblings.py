"""Siblings: several replies decoded together, each exact to go on with, and recorded so that it can be run again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import digests, engine, ids_of, opened, tip

from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.errors import NothingToDo, SessionError
from kvloom.live import LiveState
from kvloom.loom import KVLoom
from kvloom.siblings import Siblings

TOGETHER = ("llama", "gpt2", "gemma3_text", "mistral_window", "llama_yarn")
APART = ("jamba", "mamba2", "deepseek_v3", "gpt_oss", "gemma2", "llama4_text", "deepseek_v4")
SAID = "tell me of the one who would have been there"


@pytest.fixture(scope="module")
def engines() -> dict[tuple[str, str], TransformersEngine]:
    found = [(kind, "float32") for kind in (*TOGETHER, *APART)] + [("llama", "bfloat16"), ("gemma3_text", "bfloat16")]
    return {(kind, dtype): engine(kind, dtype) for kind, dtype in found}


def prefix(model: TransformersEngine, tokens: int) -> tuple[LiveState, list[int]]:
    ids = [(11 * at * at + 3 * at) % 300 for at in range(tokens)]
    live = model.new_state(tokens + 64)
    model.prefill(live, ids)
    return live, ids


def greedy(model: TransformersEngine, live: LiveState, first: int, steps: int) -> tuple[list[int], list[float]]:
    """The tokens that follow, each alone, and by how much each was the likeliest."""
    tokens, leads = [first], []
    for _ in range(steps):
        best = model.run_pass(live, tokens[-1:]).float().topk(2)
        tokens.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return tokens, leads


@pytest.mark.parametrize("kind", TOGETHER)
def test_each_path_says_what_it_would_have_said_alone(engines: Any, kind: str) -> None:
    model, steps = engines[kind, "float32"], 24
    assert model.apart is None
    live, ids = prefix(model, 40)
    firsts = [5, 17, 40, 80]
    siblings = Siblings(model, live, len(ids), [0] * 4, steps)
    said, tokens = [[first] for first in firsts], firsts
    for _ in range(steps):
        tokens = siblings.step(tokens).argmax(-1).tolist()
        for path, token in zip(said, tokens, strict=True):
            path.append(token)
    for first, path in zip(firsts, said, strict=True):
        live.truncate(len(ids))
        alone, leads = greedy(model, live, first, steps)
        differs = next((at for at in range(steps) if alone[at + 1] != path[at + 1]), None)
        assert differs is None or leads[differs] < 1e-3, "only what rounding decides may part them"


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gemma3_text", "bfloat16"), ("gpt2", "float32")])
def test_the_bits_of_a_path_do_not_depend_on_what_the_others_say(engines: Any, kind: str, dtype: str) -> None:
    model = engines[kind, dtype]
    live, ids = prefix(model, 30)
    found = []
    for others in ([9, 200], [33, 7]):
        siblings = Siblings(model, live, len(ids), [0, 0, 0], 4)
        logits = [siblings.step([others[0], 5 + step, others[1]])[1].clone() for step in range(4)]
        found.append((logits, siblings.source(1).rows(0, 0, len(ids), len(ids) + 4).tobytes()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


def test_why_paths_cannot_be_decoded_together_is_said(engines: Any) -> None:
    reasons = {kind: engines[kind, "float32"].apart for kind in APART}
    assert "overwritten in place" in reasons["jamba"]
    assert "way of its own" in reasons["deepseek_v3"]
    assert "chunked attention" in reasons["llama4_text"]
    assert "s_aux" in reasons["gpt_oss"]
    assert "softcap" in reasons["gemma2"]


def open_one(path: Path, engines: Any, kind: str, dtype: str = "float32") -> KVLoom:
    return KVLoom(path, model=engines[kind, dtype])


def talk(loom: KVLoom) -> Branch:
    branch = loom.session("talk", system="all of it was said").branch()
    branch.say("what is it", max_tokens=9)
    return branch


EVERY = [(kind, "float32") for kind in ("llama", "gpt2", "gemma3_text", "jamba", "deepseek_v3")]
EVERY += [("llama", "bfloat16"), ("gemma3_text", "bfloat16")]


@pytest.mark.parametrize(("kind", "dtype"), EVERY)
def test_siblings_are_stored_and_go_on_bit_for_bit_in_a_new_process(
    store_path: Path, engines: Any, kind: str, dtype: str
) -> None:
    with open_one(store_path, engines, kind, dtype) as loom:
        branch = talk(loom)
        samples = branch.sample(SAID, n=4, max_tokens=14, seed=5)
        assert len({sample.reply.branch for sample in samples}) == 4
        assert branch.log()[-1].text == SAID, "the branch stays at the message"
        told = {sample.reply.branch: sample.reply.text for sample in samples}
        session = loom.find("talk")
        live = {name: session.branch(name).say("and then", max_tokens=3).text for name in told}
    with opened(store_path, kind, dtype) as loom:
        session = loom.find("talk")
        for name, text in told.items():
            assert session.branch(name).log()[-3].text == text
            assert session.branch(name).log()[-1].text == live[name]
            again = session.branch(name).regenerate(max_tokens=3).reply
            assert again.tokens.replayed == 0 or loom.engine.apart
            assert again.text == live[name]


@pytest.mark.parametrize(
    ("kind", "dtype", "count"),
    [
        ("llama", "bfloat16", 3),
        ("llama", "float32", 1),
        *[(k, "float32", 3) for k in ("llama", "gemma3_text", "jamba")],
    ],
)
def test_state_of_siblings_that_is_gone_comes_back_with_the_same_bits(
    store_path: Path, engines: Any, kind: str, dtype: str, count: int
) -> None:
    with open_one(store_path, engines, kind, dtype) as loom:
        talk(loom)
        samples = loom.find("talk").branch().sample(SAID, n=count, max_tokens=12, seed=8)
        loom.flush()
        session = loom.find("talk")
        branches = [session.branch(sample.reply.branch) for sample in samples]
        held = [digests(loom, each) for each in branches]
        for each in branches:
            with loom.database.write() as conn:
                row = tip(each).segment
                conn.exec_driver_sql(f"UPDATE chunk SET blob = zeroblob(length(blob)) WHERE segment = {row}")
        for each, before in zip(branches, held, strict=True):
            loom.resumer.forget()
            with loom.engine.lock:
                _, account = loom.resumer.resume(ids_of(loom, each)[: tip(each).state_end], tip(each), room=1)
            assert account.replayed > 0
            assert digests(loom, each) == before


def test_a_stopped_reply_is_gone_on_with_by_several(store_path: Path, engines: Any) -> None:
    with open_one(store_path, engines, "llama") as loom:
        branch = loom.session("talk").branch()
        began = branch.say(SAID, max_tokens=5).text
        samples = branch.sample(n=3, max_tokens=6, seed=1)
        for sample in samples:
            turns = loom.find("talk").branch(sample.reply.branch).log()
            assert [turn.role for turn in turns] == ["user", "assistant", "assistant"]
            assert turns[1].text == began
        computed = samples[0].reply.tokens.computed + samples[1].reply.tokens.computed
        assert computed == 10, "the token that was pending was run once, for all of them"


def test_likelihoods_are_those_kept_with_the_turns(store_path: Path, engines: Any) -> None:
    with open_one(store_path, engines, "llama") as loom:
        session = loom.session("talk")
        for sample in session.branch().sample(SAID, n=3, max_tokens=8, seed=2):
            kept = session.token_scores(session.branch(sample.reply.branch).log()[-1])
            assert sample.logprob == pytest.approx(sum(each.logprob for each in kept), abs=0.05)
            assert sample.tokens == len(kept)
            assert sample.mean_logprob == pytest.approx(sample.logprob / sample.tokens)


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_the_same_seed_gives_the_same_siblings(tmp_path: Path, engines: Any, kind: str) -> None:
    found = []
    for name in ("a", "b"):
        with open_one(tmp_path / name, engines, kind) as loom:
            samples = loom.session("talk").branch().sample(SAID, n=3, max_tokens=10, seed=4)
            found.append([sample.reply.text for sample in samples])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_stopped_siblings_keep_what_they_have_said(store_path: Path, engines: Any, kind: str) -> None:
    cancel = threading.Event()
    with open_one(store_path, engines, kind) as loom:
        branch = loom.session("talk").branch()
        steps = []

        def told(tokens: int) -> None:
            steps.append(tokens)
            if len(steps) == 4:
                cancel.set()

        run = branch.sampling(SAID, n=3, max_tokens=40, seed=3, cancel=cancel, told=told)
        assert run.reply.finish_reason == "interrupted"
        for sample in run.samples:
            assert sample.reply.finish_reason == "interrupted"
            assert sample.tokens == 4
            go_on = loom.find("talk").branch(sample.reply.branch).continue_reply(max_tokens=2).reply
            assert (go_on.tokens.computed, go_on.tokens.generated) == (0, 2)


def test_what_makes_no_sense_is_refused(store_path: Path, engines: Any) -> None:
    with open_one(store_path, engines, "llama") as loom:
        branch = loom.session("talk").branch()
        with pytest.raises(SessionError, match="n is 0"):
            branch.sample(SAID, n=0)
        with pytest.raises(NothingToDo):
            branch.sample(n=2)
