"""The command line on a session that two models read: which state is whose, and that every command finds its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Command, fails
from tiny import tiny_llama_folder

from kvloom_store.checksum import update
from kvloom_store.database import Database
from kvloom_store.schema import chunk


@pytest.fixture
def two(trip: Command, other_model: str) -> Command:
    """The session of one exchange, and a second one under another model."""
    said = trip("say", "trip", "who are you?", "--max-tokens", "4", "--model", other_model)
    assert said.code == 0
    assert "goes on under" in said.err
    assert "weights" in said.err
    return trip


def stored(command: Command) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = command("models", "--stored", "--json").json["models"]
    return found


def test_a_store_tells_which_models_it_holds_state_of(two: Command, model: str, other_model: str) -> None:
    own, other = stored(two)
    assert [(own["name"], other["name"])] == [(model, other_model)]
    assert (own["sessions"], other["sessions"]) == (1, 1)
    assert (own["turns"], other["turns"]) == (2, 4)
    assert other["tokens"] > own["tokens"] > 0
    assert other["bytes"] > own["bytes"] > 0
    assert own["digest"] != other["digest"]
    assert {name for name in own["fields"] if own["fields"][name] != other["fields"][name]} == {"weights"}
    shown = two("models", "--stored").out.splitlines()
    assert len(shown) == 3
    assert all(each["digest"][:8] in line for each, line in zip((own, other), shown[1:], strict=True))


def test_an_empty_store_holds_none(kvloom: Command) -> None:
    assert stored(kvloom) == []
    assert "no model" in kvloom("models", "--stored").out


def test_either_model_goes_on_with_its_own_state(two: Command, other_model: str) -> None:
    """The session's own stays the default, and the other is found by its name."""
    own = two("say", "trip", "and now?", "--max-tokens", "3", "--json").json
    assert own["tokens"]["reused"] > 20
    for name in ((), ("--model", other_model)):
        two("say", "trip", "so?", "--max-tokens", "3", *name)
        again = two("say", "trip", "yes?", "--max-tokens", "3", "--require-reuse", "--json", *name)
        assert again.code == 0
        assert again.json["tokens"]["replayed"] == 0
        assert "goes on under" not in again.err
    assert two("fsck", "--json").json["findings"] == []


def test_why_foretells_what_each_model_will_read(two: Command, other_model: str) -> None:
    for name in ((), ("--model", other_model)):
        foretold = two("why", "trip", "and now?", "--json", *name).json["tokens"]
        said = two("say", "trip", "and now?", "--max-tokens", "3", "--json", *name).json["tokens"]
        assert (foretold["reused"], foretold["computed"]) == (said["reused"], said["computed"])


def test_a_branch_is_warmed_for_the_model_that_is_asked_for(two: Command, model: str, other_model: str) -> None:
    assert two("warm", "trip", "--dry-run", "--json").json["points"][0]["plan"]["computed"] > 0
    done = two("warm", "trip", "--json").json["points"][0]["done"]
    assert done["tokens"]["computed"] > 0
    for name in (model, other_model):
        assert two("warm", "trip", "--model", name).out.startswith("nothing to do")


def test_a_receipt_is_of_the_model_that_is_asked_for(two: Command, model: str, other_model: str) -> None:
    assert two("verify", "trip", "--json").json["model"] == other_model  # the own one has not read this yet
    fails(two("verify", "trip", "--replay"), 30, "state of")
    two("warm", "trip")
    for name in (model, other_model):
        receipt = two("verify", "trip", "--replay", "--model", name, "--json").json
        assert (receipt["ok"], receipt["model"], receipt["difference"]) == (True, name, None)


def test_damaged_state_is_computed_again_by_the_model_it_is_of(
    two: Command, store_path: Path, model: str, other_model: str
) -> None:
    two("warm", "trip")
    database = Database(store_path)
    with database.write() as conn:
        for row in conn.execute(chunk.select()).all():
            values = {name: value for name, value in row._mapping.items() if name != "checksum"}
            update(conn, chunk, values, blob=bytes([values["blob"][0] ^ 1]) + values["blob"][1:])
    database.close()
    assert two("fsck", "--repair", "--yes").code == 0
    assert two("fsck", "--json").json["findings"] == []
    for name in (model, other_model):
        assert two("verify", "trip", "--replay", "--model", name).code == 0


def test_a_bundle_has_both_models(two: Command, other_model: str, tmp_path: Path) -> None:
    bundle = str(tmp_path / "trip.kvloom")
    assert two("export", "trip", "-o", bundle).code == 0
    assert two("import", bundle, "--store", str(tmp_path / "copy.db")).code == 0
    there = ("--json", "--store", str(tmp_path / "copy.db"))
    kept = two("say", "trip", "so?", "--max-tokens", "3", "--require-reuse", "--model", other_model, *there)
    assert kept.json["tokens"]["computed"] < 20
    assert [each["turns"] for each in two("models", "--stored", *there).json["models"]] == [2, 6]


def test_a_model_that_was_moved_is_found_where_it_is_named_once(kvloom: Command, tmp_path: Path) -> None:
    before, after = tiny_llama_folder(tmp_path / "before"), tmp_path / "after"
    kvloom("say", "trip", "hello", "--max-tokens", "3", "--dtype", "float32", "--model", str(before))
    before.rename(after)
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0", "use_cache": False}))
    for name in (("--model", str(after)), ()):
        said = kvloom("say", "trip", "more", "--max-tokens", "3", "--require-reuse", "--json", *name)
        assert said.code == 0
        assert "goes on under" not in said.err
    assert len(stored(kvloom)) == 1


def test_tokens_are_those_of_the_model_that_said_them(two: Command) -> None:
    shown = two("show", "trip", "--tokens", "--json").json["tokens"]
    assert all(row["text"] is not None for row in shown)
    assert two("fork", "trip:40", "cut").code == 0
    assert two("say", "trip@cut", "more", "--max-tokens", "2").code == 0
