"""Commands about how much room state takes: gc, pin, unpin, quota. None of them needs a model."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.progress import Bars
from kvloom.cli.talk import interruptible
from kvloom.cli.terminal import columns, dim, print_json, size, stdin_is_terminal, warn
from kvloom.shown import clean, seconds

if TYPE_CHECKING:
    from kvloom_store.gc import Collected
    from kvloom_store.quota import Limits

ASK_ABOVE = 30.0
"""Seconds of computing anew above which gc asks first."""

SHOWN = 12
"""Branches that are listed; the others are counted."""

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<unit>[kmgt]?)(?P<binary>i?)b?|(?P<percent>%))", re.IGNORECASE)


class Size(click.ParamType):  # type: ignore[type-arg]  # only generic for type checkers
    """Bytes as people write them: 500MB, 2GiB, 1000000; where there is a whole, a part of it: 30%."""

    name = "size"

    def __init__(self, *, percent: bool = False) -> None:
        self.percent = percent

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _SIZE.fullmatch(str(value).strip())
        if found is None or (found["percent"] and not self.percent) or (found["binary"] and not found["unit"]):
            self.fail(f"{value!r} is not a size; write 500MB, 2GiB{' or 30%' if self.percent else ''}", param, ctx)
        if found["percent"]:
            return float(found["number"]) / 100
        unit = found["unit"].lower()
        return int(float(found["number"]) * (_BINARY if found["binary"] else _UNITS)[unit])


@click.command()
@shared
@click.option("--max-bytes", type=Size(percent=True), metavar="SIZE", help="Leave so much state: 500MB, 2GiB, 30%.")
@click.option("--keep-branches", is_flag=True, help="Leave alone all that a branch or a tag leads to.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be dropped, and what coming back to it would take.")
@click.option("-y", "--yes", is_flag=True, help=f"Do not ask (it asks above {ASK_ABOVE:.0f} s of computing anew).")
def gc(options: Options, max_bytes: int | float | None, keep_branches: bool, dry_run: bool, yes: bool) -> None:
    """Drop state until at most SIZE of it is left. Nothing that was said is ever dropped, and every branch goes on.

    What is worth least goes first: the seconds it saves for each byte, as this machine has been timed, and how likely
    it is needed. What no branch and no tag leads to goes before what one does, ends of paths before what they share;
    what is pinned stays. Without SIZE, the store comes down to its quota, or loses only what nothing reaches.

    When a branch is gone on with whose state was dropped, that is computed anew ("fresh"): as if its text were
    read for the first time, with replies that may differ in the end. --exact of say, continue, regenerate and warm
    runs it again just as it was first run, which takes longer. Both are told beforehand.

    \b
    Example:
      kvloom gc --max-bytes 30% --dry-run
      kvloom gc --max-bytes 2GB
      kvloom pin trip && kvloom gc --max-bytes 500MB --yes
    """
    bars = Bars()
    with reading(options) as reader, interruptible() as stopped:
        most = max_bytes
        if isinstance(max_bytes, float):
            most = int(max_bytes * reader.gc(dry_run=True).before)
        report = reader.gc(
            None if most is None else int(most),
            keep_branches=keep_branches,
            dry_run=dry_run,
            agree=None if yes else lambda planned: _agree(options, planned),
            cancel=stopped.cancel,
            progress=bars.dropped,
        )
        bars.stop()
    if options.json:
        print_json(asdict(report))
    else:
        _print(report, listed=not yes and not dry_run and _is_dear(report))
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)


def _is_dear(planned: Collected) -> bool:
    """Whether coming back to what goes takes long enough to ask before."""
    return bool(planned.branches) and (planned.seconds is None or planned.seconds > ASK_ABOVE)


def _agree(options: Options, planned: Collected) -> bool:
    """Ask before much is dropped. Raises SessionError where there is nobody to ask, click.Abort for a no."""
    from kvloom.errors import SessionError

    if not _is_dear(planned):
        return True
    took = "an unknown time" if planned.seconds is None else seconds(planned.seconds)
    if options.json or not stdin_is_terminal():
        raise SessionError(
            f"computing anew what this would drop takes {took}",
            hint="--yes does it without asking, --dry-run tells more",
        )
    _print_branches(planned)
    click.confirm(f"Drop {size(planned.freed)}, which takes {took} to compute anew?", abort=True, err=True)
    return True


def _print(report: Collected, *, listed: bool) -> None:
    if not report.segments:
        click.echo(f"nothing to drop: state takes {size(report.before)}{_kept(report)}")
        return
    done = "would free" if report.dry_run else "freed"
    click.echo(
        f"{done} {size(report.freed)} of {size(report.before)}; {size(report.after)} of state are left{_kept(report)}"
    )
    if report.tokens:
        ways = f"{_took(report.seconds)} anew, {_took(report.exact_seconds)} exactly as it was"
        click.echo(f"coming back to all of it: {report.tokens:,} tokens, {ways}")
    if not listed:
        _print_branches(report)
    if report.skipped:
        warn(f"{report.skipped} segments were not dropped: they came into use meanwhile, or this was stopped")
    if not report.dry_run:
        more = f"the file is {size(report.file_freed)} smaller" if report.file_freed else "the file is no smaller"
        rest = report.freed - report.file_freed
        dim(more + ("; the rest is used again by what is stored next" if rest > 1 << 20 else ""))


def _kept(report: Collected) -> str:
    return f" ({size(report.kept)} may not be dropped: pinned, or in use)" if report.kept else ""


def _took(value: float | None) -> str:
    return "unknown time" if value is None else seconds(value)


def _print_branches(report: Collected) -> None:
    """The branches that lose state, those that lose most first."""
    if not report.branches:
        return
    lost = sorted(report.branches, key=lambda each: -each.tokens)
    rows = [[clean(b.name), f"{b.tokens:,}", _took(b.seconds), _took(b.exact_seconds)] for b in lost[:SHOWN]]
    columns(rows, ["branch", "tokens", "anew", "exactly"])
    if len(lost) > SHOWN:
        click.echo(f"and {len(lost) - SHOWN} others")


@click.command()
@shared
@ref_argument()
def pin(options: Options, ref: str) -> None:
    """Pin the turn at REF: its state, and that of all turns before it, is never dropped.

    The pin stays at that turn: what is said after it is dropped like anything else, until it is pinned, too. What is
    pinned is marked in "kvloom log" and "kvloom tree", and "kvloom branches" says of each branch how far it is.

    \b
    Example:
      kvloom pin trip
      kvloom pin trip@main~2
    """
    at, point = parse(ref)
    with reading(options) as reader:
        session = reader.find(at.session)
        new = session.pin(point)
        turn = session.log(point)[-1].id
        missing = bool(session.missing(point))
    if options.json:
        return print_json({"session": session.name, "turn": turn, "pinned": True, "changed": new})
    click.echo(f"{session.name}@{turn[:8]} is pinned{'' if new else ' already'}")
    if missing:
        dim(f"not all of its state is held now: kvloom warm {session.name}@{turn[:8]} computes it")
    return None


@click.command()
@shared
@ref_argument()
def unpin(options: Options, ref: str) -> None:
    """Take the pin of the turn at REF away. A pin further on keeps that turn's state, too.

    \b
    Example:
      kvloom unpin trip
      kvloom unpin trip@3f2a
    """
    at, point = parse(ref)
    with reading(options) as reader:
        session = reader.find(at.session)
        was = session.unpin(point)
        turn = session.log(point)[-1].id if was else None
    if options.json:
        return print_json({"session": session.name, "turn": turn, "pinned": False, "changed": was})
    return click.echo(f"{session.name}@{turn[:8]} is not pinned any more" if turn else f"{clean(ref)} was not pinned")


@click.command()
@shared
@click.argument("most", metavar="[SIZE]", type=Size(), required=False)
@click.option("--none", "without", is_flag=True, help="Take the quota away.")
@click.option("--min-free", type=Size(), metavar="SIZE", help="Leave so much free on the disk (default 256 MiB).")
def quota(options: Options, most: int | None, without: bool, min_free: int | None) -> None:
    """Show how much room state may take in this store, or let it be SIZE at most.

    It is looked at whenever state is written: what is worth least is dropped then to make room, as "kvloom gc" does.
    Where nothing more may go, or the disk has less than --min-free left, what is said is kept and its
    state is not; a warning says so. By default there is no quota, and 256 MiB stay free (5 % of a small disk).

    \b
    Example:
      kvloom quota
      kvloom quota 2GB
      kvloom quota --none --min-free 1GiB
    """
    from kvloom_store import quota as limits_of

    if most is not None and without:
        raise click.UsageError("give a SIZE or --none")
    with reading(options) as reader:
        limits = reader.quota()
        if most is not None or without or min_free is not None:
            limits = limits_of.Limits(
                None if without else limits.max_state if most is None else most,
                limits.min_free if min_free is None else min_free,
            )
            reader.set_quota(limits)
        with reader.database.read() as conn:
            taken = limits_of.state_bytes(conn)
    if options.json:
        return print_json({"state": taken, **asdict(limits)})
    return _print_limits(limits, taken)


def _print_limits(limits: Limits, taken: int) -> None:
    click.echo(f"quota = {'none' if limits.max_state is None else size(limits.max_state)} (state takes {size(taken)})")
    free = "the default, 256 MiB or 5 % of a small disk" if limits.min_free is None else size(limits.min_free)
    click.echo(f"min-free = {free}")
    if limits.max_state is not None and taken > limits.max_state:
        dim("it is over its quota: kvloom gc brings it down now, the next turn does else")
