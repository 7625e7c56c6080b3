"""The command line in this process, with a tiny model, in a home of its own."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Command, Result
from tiny import tiny_llama_folder

from kvloom.cli import run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Decoding in float32 rounds otherwise with two threads: what is compared is made with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture
def kvloom(
    store_path: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Run a command in this process, in a home of its own, with the tiny model as the default."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVLOOM_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVLOOM_MODEL", model)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def command(*args: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = run(list(args))
        return Result(code, *capfd.readouterr())

    return command


@pytest.fixture
def trip(kvloom: Command) -> Command:
    """A session of one exchange, said with a system prompt."""
    assert kvloom("say", "trip", "hello there", "--system", "Be brief.", "--max-tokens", "6").code == 0
    return kvloom
