"""``kvloom warm``: compute state that is missing before somebody waits for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.asking import exact_option, tell_dropped, told
from kvloom.cli.common import Options, complete_ref, parse, reading, shared
from kvloom.cli.opening import binding_of, model_options, with_model
from kvloom.cli.talk import Stopped, interruptible
from kvloom.cli.terminal import dim, print_json, warn
from kvloom.shown import clean, seconds

if TYPE_CHECKING:
    from kvloom.report import Added
    from kvloom.warm import Missing

LOW_PRIORITY = 10
"""What is added to the niceness of the process, on systems that have one."""


@dataclass
class _Place:
    """A point to warm, what is missing there, and what was done about it."""

    session: str
    at: str
    model: tuple[str, str]
    missing: Missing
    added: Added | None = None

    @property
    def name(self) -> str:
        return clean(f"{self.session}@{self.at}")

    def to_json(self) -> dict[str, Any]:
        plan = {**self.missing.cost.to_json(), "unwritten": self.missing.unwritten}
        done = self.added.to_json() if self.added else None
        return {"session": self.session, "at": self.at, "plan": plan, "done": done}


@click.command()
@shared
@click.argument("refs", metavar="REF...", nargs=-1, shell_complete=complete_ref)
@click.option("--all", "everything", is_flag=True, help="Every branch of every session.")
@click.option("--dry-run", is_flag=True, help="Only tell what is missing; no model is loaded.")
@exact_option
@model_options
def warm(
    options: Options,
    refs: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    exact: bool,
    model: str | None,
    dtype: str | None,
) -> None:
    """Compute what is missing of the state down to each REF, at low priority, so that the next turn need not wait.

    That is, tokens that are pending (an edit left unrun, a message that was interrupted), and state that was never
    stored, was dropped, or is damaged: all that is there is read, and checked. Ctrl-C stops it; turns that were done
    are kept, and so are the passes of one that was begun (of one that is replayed, nothing).

    What was dropped is computed anew; with --exact it is run again just as it was first, replies token by token, and
    so is what recode stored with loss.

    With --model it is the state of another model that is computed, and kept beside that of the session's own.

    \b
    Example:
      kvloom edit trip~3 --text "Name three rivers in Spain." --no-run
      kvloom warm trip@main-2
      kvloom warm --all --dry-run
    """
    if bool(refs) == everything:
        raise click.UsageError("name what to warm, or say --all" if not refs else "--all takes no REF")
    places = _places(options, refs, exact, model, dtype)
    stopped = Stopped()
    failed = 0
    if not dry_run and any(place.missing for place in places):
        if hasattr(os, "nice"):
            os.nice(LOW_PRIORITY)  # before the model is loaded: its threads inherit it
        with interruptible() as stopped:
            todo = [place for place in places if place.missing]
            asked = (model, dtype)
            failed = _compute(options, todo, asked, stopped, exact=exact, carry_on=everything)
    if options.json:
        print_json({"points": [place.to_json() for place in places], "stopped": bool(stopped.signal)})
    elif not any(place.missing for place in places):
        click.echo("nothing to do: all state is there")
    elif dry_run:
        for place in places:
            click.echo(f"{place.name}: {_plan(place.missing)}")
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)
    if failed:
        raise click.exceptions.Exit(failed)


def _places(options: Options, refs: tuple[str, ...], exact: bool, model: str | None, dtype: str | None) -> list[_Place]:
    """What was named (or all branches there are), and what is missing there; no model is needed to know."""
    from kvloom.report import Cost
    from kvloom.warm import Missing

    with reading(options) as reader:
        if refs:
            named = [(reader.find(parse(ref)[0].session), parse(ref)[1]) for ref in refs]
        else:
            named = [(session, branch.name) for session in reader.sessions() for branch in session.branches()]
        found = []
        for session, at in named:
            known = binding_of(session.row.settings, model, dtype)
            if not known:  # it has not read anything yet
                unread = sum(turn.role != "system" for turn in session.log(at))
                found.append(_Place(session.name, at or "main", (str(model), ""), Missing(Cost(), unread)))
                continue
            session.use(known)
            by = (str(known["model"]), str(known["model_digest"]))
            found.append(_Place(session.name, at or "main", by, session.missing(at, verify=True, exact=exact)))
        return found


def _compute(
    options: Options,
    places: list[_Place],
    asked: tuple[str | None, str | None],
    stopped: Stopped,
    *,
    exact: bool,
    carry_on: bool,
) -> int:
    """Warm all places, each model loaded once; the exit code of what failed last where others are to ``carry_on``."""
    from kvloom.errors import KVLoomError

    failed = 0
    for model in dict.fromkeys(place.model for place in places):
        mine = [place for place in places if place.model == model]
        try:
            with with_model(options, mine[0].session, model=asked[0], dtype=asked[1]) as (session, bars):
                for place in mine:
                    if stopped.signal:
                        return failed
                    found = session.loom.find(place.session)
                    if asked[0] is not None:
                        found.add_model()
                    tell_dropped(found, place.at, exact=exact)
                    place.added = found.warm(place.at, exact=exact, cancel=stopped.cancel, progress=bars.passes)
                    bars.stop()
                    _tell(options, place, place.added)
        except KVLoomError as error:
            if not carry_on:
                raise
            failed = error.exit_code
            warn(f"{clean(mine[0].session)}: {error}")
    return failed


def _tell(options: Options, place: _Place, added: Added) -> None:
    for notice in added.notices:
        warn(notice)
    if options.json:
        return
    tokens = added.tokens
    click.echo(
        f"{place.name}: reused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}"
        f" · {seconds(added.seconds)}"
    )
    if added.pending:
        dim(f"{added.pending:,} tokens are left; the same command goes on with them")


def _plan(missing: Missing) -> str:
    if not missing:
        return "nothing to do"
    unwritten = f", and {missing.unwritten} turns of text alone" if missing.unwritten else ""
    return f"{told(missing.cost)}{unwritten}"
