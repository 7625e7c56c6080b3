"""``kvloom chat``: talk on a branch; move about the tree with commands that begin with a slash.

In a terminal the input is edited (Alt-Enter begins a new line, the history is kept in a private file); from a
pipe, each line is one message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli import chat_commands
from kvloom.cli.common import Options, reading, ref_argument, shared
from kvloom.cli.opening import Talk, model_options, new_session_options, talking
from kvloom.cli.talk import interruptible, sampling, sampling_options, stream, tell
from kvloom.cli.terminal import dim, print_json
from kvloom.shown import clean

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from kvloom.report import Reply, Tokens
    from kvloom.run import Run

NEARLY_FULL = 0.9
"""How much of the context is used when a shorter branch is proposed."""

FULLER = 0.05
"""How much more of it, each time that this is proposed again."""

Ask = Callable[[str], str]
"""Shows a prompt and returns what was typed; EOFError at the end, KeyboardInterrupt for Ctrl-C."""


@click.command()
@shared
@ref_argument(metavar="[SESSION[@REF]]", required=False)
@new_session_options
@model_options
@sampling_options
def chat(options: Options, ref: str | None, **values: Any) -> None:
    """Talk, interactively. Without SESSION, a new one is named after the day.

    Enter sends, Alt-Enter begins a new line. Ctrl-C stops a reply and keeps what was said; /continue goes on
    with it. Ctrl-D leaves. /help lists what else there is. From a pipe, each line is one message.

    \b
    Example:
      kvloom chat
      kvloom chat trip@main~2 --temperature 0.7
    """
    settings = sampling(values)  # what is left of the values is what a session is begun with
    name = ref or _free_name(options)
    with talking(options, name, create=True, **values) as talk:
        room = Chat(talk, settings, quiet=options.json)
        begun = len(talk.branch.log())
        dim(f"{talk.session.name}@{talk.branch.name}, {begun} turns so far · /help · Ctrl-D leaves")
        interactive = sys.stdin.isatty() and sys.stderr.isatty()
        with redirect_stdout(sys.stderr) if options.json else nullcontext():
            room.talk(_prompt_session().prompt if interactive else _line_from_pipe)
        if options.json:
            told = {"session": talk.session.name, "branch": room.branch.name, "replies": room.replies}
            print_json(told | ({"template": talk.template} if talk.template else {}))
        room.check_said()
        if room.failed and not interactive:
            raise click.exceptions.Exit(room.failed)


def _free_name(options: Options) -> str:
    """chat-2025-01-31, or chat-2025-01-31-2 and so on where there is one."""
    name = f"chat-{date.today().isoformat()}"
    if not options.path.exists():
        return name
    with reading(options) as reader:
        taken = {session.name for session in reader.sessions()}
    number = 1
    while (free := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return free


class NothingSaid(click.exceptions.Exit):
    """The chat ended without a turn: ``talking`` takes a session away that was made for it."""


class Chat:
    """A conversation at a terminal: the branch it is on, and what was replied."""

    def __init__(self, talk: Talk, settings: dict[str, Any], *, quiet: bool = False) -> None:
        self.loom = talk.loom
        self.session = talk.session
        self.branch = talk.branch
        self.progress = talk.progress
        self.settings = settings
        self.quiet = quiet
        self.replies: list[dict[str, Any]] = []
        self.moved = False
        self.proposed = 0.0
        self.failed = 0

    @property
    def prompt(self) -> str:
        """What stands before the input: where one is."""
        return f"{clean(self.session.name)}@{clean(self.branch.name)}> "

    def talk(self, ask: Ask) -> None:
        """Ask and answer until the input ends."""
        from kvloom.errors import KVLoomError

        while True:
            try:
                line = ask(self.prompt)
            except EOFError:
                return
            except KeyboardInterrupt:
                dim("Ctrl-D leaves")
                continue
            if not line.strip():
                continue
            try:
                if not chat_commands.handle(self, line):
                    return
            except KVLoomError as error:
                self.failed = error.exit_code
                click.echo(f"{click.style('error:', fg='red')} {clean(str(error))}", err=True)
                if error.hint:
                    click.echo(f"{click.style('hint:', fg='cyan')} {clean(error.hint)}", err=True)

    def run(self, start: Callable[..., Run]) -> Reply:
        """Run ``start`` and print the reply as it comes; Ctrl-C ends the reply, not the chat."""
        with interruptible() as stopped:
            run = start(cancel=stopped.cancel, progress=self.progress.passes, **self.settings)
            reply, closed = stream(run, self.progress.stop, stopped.cancel, quiet=self.quiet)
        tell(reply, brief=self.quiet)
        self.replies.append(reply.to_json())
        if closed is not None:
            raise closed
        if stopped.asks_to_leave:
            raise click.exceptions.Exit(128 + stopped.signal)
        if reply.finish_reason == "interrupted":
            dim("/continue goes on with it")
        if reply.branch != self.branch.name:
            self.branch = self.session.branch(reply.branch)
        self._propose_compacting(reply.tokens)
        return reply

    def _propose_compacting(self, tokens: Tokens) -> None:
        """Say so when the context is nearly full, and again when it is fuller still."""
        used, limit = sum(asdict(tokens).values()), self.loom.engine.context_limit
        full = used / limit
        if full < NEARLY_FULL:
            self.proposed = 0.0
        elif not self.proposed or full >= self.proposed + FULLER:
            self.proposed = full
            dim(f"{used:,} of {limit:,} tokens are used; /compact goes on with a summary, on a new branch")

    def check_said(self) -> None:
        """Leave nothing behind where nothing was said."""
        if not self.replies and not self.moved:
            raise NothingSaid(0)


def _line_from_pipe(_prompt: str) -> str:
    """One line of stdin. Raises EOFError at its end, InvalidText for bytes that are no text."""
    from kvloom.errors import InvalidText
    from kvloom_proto.limits import MAX_TURN_BYTES

    data = sys.stdin.buffer.readline(MAX_TURN_BYTES)
    if not data:
        raise EOFError
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        message = f"a line of stdin is not valid UTF-8 (byte {error.start})"
        raise InvalidText(message, hint="convert it first: iconv -t UTF-8") from error


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        prompt_continuation=lambda width, _number, _soft: "." * (width - 1) + " ",
        history=_history(),
        completer=WordCompleter([f"/{name}" for name in chat_commands.COMMANDS], sentence=True),
        complete_while_typing=False,
        output=create_output(stdout=sys.stderr),
    )


def _history() -> Any:
    """The lines typed before, in a private file; only in memory where that can't be written."""
    import platformdirs
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(platformdirs.user_state_dir("kvloom", appauthor=False)) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        dim(f"the history is not kept: cannot write {path} ({error.strerror})")
        return InMemoryHistory()
    return FileHistory(str(path))
