"""Commands that run the model: say, continue, regenerate."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.asking import exact_option, tell_dropped
from kvloom.cli.common import F, Options, ref_argument, shared
from kvloom.cli.opening import Talk, model_options, new_session_options, talking
from kvloom.cli.terminal import dim, print_json, stdout_is_terminal, warn
from kvloom.shown import clean, preview, told

if TYPE_CHECKING:
    from kvloom.report import Reply
    from kvloom.run import Run

STOP_HELP = 'End before this text (can be repeated; default: none, or "\\nUser:" where the model has no chat template).'


def sampling_options(command: F) -> F:
    """How long a reply may get, and how its tokens are chosen."""
    longest = click.option("--max-tokens", type=int, metavar="N", help="End the reply after N tokens (default 512).")
    return longest(choosing_options(command))


def choosing_options(command: F) -> F:
    """How to choose the tokens of a reply."""
    for option in reversed(
        [
            click.option(
                "--temperature",
                type=float,
                metavar="T",
                help="0: always the likeliest token (default; of sample and explore 1).",
            ),
            click.option("--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens."),
            click.option("--top-p", type=float, metavar="P", help="Choose among those that make up P of the whole."),
            click.option(
                "--min-p", type=float, metavar="P", help="Only tokens at least P times as likely as the best."
            ),
            click.option(
                "--typical-p",
                type=float,
                metavar="P",
                help="Choose among tokens about as surprising as expected, which make up P of the whole.",
            ),
            click.option("--repetition-penalty", type=float, metavar="R", help="Above 1: repeat less."),
            click.option("--seed", type=int, metavar="N", help="The same seed gives the same reply."),
            click.option("--stop", multiple=True, metavar="TEXT", help=STOP_HELP),
        ]
    ):
        command = option(command)
    return command


def sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, taken out of a command's options and checked before anything is opened."""
    from dataclasses import fields

    from kvloom.sampling import SamplingSettings

    given = {field.name: values.pop(field.name, None) for field in fields(SamplingSettings)}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    SamplingSettings.from_plain(given)
    return given


@click.command()
@shared
@ref_argument()
@click.argument("text", metavar="TEXT|-")
@new_session_options
@model_options
@sampling_options
@click.option("--choices", metavar="A,B,C", help="Reply with the likeliest of these texts: nothing is sampled.")
@click.option("--choice", "single", multiple=True, metavar="TEXT", help="One more of them; it may hold commas.")
@click.option("--no-reuse", is_flag=True, help="Load no stored state: compute everything anew.")
@click.option("--require-reuse", is_flag=True, help="Fail unless the whole stored prefix is reused.")
@exact_option
def say(options: Options, ref: str, text: str, choices: str | None, single: tuple[str, ...], **values: Any) -> None:
    """Say TEXT at REF and print the reply as it comes. A new SESSION is made; "-" reads TEXT from stdin.

    On a branch, the branch moves on. At a turn, a tag, a token or SESSION@BRANCH~N, a new branch is made.
    Ctrl-C stops the reply; what was said is kept, and "kvloom continue" goes on with it.

    With --choices (or --choice, once for each) the model chooses: how likely it is to begin its reply with each is
    told, the likeliest becomes the reply, and the others are not kept.

    \b
    Example:
      kvloom say trip "Name a city in Italy." --system "You are brief."
      kvloom say trip@main~2 "Name a city in Spain."
      kvloom say trip "Is Rome larger than Milan?" --choices Yes,No
      cat notes.txt | kvloom say notes - --max-tokens 100 --json
    """
    given = [name for name in ("no_reuse", "require_reuse", "exact") if values[name]]
    if len(given) > 1:
        raise click.UsageError(f"--{given[0].replace('_', '-')} and --{given[1].replace('_', '-')} exclude each other")
    settings = sampling(values)
    texts = _choices(choices, single)
    if texts and settings:
        raise click.UsageError(f"--{next(iter(settings)).replace('_', '-')} is for replies that are not chosen")
    said = read_text(text)
    reuse: dict[str, Any] = {"reuse": not values["no_reuse"], "require_reuse": values["require_reuse"]}
    reuse["exact"] = values["exact"]

    begun = {name: values[name] for name in ("system", "chat_template", "model", "dtype")}
    with talking(options, ref, create=True, **begun) as talk:
        if not values["no_reuse"]:
            tell_dropped(talk.session, talk.branch.name, exact=values["exact"])

        def start(cancel: threading.Event) -> Run:
            how = {"cancel": cancel, "progress": talk.progress.passes, **reuse}
            return talk.branch.choosing(said, texts, **how) if texts else talk.branch.stream(said, **how, **settings)

        finish(options, talk, start)


def _choices(listed: str | None, single: tuple[str, ...]) -> list[str]:
    """What there is to choose from, checked before anything is opened; [] where nothing is to be chosen."""
    from kvloom.choices import check_texts

    texts = [] if listed is None else [text.strip() for text in listed.split(",")]
    texts += single
    if texts:
        check_texts(texts)
    return texts


@click.command("continue")
@shared
@ref_argument()
@exact_option
@model_options
@sampling_options
def continue_(options: Options, ref: str, exact: bool, model: str | None, dtype: str | None, **values: Any) -> None:
    """Go on with the reply at REF that was interrupted or met its limit, just where it stopped.

    At a token (SESSION@BRANCH:90) it goes on from that very token, on a new branch; "kvloom show REF --tokens"
    shows where tokens are.

    \b
    Example:
      kvloom continue trip
      kvloom continue trip@main:90 --temperature 1
      kvloom continue trip@main --max-tokens 200
    """
    settings = sampling(values)
    with talking(options, ref, model=model, dtype=dtype) as talk:
        tell_dropped(talk.session, talk.branch.name, exact=exact)
        how = {"exact": exact, "progress": talk.progress.passes, **settings}
        finish(options, talk, lambda cancel: talk.branch.continue_reply(cancel=cancel, **how))


@click.command()
@shared
@ref_argument()
@exact_option
@model_options
@sampling_options
def regenerate(options: Options, ref: str, exact: bool, model: str | None, dtype: str | None, **values: Any) -> None:
    """Get another reply to the last message at REF; the one before stays in the tree.

    \b
    Example:
      kvloom regenerate trip --temperature 0.8
      kvloom regenerate trip@main --temperature 0.8 --seed 7
    """
    settings = sampling(values)
    with talking(options, ref, model=model, dtype=dtype) as talk:
        tell_dropped(talk.session, talk.branch.name, exact=exact)
        how = {"exact": exact, "progress": talk.progress.passes, **settings}
        finish(options, talk, lambda cancel: talk.branch.regenerate(cancel=cancel, **how))


def finish(options: Options, talk: Talk, start: Callable[[threading.Event], Run]) -> None:
    """Run to the end, print it as was asked for, and leave with 130 if it was interrupted."""
    with interruptible() as stopped:
        reply, closed = stream(start(stopped.cancel), talk.progress.stop, stopped.cancel, quiet=options.json)
    if options.json and closed is None:
        print_json(reply.to_json() | ({"template": talk.template} if talk.template else {}))
    if talk.note:
        dim(talk.note)
    tell(reply, brief=options.json)
    if closed is not None:
        raise closed
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)


def stream(
    run: Run, settled: Callable[[], None], cancel: threading.Event, *, quiet: bool = False
) -> tuple[Reply, BrokenPipeError | None]:
    """Print the pieces of a run as they come. If nobody reads them, stop it: what was said is kept."""
    closed: BrokenPipeError | None = None
    ended_line = True
    try:
        for piece in run:
            settled()
            if quiet or closed is not None:
                continue
            try:
                sys.stdout.write(clean(piece) if stdout_is_terminal() else piece)
                sys.stdout.flush()
            except BrokenPipeError as error:
                closed = error
                cancel.set()
            ended_line = piece.endswith("\n")
    finally:
        settled()
    if not quiet and closed is None and not ended_line:
        click.echo()
    return run.reply, closed


def tell(reply: Reply, *, brief: bool = False) -> None:
    """What the run should be known for, on stderr: notices, and the dim line."""
    for notice in reply.notices:
        warn(notice)
    if brief:
        return
    for option in sorted(reply.choice.options, key=lambda each: -each.logprob) if reply.choice else ():
        per_token = f"{option.logprob:.2f}, {option.mean_logprob:.2f} a token"
        dim(f"{100 * option.probability:5.1f}%  {preview(option.text, 60)}  ({per_token})")
    dim(told(reply))


class Stopped:
    """What asked a run to stop: ``signal`` is 0 while nothing did."""

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.signal = 0

    @property
    def asks_to_leave(self) -> bool:
        """Whether the whole program was asked to end, not only the reply."""
        return self.signal not in (0, signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Stopped]:
    """Ctrl-C (or a request to end) asks the run to stop, which keeps what was said; a second one insists."""
    stopped = Stopped()

    def stop(number: int, _frame: object) -> None:
        if stopped.cancel.is_set():
            raise KeyboardInterrupt
        stopped.signal = number
        stopped.cancel.set()

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def read_text(given: str) -> str:
    """TEXT, or what is on stdin; refused here if it is empty, before anything is opened."""
    from kvloom.errors import InvalidText, LimitExceeded
    from kvloom.plaintext import check_unicode
    from kvloom_proto.limits import MAX_TURN_BYTES

    text = given
    if given == "-":
        if sys.stdin.isatty():
            dim("type the text, then Ctrl-D")
        data = sys.stdin.buffer.read(MAX_TURN_BYTES + 1)
        if len(data) > MAX_TURN_BYTES:
            raise LimitExceeded("the text on stdin", len(data), MAX_TURN_BYTES)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            message = f"stdin is not valid UTF-8 (byte {error.start})"
            raise InvalidText(message, hint="convert it first: iconv -t UTF-8") from error
        text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise InvalidText("there is nothing to say", hint="give some text, or - to read it from stdin")
    check_unicode(text)
    return text
