"""``kvloom compact``: go on shorter, on a new branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvloom.cli.asking import agree, tell_added, yes_option
from kvloom.cli.common import Options, parse, ref_argument, shared
from kvloom.cli.opening import model_options, with_model
from kvloom.cli.progress import Bars
from kvloom.cli.talk import Stopped, interruptible, stream
from kvloom.cli.terminal import dim, print_json

if TYPE_CHECKING:
    from kvloom.compact import Compaction
    from kvloom.report import Added, Reply


@click.command()
@shared
@ref_argument()
@click.option(
    "--summary",
    is_flag=True,
    help="Have the model write a summary, and begin with that.",
)
@click.option(
    "--keep", type=click.IntRange(0), metavar="N", help="Keep the last N exchanges (default 4; with --summary 0)."
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="The longest a summary may be (default 400).")
@click.option("--branch", metavar="NAME", help="The new branch (default: the old one's name with a number).")
@yes_option
@model_options
def compact(
    options: Options,
    ref: str,
    summary: bool,
    keep: int | None,
    max_tokens: int | None,
    branch: str | None,
    yes: bool,
    model: str | None,
    dtype: str | None,
) -> None:
    """Begin a shorter branch: the system prompt and the last exchanges of REF, or a summary of it, or both.

    For conversations that near the limit of the model's context. What is kept has the text it had; its state is
    computed, and how many tokens that are is told before. The summary is asked for on a branch of its own,
    "summary-of-BRANCH", which goes on from what is stored. The old branch stays.

    \b
    Example:
      kvloom compact trip --keep 2
      kvloom compact trip --summary
      kvloom compact trip@main~2 --summary --keep 1 --branch short
    """
    at, point = parse(ref)
    if max_tokens is not None and not summary:
        raise click.UsageError("--max-tokens is for a --summary")
    if keep == 0 and not summary:
        raise click.UsageError("--keep 0 leaves nothing; --summary goes with it")
    with with_model(options, at.session, model=model, dtype=dtype) as (session, bars):
        plan = session.compact(
            point,
            keep=keep,
            summary=summary,
            branch=branch,
            max_tokens=max_tokens,
        )
        agree(options, plan.cost, yes=yes)
        with interruptible() as stopped:
            reply, added = make(plan, bars, stopped, quiet=options.json)
        if options.json:
            print_json(
                {
                    "session": session.name,
                    "branch": added.branch if added else None,
                    "plan": plan.cost.to_json(),
                    "summary": reply.to_json() if reply else None,
                    "added": added.to_json() if added else None,
                }
            )
        if stopped.signal:
            raise click.exceptions.Exit(128 + stopped.signal)


def make(plan: Compaction, bars: Bars, stopped: Stopped, *, quiet: bool) -> tuple[Reply | None, Added | None]:
    """Have the summary written and printed as it comes, and make the branch; none if it was stopped before."""
    reply, closed = None, None
    if plan.request is not None:
        run = plan.summarise(cancel=stopped.cancel, progress=bars.passes)
        reply, closed = stream(run, bars.stop, stopped.cancel, quiet=quiet)
        if closed is not None:
            raise closed
        if reply.finish_reason == "interrupted":
            if not quiet:
                dim(f"stopped; what there is of the summary is on {reply.session}@{reply.branch}")
            return reply, None
    added = plan.run(cancel=stopped.cancel, progress=bars.passes)
    bars.stop()
    tell_added(added, quiet=quiet)
    return reply, added
