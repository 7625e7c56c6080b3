"""The commands that make room: what they tell, what they ask, and what comes back afterwards."""

from __future__ import annotations

import pytest
from command import Command, fails

from kvloom.cli import asking, room


@pytest.fixture(autouse=True)
def _tells_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SAY_ABOVE", 0.0)


def test_gc_tells_first_then_drops_and_everything_goes_on(trip: Command):
    planned = trip("gc", "--max-bytes", "0", "--dry-run", "--json").json
    assert planned["dry_run"]
    assert planned["freed"] == planned["before"] == trip("stats", "--json").json["bytes"]["state_stored"]
    [lost] = planned["branches"]
    assert (lost["name"], lost["tokens"]) == ("trip@main", planned["tokens"])
    assert 0 < lost["seconds"] <= lost["exact_seconds"]
    shown = trip("gc", "--max-bytes", "0", "--dry-run")
    assert "would free" in shown.out
    assert "trip@main" in shown.out
    done = trip("gc", "--max-bytes", "0", "--json").json
    assert (done["freed"], done["after"], done["dry_run"]) == (planned["freed"], 0, False)
    assert "nothing to drop" in trip("gc", "--max-bytes", "0").out
    assert "hello there" in trip("log", "trip").out
    went_on = trip("say", "trip", "and then?", "--max-tokens", "2")
    assert "comes back fresh" in went_on.err
    assert "--exact" in went_on.err
    assert went_on.code == 0
    assert "comes back" not in trip("say", "trip", "and then?", "--max-tokens", "2").err


def test_dropped_state_comes_back_exactly_where_that_is_asked_for(trip: Command):
    expected = trip("regenerate", "trip", "--temperature", "1", "--seed", "3", "--json").json
    trip("gc", "--max-bytes", "0")
    again = trip("regenerate", "trip", "--temperature", "1", "--seed", "3", "--exact")
    assert "comes back exactly" in again.err
    assert again.out.strip() == expected["text"].strip()
    trip("gc", "--max-bytes", "0")
    assert trip("warm", "trip", "--exact", "--dry-run", "--json").json["points"][0]["plan"]["replayed"] > 0
    assert trip("warm", "trip", "--dry-run", "--json").json["points"][0]["plan"]["replayed"] == 0
    assert trip("warm", "trip", "--exact", "--json").json["points"][0]["done"]["tokens"]["replayed"] > 0
    assert trip("warm", "trip", "--exact").out == "nothing to do: all state is there\n"
    fails(trip("say", "trip", "more", "--exact", "--no-reuse"), 2, "exclude")


def test_gc_asks_before_much_is_to_be_computed_anew(trip: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "ASK_ABOVE", 0.0)
    before = trip("stats", "--json").json["bytes"]["state_stored"]
    refused = trip("gc", "--max-bytes", "0", "--json")
    assert (refused.code, refused.out) == (40, "")
    fails(trip("gc", "--max-bytes", "0"), 40, "--yes")
    assert trip("stats", "--json").json["bytes"]["state_stored"] == before
    assert trip("gc", "--max-bytes", "0", "--yes", "--json").json["after"] == 0


def test_what_is_pinned_stays_and_is_marked(trip: Command):
    assert "is pinned" in trip("pin", "trip").out
    assert not trip("pin", "trip", "--json").json["changed"]
    assert "(pinned)" in trip("log", "trip").out
    assert trip("branches", "trip", "--json").json["branches"][0]["pinned"] == 3
    assert "pinned" in trip("branches", "trip").out
    kept = trip("gc", "--max-bytes", "0")
    assert "may not be dropped" in kept.out
    assert "is not pinned any more" in trip("unpin", "trip").out
    assert "was not pinned" in trip("unpin", "trip").out
    assert "pinned" not in trip("branches", "trip").out
    assert trip("gc", "--max-bytes", "0", "--json").json["after"] == 0
    assert "kvloom warm" in trip("pin", "trip").err


def test_a_quota_is_kept_with_the_store_and_looked_at_when_state_is_written(trip: Command):
    assert trip("quota", "--json").json["max_state"] is None
    assert "quota = 1.0 KB" in trip("quota", "1KB").out
    assert trip("quota", "--json").json["max_state"] == 1000
    said = trip("say", "trip", "and then?", "--max-tokens", "2")
    assert said.code == 0
    assert "not stored any more" in said.err
    assert "quota = none" in trip("quota", "--none", "--min-free", "900TiB").out
    assert "free on the disk" in trip("say", "trip", "and then?", "--max-tokens", "2").err
    fails(trip("quota", "many"), 2, "is not a size")
    fails(trip("quota", "1GB", "--none"), 2, "--none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1000", 1000), ("1.5kb", 1500), ("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1K", 1000), ("30%", 0.3)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: float):
    assert room.Size(percent=True).convert(text, None, None) == expected
