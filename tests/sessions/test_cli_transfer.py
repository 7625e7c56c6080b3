"""``kvloom export`` and ``kvloom import`` as a user and a script see them."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, fails

from kvloom_proto.frames import MAGIC


def test_a_session_goes_into_a_file_and_comes_back_in_another_store(trip: Command, tmp_path: Path) -> None:
    file, other = tmp_path / "trip.kvb", str(tmp_path / "other" / "o.db")
    assert trip("fork", "trip~1", "aside").code == 0
    done = trip("export", "trip", "-o", str(file))
    assert (done.code, done.out) == (0, "")
    assert "3 turns, 2 segments of state" in done.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes().startswith(MAGIC)
    found = trip("import", str(file), "--store", other)
    assert found.out.startswith("trip is new: 3 turns, 3 of them new; 2 segments of state")
    here, there = trip("log", "trip", "--json").json, trip("log", "trip", "--json", "--store", other).json
    assert here == there
    reply = trip("say", "trip", "more", "--max-tokens", "3", "--json", "--store", other).json
    assert reply["tokens"]["reused"] > 0
    assert reply["tokens"]["replayed"] == 0
    again = trip("import", str(file), "--store", other, "--json").json
    assert again["sessions"][0]["new_turns"] == 0
    assert again["sessions"][0]["names"] == {"main": "main-2", "aside": "aside"}


def test_the_model_is_found_where_it_is_here_and_not_where_the_file_says(
    trip: Command, tmp_path: Path, model: str
) -> None:
    file, other = tmp_path / "trip.kvb", str(tmp_path / "other" / "o.db")
    assert trip("export", "trip", "-o", str(file)).code == 0
    assert model.encode() not in file.read_bytes()
    assert trip("import", str(file), "--store", other).code == 0
    assert trip("ls", "--json", "--store", other).json["sessions"][0]["model"] == ""
    assert trip("say", "trip", "more", "--max-tokens", "2", "--store", other).code == 0  # with the configured one
    assert trip("ls", "--json", "--store", other).json["sessions"][0]["model"] == model


def test_a_bundle_goes_through_a_pipe(trip: Command, tmp_path: Path) -> None:
    data = tmp_path / "trip.kvm"
    told = trip("export", "trip@main", "--format", "msgpack", "-o", str(data), "--json").json
    assert (told["turns"], told["branches"], told["bytes"]) == (3, ["main"], data.stat().st_size)
    done = trip("import", "-", "--as", "copy", "--text-only", "--json", stdin=data.read_bytes()).json
    [copy] = done["sessions"]
    assert (copy["session"], copy["new_turns"], copy["segments"]) == ("copy", 3, 0)
    refused = trip("export", "trip", "-o", "-", "--json")
    assert (refused.code, refused.out) == (2, "")
    assert "a place of their own" in refused.err


def test_a_transcript_goes_out_and_in(trip: Command, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    assert trip("export", "trip", "--format", "openai", "-o", str(chat)).code == 0
    messages = json.loads(chat.read_text())["messages"]
    assert [each["role"] for each in messages] == ["system", "user", "assistant"]
    done = trip("import", str(chat))
    assert done.out == "chat is new: 3 turns, 3 of them new\n"
    assert trip("log", "chat", "--json").json["turns"][1]["text"] == "hello there"
    assert trip("say", "chat", "and now?", "--max-tokens", "2").code == 0
    page = trip("export", "chat", "--format", "markdown", "-o", "-")
    assert page.out.startswith("# chat\n\n## System\n\nBe brief.\n\n## User\n\nhello there")
    assert "and now?" in page.out
    piped = trip("import", "-", "--as", "piped", stdin=chat.read_bytes())
    assert piped.out.startswith("piped is new")


def test_text_that_met_no_model_can_be_looked_at(kvloom: Command, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "hello"}]')
    assert kvloom("import", str(chat)).code == 0
    for look in (["log", "chat"], ["tree", "chat"], ["show", "chat"], ["branches", "chat"], ["ls"], ["stats"]):
        assert kvloom(*look).code == 0
    for look in (["cost", "chat"], ["warm", "chat", "--dry-run"], ["diff", "chat", "chat"], ["search", "hello"]):
        assert kvloom(*look).code == 0
    fails(kvloom("why", "chat", "more"), 40, "no model yet")
    assert kvloom("regenerate", "chat", "--max-tokens", "3").code == 0
    assert kvloom("why", "chat", "more").code == 0


def test_what_cannot_be_done_is_told_and_leaves_nothing_behind(trip: Command, tmp_path: Path) -> None:
    file = tmp_path / "trip.kvb"
    fails(trip("export", "trip", "-o", str(tmp_path / "no" / "file")), 40, "cannot write")
    fails(trip("export", "trip", "-o", str(tmp_path)), 40, "cannot write")
    fails(trip("export", "nosuch", "-o", str(file)), 20, "nosuch")
    fails(trip("export", "trip:5", "-o", str(file)), 40, "inside a turn")
    fails(trip("export", "trip", "-o", str(file), "--format", "markdown", "--text-only"), 2, "--text-only")
    assert not [path for path in tmp_path.iterdir() if "trip.kvb" in path.name or path.name.startswith(".")]
    fails(trip("import", str(tmp_path / "none")), 40, "cannot read")
    fails(trip("import", str(tmp_path)), 40, "cannot read")
    fails(trip("import", "-", stdin=b"[]"), 2, "--as")
    fails(trip("import", "-", "--as", "x", stdin=b"nothing"), 10, "not a bundle")
    assert trip("export", "trip", "-o", str(file)).code == 0
    cut = tmp_path / "cut.kvb"
    cut.write_bytes(file.read_bytes()[:-20])
    fails(trip("import", str(cut)), 10, "the file ends", "at byte")
    told = trip("import", str(cut), "--json")
    assert json.loads(told.err)["error"]["type"] == "Truncated"
    fails(trip("import", str(file), "--as", "no name"), 20, "no name")


def test_an_output_that_is_there_is_replaced_only_by_a_whole_one(trip: Command, tmp_path: Path) -> None:
    file = tmp_path / "trip.kvb"
    file.write_text("mine")
    fails(trip("export", "trip@nosuch", "-o", str(file)), 20)
    assert file.read_text() == "mine"
    assert trip("export", "trip", "-o", str(file)).code == 0
    assert file.read_bytes().startswith(MAGIC)


@pytest.mark.parametrize("command", [["export", "trip", "-o", "{}"], ["import", "{}"]])
def test_neither_command_imports_torch(trip: Command, tmp_path: Path, store_path: Path, command: list[str]) -> None:
    file = tmp_path / "trip.kvb"
    assert trip("export", "trip", "-o", str(file)).code == 0
    args = [each.format(file) for each in command]
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"from kvloom.cli import run; import sys; assert run({args!r}) == 0; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
