"""``kvloom browse``: walking, names, searching, comparing. The stores are made without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from browsing import Walk, walk
from test_cli_tree import Spec, make, scored

from kvloom.browse.conversation import Conversation
from kvloom.browse.screens import Choose, Compare, Keys, Sessions
from kvloom.browse.tree_pane import TreePane
from kvloom.errors import NothingToDo
from kvloom.loom import KVLoom
from kvloom_store import refs
from kvloom_store.database import Database
from kvloom_store.names import Ref

SPEC: Spec = [
    (None, "Where to?"),
    (0, "Rome."),
    (1, "Why?"),
    (2, "Food."),
    (1, "And then?"),
    (4, "Milan."),
    (5, "Then?"),
]
SPEC += [(6, "Home.")]
# Row 0 is the beginning; the rows of the turns above: 1, 2, 3, 4 (food), 5, 6, 7, 8 (home, main).


@pytest.fixture
def trip(store_path: Path) -> Path:
    make(store_path, SPEC, branches={"food": 3, "home": 7})
    with KVLoom(store_path) as loom, loom.database.write() as conn:
        main = refs.resolve(conn, Ref("trip", "main", 0))
        home = refs.resolve(conn, Ref("trip", "home", 0))
        assert main.branch is not None
        refs.move_branch(conn, main.branch.row, None, home.turn)
    return store_path


def names(path: Path) -> dict[str, str]:
    """Where each branch and tag points: the text there."""
    with KVLoom(path) as loom:
        return {name: turn.text for turn in loom.find("trip").tree() for name in (*turn.branches, *turn.tags)}


class TestLooking:
    def test_it_begins_where_main_is_with_the_path_to_there_beside_it(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            assert at.turn.text == "Home."
            left = [line[:31].rstrip(" ▕") for line in at.lines]
            assert left[:9] == [
                "trip",
                "● u Where to?",
                "● a Rome.",
                "├─● u Why?",
                "│ ● a [food] Food.",
                "● u And then?",
                "● a Milan.",
                "● u Then?",
                "● a [main] [home] Home.",
            ]
            right = [line[32:].strip() for line in at.lines]
            assert [line for line in right if line in ("Where to?", "Rome.", "Why?", "Milan.", "Home.")] == [
                "Where to?",
                "Rome.",
                "Milan.",
                "Home.",
            ]
            assert "trip@main · 6 turns" in at.shown

        walk(trip, drive)

    def test_a_ref_says_where_to_begin(self, trip: Path) -> None:
        with KVLoom(trip) as loom:
            turn = loom.find("trip").log("food")[-1].id

        async def drive(at: Walk) -> None:
            assert at.turn.text == "Food."

        walk(trip, drive, at=turn)

    @pytest.mark.parametrize(
        ("keys", "row"),
        [
            (["up"], 7),
            (["k"], 7),
            (["up", "down"], 8),
            (["k", "k", "j"], 7),
            (["left"], 7),
            (["h", "h", "h", "h"], 2),
            (["h", "h", "h", "h", "right"], 3),
            (["h", "h", "h", "h", "l", "l"], 4),
            (["right"], 8),
            (["home"], 0),
            (["home", "up"], 0),
            (["home", "end"], 8),
            (["pageup"], 0),
            (["home", "pagedown"], 8),
        ],
    )
    def test_keys_walk(self, trip: Path, keys: list[str], row: int) -> None:
        async def drive(at: Walk) -> None:
            await at.press(*keys)
            assert at.tree.cursor == row
            assert at.outline.places[row - 1].node.text in at.shown if row else "trip" in at.shown

        walk(trip, drive)

    def test_space_folds_and_walking_into_it_unfolds(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("home", "down", "down", "down", "space")
            assert "├─● u +1 Why?" in at.shown
            assert "[food]" not in at.shown
            await at.press("down")
            assert at.turn.text == "And then?"
            await at.press("up", "right")
            assert at.turn.text == "Food."
            assert "[food]" in at.shown

        walk(trip, drive)

    def test_a_click_goes_to_a_turn(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.pilot.click(TreePane, offset=(3, 4))
            await at.pilot.pause()
            assert at.turn.text == "Food."

        walk(trip, drive)

    def test_enter_goes_into_the_transcript_and_escape_comes_back(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("enter")
            assert at.screen.transcript.has_focus
            await at.press("escape")
            assert at.tree.has_focus

        walk(trip, drive)

    def test_the_transcript_scrolls(self, store_path: Path) -> None:
        make(store_path, [(None, "\n".join(f"line {n}" for n in range(100)))], branches={"b": 0})

        async def drive(at: Walk) -> None:
            await at.press("end")
            assert "line 99" in at.shown
            await at.press("enter", "home")
            await at.until(lambda: "line 0" in at.shown)
            await at.press("end")
            await at.until(lambda: "line 99" in at.shown)

        walk(store_path, drive)

    def test_scores_are_shown_where_there_are_some(self, trip: Path) -> None:
        scored(trip, "food", 0.8251)

        async def drive(at: Walk) -> None:
            assert "[food] score 0.825 Food." in at.shown
            await at.press("up", "up", "up", "up")
            assert "score 0.825" in at.shown

        walk(trip, drive)

    def test_text_cannot_draw_or_mean_anything(self, store_path: Path) -> None:
        make(store_path, [(None, "[bold]x[/bold] [/] \x1b[2J\x07\u202eabc\ttab"), (0, "b")], branches={"b": 0})

        async def drive(at: Walk) -> None:
            await at.press("down")
            assert at.shown.count("[bold]x[/bold] [/] ␛[2J␇�abc") == 1
            assert "[b] [bold]x" in at.shown
            await at.press("slash")
            await at.type("[/]")
            assert "1 turns found" in at.shown

        walk(store_path, drive)

    def test_every_key_is_explained(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("question_mark")
            assert isinstance(at.app.screen, Keys)
            told = str(at.app.screen.query_one("#keys").content)
            for binding in (*TreePane.BINDINGS, *Conversation.BINDINGS):
                assert binding.description in told
            await at.press("escape")
            assert at.tree.has_focus

        walk(trip, drive)

    def test_q_leaves(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("q")
            await at.until(lambda: not at.app.is_running)

        walk(trip, drive)


class TestSearching:
    def test_the_next_turn_that_was_found_is_gone_to(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("slash")
            await at.type("FOOD")
            assert at.turn.text == "Food."
            assert "1 turns found" in at.shown
            await at.press("slash")
            await at.type("then")
            assert at.turn.text == "And then?"
            await at.press("n")
            assert at.turn.text == "Then?"
            await at.press("n")
            assert at.turn.text == "And then?"
            await at.press("N")
            assert at.turn.text == "Then?"

        walk(trip, drive)

    def test_escape_leaves_the_line_and_nothing_happens(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("slash", "f", "escape")
            assert at.tree.has_focus
            assert not at.screen.line.display
            assert at.turn.text == "Home."

        walk(trip, drive)

    def test_what_is_not_there_is_said(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("slash")
            await at.type("paris")
            assert "0 turns found" in at.shown
            await at.press("n")
            assert at.turn.text == "Home."

        walk(trip, drive)


class TestNames:
    def test_a_fork_begins_at_the_cursor(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("h", "f")
            await at.type("instead")
            await at.until(lambda: "instead" in at.turn.branches)
            assert "branch instead begins here" in at.shown

        walk(trip, drive)
        assert names(trip)["instead"] == "Then?"

    def test_a_fork_at_the_very_beginning(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("home", "f")
            await at.type("anew")
            await at.until(lambda: "trip [anew]" in at.shown)

        walk(trip, drive)

    def test_a_tag_stays_at_a_turn(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("h", "t")
            await at.type("best")
            await at.until(lambda: "#best" in at.shown)
            await at.press("home", "t")
            await at.type("no")
            await at.until(lambda: at.told)
            assert at.told == ["there is no turn to tag here\ngo to a turn first"]

        walk(trip, drive)
        assert names(trip)["best"] == "Then?"

    @pytest.mark.parametrize(("key", "name", "told"), [("f", "main", "exists already"), ("t", "no", "exists already")])
    def test_a_name_that_is_taken_is_told_with_a_hint(self, trip: Path, key: str, name: str, told: str) -> None:
        async def drive(at: Walk) -> None:
            await at.press("t")
            await at.type("no")
            await at.press(key)
            await at.type(name)
            await at.until(lambda: at.told)
            assert at.told == [f"branch or tag '{name}' {told}\nchoose another name"]

        walk(trip, drive)

    def test_accepting_moves_main_here_and_keeps_its_old_tip(self, trip: Path) -> None:
        with KVLoom(trip) as loom:
            loom.find("trip").discard(loom.find("trip").branch("home"))

        async def drive(at: Walk) -> None:
            await at.press("up", "up", "up", "up", "a")
            await at.until(lambda: "main" in at.turn.branches)
            assert "main is here; where it was is main-2 now" in at.shown

        walk(trip, drive)
        assert names(trip) == {"main": "Food.", "food": "Food.", "main-2": "Home."}

    def test_accepting_makes_no_branch_where_another_one_leads_there(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("up", "up", "up", "up", "a")
            await at.until(lambda: "main" in at.turn.branches)
            await at.press("a")
            await at.until(lambda: at.told)
            assert "main is here already" in at.told[0]

        walk(trip, drive)
        assert names(trip) == {"main": "Food.", "food": "Food.", "home": "Home."}

    def test_deleting_a_branch_asks_first_and_keeps_the_turns(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("x")
            await at.until(lambda: isinstance(at.app.screen, Choose))
            assert "keep all" in at.shown
            assert "delete main" not in at.shown
            await at.press("enter")
            assert "home" in at.turn.branches
            await at.press("x")
            await at.until(lambda: isinstance(at.app.screen, Choose))
            await at.press("down", "enter")
            await at.until(lambda: isinstance(at.app.screen, Conversation) and "home" not in at.turn.branches)
            assert "branch home is deleted" in at.shown
            await at.press("x")
            await at.until(lambda: at.told)
            assert "main is never deleted" in at.told[0]

        walk(trip, drive)
        assert names(trip) == {"main": "Home.", "food": "Food."}


class TestComparing:
    @pytest.mark.parametrize("second", [["m"], []])
    def test_two_turns_are_shown_from_where_their_paths_part(self, trip: Path, second: list[str]) -> None:
        async def drive(at: Walk) -> None:
            await at.press("m", "up", "up", "up", "up", *second, "d")
            assert isinstance(at.app.screen, Compare)
            assert "they part after assistant" in at.shown
            assert "Rome." in at.shown
            assert "Where to?" not in at.shown
            line = next(line for line in at.lines if "And then?" in line)
            assert line.index("And then?") < 40 < line.index("Why?")
            await at.press("escape")
            assert at.tree.has_focus

        walk(trip, drive)

    def test_long_paths_are_compared_from_where_they_part(self, store_path: Path) -> None:
        spec: Spec = [(None, "start"), (0, "aside")]
        make(store_path, spec + [(n if n > 1 else 0, f"turn {n}") for n in range(1, 1000)])

        async def drive(at: Walk) -> None:
            await at.press("end", "m", "home", "down", "down", "m", "d")
            assert "turn 1" in at.shown
            assert "aside" in at.shown
            await at.press("end")
            await at.until(lambda: "… 799 turns below" in at.shown)

        walk(store_path, drive)

    def test_marks_are_shown_taken_away_and_no_more_than_two(self, trip: Path) -> None:
        async def drive(at: Walk) -> None:
            await at.press("m", "up", "m", "up", "m")
            assert "●A u Then?" in at.shown
            assert "●B a Milan." in at.shown
            await at.press("m", "d")
            assert isinstance(at.app.screen, Compare)
            await at.press("q")
            await at.press("down", "m", "d")
            assert at.told == ["there is nothing to compare\nmark two turns with m first"]

        walk(trip, drive)


class TestSessions:
    def test_without_a_session_there_is_a_list_of_them(self, trip: Path) -> None:
        database = Database(trip)
        with database.write() as conn:
            refs.create_session(conn, "another", {"model": "m"})
        database.close()

        async def drive(at: Walk) -> None:
            await at.until(lambda: isinstance(at.app.screen, Sessions))
            await at.pilot.pause()
            listed = [line.split()[:3] for line in at.lines if " turns " in line]
            assert listed == [["another", "0", "turns"], ["trip", "8", "turns"]]
            await at.press("j", "enter")
            await at.until(lambda: isinstance(at.app.screen, Conversation) and at.outline.name == "trip")
            await at.press("backspace")
            await at.until(lambda: isinstance(at.app.screen, Sessions))
            await at.press("j", "k", "enter")
            await at.until(lambda: isinstance(at.app.screen, Conversation) and at.outline.name)
            assert at.outline.name == "another"

        walk(trip, drive, session=None)

    def test_none_is_an_error_with_a_hint(self, store_path: Path) -> None:
        KVLoom(store_path).close()

        async def drive(at: Walk) -> None:
            await at.until(lambda: not at.app.is_running)

        with pytest.raises(NothingToDo, match="no sessions yet"):
            walk(store_path, drive, session=None)


class TestLarge:
    def queries(self, path: Path, drive: Callable[[Walk, Callable[[], int]], object]) -> None:
        """Browse, counting statements."""
        counted: list[str] = []

        def count(_conn: object, _cursor: object, statement: str, *_more: object) -> None:
            counted.append(statement)

        sa.event.listen(sa.Engine, "before_cursor_execute", count)
        try:
            walk(path, lambda at: drive(at, lambda: len(counted)))
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", count)

    def test_opening_asks_as_little_of_five_thousand_turns_as_of_five(self, tmp_path: Path) -> None:
        asked = []
        for size in (5, 5000):
            path = tmp_path / str(size) / "kvloom.db"
            make(
                path,
                [(n - 1 if n else None, f"turn {n} " + "words " * 20) for n in range(size)],
                branches={"b": size - 1},
            )

            async def drive(at: Walk, count: Callable[[], int], size: int = size) -> None:
                asked.append(count())
                await at.press("end", "home", "down", "down", "pagedown", "end", "left", "space", "space")
                assert count() == asked[-1]  # walking asks nothing
                assert at.turn.text.startswith(f"turn {size - 2} ")
                assert f"turn {size - 2}" in at.shown
                await at.press("home", "down")
                assert "turn 0 words" in at.shown
                assert "turns above" not in at.shown

            self.queries(path, drive)
        assert asked[0] == asked[1]

    def test_only_the_lines_that_are_seen_are_drawn(self, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(store_path, [(n - 1 if n else None, f"turn {n}") for n in range(5000)], branches={"b": 4999})
        drawn: set[int] = set()
        row = TreePane._row
        monkeypatch.setattr(TreePane, "_row", lambda pane, number: drawn.add(number) or row(pane, number))

        async def drive(at: Walk) -> None:
            await at.press("end", "up", "up")
            await at.press("enter", "home")
            await at.until(lambda: "… 4798 turns above" in at.shown)
            assert at.screen.transcript.virtual_size.height < 610

        walk(store_path, drive)
        assert len(drawn) <= 60

    def test_a_tree_with_a_thousand_short_branches(self, store_path: Path) -> None:
        spec: Spec = [(None, "0")]
        for n in range(0, 2000, 2):
            spec += [(n, "aside"), (n, "on")]
        make(store_path, spec)

        async def drive(at: Walk) -> None:
            await at.press("end")
            assert at.tree.cursor == 2001
            await at.press("left")
            assert at.turn.text == "on"

        walk(store_path, drive, size=(60, 12))
