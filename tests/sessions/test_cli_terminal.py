"""``kvloom chat`` and ``say`` as a person uses them: in a terminal, with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from tiny import tiny_llama_folder

QUIET = {"PROMPT_TOOLKIT_NO_CPR": "1"}
"""pexpect is no terminal that would answer where its cursor is."""

INPUT_ENDED = r"\x1b\[\?2004l"
"""What prompt_toolkit tells the terminal when a line was entered."""

COMMAND = [sys.executable, "-m", "kvloom.cli"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1 << 20))


@pytest.fixture
def env(store_path: Path, tmp_path: Path, model: str) -> dict[str, str]:
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "KVLOOM_MODEL": model}
    return {
        **os.environ,
        **home,
        "KVLOOM_CONFIG": str(tmp_path / "none.toml"),
        "TERM": "xterm",
        "COLUMNS": "100",
        **QUIET,
    }


def run(env: dict[str, str], *args: str) -> dict[str, object]:
    done = subprocess.run([*COMMAND, *args, "--json"], env=env, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_chat_is_stopped_gone_on_with_and_left(env: dict[str, str], tmp_path: Path) -> None:
    limit = str(1 << 19)
    chat = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "chat", "talk", "--max-tokens", limit], env=env, timeout=120)

    def say(keys: str) -> None:
        chat.expect("talk@main>")
        chat.send(keys)
        chat.expect(INPUT_ENDED)

    chat.expect("talk@main, 0 turns so far")
    say("two\x1b\rlines\r")  # Alt-Enter between them
    for command in ("/continue\r", "\x03"):
        chat.expect(r"\w")  # the reply has begun
        chat.sendintr()
        chat.expect("interrupted")
        chat.expect("/continue goes on with it")
        say(command)
    chat.expect("Ctrl-D leaves")
    say("/tree\r")
    chat.expect(r"\(interrupted\)")
    chat.expect("talk@main>")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0

    turns = run(env, "log", "talk")["turns"]
    assert isinstance(turns, list)
    assert [(turn["role"], turn["continues"]) for turn in turns] == [
        ("user", False),
        ("assistant", False),
        ("assistant", True),
    ]
    assert turns[0]["text"] == "two\nlines"
    went_on = run(env, "continue", "talk", "--max-tokens", "3")
    assert went_on["finish_reason"] == "length"
    history = tmp_path / "state" / "kvloom" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+/continue" in history.read_text()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_reply_that_is_stopped_is_kept(env: dict[str, str], ending: signal.Signals) -> None:
    command = [*COMMAND, "say", "talk", "hello", "--max-tokens", str(1 << 19)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as said:
        assert said.stdout is not None
        begun = said.stdout.read(1)
        said.send_signal(ending)
        rest, told = said.communicate()
    assert said.returncode == 128 + ending
    assert b"interrupted" in told
    assert b"Traceback" not in told
    turns = run(env, "log", "talk")["turns"]
    assert isinstance(turns, list)
    assert turns[-1]["finish_reason"] == "interrupted"
    assert turns[-1]["text"].rstrip("\n") == (begun + rest).decode().rstrip("\n")
