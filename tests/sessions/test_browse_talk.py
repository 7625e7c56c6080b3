"""``kvloom browse``: saying things in the tree, with a tiny model that is loaded when it is first needed."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import Walk, walk
from command import Command
from textual.widgets import TextArea
from tiny import tiny_llama_folder

from kvloom.browse import app as application
from kvloom.browse.screens import Edit
from kvloom.browse.speech import Speech
from kvloom.loom import KVLoom
from kvloom.shown import clean, strip

LIMIT = 1 << 19
SHORT = {"max_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1 << 20))


@pytest.fixture
def path(trip: Command, store_path: Path) -> Path:
    """A store with a system prompt and one exchange: rows 1, 2, 3."""
    return store_path


def talk(path: Path, model: str, drive: Any, **options: Any) -> None:
    walk(path, drive, model=model, sampling=options.pop("sampling", SHORT), **options)


def texts(path: Path, branch: str = "main") -> list[str]:
    with KVLoom(path) as loom:
        return [turn.text for turn in loom.find("trip").log(branch)]


def branches(path: Path) -> list[str]:
    with KVLoom(path) as loom:
        return [branch.name for branch in loom.find("trip").branches()]


def test_at_a_tip_its_branch_moves_on_and_the_cursor_with_it(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        tip = at.tree.at
        await at.press("s")
        await at.type("and now")
        await at.until_said(5)
        assert at.turn.role == "assistant"
        assert "main" in at.turn.branches
        assert at.outline.path(at.tree.cursor)[-3].id == tip
        assert clean(at.turn.text.strip()) in at.shown
        await at.until(lambda: "4 tokens, held" in " ".join(at.shown.split()))  # its state is stored behind
        for word in ("trip@main", "reused", "computed", "stopped at its limit"):
            assert word in at.shown

        assert "● a 4 [main]" in at.shown
        expected = strip([each.entropy for each in at.app.screen.session.token_scores(at.turn)], 30)
        assert len(expected) == 4
        assert f"entropy {expected}" in at.shown
        at.tree.show(replace(at.outline, held=()), at.tree.at)
        await at.pilot.pause()
        assert "○ a 4 [main]" in at.shown

    talk(path, model, drive)
    assert texts(path)[3] == "and now"
    assert branches(path) == ["main"]


def test_what_is_said_is_what_say_would_have_said(trip: Command, store_path: Path, model: str) -> None:
    trip("fork", "trip", "b")
    told = trip("say", "trip@b", "and now", "--max-tokens", "24", "--json").json

    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("and now")
        await at.until_said(7)

    talk(store_path, model, drive, sampling={"max_tokens": 24})
    assert texts(store_path)[-1] == told["text"]


def test_where_no_branch_ends_a_new_one_begins(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("h", "h", "s")
        await at.type("otherwise")
        await at.until_said(5)
        assert at.turn.branches == ("main-2",)

    talk(path, model, drive)
    assert texts(path, "main-2")[:2] == ["Be brief.", "otherwise"]
    assert len(texts(path)) == 3


def test_another_reply_is_a_sibling_on_a_branch_of_its_own(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        first = at.turn
        await at.press("r")
        await at.until_said(4)
        assert (at.turn.parent, at.turn.branches) == (first.parent, ("main-2",))
        assert at.turn.id != first.id

    talk(path, model, drive)
    with KVLoom(path) as loom, loom.database.read() as conn:
        from kvloom_store import refs, turns
        from kvloom_store.names import Ref

        turn = turns.get(conn, refs.resolve(conn, Ref("trip", "main-2", 0)).turn or 0)
    assert turn.settings["temperature"] == 0.8


def test_an_edited_message_is_said_from_where_the_old_one_stands(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("e")
        assert at.told == ["only what you said can be edited\ngo to one of your turns (u in the tree)"]
        await at.press("h", "e")
        await at.until(lambda: isinstance(at.app.screen, Edit))
        assert at.app.screen.query_one(TextArea).text == "hello there"
        await at.press("escape")
        await at.until(lambda: at.app.screen is not None and at.tree.has_focus)
        await at.press("e")
        await at.until(lambda: isinstance(at.app.screen, Edit))
        await at.press("exclamation_mark", "ctrl+s")
        await at.until_said(5)
        assert at.turn.branches == ("main-2",)

    talk(path, model, drive)
    assert texts(path, "main-2")[:2] == ["Be brief.", "hello there!"]
    assert texts(path)[1] == "hello there"


def test_escape_stops_a_reply_and_keeps_it_and_the_keys_work_meanwhile(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("go on")
        await at.until(lambda: at.screen.speech is not None and len(at.screen.speech.pieces) > 20)
        assert "Esc stops" in at.shown
        at.hit("r")
        await at.until(lambda: at.told == ["a reply is being made; Esc stops it"])
        at.hit("up")
        await at.until(lambda: at.turn.text == "hello there")
        at.hit("t")
        await at.until(lambda: at.screen.line.has_focus)
        at.hit(*"here", "enter")
        await at.until(lambda: "#here" in at.shown)
        assert at.screen.speech is not None
        at.hit("escape")
        await at.until_said(5)
        await at.until(lambda: "interrupted" in at.shown)
        assert at.turn.text == "hello there"  # the cursor had gone elsewhere

    talk(path, model, drive, sampling={"max_tokens": LIMIT})
    with KVLoom(path) as loom:
        last = loom.find("trip").log()[-1]
    assert last.finish_reason == "interrupted"
    assert len(last.text) > 20


def test_leaving_stops_a_reply_and_keeps_it(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("go on")
        await at.until(lambda: at.screen.speech is not None and at.screen.speech.pieces)
        await at.press("q")
        await at.until(lambda: not at.app.is_running)

    talk(path, model, drive, sampling={"max_tokens": LIMIT})
    assert len(texts(path)) == 5


def test_a_signal_that_asks_to_end_is_obeyed_and_told(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("go on")
        await at.until(lambda: at.screen.speech is not None and at.screen.speech.pieces)
        signal.raise_signal(signal.SIGTERM)
        await at.until(lambda: not at.app.is_running)

    browser = walk(path, drive, model=model, sampling={"max_tokens": LIMIT})
    assert browser.left_by == signal.SIGTERM
    assert len(texts(path)) == 5


def test_stopped_while_the_model_loads_nothing_is_left_behind(
    path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    loading = Speech.loading

    def stopped(speech: Speech, stage: str, fraction: float) -> None:
        told.append(stage)
        speech.stop()
        loading(speech, stage, fraction)

    monkeypatch.setattr(Speech, "loading", stopped)

    async def drive(at: Walk) -> None:
        await at.press("h", "h", "s")
        await at.type("otherwise")
        await at.until(lambda: told and at.screen.speech is None)
        assert at.told == []
        monkeypatch.setattr(Speech, "loading", loading)
        await at.press("s")
        await at.type("otherwise")
        await at.until_said(5)

    talk(path, model, drive)
    assert branches(path) == ["main", "main-2"]


def test_the_model_is_loaded_only_when_something_is_said(path: Path) -> None:
    async def drive(at: Walk) -> None:
        await at.press("up", "m", "f")
        await at.type("b")
        await at.until(lambda: "[b]" in at.shown)
        assert not at.screen.loom.has_engine
        await at.press("home", "s")
        await at.type("hello")
        await at.until(lambda: at.told)
        assert at.told[0].startswith("no model 'nosuch' here\n")
        await at.until(lambda: at.screen.speech is None)

    talk(path, "nosuch", drive)
    assert branches(path) == ["main", "b"]


def test_another_model_is_refused_with_what_differs(path: Path, other_model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("hello")
        await at.until(lambda: at.told)
        assert "belongs to another model" in at.told[0]
        assert "use the model the session was made with" in at.told[0]

    talk(path, other_model, drive)
    assert len(texts(path)) == 3


def test_nothing_cannot_be_said_and_there_must_be_something_to_reply_to(path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type(" ")
        await at.until(lambda: at.told)
        await at.until(lambda: at.screen.speech is None)
        await at.press("home", "r")
        await at.until(lambda: len(at.told) == 2)
        await at.press("down", "r")
        await at.until(lambda: len(at.told) == 3)
        assert [told.partition("\n")[0] for told in at.told] == [
            "there is nothing to say",
            "there is no reply to make again here",
            "there is no reply to regenerate",
        ]

    talk(path, model, drive)
    assert branches(path) == ["main"]


def test_a_branch_that_moved_meanwhile_is_not_gone_on_with(trip: Command, store_path: Path, model: str) -> None:
    async def drive(at: Walk) -> None:
        assert trip("say", "trip", "first", "--max-tokens", "2").code == 0
        await at.press("s")
        await at.type("second")
        await at.until_said(7)
        assert at.turn.branches == ("main-2",)

    talk(store_path, model, drive)
    assert texts(store_path)[3] == "first"
    assert texts(store_path, "main-2")[3] == "second"


def test_a_bug_ends_the_browser_with_its_error_and_no_traceback(
    path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvloom.browse.tree_pane.TreePane.mark", lambda _: 1 / 0)

    async def drive(at: Walk) -> None:
        await at.press("m")

    with pytest.raises(ZeroDivisionError):
        talk(path, model, drive)
    browser = application.Browser(lambda *_: 1 / 0)
    monkeypatch.setattr(browser, "run", lambda: setattr(browser, "_exception", ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        application.run(browser)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_bug_in_the_thread_that_speaks_is_told_and_the_browser_goes_on(
    path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.browse.actions.Saying.start", lambda *_, **__: 1 / 0)

    async def drive(at: Walk) -> None:
        await at.press("s")
        await at.type("x")
        await at.until(lambda: at.told)
        assert at.told == ["ZeroDivisionError: division by zero\nthis is a bug; KVLOOM_DEBUG=1 shows where it happened"]
        await at.until(lambda: at.screen.speech is None)

    talk(path, model, drive)
