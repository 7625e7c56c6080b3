"""``kvloom fsck`` and ``kvloom verify``: what they print, what they ask, and with which exit code."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, fails

DAMAGE = "UPDATE chunk SET blob = x'00' WHERE rowid = 1"


@pytest.fixture
def store(trip: Command, store_path: Path) -> Path:
    return store_path


def change(path: Path, statement: str) -> None:
    raw = sqlite3.connect(path)
    assert raw.execute(statement).rowcount > 0
    raw.commit()
    raw.close()


def test_a_sound_store_exits_with_0(trip: Command) -> None:
    result = trip("fsck")
    assert result.code == 0
    assert result.out.startswith("sound: ")
    assert trip("fsck", "--json").json["findings"] == []
    assert trip("fsck", "--quick", "--json").json["bytes"] == 0


def test_damage_is_told_and_exits_with_10(trip: Command, store: Path) -> None:
    change(store, DAMAGE)
    result = trip("fsck")
    assert result.code == 10
    assert "heals trip@" in result.out
    assert "--repair" in result.err
    told = trip("fsck", "--json")
    assert (told.code, told.err) == (10, "")
    assert [each["kind"] for each in told.json["findings"]] == ["chunk"]
    assert (told.json["sound"], told.json["heals"]) == (False, 1)


def test_a_repair_shows_its_plan_and_does_nothing_unless_somebody_agrees(trip: Command, store: Path) -> None:
    change(store, DAMAGE)
    before = store.read_bytes()
    refused = trip("fsck", "--repair")
    assert refused.code == 40
    assert "compute state again" in refused.out
    assert "--yes" in refused.err
    assert store.read_bytes() == before


def test_a_repair_computes_state_again_and_the_store_is_sound(trip: Command, store: Path) -> None:
    change(store, DAMAGE)
    result = trip("fsck", "--repair", "--yes")
    assert result.code == 0, result.err
    assert "bit for bit" in result.out
    assert result.out.rstrip().endswith("the store is sound")
    assert trip("say", "trip", "more", "--max-tokens", "2", "--require-reuse").code == 0


def test_a_repair_tells_programs_what_it_did(trip: Command, store: Path) -> None:
    change(store, "UPDATE turn SET message = x'81' WHERE id = 3")
    told = trip("fsck", "--repair", "--yes", "--json")
    assert (told.code, told.json["sound"]) == (0, True)
    assert any("set aside" in line for line in told.json["done"])
    assert {each["kind"] for each in told.json["findings"]} <= {"set-aside", "orphan"}


def test_segments_whose_model_is_not_here_wait_for_it(trip: Command, store: Path, model: str, tmp_path: Path) -> None:
    change(store, DAMAGE)
    hidden = tmp_path / "away"
    Path(model).rename(hidden)
    try:
        result = trip("fsck", "--repair", "--yes")
    finally:
        hidden.rename(model)
    assert result.code == 10
    assert "wait for the model" in result.err
    assert trip("fsck", "--repair", "--yes").code == 0


def test_quick_and_repair_exclude_each_other(trip: Command) -> None:
    fails(trip("fsck", "--quick", "--repair"), 2, "--quick")


def test_a_receipt_says_what_was_read_back_and_on_what_it_was_computed(trip: Command) -> None:
    result = trip("verify", "trip")
    assert result.code == 0
    for words in ("trip@main", "tokens", "torch", "read back", "as written", "all is well"):
        assert words in result.out
    told = trip("verify", "trip", "--json").json
    assert told["ok"]
    assert (told["held"] + told["pending"], told["replayed"]) == (told["tokens"], None)


def test_a_receipt_of_damaged_state_exits_with_10_and_says_what_to_do(trip: Command, store: Path) -> None:
    change(store, DAMAGE)
    result = trip("verify", "trip")
    assert result.code == 10
    assert "fsck --repair" in result.out


def test_replaying_finds_the_same_bits(trip: Command) -> None:
    result = trip("verify", "trip", "--replay")
    assert result.code == 0
    assert "identical bit for bit" in result.out
    assert trip("verify", "trip:10", "--replay", "--json").json["replayed"] == 10


@pytest.mark.parametrize("command", [["fsck"], ["verify", "trip"]])
def test_checking_loads_no_model(trip: Command, store: Path, command: list[str]) -> None:
    code = (
        "import sys; from kvloom.cli import run; code = run(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env={**os.environ, "KVLOOM_STORE": str(store)}, check=False
    )
    assert done.returncode == 0


def test_what_was_set_aside_is_listed_with_its_text_and_can_be_deleted(trip: Command, store: Path) -> None:
    assert trip("fsck", "--quarantined").out == "nothing was set aside\n"
    change(store, "UPDATE turn SET created = created + 5 WHERE role = 'user'")
    trip("fsck", "--repair", "--yes")
    shown = trip("fsck", "--quarantined")
    assert shown.code == 0
    assert "hello there" in shown.out
    told = trip("fsck", "--quarantined", "--json").json
    said = [each for each in told["set_aside"] if each["text"] == "hello there"]
    assert [each["table"] for each in said] == ["turn"]
    assert all(each["why"] and each["when"] for each in told["set_aside"])
    assert trip("fsck", "--quarantined", "--forget").code == 40
    assert trip("fsck", "--quarantined", "--forget", "--yes", "--json").json["deleted"] == len(told["set_aside"])
    assert trip("fsck", "--quarantined", "--json").json["set_aside"] == []
    assert "set-aside" not in {each["kind"] for each in trip("fsck", "--json").json["findings"]}


@pytest.mark.parametrize("wrong", [("--forget",), ("--quarantined", "--repair"), ("--quarantined", "--quick")])
def test_options_that_do_not_go_together_are_refused(trip: Command, wrong: tuple[str, ...]) -> None:
    assert trip("fsck", *wrong).code == 2
