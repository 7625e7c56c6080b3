"""``kvloom why``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command, fails

from kvloom import models


def conversation(kvloom: Command, *more: tuple[str, str]) -> list[dict[str, str]]:
    turns = kvloom("log", "trip", "--json").json["turns"]
    said = [(turn["role"], turn["text"]) for turn in turns]
    return [{"role": role, "content": text} for role, text in [*said, *more]]


def test_it_tells_the_cause_the_counts_the_place_and_what_to_do(trip: Command) -> None:
    result = trip("why", "trip", "and more")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("new text: only the new text is new\n")
    for word in ("tokens  ", "reused 32, replayed 0", "differs at  token 33", "asked  ", "cost  ", "to do  "):
        assert word in result.out


def test_json_is_the_object_of_the_api_and_foretells_what_say_reports(trip: Command) -> None:
    found = trip("why", "trip@main~2", "hello where", "--json").json
    assert found.keys() >= {"cause", "detail", "advice", "tokens", "difference", "cost", "fields", "unchecked"}
    assert found["difference"]["asked"].startswith(" where")
    told = trip("say", "trip@main~2", "hello where", "--max-tokens", "2", "--json").json["tokens"]
    assert {key: found["tokens"][key] for key in ("reused", "replayed", "computed")} == {
        key: told[key] for key in ("reused", "replayed", "computed")
    }


def test_no_weights_are_loaded_and_the_store_is_left_as_it_was(
    trip: Command, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    before = trip("stats", "--json").json
    assert trip("why", "trip:30", "and more").code == 0
    assert trip("stats", "--json").json == before


def test_messages_come_from_a_file_or_stdin(trip: Command, tmp_path: Path) -> None:
    asked = conversation(trip, ("user", "more"))
    asked[1]["content"] = "hello here"
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(asked))
    result = trip("why", "trip", "--messages", str(file))
    assert result.out.startswith("edited history: the text of turn")
    assert "character 6" in result.out
    piped = trip("why", "trip", "--messages", "-", "--json", stdin=json.dumps(asked).encode())
    assert piped.json["cause"] == "edited history"


def test_another_template_or_clock_is_for_messages_only(trip: Command, tmp_path: Path) -> None:
    template, file = tmp_path / "t.jinja", tmp_path / "m.json"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    file.write_text(json.dumps(conversation(trip, ("user", "more"))))
    found = trip("why", "trip", "--messages", str(file), "--chat-template", str(template), "--json").json
    assert found["cause"] == "template"
    options = ["--template-options", '{"a": 1}', "--clock", "2020-01-01"]
    assert trip("why", "trip", "--messages", str(file), *options).code == 0
    fails(trip("why", "trip", "text", "--clock", "2020-01-01"), 2, "--messages")
    fails(trip("why", "trip", "--messages", str(file), "--clock", "noon"), 40, "ISO")
    fails(trip("why", "trip", "--messages", str(file), "--template-options", "[]"), 40, "JSON object")


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[]", '[{"role": 1}]', "[" * 100_000])
def test_what_is_no_list_of_messages_is_refused(trip: Command, tmp_path: Path, content: str) -> None:
    file = tmp_path / "m.json"
    file.write_text(content)
    fails(trip("why", "trip", "--messages", str(file)), 40)


def test_what_cannot_be_answered_is_told(trip: Command, tmp_path: Path) -> None:
    fails(trip("why", "trip"), 2, "TEXT or --messages")
    fails(trip("why", "trip", "text", "--messages", "x"), 2)
    fails(trip("why", "trip", "--messages", str(tmp_path / "none")), 40, "cannot read")
    fails(trip("why", "nosuch", "text"), 20, "nosuch")
    fails(trip("why", "trip@nosuch", "text"), 20, "nosuch")
    fails(trip("why", "trip", "text", "--model", "nosuch"), 30, "nosuch")


def test_another_model_is_known_once_it_was_loaded_here(
    trip: Command, other_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.identity._SETTLED_NS", 0)
    found = trip("why", "trip", "more", "--model", other_model, "--json").json
    assert (found["cause"], "weights" in found["unchecked"]) == ("new text", True)
    assert trip("say", "elsewhere", "hello", "--model", other_model, "--max-tokens", "1").code == 0
    found = trip("why", "trip", "more", "--model", other_model, "--json").json
    assert (found["cause"], [field for field, _, _ in found["fields"]]) == ("other model", ["weights"])
    own = trip("ls", "--json").json["sessions"][-1]["dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[own]
    assert trip("why", "trip", "more", "--dtype", other).out.startswith("other model: dtype")
