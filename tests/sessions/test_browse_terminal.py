"""``kvloom browse`` as a person uses it: in a terminal, or where there is none to speak of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
from command import Command, fails
from tiny import tiny_llama_folder

COMMAND = [sys.executable, "-m", "kvloom.cli"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1 << 20))


@pytest.fixture
def env(trip: Command, tmp_path: Path) -> dict[str, str]:
    """What the command needs to find the store that ``trip`` made."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**inherited, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}


class Terminal:
    """A terminal of 24 lines of 80, and what is on it."""

    def __init__(self, env: dict[str, str], *args: str, size: tuple[int, int] = (24, 80)) -> None:
        self.child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], *args], env=env, dimensions=size, timeout=120)
        self.raw = b""
        self._screen = pyte.Screen(size[1], size[0])
        self._stream = pyte.ByteStream(self._screen)

    @property
    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display)

    def until(self, condition: Callable[[str], object]) -> None:
        """Read until the screen is so. Raises pexpect.TIMEOUT."""
        while not condition(self.shown):
            self._read()

    def leave(self) -> int:
        """Read to the end; the exit code."""
        try:
            while True:
                self._read()
        except pexpect.EOF:
            self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus

    def _read(self) -> None:
        data = self.child.read_nonblocking(4096)
        self.raw += data
        self._stream.feed(data)


@pytest.fixture
def open_terminal(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def spawn(*args: str, **options: tuple[int, int]) -> Terminal:
        opened.append(Terminal(env, *args, **options))
        return opened[-1]

    yield spawn
    for each in opened:
        each.child.close(force=True)


def log(env: dict[str, str], ref: str) -> list[dict[str, object]]:
    done = subprocess.run([*COMMAND, "log", ref, "--json"], env=env, capture_output=True, text=True, check=True)
    turns: list[dict[str, object]] = json.loads(done.stdout)["turns"]
    return turns


def test_something_is_said_in_a_terminal_of_80_by_24(
    env: dict[str, str], open_terminal: Callable[..., Terminal]
) -> None:
    at = open_terminal("browse", "trip", "--max-tokens", "5")
    at.until(lambda shown: "[main]" in shown and "hello there" in shown and "trip@main · 3 turns" in shown)
    at.child.send("s")
    at.until(lambda shown: "say (Enter sends" in shown)
    at.child.send("and now\r")
    at.until(lambda shown: "trip@main · stopped at its limit · reused" in shown)
    at.child.send("?")
    at.until(lambda shown: "go into the transcript" in shown)
    at.child.send("\x1b")
    at.until(lambda shown: "go into the transcript" not in shown)
    at.child.send("q")
    assert at.leave() == 0
    assert b"\x1b[?1049l" in at.raw[-400:]  # the screen before is back
    assert [turn["text"] for turn in log(env, "trip")][3] == "and now"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_keeps_what_was_said_and_gives_the_terminal_back(
    env: dict[str, str], open_terminal: Callable[..., Terminal], ending: signal.Signals
) -> None:
    at = open_terminal("browse", "trip", "--max-tokens", str(1 << 19))
    at.until(lambda shown: "[main]" in shown)
    at.child.send("s")
    at.until(lambda shown: "say (Enter sends" in shown)
    at.child.send("and now\r")
    at.until(lambda shown: "pieces · Esc stops" in shown)
    at.child.kill(ending)
    assert at.leave() == 128 + ending
    assert b"\x1b[?1049l" in at.raw[-400:]
    assert b"Traceback" not in at.raw
    assert log(env, "trip")[-1]["finish_reason"] == "interrupted"


def test_a_terminal_that_is_too_small_is_refused(env: dict[str, str], open_terminal: Callable[..., Terminal]) -> None:
    env |= {"COLUMNS": "80", "LINES": "24"}  # as a shell may have left them
    at = open_terminal("browse", "trip", size=(10, 50))
    assert at.leave() == 2
    assert "this terminal has 50 and 10" in at.shown.replace("\n", "")


def test_where_there_is_no_terminal_it_says_what_else_there_is(trip: Command) -> None:
    fails(trip("browse", "trip"), 2, "this is none", "kvloom tree")
    fails(trip("browse"), 2, "this is none")


def test_a_session_that_is_not_there_is_told_before_anything_is_drawn(open_terminal: Callable[..., Terminal]) -> None:
    at = open_terminal("browse", "tripp")
    assert at.leave() == 20
    assert "did you mean trip?" in at.shown
    assert b"\x1b[?1049h" not in at.raw


def test_help_needs_no_textual(env: dict[str, str]) -> None:
    code = "import sys; from kvloom.cli import run; run(['browse', '-h']); sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
