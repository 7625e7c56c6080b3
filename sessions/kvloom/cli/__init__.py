"""The command line: ``kvloom``. Each command is a few lines that call the library.

Only click is imported here; a command's module is imported when it is asked for, and what it needs when it runs,
so that listing and reading never wait for torch.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from kvloom._version import __version__
from kvloom.cli.commands import BY_NAME, SECTIONS
from kvloom.cli.common import json_option, store_option
from kvloom.cli.terminal import never_fail_to_print, wants_color
from kvloom.errors import KVLoomError
from kvloom.shown import clean

INTERRUPTED = 130
CLOSED_PIPE = 141
"""What a shell reports for a program that ended because nobody read its output."""


class ClosedPipe(Exception):
    """Nobody reads our output any more. (click would end a BrokenPipeError with code 1, as if we had failed.)"""


class _Commands(click.Group):
    """A group whose help lists the commands by what they are for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ClosedPipe from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(entry.name, entry.summary) for entry in entries])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(BY_NAME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = BY_NAME.get(cmd_name)
        if entry is None:
            return None
        found: click.Command = getattr(importlib.import_module(f"kvloom.cli.{entry.module}"), entry.function)
        found.short_help = entry.summary
        return found


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvloom", message="%(prog)s %(version)s")
@store_option
@json_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Keep conversations with a language model as trees, every branch of which resumes at once.

    \b
    A REF names a point: SESSION, SESSION@BRANCH, SESSION@BRANCH~2 (two turns
    back), SESSION@TAG or SESSION@TURN (a turn id, or how it begins). With :90
    behind it, it names the point on the path to there where 90 tokens are kept.

    \b
    Example:
      kvloom say trip "Name a city in Italy."
      kvloom fork trip@main~2 instead
      kvloom say trip@instead "Name a city in Spain."
      kvloom continue trip:30 --temperature 1
      kvloom tree trip
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; whatever goes wrong is told in one line."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    never_fail_to_print()
    # Listing takes a third of a second, a fifth of which would go into looking for garbage that is not there:
    # imports make none. Commands that run a model turn the collector on again, once it is loaded.
    gc.disable()
    code = run(args)
    gc.freeze()
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command; the exit code. Never raises."""
    as_json = "--json" in args
    try:
        code = cli.main(args, prog_name="kvloom", standalone_mode=False, color=wants_color())
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KVLoomError as error:
        return _failed(type(error).__name__, str(error), error.hint, error.exit_code, as_json)
    except click.UsageError as error:
        return _failed("UsageError", error.format_message(), _usage_hint(error), error.exit_code, as_json)
    except click.ClickException as error:
        return _failed(type(error).__name__, error.format_message(), "", error.exit_code, as_json)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _failed("Interrupted", "interrupted", "", INTERRUPTED, as_json)
    except (ClosedPipe, BrokenPipeError):
        _forget_output()
        return CLOSED_PIPE
    except OSError as error:
        _forget_output()
        return _failed("OSError", str(error), "check the disk and the permissions", 1, as_json)
    except Exception as error:  # the last resort: a user sees one line, a developer asks for more
        if os.environ.get("KVLOOM_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}"
        return _failed("InternalError", message, "this is a bug; KVLOOM_DEBUG=1 shows where it happened", 1, as_json)


def _usage_hint(error: click.UsageError) -> str:
    if error.ctx is None:
        return "kvloom --help"
    return f"{error.ctx.command_path} --help shows how it is used"


def _failed(kind: str, message: str, hint: str, code: int, as_json: bool) -> int:
    """Tell what went wrong on stderr, in one line and another with what to do."""
    try:
        if as_json:
            told = {"type": kind, "message": message, "hint": hint, "exit_code": code}
            click.echo(json.dumps({"error": told}), err=True)
            return code
        click.echo(f"{click.style('error:', fg='red')} {_one_line(message)}", err=True)
        if hint:
            click.echo(f"{click.style('hint:', fg='cyan')} {_one_line(hint)}", err=True)
    except OSError:
        _forget_output()
    return code


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _forget_output() -> None:
    """Nobody reads any more: have what is still buffered go nowhere instead of failing at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
