"""What the model thought of the tokens it generated: measured at the model, kept with the turn, read when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from command import Command, fails
from sqlalchemy import event
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import CorruptRow
from kvloom.scores import ALTERNATIVES, TokenScore, mean_logprob, perplexity, score
from kvloom.shown import strip
from kvloom_proto.scores import read_scores
from kvloom_store import schema, trie

HALF = 2.0**-10
"""How far a float16 lies from the number it stands for, as a share of it."""


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as opened:
        yield opened


def ids_of(loom: kvloom.KVLoom, branch: kvloom.Branch) -> list[int]:
    path, states = branch._path()
    position = states[path[-1].row].position
    with loom.database.read() as conn:
        return trie.tokens_to(conn, position.node, position.offset)


def by_transformers(loom: kvloom.KVLoom, ids: list[int], count: int) -> list[TokenScore]:
    """Scores of the last tokens from one pass of the plain model, in float64."""
    with torch.inference_mode():
        logits = loom.engine.model(torch.tensor([ids])).logits[0].double()
    found = []
    for at in range(len(ids) - count, len(ids)):
        logprobs = logits[at - 1].log_softmax(0)
        top = logprobs.topk(ALTERNATIVES)
        entropy = -float((logprobs.exp() * logprobs).sum())
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        found.append(TokenScore(ids[at], float(logprobs[ids[at]]), entropy, pairs))
    return found


def agree(ours: tuple[TokenScore, ...], theirs: list[TokenScore]) -> None:
    assert [each.token for each in ours] == [each.token for each in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=HALF, abs=1e-4)
        assert a.entropy == pytest.approx(b.entropy, rel=HALF, abs=1e-4)
        assert [token for token, _ in a.top] == [token for token, _ in b.top]
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], rel=HALF, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.7, "seed": 4, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.4}],
    ids=["greedy", "sampled"],
)
def test_they_are_the_models_own_whatever_the_reply_was_sampled_with(loom: kvloom.KVLoom, sampling: dict):
    session = loom.session("a", system="be brief")
    reply = session.branch().say("hello there", max_tokens=12, **sampling)
    scores = session.token_scores()
    assert len(scores) == reply.tokens.generated == 12
    agree(scores, by_transformers(loom, ids_of(loom, session.branch()), 12))


def test_the_first_token_of_a_reply_taken_from_stored_state_has_its_own(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello there", max_tokens=6)
    first = session.token_scores()
    loom.resumer.forget()
    reply = session.branch().regenerate(max_tokens=6).reply
    assert reply.tokens.computed == 0
    assert session.token_scores() == first


def test_a_continued_reply_keeps_its_own_part(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello there", max_tokens=9)
    whole = session.token_scores()
    session.fork("short", "main~1").regenerate(max_tokens=4).reply  # noqa: B018
    rest = session.branch("short").continue_reply(max_tokens=5).reply
    assert rest.tokens.generated == 5
    turns = session.log("short")
    assert [len(session.token_scores(turn)) for turn in turns] == [0, 4, 5]
    assert session.token_scores(turns[1]) + session.token_scores(turns[2]) == whole


def test_a_turn_that_is_cut_keeps_its_own_part(loom: kvloom.KVLoom):
    session = loom.session("a")
    asked = session.branch().say("hello there", max_tokens=9)
    whole = session.token_scores()
    start = asked.tokens.reused + asked.tokens.computed
    session.fork("cut", f"main:{start + 4}")
    assert session.token_scores("cut") == whole[:4]
    assert session.token_scores(f"main:{start + 3}") == whole[:3]
    assert session.token_scores(session.log(f"main:{start + 3}")[-1]) == whole[:3]
    session.fork("asked", f"main:{start - 2}")
    assert session.token_scores("asked") == ()


def test_a_reply_that_was_stopped_keeps_those_of_what_was_said(loom: kvloom.KVLoom):
    session = loom.session("a")
    run = iter(session.branch().stream("hello", max_tokens=30))
    next(run)
    run.close()  # type: ignore[attr-defined]
    last = session.log()[-1]
    assert last.finish_reason == "interrupted"
    assert len(session.token_scores(last)) == last.tokens > 0


def test_what_no_model_generated_has_none(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    assert session.token_scores() != session.log()  # the system turn has no tokens of its own yet
    assert session.token_scores() == ()
    session.branch().say("hello", max_tokens=2)
    assert [len(session.token_scores(turn)) for turn in session.log()] == [0, 0, 2]


def test_listing_reads_none_of_them(loom: kvloom.KVLoom):
    session = loom.session("a", system="be brief")
    session.branch().say("hello", max_tokens=4)
    loom.flush()
    statements: list[str] = []
    event.listen(loom.database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for look in (session.log, session.tree, session.branches, loom.sessions):
        look()
    assert statements
    assert not [each for each in statements if "turn_state.scores" in each]
    session.token_scores()
    assert [each for each in statements if "turn_state.scores" in each]


def test_they_are_under_the_checksum_of_their_row(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello", max_tokens=4)
    loom.flush()
    table = schema.turn_state
    with loom.database.write() as conn:
        packed = conn.execute(sa.select(table.c.scores).where(table.c.scores.is_not(None))).scalar_one()
        damaged = packed[:-1] + bytes([packed[-1] ^ 1])
        assert read_scores(damaged, [score.token for score in session.token_scores()])
        conn.execute(table.update().where(table.c.scores.is_not(None)).values(scores=damaged))
    with pytest.raises(CorruptRow):
        session.token_scores()


def test_tokens_that_are_ruled_out_count_for_nothing():
    logits = torch.tensor([0.0, -math.inf, math.log(3.0)])
    found = score(logits, 0)
    assert found.logprob == pytest.approx(math.log(0.25))
    assert found.entropy == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert [token for token, _ in found.top] == [2, 0, 1]
    assert found.top[2][1] == -math.inf
    certain = score(torch.tensor([-math.inf, 4.0]), 1)
    assert (certain.logprob, certain.entropy) == (0.0, 0.0)


def test_of_equals_the_lowest_id_comes_first():
    assert [token for token, _ in score(torch.zeros(3), 1).top] == [0, 1, 2]


def test_a_choice_among_n_equals_has_perplexity_n():
    scores = [score(torch.zeros(7), 3)] * 4
    assert mean_logprob(scores) == pytest.approx(-math.log(7))
    assert perplexity(scores) == pytest.approx(7.0)
    assert (mean_logprob([]), perplexity([])) == (0.0, 1.0)


# The command line


def test_show_prints_a_line_for_each_token(trip: Command):
    result = trip("show", "trip", "--scores")
    told = trip("show", "trip", "--scores", "--json").json
    lines = result.out.splitlines()
    assert lines[0].split() == ["position", "text", "probability", "entropy", "others"]
    assert len(lines) == 1 + 6 + 1
    first = told["tokens"][0]
    assert lines[1].split()[0] == str(first["position"])
    assert f"{100 * math.exp(first['logprob']):.1f}%" in lines[1]
    assert lines[-1].startswith("6 tokens, mean log-probability -")
    shown = trip("show", "trip", "--tokens", "--json").json["tokens"][-6:]
    for by_scores, by_tokens in zip(told["tokens"], shown, strict=True):
        assert {key: by_scores[key] for key in ("position", "id", "text")} == {
            key: by_tokens[key] for key in ("position", "id", "text")
        }
        assert len(by_scores["top"]) == 5
    mean = sum(each["logprob"] for each in told["tokens"]) / 6
    assert told["mean_logprob"] == pytest.approx(mean)
    assert told["perplexity"] == pytest.approx(math.exp(-mean))


def test_show_at_a_token_ends_there(trip: Command):
    whole = trip("show", "trip", "--scores", "--json").json["tokens"]
    at = whole[2]["position"]
    assert trip("show", f"trip:{at}", "--scores", "--json").json["tokens"] == whole[:2]


def test_show_of_what_was_not_generated_says_so(trip: Command):
    result = trip("show", "trip~1", "--scores")
    assert (result.code, result.out) == (0, "")
    assert "no scores" in result.err
    assert trip("show", "trip~1", "--scores", "--json").json["tokens"] == []


def test_log_adds_how_likely_each_reply_was(trip: Command):
    trip("say", "trip", "again", "--max-tokens", "3")
    result = trip("log", "trip", "--scores")
    assert result.out.count("perplexity") == 2
    turns = trip("log", "trip", "--scores", "--json").json["turns"]
    assert ["perplexity" in turn for turn in turns] == [turn["role"] == "assistant" for turn in turns]
    assert all(math.exp(-turn["mean_logprob"]) == pytest.approx(turn["perplexity"]) for turn in turns[2::2])
    assert "perplexity" not in trip("log", "trip").out


def test_tokens_and_scores_exclude_each_other(trip: Command):
    fails(trip("show", "trip", "--scores", "--tokens"), 2, "exclude each other")


@pytest.mark.parametrize(
    ("entropies", "width", "shown"),
    [
        ([], 5, ""),
        ([0.0, 0.6, 2.0, 3.99, 40.0], 5, "▁▂▅██"),
        ([0.0, 0.0, 0.0, 3.0, 0.1], 2, "▁▇"),  # the most uncertain token of a share is seen
        ([1.0] * 3, 30, "▃▃▃"),
    ],
)
def test_a_strip_shows_how_uncertain_the_model_was(entropies: list[float], width: int, shown: str) -> None:
    assert strip(entropies, width) == shown
