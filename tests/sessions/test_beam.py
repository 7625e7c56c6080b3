"""Beam search: transformers' own hypotheses and scores, each exact to go on with, recorded so that it can run again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import digests, ending, engine, ids_of, tip

from kvloom.beam import Beams, BeamSettings
from kvloom.engine import TransformersEngine
from kvloom.errors import NothingToDo, SessionError
from kvloom.growing import Growing
from kvloom.loom import KVLoom
from kvloom.sampling import SamplingSettings
from kvloom.siblings import Siblings
from kvloom.textstream import TextStream
from kvloom_store import turns

SAID = "tell me of the one who would have been there"
KINDS = ("llama", "gemma3_text")


@pytest.fixture(scope="module")
def engines() -> dict[str, TransformersEngine]:
    made = {kind: ending(kind) for kind in KINDS}
    return {**made, "two ends": ending("llama", also=(40,)), "endless": engine("llama"), "jamba": engine("jamba")}


def by_transformers(
    model: TransformersEngine, ids: list[int], search: BeamSettings, tokens: int, stop: tuple[str, ...] = ()
) -> tuple[list[list[int]], list[float]]:
    """The tokens of each hypothesis, and its score."""
    ends = sorted(model.eos_ids)
    found = model.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        num_beams=search.width,
        num_return_sequences=search.width,
        do_sample=False,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **({"stop_strings": list(stop), "tokenizer": model.tokenizer} if stop else {}),
    )
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    said = [row[len(ids) : len(ids) + n].tolist() for row, n in zip(found.sequences, lengths, strict=True)]
    return said, found.sequences_scores.tolist()


def searched(
    model: TransformersEngine, ids: list[int], search: BeamSettings, tokens: int, stop: tuple[str, ...] = ()
) -> tuple[list[list[int]], list[float]]:
    live = model.new_state(len(ids))
    logits = model.prefill(live, ids)
    stream = TextStream(model.tokenizer, stop=stop, skip_ids=model.eos_ids)
    root = Growing(list(ids), SamplingSettings(), 0, tokens, stream, model.eos_ids, hidden=live.hidden)
    beams = Beams(model, Siblings(model, live, live.length, [0], root.budget), [root], search)
    beams.search(logits[None])
    assert all(path.ids == ids + path.tokens for path in beams.found)
    return [path.tokens for path in beams.found], [beams.score(path) for path in beams.found]


widths = st.integers(2, 6)
penalties = st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])
stopping = st.sampled_from([True, False, "never"])
PROPERTY = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(
    st.sampled_from([*KINDS, "two ends", "endless"]),
    widths,
    penalties,
    stopping,
    st.integers(1, 24),
    st.integers(0, 99),
)
def test_the_hypotheses_and_scores_are_those_of_transformers(
    engines: Any, kind: str, width: int, penalty: float, early: Any, tokens: int, seed: int
) -> None:
    search = BeamSettings(width, penalty, early)
    ids = [(11 * at * at + 3 * at + 17 * seed) % 300 for at in range(8 + seed)]
    said, scores = by_transformers(engines[kind], ids, search, tokens)
    found = searched(engines[kind], ids, search, tokens)
    assert found[0] == said
    assert found[1] == pytest.approx(scores, abs=2e-4)


@PROPERTY
@given(st.sampled_from([("e",), (" the",), (" th", " o")]), widths, stopping, st.integers(1, 16), st.integers(0, 99))
def test_a_stop_string_finishes_a_hypothesis_as_in_transformers(
    engines: Any, stop: tuple[str, ...], width: int, early: Any, tokens: int, seed: int
) -> None:
    search = BeamSettings(width, 1.0, early)
    ids = [(11 * at * at + 3 * at + 17 * seed) % 300 for at in range(8 + seed % 30)]
    said, scores = by_transformers(engines["llama"], ids, search, tokens, stop)
    found = searched(engines["llama"], ids, search, tokens, stop)
    assert found[0] == said
    assert found[1] == pytest.approx(scores, abs=2e-4)


def test_replies_of_every_length_and_ending_are_compared(engines: Any) -> None:
    """So that the two tests above compare more than one kind of search."""
    ids = [(11 * at * at + 3 * at + 34) % 300 for at in range(10)]
    found = {
        early: searched(engines["gemma3_text"], ids, BeamSettings(4, 1.0, early), 20)[0] for early in (True, False)
    }
    assert found[True] != found[False], "a search that goes on finds better ones"
    ends = [said[-1] in engines["gemma3_text"].eos_ids for said in found[True]]
    assert all(ends)
    assert len({len(said) for said in found[True]}) > 1


def test_one_beam_is_the_greedy_reply(engines: Any) -> None:
    model = engines["endless"]
    live = model.new_state(40)
    ids = list(range(40, 60))
    logits, greedy = model.prefill(live, ids), []
    for _ in range(12):
        greedy.append(int(logits.argmax()))
        logits = model.run_pass(live, greedy[-1:])
    assert searched(model, ids, BeamSettings(1), 12)[0] == [greedy]


def test_the_first_step_runs_nothing_and_each_other_one_token_a_beam(engines: Any, store_path: Path) -> None:
    with KVLoom(store_path, model=engines["endless"]) as loom:
        steps: list[int] = []
        run = loom.session("talk").branch().beaming(SAID, width=3, max_tokens=6, told=steps.append)
        computed = run.reply.tokens.computed
        message = loom.find("talk").branch().log()[-1]
        assert message.role == "user"
        assert computed == len(ids_of(loom, loom.find("talk").branch())) + 3 * 5
        assert steps == [3] * 6
        session = loom.find("talk")
        assert session.cost().tokens == run.reply.tokens, "what was run is counted once"


def open_one(path: Path, model: TransformersEngine) -> KVLoom:
    return KVLoom(path, model=model)


@pytest.mark.parametrize("kind", [*KINDS, "endless"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_beams_are_branches_best_first_and_the_branch_stays_at_the_message(
    store_path: Path, engines: Any, kind: str, tokens: int
) -> None:
    model = engines[kind]
    with open_one(store_path, model) as loom:
        branch = loom.session("talk").branch()
        samples = branch.beam(SAID, width=4, max_tokens=tokens, length_penalty=0.6, early_stopping=False)
        assert branch.log()[-1].text == SAID
        session = loom.find("talk")
        scores = [sample.score for sample in samples]
        assert scores == sorted(scores, reverse=True)
        ids = ids_of(loom, branch)
        expected, values = by_transformers(model, ids, BeamSettings(4, 0.6, False), tokens)
        assert scores == pytest.approx(values, abs=2e-4)
        for sample, said in zip(samples, expected, strict=True):
            mine = session.branch(sample.reply.branch)
            assert ids_of(loom, mine)[len(ids) :] == said
            assert tip(mine).state_end == len(ids) + len(said) - 1, "the last token is pending, as in any reply"
            assert sample.reply.finish_reason == ("stop" if said[-1] in model.eos_ids else "length")
            assert sum(each.logprob for each in session.token_scores(mine.log()[-1])) == pytest.approx(
                sample.logprob, abs=0.05
            )
            with loom.database.read() as conn:
                kept = turns.path_to(conn, mine.row.turn)[-1].settings
            expected_settings = {"beam_width": 4, "length_penalty": 0.6, "early_stopping": False, "score": sample.score}
            assert expected_settings.items() <= kept.items()


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gemma3_text", "float32"), ("llama", "bfloat16")])
def test_state_of_a_beam_that_is_gone_comes_back_with_the_same_bits(store_path: Path, kind: str, dtype: str) -> None:
    with open_one(store_path, ending(kind, dtype)) as loom:
        session = loom.session("talk", system="all of it was said")
        session.branch().say("what is it", max_tokens=9)
        samples = session.branch().beam(SAID, width=4, max_tokens=14, early_stopping="never")
        loom.flush()
        branches = [session.branch(sample.reply.branch) for sample in samples]
        rows = {entry.path for each in branches for entry in tip(each).schedule.passes}
        assert len(rows) > 1, "beams have changed their rows"
        held = [digests(loom, each) for each in branches]
        for each in branches:
            with loom.database.write() as conn:
                row = tip(each).segment
                conn.exec_driver_sql(f"UPDATE chunk SET blob = zeroblob(length(blob)) WHERE segment = {row}")
        replayed = 0
        for each, before in zip(branches, held, strict=True):
            loom.resumer.forget()
            with loom.engine.lock:
                _, account = loom.resumer.resume(ids_of(loom, each)[: tip(each).state_end], tip(each), room=1)
            replayed += account.replayed
            assert digests(loom, each) == before
        assert replayed > 0, "though not of all: beams that differ in their last token alone share their state"


def test_a_beam_goes_on_as_it_would_have_in_the_same_process(tmp_path: Path) -> None:
    def begun(path: Path) -> tuple[KVLoom, str]:
        loom = open_one(path, ending("gemma3_text"))
        return loom, loom.session("talk").branch().beam(SAID, width=3, max_tokens=9)[0].reply.branch

    loom, name = begun(tmp_path / "a")
    with loom:
        expected = loom.find("talk").branch(name).say("and then", max_tokens=5).text
    loom, name = begun(tmp_path / "b")
    loom.close()
    with open_one(tmp_path / "b", ending("gemma3_text")) as loom:
        reply = loom.find("talk").branch(name).say("and then", max_tokens=5)
        assert reply.text == expected
        assert reply.tokens.replayed == 0


def test_a_stopped_search_keeps_its_running_beams(store_path: Path, engines: Any) -> None:
    cancel, steps = threading.Event(), []

    def told(tokens: int) -> None:
        steps.append(tokens)
        if len(steps) == 4:
            cancel.set()

    with open_one(store_path, engines["endless"]) as loom:
        branch = loom.session("talk").branch()
        run = branch.beaming(SAID, width=3, max_tokens=40, cancel=cancel, told=told)
        assert run.reply.finish_reason == "interrupted"
        assert [sample.tokens for sample in run.samples] == [4, 4, 4]
        for sample in run.samples:
            assert sample.reply.finish_reason == "interrupted"
            going_on = loom.find("talk").branch(sample.reply.branch)
            assert going_on.continue_reply(max_tokens=2).reply.tokens.computed == 0
        cancel.set()
        stopped = loom.session("other").branch().beaming(SAID, cancel=cancel)
        assert (stopped.reply.finish_reason, stopped.samples) == ("interrupted", [])


def test_replies_to_the_last_message_and_more_of_a_stopped_one(store_path: Path, engines: Any) -> None:
    with open_one(store_path, ending("gemma3_text")) as loom:
        session = loom.session("talk")
        branch = session.branch()
        first = branch.beam(SAID, width=2, max_tokens=5, stop=["e"])
        again = branch.beam(width=2, max_tokens=5, stop=["e"])
        assert [each.reply.text for each in first] == [each.reply.text for each in again]
        branch.move_to(again[0].reply.turn)
        assert branch.log()[-1].text == again[0].reply.text
    with open_one(store_path, engines["endless"]) as loom:
        branch = loom.session("stopped").branch()
        began = branch.say(SAID, max_tokens=3).text
        found = branch.beam(width=2, max_tokens=4)
        assert [turn.text for turn in loom.find("stopped").branch(found[0].reply.branch).log()][1] == began


def test_what_cannot_be_searched_is_refused_before_anything_is_stored(store_path: Path, engines: Any) -> None:
    with open_one(store_path, engines["jamba"]) as loom:
        branch = loom.session("talk").branch()
        with pytest.raises(SessionError, match="overwritten in place") as refused:
            branch.beam(SAID)
        assert "sample" in refused.value.hint
        assert branch.log() == []
    with open_one(store_path, engines["endless"]) as loom:
        branch = loom.session("other").branch()
        for wrong, named in (
            ({"width": 0}, "width is 0"),
            ({"width": True}, "width is True"),
            ({"width": 250}, "too many beams"),
            ({"length_penalty": float("nan")}, "length_penalty is nan"),
            ({"early_stopping": "always"}, "early_stopping is 'always'"),
            ({"early_stopping": 1}, "early_stopping is 1"),
            ({"temperature": 1.0}, "temperature has no part"),
        ):
            with pytest.raises(SessionError, match=named):
                branch.beam(SAID, **wrong)
        assert branch.log() == []
        with pytest.raises(NothingToDo):
            branch.beam()
