"""``kvloom edit``: a past turn said otherwise, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, fails

from kvloom.cli import asking


def tree(kvloom: Command) -> set[str]:
    return {turn["id"] for turn in kvloom("tree", "trip", "--json").json["turns"]}


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An editor that runs what a test writes into this script; "$1" is the file."""
    script = tmp_path / "editor.sh"
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"sh {script}")
    return script


def test_an_edited_message_is_replied_to_on_a_new_branch(trip: Command) -> None:
    before = tree(trip)
    done = trip("edit", "trip~1", "--text", "who is there", "--max-tokens", "4")
    assert done.code == 0
    assert done.err.index("to compute") < done.err.index("trip@main-2"), "the cost is told first"
    turns = trip("log", "trip@main-2", "--json").json["turns"]
    assert [turn["text"] for turn in turns[:2]] == ["Be brief.", "who is there"]
    assert done.out.rstrip("\n") == turns[2]["text"].rstrip("\n")
    assert tree(trip) > before
    assert trip("log", "trip", "--json").json["turns"][1]["text"] == "hello there"


def test_json_holds_the_plan_what_was_run_and_the_reply(trip: Command) -> None:
    done = trip("edit", "trip~1", "--text", "who is there", "--max-tokens", "4", "--branch", "who", "--json")
    told = done.json
    assert done.err == ""
    assert (told["session"], told["branch"]) == ("trip", "who")
    plan, tokens = told["plan"], told["added"]["tokens"]
    assert plan["to_run"] == plan["computed"] == tokens["computed"]
    assert plan["kept"] == tokens["reused"] > 0
    assert told["reply"]["tokens"]["generated"] == 4
    assert told["reply"]["branch"] == "who"


def test_later_turns_are_appended_again_and_nothing_is_generated(trip: Command) -> None:
    old = trip("log", "trip", "--json").json["turns"]
    told = trip("edit", "trip~1", "--text", "who is there", "--replay-turns", "--json").json
    assert told["reply"] is None
    new = trip("log", f"trip@{told['branch']}", "--json").json["turns"]
    assert (new[2]["text"], new[2]["tokens"]) == (old[2]["text"], old[2]["tokens"])
    assert trip("say", f"trip@{told['branch']}", "go on", "--max-tokens", "2", "--require-reuse").code == 0


def test_text_comes_from_stdin_and_no_reply_is_generated_unless_wanted(trip: Command) -> None:
    told = trip("edit", "trip~1", "--text", "-", "--no-reply", "--json", stdin=b"who\nis there\n").json
    assert told["reply"] is None
    assert trip("show", f"trip@{told['branch']}", "--json").json["turn"]["text"] == "who\nis there"
    told = trip("edit", "trip", "--text", "it was so", "--json").json
    shown = trip("show", f"trip@{told['branch']}", "--json").json["turn"]
    assert (told["reply"], shown["role"], shown["finish_reason"]) == (None, "assistant", "given")
    assert shown["settings"]["edited_from"] == trip("show", "trip", "--json").json["turn"]["id"]


def test_the_editor_opens_with_the_text_and_its_last_newline_is_none_of_it(trip: Command, editor: Path) -> None:
    editor.write_text('grep -qx "hello there" "$1" && echo "hello who" > "$1" && touch -d 2030-01-01 "$1"\n')
    told = trip("edit", "trip~1", "--no-reply", "--json").json
    assert trip("show", f"trip@{told['branch']}", "--json").json["turn"]["text"] == "hello who"


@pytest.mark.parametrize("script", ["true", 'touch -d 2030-01-01 "$1"'])
def test_a_text_left_as_it_was_does_nothing_and_says_so(trip: Command, editor: Path, script: str) -> None:
    editor.write_text(f"{script}\n")
    before = tree(trip)
    done = trip("edit", "trip~1")
    assert (done.code, done.out) == (0, "")
    assert "unchanged" in done.err
    assert trip("edit", "trip~1", "--json").json["branch"] is None
    assert tree(trip) == before


def test_an_unchanged_text_needs_no_model(trip: Command, store_path: Path) -> None:
    code = (
        "import sys; from kvloom.cli import run; code = run(['edit', 'trip~1', '--text', 'hello there']);"
        "print(code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    env = {**os.environ, "KVLOOM_STORE": str(store_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["0"]


def test_above_the_threshold_it_asks_and_where_nobody_is_there_it_refuses(
    trip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ASK_ABOVE", 5)
    before = trip("tree", "trip", "--json").json
    refused = trip("edit", "trip~1", "--text", "who is there", "--json")
    assert (refused.code, refused.out) == (40, "")
    assert "--yes" in refused.err
    refused = trip("edit", "trip~1", "--text", "who is there")
    assert (refused.code, refused.out) == (40, "")
    assert "to compute" in refused.err
    assert trip("tree", "trip", "--json").json == before
    assert trip("branches", "trip", "--json").json["branches"][-1]["name"] == "main"
    assert trip("edit", "trip~1", "--text", "who is there", "--no-reply", "--yes").code == 0
    assert trip("edit", "trip~1", "--text", "who else", "--no-run").code == 0, "nothing is run"


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 130)])
def test_the_question_is_answered_at_a_terminal(
    trip: Command, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr(asking, "ASK_ABOVE", 5)
    monkeypatch.setattr(asking, "stdin_is_terminal", lambda: True)
    made = trip("edit", "trip~1", "--text", "who is there", "--no-reply", stdin=answer.encode())
    assert made.code == code
    assert len(trip("branches", "trip", "--json").json["branches"]) == (2 if code == 0 else 1)


def test_what_is_wrong_is_told_in_one_line(trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    fails(trip("edit", "trip~1"), 2, "--text")
    fails(trip("edit", "trip~3", "--text", "x"), 40, "beginning")
    fails(trip("edit", "trip@none", "--text", "x"), 20, "none")
    fails(trip("edit", "trip~1", "--text", " "), 40)
    fails(trip("edit", "trip~1", "--text", "x", "--branch", "main"), 20, "main")
