"""What SECURITY.md claims of files: nobody else may read them. What is erased is in test_erase."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from command import Command

from kvloom.cli import chat
from kvloom_store.database import Database

ROOT = Path(__file__).parents[2]


@pytest.fixture
def open_to_all() -> None:
    """A process whose new files anybody may read, unless they are made otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_to_all")
def test_all_that_is_written_is_its_owners_alone(kvloom: Command, store_path: Path, tmp_path: Path) -> None:
    assert kvloom("say", "trip", "hello there", "--max-tokens", "4").code == 0
    database = Database(store_path)
    with database.write(), database.read():
        found = {path.name: mode(path) for path in store_path.parent.iterdir()}
    database.close()
    assert found == dict.fromkeys(("kvloom.db", "kvloom.db-wal", "kvloom.db-shm"), 0o600)
    assert mode(store_path.parent) == 0o700
    for name in ("trip.kvloom", "trip.md", "trip.json"):
        file = tmp_path / name
        how = {".md": ("--format", "markdown"), ".json": ("--format", "openai")}.get(file.suffix, ())
        assert kvloom("export", "trip", "-o", str(file), *how).code == 0
        assert mode(file) == 0o600
    assert kvloom("rm", "trip", "--erase", "--yes").code == 0
    assert mode(store_path) == 0o600


@pytest.mark.usefixtures("open_to_all")
def test_the_history_of_a_chat_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history = Path(chat._history().filename)
    assert history.is_relative_to(tmp_path)
    assert (mode(history), mode(history.parent)) == (0o600, 0o700)


def test_the_tests_that_are_named_are_there() -> None:
    named = {
        each
        for group in re.findall(r"\[(test_[^\]]*)\]", (ROOT / "SECURITY.md").read_text())
        for each in group.split(", ")
    }
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 8
    assert named <= there
    assert "SECURITY.md" in (ROOT / "README.md").read_text()
