"""``kvloom search``: what it prints, and what it refuses."""

from __future__ import annotations

import pytest
from command import Command, fails


def test_hits_are_shown_with_their_ref_and_the_match_marked(trip: Command) -> None:
    result = trip("search", "hello")
    assert (result.code, result.err) == (0, "")
    first, second = result.out.splitlines()
    ref, role = first.split()[:2]
    assert (role, second) == ("user", "  [hello] there")
    assert trip("show", ref, "--json").json["turn"]["text"] == "hello there"


def test_words_need_no_quotes_and_json_is_one_object(trip: Command) -> None:
    [hit] = trip("search", "there", "hello", "--json").json["hits"]
    assert (hit["session"], hit["snippet"], hit["marks"]) == ("trip", "hello there", [[0, 5], [6, 11]])
    assert hit["ref"].startswith("trip@")
    assert trip("search", '"there hello"', "--json").json == {"hits": [], "damaged": 0}


def test_it_can_be_narrowed(trip: Command) -> None:
    trip("say", "other", "hello again", "--max-tokens", "2")
    assert len(trip("search", "hello", "--json").json["hits"]) == 2
    for options in (["--session", "other"], ["--newest", "--limit", "1"]):
        [hit] = trip("search", "hello", *options, "--json").json["hits"]
        assert hit["session"] == "other"
    [hit] = trip("search", "brief", "--role", "system", "--json").json["hits"]
    assert hit["role"] == "system"
    assert trip("search", "brief", "--role", "user", "--json").json["hits"] == []


def test_nothing_found_is_no_failure(trip: Command) -> None:
    result = trip("search", "nothing")
    assert (result.code, result.out, result.err.strip()) == (0, "", "nothing was found")


def test_raw_queries_and_building_the_index_anew(trip: Command) -> None:
    assert len(trip("search", "--raw", "hel* NOT away", "--json").json["hits"]) == 1
    assert len(trip("search", "--rebuild", "hello", "--json").json["hits"]) == 1
    fails(trip("search", "--raw", "hel* NOT ("), 20, "cannot search", "FTS5")


def test_a_removed_session_is_not_found(trip: Command) -> None:
    trip("rm", "trip", "--yes")
    assert trip("search", "hello", "--json").json["hits"] == []


def test_a_terminal_is_shown_no_control_characters(trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    trip("say", "odd", "a\x1b[31m needle\x9b", "--max-tokens", "2")
    assert not set("\x1b\x9b") & set(trip("search", "needle").out)
    monkeypatch.setattr("kvloom.cli.search.stdout_is_terminal", lambda: True)
    shown = trip("search", "needle").out
    assert "␛[31m needle" in shown
    assert "[needle]" not in shown


def test_what_cannot_be_searched_is_told(kvloom: Command, trip: Command) -> None:
    fails(trip("search", "???"), 20, "no word")
    fails(trip("search", "hello", "--session", "trap"), 20, "trap")
    fails(trip("search"), 2, "TEXT")


def test_without_a_store_there_is_nothing_to_search(kvloom: Command) -> None:
    fails(kvloom("search", "hello"), 20, "no store")
