"""What commands that run the model over many tokens share: the cost is told first, and asked about where it is high."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvloom.cli.common import F, Options
from kvloom.cli.terminal import dim, stdin_is_terminal, warn
from kvloom.shown import seconds

if TYPE_CHECKING:
    from kvloom.report import Added, Cost
    from kvloom.session import Session

ASK_ABOVE = 2000
"""Tokens to run above which a command asks first."""


def yes_option(command: F) -> F:
    """``--yes``."""
    return click.option("-y", "--yes", is_flag=True, help=f"Do not ask (it asks above {ASK_ABOVE:,} tokens).")(command)


SAY_ABOVE = 2.0
"""Seconds of bringing back dropped state from which they are told before."""


def exact_option(command: F) -> F:
    """``--exact``."""
    return click.option(
        "--exact", is_flag=True, help="Run state that was dropped, or stored with loss, again just as it was."
    )(command)


def tell_dropped(session: Session, at: str, *, exact: bool) -> None:
    """Before a run: what bringing back state that was dropped takes, either way, where that is a wait.

    Raises EngineError where it is to come back exactly, and nobody knows how.
    """
    from kvloom.errors import EngineError

    lost = session.dropped(at)
    if exact and not lost.possible:
        raise EngineError(
            "state was dropped, and what it stood on was removed: it cannot be run again just as it was",
            hint="without --exact it is computed anew",
        )
    chosen = lost.exact_seconds if exact else lost.fresh_seconds
    if not lost.fresh or (chosen is not None and chosen < SAY_ABOVE):
        return
    ways = [f"{lost.fresh:,} tokens anew{_about(lost.fresh_seconds)}"]
    if lost.possible:
        ways.append(f"{lost.exact:,} run again just as they were{_about(lost.exact_seconds)} with --exact")
    dim(f"state was dropped here and comes back {'exactly' if exact else 'fresh'}: " + ", or ".join(ways))


def _about(value: float | None) -> str:
    return "" if value is None else f" in about {seconds(value)}"


def told(cost: Cost) -> str:
    """A cost as people read it."""
    parts = [f"{cost.kept:,} tokens kept", f"{cost.computed:,} to compute"]
    if cost.replayed:
        parts.insert(1, f"{cost.replayed:,} to replay")
    if cost.generated:
        parts.append(f"up to {cost.generated:,} to generate")
    return ", ".join(parts)


def agree(options: Options, cost: Cost, *, yes: bool) -> None:
    """Tell the cost before anything is run, and ask whether to go on where it is high.

    Raises SessionError where there is nobody to ask, click.Abort for a no.
    """
    from kvloom.errors import SessionError

    if not options.json:
        dim(told(cost))
    if yes or cost.to_run <= ASK_ABOVE:
        return
    if options.json or not stdin_is_terminal():
        raise SessionError(f"this would run {cost.to_run:,} tokens", hint="--yes does it without asking")
    click.confirm(f"Run {cost.to_run:,} tokens?", abort=True, err=True)


def tell_added(added: Added, *, quiet: bool) -> None:
    """What a run over given turns should be known for, on stderr: notices, and the dim line."""
    for notice in added.notices:
        warn(notice)
    if quiet:
        return
    tokens = added.tokens
    parts = [f"{added.session}@{added.branch}"]
    parts.append(f"reused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}")
    if added.pending:
        parts.append(f"{added.pending} pending: kvloom warm {added.session}@{added.branch} computes them")
    parts.append(seconds(added.seconds))
    dim(" · ".join(parts))
