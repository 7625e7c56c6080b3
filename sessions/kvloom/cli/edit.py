"""``kvloom edit``: say a turn otherwise, on a new branch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.asking import agree, tell_added, yes_option
from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.opening import model_options, with_model
from kvloom.cli.talk import interruptible, read_text, sampling, sampling_options, stream, tell
from kvloom.cli.terminal import dim, print_json, stdin_is_terminal

if TYPE_CHECKING:
    from kvloom.cli.progress import Bars
    from kvloom.planned import PlannedBranch
    from kvloom_store.names import Ref


@click.command()
@shared
@ref_argument()
@click.option("--text", metavar="TEXT|-", help="The new text (- reads it from stdin; default: your editor opens).")
@click.option("--branch", metavar="NAME", help="The new branch (default: the old one's name with a number).")
@click.option("--replay-turns", is_flag=True, help="Append the later turns again, with the text they had.")
@click.option("--no-reply", is_flag=True, help="After an edited message, generate no reply.")
@click.option("--no-run", is_flag=True, help="Only write the turns; kvloom warm computes their state later.")
@yes_option
@model_options
@sampling_options
def edit(options: Options, ref: str, text: str | None, branch: str | None, **values: Any) -> None:
    """Say the turn at REF otherwise, on a new branch: a message, a reply, or the system prompt.

    What was said before it is kept, with its state. What was said later is left behind; with --replay-turns it is
    appended again as it was, computed but not generated. How many tokens are kept and how many are to be computed
    is told before anything runs. After an edited message a reply is generated. The old branch stays.

    Without --text, $VISUAL or $EDITOR opens with the text; left as it was, nothing is done.

    \b
    Example:
      kvloom edit trip~1
      kvloom edit trip@main~3 --text "Name three cities in Spain."
      kvloom edit trip@main~3 --text "Name two cities." --replay-turns --yes
    """
    settings = sampling(values)
    at, _ = parse(ref)
    old, session = _old(options, at)
    new = read_text(text) if text is not None else _edited(old)
    if new == old:
        if options.json:
            return print_json({"session": session, "branch": None, "plan": None, "added": None, "reply": None})
        return dim("the text is unchanged: nothing was done")
    with with_model(options, session, model=values["model"], dtype=values["dtype"]) as (opened, bars):
        from kvloom import edit as editing

        plan = editing.plan(opened, at, new, branch=branch, replay_turns=values["replay_turns"])
        agree(options, plan.cost, yes=values["yes"] or values["no_run"])
        replies = plan.role == "user" and not (values["replay_turns"] or values["no_reply"] or values["no_run"])
        return make(options, plan, bars, settings if replies else None, compute=not values["no_run"])


def make(
    options: Options, plan: PlannedBranch, bars: Bars, settings: dict[str, Any] | None, *, compute: bool = True
) -> None:
    """Make a planned branch, get a reply if there are ``settings`` for one, and print all of it as was asked for."""
    reply, closed = None, None
    with interruptible() as stopped:
        added = plan.run(compute=compute, cancel=stopped.cancel, progress=bars.passes)
        bars.stop()
        tell_added(added, quiet=options.json)
        if settings is not None and not stopped.signal:
            run = plan.branch.regenerate(cancel=stopped.cancel, progress=bars.passes, **settings)
            reply, closed = stream(run, bars.stop, stopped.cancel, quiet=options.json)
            tell(reply, brief=options.json)
    if options.json and closed is None:
        head = {"session": added.session, "branch": added.branch, "plan": plan.cost.to_json()}
        print_json({**head, "added": added.to_json(), "reply": reply.to_json() if reply else None})
    if closed is not None:
        raise closed
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)


def _old(options: Options, ref: Ref) -> tuple[str, str]:
    """What the turn at a ref says now, and the session's name."""
    from kvloom.path import find

    with reading(options) as reader, reader.database.read() as conn:
        return find(conn, ref).text, ref.session


def _edited(old: str) -> str:
    """The text as the user's editor leaves it; the newline that editors put at the end is none of the text."""
    if not stdin_is_terminal() and not (os.environ.get("VISUAL") or os.environ.get("EDITOR")):
        raise click.UsageError("there is no terminal for an editor: give the new text with --text")
    new = click.edit(old, extension=".md")
    if new is None:
        return old
    return new if old.endswith("\n") else new.removesuffix("\n")
