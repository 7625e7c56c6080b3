"""``kvloom tree``: how a session is drawn. The stores are made without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.cli import run
from kvloom_store import explorations, refs, turns
from kvloom_store.database import Database
from kvloom_store.names import Ref
from kvloom_store.turns import Turn

Draw = Callable[[int], list[str]]
Spec = list[tuple[int | None, str]]
"""Turns as (number of the parent, text)."""


def make(path: Path, spec: Spec, *, branches: dict[str, int] | None = None) -> None:
    database = Database(path)
    made: list[Turn] = []
    with database.write() as conn:
        session = refs.create_session(conn, "trip", {"model": "m"})
        for number, (parent, text) in enumerate(spec):
            role = "user" if number % 2 == 0 else "assistant"
            message = {"role": role, "content": text}
            made.append(turns.add_turn(conn, session.row, None if parent is None else made[parent], message))
        for name, at in (branches or {}).items():
            refs.add_branch(conn, session.row, name, made[at].row)
    database.close()


def scored(path: Path, branch: str, score: float) -> None:
    """Have a search score the turn a branch points at."""
    database = Database(path)
    with database.write() as conn:
        at = refs.resolve(conn, Ref("trip", branch, 0))
        assert at.turn is not None
        search = explorations.create(conn, at.session.row, f"of-{branch}", at.turn, {})
        made = explorations.add(conn, search, None, 1, at.turn, explorations.ENDED, 1, -1.0)
        explorations.set_score(conn, made, score)
    database.close()


@pytest.fixture
def draw(store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Draw:
    def draw(width: int = 80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        assert run(["tree", "trip"]) == 0
        return capsys.readouterr().out.splitlines()

    return draw


def drawn(line: str) -> str:
    """A line without the turn's id, which is random."""
    return re.sub(r"([●*]) [0-9a-f]{4,} ", r"\1 ", line)


def test_a_session_is_drawn_so(store_path: Path, draw: Draw) -> None:
    spec: Spec = [(None, "Where to?"), (0, "Rome."), (1, "Why?"), (2, "Food."), (1, "And then?"), (4, "Milan.")]
    spec += [(5, "Then?"), (6, "Home.")]
    make(store_path, spec, branches={"food": 3, "home": 7})
    assert [drawn(line) for line in draw(80)] == [
        "trip [main]",
        "● user  Where to?",
        "● assistant  Rome.",
        "├─● user  Why?",
        "│ ● assistant [food]  Food.",
        "● user  And then?",
        "● assistant  Milan.",
        "● user  Then?",
        "● assistant [home]  Home.",
    ]


def test_scores_of_searches_stand_beside_their_turns(
    store_path: Path, draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    make(store_path, [(None, "Where to?"), (0, "Rome."), (0, "Milan.")], branches={"rome": 1, "milan": 2})
    scored(store_path, "rome", -1.25)
    scored(store_path, "milan", 0.75)
    assert [drawn(line) for line in draw()[2:]] == [
        "├─● user [milan] score 0.75  Milan.",
        "● assistant [rome] score -1.25  Rome.",
    ]
    assert run(["tree", "trip", "--json"]) == 0
    assert [turn["score"] for turn in json.loads(capsys.readouterr().out)["turns"]] == [None, -1.25, 0.75]
    for kind in ("--svg", "--html"):
        assert run(["tree", "trip", kind, "-"]) == 0
        picture = capsys.readouterr().out
        assert "score -1.25<" in picture
        assert "score 0.75<" in picture


def test_a_straight_conversation_is_never_indented_however_deep(store_path: Path, draw: Draw) -> None:
    make(store_path, [(n - 1 if n else None, f"turn {n}") for n in range(5000)])
    lines = draw(80)
    assert len(lines) == 5001
    assert all(line.startswith("● ") for line in lines[1:])


def test_a_tree_that_branches_at_every_turn_stays_narrow(store_path: Path, draw: Draw) -> None:
    # Each turn of the trunk has a reply that nobody went on with.
    trunk: Spec = [(None, "0")]
    for n in range(0, 1000, 2):
        trunk += [(n, "aside"), (n, "on")]
    make(store_path, trunk)
    lines = draw(30)
    assert {line[0] for line in lines[1:]} == {"●", "├"}
    assert max(map(len, lines)) <= 30


@pytest.mark.parametrize("width", [5, 20, 40, 200])
def test_lines_fit_the_terminal_unless_names_do_not(store_path: Path, draw: Draw, width: int) -> None:
    make(store_path, [(None, "漢字かな交じり文 " * 40), (0, "plain words " * 40)])
    for line in draw(width)[1:]:
        wide = sum(2 if ord(char) > 0x2FFF else 1 for char in line)
        assert wide <= max(width, len("● 1234 assistant"))


def test_text_cannot_draw(store_path: Path, draw: Draw) -> None:
    make(store_path, [(None, "a\nb\r\x1b[2J[bold]x[/bold]\t\u202ecba"), (0, "")])
    assert drawn(draw()[1]) == "● user  a b ␛[2J[bold]x[/bold] �cba"


def test_a_terminal_without_unicode_gets_plain_signs(
    store_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store_path, [(None, "a"), (0, "b"), (0, "c")])
    monkeypatch.setattr("kvloom.cli.tree.UNICODE", ("*", "| ", "+-", "~"))
    assert [drawn(line) for line in draw()[1:]] == ["* user  a", "+-* user  c", "* assistant  b"]
