"""``kvloom sample``: several replies at once, a table of them or one object, and the branch moved only if asked."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from command import Command, fails

from kvloom.cli.progress import Bars

SAID = "tell me of the one"


def test_replies_are_shown_best_first_and_the_branch_stays(kvloom: Command) -> None:
    shown = kvloom("sample", "trip", SAID, "-n", "4", "--max-tokens", "8", "--seed", "3")
    assert shown.code == 0, shown.err
    header, *rows = shown.out.splitlines()
    assert header.split() == ["branch", "score", "tokens", "finish", "text"]
    assert {row.split()[0] for row in rows} == {"main-1", "main-2", "main-3", "main-4"}
    scores = [float(row.split()[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(row.split()[2:4] == ["8", "length"] for row in rows)
    assert "4 replies" in shown.err
    assert "tokens/s" in shown.err
    log = kvloom("log", "trip", "--json").json["turns"]
    assert [turn["role"] for turn in log] == ["user"]


def test_without_a_text_they_are_other_replies_to_the_last_message(trip: Command) -> None:
    first = trip("sample", "trip@main~1", "-n", "2", "--max-tokens", "5", "--json").json
    assert len(first["samples"]) == 2
    for each in first["samples"]:
        turns = trip("log", f"trip@{each['branch']}", "--json").json["turns"]
        assert [turn["text"] for turn in turns[1:]] == ["hello there", each["text"]]


def test_one_object_tells_of_all_of_them_and_accepting_moves_the_branch(kvloom: Command) -> None:
    found = kvloom("sample", "trip", SAID, "-n", "3", "--max-tokens", "6", "--json", "--accept").json
    best, *others = found["samples"]
    assert all(best["score"] >= each["score"] for each in others)
    assert best["score"] == pytest.approx(best["logprob"] / best["tokens"])
    assert found["accepted"] == best["branch"]
    assert found["tokens"]["generated"] == 18
    log = kvloom("log", "trip", "--json").json["turns"]
    assert (log[-1]["id"], log[-1]["text"]) == (best["turn"], best["text"])
    more = kvloom("say", "trip", "and then", "--max-tokens", "3", "--json").json
    assert more["tokens"]["replayed"] == 0


def test_beams_are_found_in_order_of_their_score(kvloom: Command) -> None:
    command = ("sample", "trip", SAID, "--beam", "3", "--length-penalty", "0.5", "--early-stopping", "never")
    found = kvloom(*command, "--max-tokens", "6", "--json").json
    assert [each["branch"] for each in found["samples"]] == ["main-1", "main-2", "main-3"]
    for each in found["samples"]:
        assert each["score"] == pytest.approx(each["logprob"] / each["tokens"] ** 0.5)
    assert found["accepted"] is None
    again = kvloom("sample", "trip", "--beam", "3", "--max-tokens", "6", "--json").json
    assert [each["text"] for each in again["samples"]] == [each["text"] for each in found["samples"]]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-n", "0"), 40, ("n is 0",)),
        (("-n", "3", "--beam", "2"), 2, ("--beam says how many",)),
        (("--beam", "0"), 40, ("width is 0",)),
        (("--length-penalty", "2"), 2, ("--length-penalty is for --beam",)),
        (("--beam", "2", "--length-penalty", "nan"), 40, ("length_penalty is nan",)),
        (("--beam", "2", "--top-k", "4"), 2, ("--top-k", "--beam")),
        (("--temperature", "-1"), 40, ("temperature",)),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_opened(
    kvloom: Command, store_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    fails(kvloom("sample", "trip", SAID, *arguments), code, *words)
    assert not store_path.exists()


def test_there_must_be_something_to_reply_to(kvloom: Command) -> None:
    fails(kvloom("sample", "trip"), 20, "no store")
    assert kvloom("say", "other", "hello", "--max-tokens", "2").code == 0
    fails(kvloom("sample", "trip"), 20, "trip")
    fails(kvloom("sample", "other@main~2"), 40, "nothing was said")
    assert kvloom("branches", "other", "--json").out.count('"main') == 1, "no branch is left of it"


@pytest.mark.parametrize("way", [("-n", "2"), ("--beam", "2")])
def test_interrupted_replies_are_kept(kvloom: Command, monkeypatch: pytest.MonkeyPatch, way: tuple[str, str]) -> None:
    steps = []

    def chosen(_bars: Bars, tokens: int) -> None:
        steps.append(tokens)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bars, "chosen", chosen)
    stopped = kvloom("sample", "trip", SAID, *way, "--max-tokens", "40", "--json", "--accept")
    assert stopped.code == 130, stopped.err
    assert (stopped.json["finish_reason"], stopped.json["accepted"]) == ("interrupted", None)
    assert [each["tokens"] for each in stopped.json["samples"]] == [3, 3]
    for each in stopped.json["samples"]:
        assert each["finish_reason"] == "interrupted"
        assert kvloom("continue", f"trip@{each['branch']}", "--max-tokens", "2").code == 0
