"""Choosing among given texts: each scored from the same state, the likeliest said, and nothing else left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from command import Command, fails
from exact.worker import frame_of, rows_of
from kinds import digests, engine, ids_of, live_digests, opened
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom import choosing
from kvloom.choices import best_of, check_texts, options_of
from kvloom.choosing import Given
from kvloom.errors import ContextOverflow, InvalidText, NothingToDo, SessionError
from kvloom.live import LiveState
from kvloom_store import schema

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "Was it there?"
CHOICES = ["yes", "no, it was not", "that is what they said"]

KINDS = ("llama", "llama_dynamic", "gemma3_text", "mamba", "mamba2", "rwkv", "jamba", "qwen3_next", "deepseek_v4")
"""Rows, rows under a rope that changes, windows, every way to overwrite state in place, compressed blocks."""


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as opened:
        yield opened


def counts(loom: kvloom.KVLoom) -> dict[str, int]:
    loom.flush()
    with loom.database.read() as conn:
        tables = schema.metadata.tables.values()
        return {t.name: conn.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in tables}


def held_by(live: LiveState) -> tuple[object, ...]:
    frame_at = live.frame_at if live.has_keyframes else None
    return live.length, live.captured, list(live.frames), set(live.stored), live.window_base, frame_at


def by_transformers(loom: kvloom.KVLoom, prompt: list[int], ids: tuple[int, ...]) -> list[float]:
    """Log-probabilities of some tokens after a prompt, from one pass of the plain model, in float64."""
    with torch.inference_mode():
        logits = loom.engine.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
    return [float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)]


# What is chosen


def test_the_likeliest_is_the_reply_and_the_others_are_not_kept(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    main = session.branch()
    choice = main.choose(QUESTION, CHOICES)
    assert [option.text for option in choice.options] == CHOICES
    assert choice.best == max(choice.options, key=lambda option: option.logprob)
    turns = session.tree()
    assert [(turn.role, turn.text) for turn in turns[1:]] == [("user", QUESTION), ("assistant", choice.best.text)]
    path, states = main._path()
    assert path[-1].finish_reason == "stop"
    assert path[-1].settings["chosen_from"] == CHOICES
    assert path[-1].settings["logprobs"] == [option.logprob for option in choice.options]
    assert states[path[-1].row].tokens == [*choice.best.ids, tiny_tokenizer().eos_token_id]


def test_each_is_as_likely_as_the_plain_model_says(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    choice = main.choose(QUESTION, CHOICES)
    prompt = ids_of(loom, main)[: -len(choice.best.ids) - 1]
    for option in choice.options:
        expected = by_transformers(loom, prompt, option.ids)
        assert option.logprobs == pytest.approx(expected, abs=1e-4)
        assert option.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert option.mean_logprob == pytest.approx(option.logprob / len(option.ids))
    whole = sum(math.exp(option.logprob) for option in choice.options)
    assert [option.probability for option in choice.options] == pytest.approx(
        [math.exp(option.logprob) / whole for option in choice.options]
    )


def test_it_keeps_its_scores_with_the_end_of_the_reply(loom: kvloom.KVLoom):
    session = loom.session("a")
    choice = session.branch().choose(QUESTION, CHOICES)
    scores = session.token_scores()
    prompt = ids_of(loom, session.branch())[: -len(scores)]
    assert tuple(each.token for each in scores) == (*choice.best.ids, tiny_tokenizer().eos_token_id)
    expected = by_transformers(loom, prompt, tuple(each.token for each in scores))
    assert [each.logprob for each in scores] == pytest.approx(expected, rel=2.0**-10, abs=1e-4)


def test_it_tells_where_tokens_came_from_and_single_tokens_cost_no_pass(
    loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch
):
    main = loom.session("a").branch()
    first = main.choose(QUESTION, CHOICES)
    run = sum(len(option.ids) - 1 for option in first.options) + len(first.best.ids)
    prompt = len(ids_of(loom, main)) - len(first.best.ids) - 1
    assert (first.tokens.reused, first.tokens.replayed, first.tokens.computed) == (0, 0, prompt + run)
    monkeypatch.setattr(loom.engine, "run_scored", None)  # would raise
    second = main.choose("And now?", ["A", "B", "C"])
    assert [len(option.ids) for option in second.options] == [1, 1, 1]
    assert second.tokens.reused == prompt + len(first.best.ids)


def test_it_ends_as_a_reply_does_and_what_is_said_next_stands_on_it(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.choose(QUESTION, CHOICES)
    with pytest.raises(NothingToDo):
        main.continue_reply()
    held = len(ids_of(loom, main)) - 1  # what ends the reply is pending
    following = main.say("go on", max_tokens=2)
    assert following.tokens.reused == held
    assert main.regenerate(max_tokens=2).reply.tokens.computed == 0


def test_under_the_default_template_it_ends_and_begins_as_that_writes_replies(store_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    engine = kvloom.TransformersEngine(tiny_model("llama"), tokenizer, name="tiny")
    with kvloom.open(store_path, model=engine) as loom:
        main = loom.session("a").branch()
        choice = main.choose(QUESTION, ["yes", "no"])
        assert {tokenizer.decode(option.ids) for option in choice.options} == {" yes", " no"}
        with pytest.raises(NothingToDo, match="complete"):
            main.continue_reply()
        held = len(ids_of(loom, main))
        assert main.say("and", max_tokens=1).tokens.reused == held
        text = tokenizer.decode(ids_of(loom, main))
        assert text.startswith(f"User: {QUESTION}\nAssistant: {choice.best.text}\nUser: and\nAssistant:")


def test_control_tokens_in_a_choice_are_text(loom: kvloom.KVLoom):
    tokenizer = tiny_tokenizer()
    choice = loom.session("a").branch().choose(QUESTION, ["<|im_end|>", "no"])
    assert tokenizer.eos_token_id not in choice.options[0].ids
    assert tokenizer.decode(choice.options[0].ids) == "<|im_end|>"


# The same whatever else was scored


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_does_not_matter_to_a_single_bit(tmp_path: Path, kind: str):
    found = []
    for name, texts in (("a", CHOICES), ("b", CHOICES[::-1]), ("c", [CHOICES[1], CHOICES[0], CHOICES[2]])):
        with opened(tmp_path / f"{name}.db", kind) as loom:
            branch = loom.session("talk").branch()
            choice = branch.choose(QUESTION, texts)
            options = sorted(choice.options, key=lambda option: option.text)
            found.append((options, choice.best, ids_of(loom, branch), live_digests(loom)))
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_leaves_no_trace_in_the_state_or_in_the_store(tmp_path: Path, kind: str):
    found = []
    for name in ("scored", "not scored"):
        with opened(tmp_path / f"{name}.db", kind) as loom:
            branch = loom.session("talk").branch()
            branch.say("Who was it, and what was said?", max_tokens=5)  # its last token is pending
            if name == "scored":
                before, rows, live = live_digests(loom), counts(loom), loom.resumer.live
                held, hidden = held_by(live), live.hidden
                choice = branch.score(["the", " and that is what they said to her"])
                assert choice.best in choice.options
                assert live_digests(loom) == before
                assert counts(loom) == rows
                assert live.ready
                assert held_by(live) == held
                assert live.hidden is hidden
            branch.say("And then?", max_tokens=5)
            loom.flush()
            found.append((ids_of(loom, branch), live_digests(loom), counts(loom)["chunk"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_reply_comes_back_from_the_store_bit_for_bit(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        branch = loom.session("talk").branch()
        branch.choose(QUESTION, CHOICES)
        live, ids = live_digests(loom), ids_of(loom, branch)
        assert digests(loom, branch) == live
        branch.say("And then?", max_tokens=3)
    with opened(store_path, kind) as loom:
        branch = loom.find("talk").fork("again", "main~2")
        assert ids_of(loom, branch) == ids
        assert branch.say("And then?", max_tokens=3).tokens.replayed == 0
        assert ids_of(loom, branch) == ids_of(loom, loom.find("talk").branch())


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_a_chosen_reply_whose_state_was_not_stored_is_run_again_to_the_same_bits(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        branch = loom.session("talk").branch()
        branch.choosing(QUESTION, CHOICES, reuse=False).reply  # noqa: B018
        loom.session("other").branch().choose(QUESTION, CHOICES)
        expected = digests(loom, loom.find("other").branch())
        assert digests(loom, branch) == expected


@pytest.mark.parametrize("kind", ["llama", "mamba2", "jamba"])
def test_state_that_no_segment_holds_is_left_as_it_was_too(kind: str):
    fresh = engine(kind)
    live = fresh.new_state(8)
    logits = fresh.prefill(live, [1, 2, 3, 4, 5])
    before, held, hidden = (rows_of(live, 5), frame_of(live)), held_by(live), live.hidden
    first = choosing.scored(fresh, live, logits, [Given("a", [7, 8, 9]), Given("b", [6])])
    assert (rows_of(live, 5), frame_of(live)) == before
    assert (held_by(live), live.ready) == (held, True)
    assert live.hidden is hidden
    assert choosing.scored(fresh, live, logits, [Given("b", [6]), Given("a", [7, 8, 9])]) == first[::-1]


# Scoring without saying


def test_scoring_after_a_message_says_what_choosing_does(loom: kvloom.KVLoom):
    session = loom.session("a")
    chosen = session.branch().choose(QUESTION, CHOICES)
    asked = session.fork("asked", "main~1")
    scored = asked.score(CHOICES)
    assert (scored.options, scored.best) == (chosen.options, chosen.best)
    assert scored.tokens.computed == sum(len(option.ids) - 1 for option in scored.options)


def test_scoring_goes_on_with_a_reply_that_was_stopped(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say(QUESTION, max_tokens=4)
    ids = ids_of(loom, main)
    choice = main.score(["the", " that was all"])
    for option in choice.options:
        assert option.logprobs == pytest.approx(by_transformers(loom, ids, option.ids), abs=1e-4)
    assert "".join(tiny_tokenizer().decode(choice.options[1].ids)) == " that was all"
    # What the model itself would go on with is its likeliest token.
    going_on = main.continue_reply(max_tokens=1).reply
    likeliest = loom.find("a").token_scores()[0]
    assert going_on.tokens.generated == 1
    assert all(option.logprob <= likeliest.top[0][1] + 1e-2 for option in choice.options)


def test_long_texts_are_scored_in_several_passes(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    session = loom.session("a")
    session.branch().say(QUESTION, max_tokens=1)
    asked = session.fork("asked", "main~1")
    text = " ".join(["the and of to"] * 40)
    whole = asked.score([text]).best
    assert whole.probability == 1.0
    assert whole.logprobs == pytest.approx(by_transformers(loom, ids_of(loom, asked), whole.ids), abs=1e-3)
    monkeypatch.setattr(choosing, "SCORED_TOKENS", 7)
    assert asked.score([text]).best.logprobs == pytest.approx(whole.logprobs, abs=1e-3)


def test_there_must_be_something_that_can_follow(loom: kvloom.KVLoom):
    main = loom.session("a", system="be brief").branch()
    with pytest.raises(NothingToDo):
        main.score(["yes"])
    main.choose(QUESTION, CHOICES)
    with pytest.raises(NothingToDo, match="complete"):
        main.score(["yes"])


# What is refused


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        ([], "nothing to choose"),
        ("yes", "one text"),
        (["yes", ""], "choice 2 of 2 is empty"),
        (["yes", " \n"], "empty"),
        (["yes", "no", "yes"], "'yes' is given twice"),
        (["yes", "\ud800"], "UTF-8"),
    ],
)
def test_choices_that_are_none_are_refused_before_anything_is_said(loom: kvloom.KVLoom, texts: list[str], word: str):
    main = loom.session("a").branch()
    for attempt in (lambda: main.choose(QUESTION, texts), lambda: main.score(texts)):
        with pytest.raises(InvalidText, match=word) as error:
            attempt()
        assert error.value.hint
    assert main.log() == []


def test_texts_of_the_same_tokens_are_refused(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    main = loom.session("a").branch()
    monkeypatch.setattr(choosing, "reply_ids", lambda *args, **options: [5, 6])
    with pytest.raises(InvalidText, match="same tokens as 'yes'"):
        main.choose(QUESTION, ["yes", "Yes"])
    monkeypatch.setattr(choosing, "reply_ids", lambda *args, **options: [])
    with pytest.raises(InvalidText, match="no tokens"):
        main.choose(QUESTION, ["yes"])
    assert main.log() == []


def test_a_choice_that_does_not_fit_is_refused(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    with pytest.raises(ContextOverflow):
        main.choose(QUESTION, ["yes", "the " * 5000])
    assert main.log() == []


def test_stopped_before_a_choice_the_message_is_kept_and_the_state_is_whole(
    loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch
):
    session = loom.session("a")
    main, cancel, run = session.branch(), threading.Event(), loom.engine.run_scored

    def stopping(live: object, ids: list[int]) -> torch.Tensor:
        cancel.set()
        return run(live, ids)

    monkeypatch.setattr(loom.engine, "run_scored", stopping)
    with pytest.raises(SessionError, match="interrupted") as error:
        main.choose(QUESTION, CHOICES, cancel=cancel)
    assert error.value.hint
    assert [turn.role for turn in main.log()] == ["user"]
    monkeypatch.undo()
    going_on = main.continue_reply(max_tokens=5).reply
    assert going_on.tokens.computed == 0
    assert going_on.text == loom.session("b").branch().say(QUESTION, max_tokens=5).text


def test_broken_off_in_a_pass_the_message_is_kept_and_the_state_is_whole(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with opened(store_path, "jamba") as loom:
        session = loom.session("a")
        main, passes, run = session.branch(), [], loom.engine.run_scored

        def broken_off(live: LiveState, ids: list[int]) -> torch.Tensor:
            passes.append(ids)
            if len(passes) == 2:
                raise KeyboardInterrupt
            return run(live, ids)

        monkeypatch.setattr(loom.engine, "run_scored", broken_off)
        with pytest.raises(KeyboardInterrupt):
            main.choose(QUESTION, CHOICES)
        monkeypatch.undo()
        assert [turn.role for turn in main.log()] == ["user"]
        assert loom.resumer.live.ready
        going_on = main.continue_reply(max_tokens=5).reply
        assert (going_on.tokens.replayed, going_on.tokens.computed) == (0, 0)
        assert going_on.text == loom.session("b").branch().say(QUESTION, max_tokens=5).text


# The figures


def test_figures_follow_from_the_log_probabilities_alone():
    options = options_of(["a", "b", "c"], [[1], [2, 3], [4]], [[-2000.0], [-1000.0, -1000.5], [-2001.0]])
    assert [option.logprob for option in options] == [-2000.0, -2000.5, -2001.0]
    assert options[1].mean_logprob == -1000.25
    assert math.fsum(option.probability for option in options) == pytest.approx(1.0)
    assert options[0].probability == pytest.approx(1 / (1 + math.exp(-0.5) + math.exp(-1)))


def test_of_equals_the_first_in_the_alphabet_is_chosen():
    options = options_of(["b", "a"], [[1], [2]], [[-1.0], [-1.0]])
    assert best_of(options).text == best_of(options[::-1]).text == "a"
    check_texts(["b", "a"])


# The command line


def test_say_with_choices_prints_the_reply_and_tells_the_odds(trip: Command):
    result = trip("say", "trip", QUESTION, "--choices", "yes, no", "--choice", "well, no")
    last = trip("show", "trip", "--json").json["turn"]
    assert result.code == 0
    assert result.out == last["text"] + "\n"
    assert last["settings"]["chosen_from"] == ["yes", "no", "well, no"]
    lines = result.err.splitlines()
    assert [line.split("%")[0].strip().replace(".", "").isdigit() for line in lines] == [True] * 3 + [False]
    assert lines[0].split("%")[1].split("(")[0].strip() == last["text"]
    assert "computed" in lines[-1]


def test_say_with_choices_in_json_has_the_choice(trip: Command):
    told = trip("say", "trip", QUESTION, "--choices", "yes,no", "--json").json
    assert [option["text"] for option in told["choice"]["options"]] == ["yes", "no"]
    assert told["choice"]["best"]["text"] == told["text"]
    assert sum(option["probability"] for option in told["choice"]["options"]) == pytest.approx(1.0)
    assert "choice" not in trip("say", "trip", "more", "--max-tokens", "1", "--json").json


def test_bad_choices_leave_nothing_behind(kvloom: Command, store_path: Path):
    fails(kvloom("say", "trip", QUESTION, "--choices", "yes,,no"), 40, "choice 2 of 3 is empty")
    fails(kvloom("say", "trip", QUESTION, "--choices", "yes,no", "--choice", "no"), 40, "twice")
    fails(kvloom("say", "trip", QUESTION, "--choices", "yes,no", "--top-k", "3"), 2, "--top-k")
    assert not store_path.exists()
