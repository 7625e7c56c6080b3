"""A tree as a picture and as a page: where turns stand, that text stays text, that both need nothing else."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_cli_tree import make

from kvloom.cli import run
from kvloom.listing import TreeTurn
from kvloom.picture.layout import layout
from kvloom.picture.page import page
from kvloom.picture.svg import CHARACTERS, svg

HOSTILE = (
    "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>"
    "\x00\x07\x1b[2J\x9b2J\u202eabc\u2066\ufffe\uffff\ud800 ]]> --> &lt;&amp; '\" \u200fעברית"
)
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Node:
    id: str
    parent: str | None


def nodes(*parents: int | None) -> list[Node]:
    return [Node(str(n), None if parent is None else str(parent)) for n, parent in enumerate(parents)]


def turn(number: int, parent: int | None, text: str = "words", **more: object) -> TreeTurn:
    plain = TreeTurn(
        f"{number:032x}", None if parent is None else f"{parent:032x}", "user", text, None, (), (), 3, None, False, 0
    )
    return replace(plain, **more)


def short(full: str | None) -> str:
    return (full or "")[-4:]


class Parsed(HTMLParser):
    """The elements of a page, and the text of each turn's paragraph."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag == "p"
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


class TestLayout:
    def test_the_longest_way_down_stays_in_its_column_and_the_others_hang_off_it(self) -> None:
        places = layout(nodes(None, 0, 1, 0, 3, 0))
        assert [(p.node.id, p.column, p.aside, p.above, p.below) for p in places] == [
            ("0", 0, False, None, 5),
            ("3", 1, True, 0, 1),
            ("4", 1, False, 1, 0),
            ("5", 1, True, 0, 0),
            ("1", 0, False, 0, 1),
            ("2", 0, False, 4, 0),
        ]

    def test_nothing_gives_nothing_and_several_beginnings_are_one_picture(self) -> None:
        assert layout(nodes()) == []
        assert [(p.column, p.aside, p.above) for p in layout(nodes(None, None))] == [(1, True, None), (0, False, None)]

    @pytest.mark.parametrize("seed", range(5))
    def test_every_node_has_one_row_and_a_subtree_is_a_run_of_rows(self, seed: int) -> None:
        chance = random.Random(seed)
        tree = nodes(None, *(chance.randrange(n) for n in range(1, 300)))
        places = layout(tree)
        assert sorted(p.node.id for p in places) == sorted(n.id for n in tree)
        for row, place in enumerate(places):
            inside = range(row + 1, row + 1 + place.below)
            for each in range(row + 1, len(places)):
                above = each
                while above > row:
                    above = -1 if places[above].above is None else places[above].above
                assert (above == row) == (each in inside)
            if place.above is not None:
                assert places[place.above].node.id == place.node.parent
                assert place.column == places[place.above].column + place.aside
        assert max(p.column for p in places) <= 9

    def test_no_line_crosses_a_turn(self) -> None:
        chance = random.Random(7)
        places = layout(nodes(None, *(chance.randrange(n) for n in range(1, 300))))
        for row, place in enumerate(places):
            if place.above is not None:
                assert all(places[r].column >= place.column for r in range(place.above + 1, row))

    def test_a_tree_as_deep_as_it_has_turns_is_drawn_without_recursion(self) -> None:
        places = layout(nodes(None, *range(20_000)))
        assert len(places) == 20_001
        assert {p.column for p in places} == {0}


class TestSvg:
    def test_names_branches_tags_scores_and_the_first_words(self) -> None:
        turns = [turn(0, None, "hello"), turn(1, 0, "there", branches=("main", "b"), tags=("best",), score=0.8251)]
        told = svg("trip", turns, short, ["empty"])
        texts = ["".join(text.itertext()) for text in ET.fromstring(told).iter(f"{SVG}text")]
        assert texts == ["trip [empty]", "0000 user hello", "0001 user [main] [b] #best score 0.825 there"]

    def test_text_is_clipped_to_the_row(self) -> None:
        told = ET.fromstring(svg("trip", [turn(0, None, "漢字 and words " * 50)], short))
        row = "".join(list(told.iter(f"{SVG}text"))[1].itertext())
        assert row.endswith("…")
        assert sum(2 if ord(char) > 0x2FFF else 1 for char in row) <= CHARACTERS

    def test_hostile_text_stays_text(self) -> None:
        hostile = turn(0, None, HOSTILE, role=HOSTILE, branches=(HOSTILE,), tags=(HOSTILE,))
        told = svg(HOSTILE, [hostile, turn(1, 0, HOSTILE)], short, [HOSTILE])
        tags = {element.tag.removeprefix(SVG) for element in ET.fromstring(told.encode()).iter()}
        assert tags == {"svg", "title", "style", "rect", "text", "tspan", "path", "circle"}
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", told)
        assert "\u200fעברית" in told  # a mark that belongs to its text, which is isolated
        assert "tspan{unicode-bidi:isolate}" in told

    def test_asks_for_nothing_from_outside_and_runs_nothing(self) -> None:
        told = svg("trip", [turn(0, None)], short)
        assert "url(" not in told
        assert "href" not in told
        assert "@import" not in told
        assert told.count("http") == 1  # the name space
        assert "prefers-color-scheme:dark" in told


class TestPage:
    def test_holds_every_turn_whole_and_once(self) -> None:
        turns = [turn(0, None, "one\ntwo"), turn(1, 0, "x" * 5000), turn(2, 0, "three", branches=("main",), score=0.5)]
        told = page("trip", turns, short)
        assert Parsed(told).texts == ["one\ntwo", "three", "x" * 5000]
        assert ">[main]</bdi> <bdi" in told
        assert ">score 0.5</bdi>" in told
        assert ("data-main", None) in Parsed(told).attributes

    def test_hostile_text_stays_text(self) -> None:
        plain = Parsed(page("trip", [turn(0, None, branches=("b",), tags=("t",)), turn(1, 0)], short, ["e"]))
        hostile = turn(0, None, HOSTILE, role=HOSTILE, branches=(HOSTILE,), tags=(HOSTILE,))
        told = page(HOSTILE, [hostile, turn(1, 0, HOSTILE)], short, [HOSTILE])
        found = Parsed(told)
        assert found.tags == plain.tags
        assert [name for name, _ in found.attributes] == [name for name, _ in plain.attributes]
        assert all(text.startswith("</script></style></title><script>alert(1)") for text in found.texts)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told)
        assert told.encode()

    def test_only_its_own_script_may_run_and_nothing_is_asked_for(self) -> None:
        told = page("trip", [turn(0, None, HOSTILE)], short)
        [script] = re.findall(r"<script>(.*?)</script>", told, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in told
        assert "innerHTML" not in script
        assert not {"link", "img", "iframe", "object", "base", "form"} & set(Parsed(told).tags)
        assert not {"src", "href"} & {name for name, _ in Parsed(told).attributes}

    def test_what_branches_can_be_folded(self) -> None:
        turns = [turn(0, None), turn(1, 0), turn(2, 1), turn(3, 0), turn(4, 3), turn(5, 2)]
        told = page("trip", turns, short)
        rows = re.findall(r'<li id="t(\d+)"[^>]*data-a="(-?\d+)" data-n="(\d+)"[^>]*>(<button)?', told)
        assert rows == [
            ("0", "-1", "5", "<button"),
            ("1", "0", "1", "<button"),
            ("2", "1", "0", ""),
            ("3", "0", "2", ""),
            ("4", "3", "1", ""),
            ("5", "4", "0", ""),
        ]

    def test_five_thousand_turns_are_a_page_of_a_few_megabytes(self) -> None:
        turns = [turn(n, n - 1 if n else None, "words " * 50) for n in range(5000)]
        told = page("trip", turns, short)
        assert len(told) < 3_000_000
        assert len(Parsed(told).texts) == 5000


class TestCommand:
    def test_writes_files_and_says_so_on_stderr(
        self, store_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        make(store_path, [(None, "a"), (0, "b"), (0, "ü")], branches={"tip": 1})
        files = [tmp_path / "trip.svg", tmp_path / "trip.html"]
        assert run(["tree", "trip", "--svg", str(files[0]), "--html", str(files[1])]) == 0
        told = capfd.readouterr()
        assert told.out == ""
        assert [line.split(":")[1] for line in told.err.splitlines()] == [" 3 turns of trip"] * 2
        assert "[tip]" in files[0].read_text()
        assert Parsed(files[1].read_text()).texts == ["a", "ü", "b"]

    @pytest.mark.parametrize("kind", ["svg", "html"])
    def test_a_dash_is_stdout(self, store_path: Path, capfdbinary: pytest.CaptureFixture[bytes], kind: str) -> None:
        make(store_path, [(None, "zwölf")])
        assert run(["tree", "trip", f"--{kind}", "-"]) == 0
        told = capfdbinary.readouterr()
        assert "zwölf" in told.out.decode()
        assert told.err == b""

    def test_json_names_the_files(self, store_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        make(store_path, [(None, "a")])
        file = str(tmp_path / "trip.svg")
        assert run(["tree", "trip", "--svg", file, "--json"]) == 0
        assert f'"svg": "{file}"' in capfd.readouterr().out

    @pytest.mark.parametrize(
        "args", [["--svg", "-", "--html", "-"], ["--svg", "-", "--json"], ["--svg", "x", "--html", "x"]]
    )
    def test_two_things_in_one_place_are_refused(
        self, store_path: Path, capfd: pytest.CaptureFixture[str], args: list[str]
    ) -> None:
        make(store_path, [(None, "a")])
        assert run(["tree", "trip", *args]) == 2
        assert capfd.readouterr().out == ""

    def test_a_place_that_cannot_be_written_is_an_error(
        self, store_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        make(store_path, [(None, "a")])
        assert run(["tree", "trip", "--svg", str(tmp_path)]) == 1
        assert "error:" in capfd.readouterr().err
