"""``kvloom fsck``: check everything in the store, and repair it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, reading, shared
from kvloom.cli.opening import with_model
from kvloom.cli.progress import Bars
from kvloom.cli.quarantined import show
from kvloom.cli.talk import interruptible
from kvloom.cli.terminal import dim, print_json, size, stdin_is_terminal, warn
from kvloom.shown import clean

if TYPE_CHECKING:
    from kvloom.cli.talk import Stopped
    from kvloom.loom import KVLoom
    from kvloom_store.fsck import Report
    from kvloom_store.fsck.repair import Plan

DAMAGED = 10
"""The exit code where something is not as it was written."""

SHOWN = 20
"""Findings of one kind that are printed one by one."""

_COLOURS = {"note": "blue", "heals": "yellow", "lost": "red"}


@click.command()
@shared
@click.option("--repair", is_flag=True, help="Repair what can be: the plan is shown first, and asked about.")
@click.option("-y", "--yes", is_flag=True, help="Repair, or delete, without asking.")
@click.option("--quick", is_flag=True, help="Do not read stored state, only what is said of it.")
@click.option("--quarantined", is_flag=True, help="List what repairs have set aside, when and why; check nothing.")
@click.option("--forget", is_flag=True, help="With --quarantined: delete all of it.")
def fsck(options: Options, repair: bool, yes: bool, quick: bool, quarantined: bool, forget: bool) -> None:
    """Check the whole store: SQLite's own check, the checksum of every row and of all stored state, and that they fit
    together. It changes nothing, and does not stop at the first thing that is wrong.

    Findings are notes (nothing is wrong), what heals (it can be made anew), or what is lost (it cannot, but for a
    backup). The exit code is 10 if there are any but notes.

    With --repair, a row in which one bit has changed is mended, for its checksum says which; damaged state is computed
    again by the model of its session, as it was recorded, and must come out with the same checksums (on another
    processor or build fresh state takes its place, which is said); what follows from the rest is made anew. Text that
    cannot be mended is set aside with what stands on it: it is kept, and never served; --quarantined lists it. Ctrl-C
    is safe: what was done stays done.

    \b
    Example:
      kvloom fsck
      kvloom fsck --quick --json
      kvloom fsck --repair
      kvloom fsck --quarantined --json
    """
    if forget and not quarantined:
        raise click.UsageError("--forget goes with --quarantined")
    if quarantined:
        if repair or quick:
            raise click.UsageError("--quarantined checks nothing, and repairs nothing")
        show(options, forget=forget, yes=yes)
        return
    if quick and repair:
        raise click.UsageError("--repair must read the stored state; leave --quick out")
    report = _check(options, quick=quick)
    done: list[str] = []
    if repair:
        if not options.json:
            _print(report)
        report = _repair(options, report, done, yes=yes)
    if options.json:
        print_json({**report.to_json(), **({"done": done} if repair else {})})
    elif not repair:
        _print(report)
    else:
        click.echo("the store is sound" if report.sound else "not all could be repaired:")
        if not report.sound:
            _print(report)
    if not report.sound:
        if not repair and not options.json:
            dim("kvloom fsck --repair shows what it would do about it, and asks")
        raise click.exceptions.Exit(DAMAGED)


def _check(options: Options, *, quick: bool = False) -> Report:
    bars = Bars()
    try:
        with reading(options) as reader:
            return reader.fsck(quick=quick, progress=lambda done, total: bars.stage("checking", done / max(total, 1)))
    finally:
        bars.stop()


def _print(report: Report) -> None:
    from kvloom_store.fsck import Severity

    shown: Counter[str] = Counter()
    for each in report.findings:
        shown[each.kind] += 1
        if shown[each.kind] <= SHOWN:
            where = f"{clean(each.at)}: " if each.at else ""
            click.echo(f"{click.style(f'{each.severity:<5}', fg=_COLOURS[each.severity])} {where}{clean(each.words)}")
    for kind, count in shown.items():
        if count > SHOWN:
            click.echo(f"... and {count - SHOWN:,} more of the kind {kind} (--json lists them all)")
    lost, heals, notes = (f"{report.count(each):,}" for each in reversed(Severity))
    state = f", {size(report.bytes)} of state" if report.bytes else ""
    verdict = "sound" if report.sound else "damaged"
    click.echo(f"{verdict}: {report.rows:,} rows{state} checked; {lost} lost, {heals} to be healed, {notes} notes")


def _repair(options: Options, report: Report, done: list[str], *, yes: bool) -> Report:
    """Plan, ask and repair, until nothing is left to do or a round changed nothing; what is found then."""
    from kvloom.repair import in_rounds
    from kvloom_store.fsck.repair import execute

    def told(line: str) -> None:
        done.append(line)
        if not options.json:
            click.echo(clean(line))

    def act(planned: Plan) -> None:
        _agree(options, planned, yes=yes)
        with interruptible() as stopped:
            with reading(options) as reader:
                execute(reader.database, planned, told=told)
            if planned.segments and not stopped.signal:
                _recompute(options, planned, told, stopped)
        if stopped.signal:
            raise click.exceptions.Exit(128 + stopped.signal)

    return in_rounds(report, act, lambda: _check(options))


def _agree(options: Options, planned: Plan, *, yes: bool) -> None:
    """Show what is going to be done, and ask.

    Raises SessionError where there is nobody to ask, click.Abort for a no.
    """
    from kvloom.errors import SessionError

    if not options.json:
        click.echo("to do:")
        for step in planned.steps:
            click.echo(f"  {step.words}")
    if yes:
        return
    if options.json or not stdin_is_terminal():
        raise SessionError("a repair changes the store", hint="--yes does it without asking")
    click.confirm("Do it?", abort=True, err=True)


def _recompute(options: Options, planned: Plan, told: Callable[[str], None], stopped: Stopped) -> None:
    """Have each model compute its segments again; those whose model cannot be had wait for it."""
    from kvloom.errors import EngineError, SessionError
    from kvloom.repair import recompute, work

    with reading(options) as reader, reader.database.read() as conn:
        found = work(conn, planned.segments)
    for each in found:
        if stopped.signal:
            return
        count = f"{len(each.segments)} segment{'s' * (len(each.segments) != 1)}"
        if each.session is None:
            with reading(options) as reader:
                _forget(reader, each.segments, told)
            continue
        from kvloom.binding import check_model
        from kvloom.engine import Cancelled

        try:
            with with_model(options, each.session, model=each.model or None, dtype=each.dtype or None) as (
                session,
                bars,
            ):
                check_model(session)
                recompute(session.loom, each.segments, told=told, cancel=stopped.cancel, progress=bars.passes)
        except (EngineError, SessionError) as error:
            warn(f"{count} of {clean(each.session)} wait for the model {clean(each.model)}: {error}")
        except Cancelled:
            return


def _forget(reader: KVLoom, segments: tuple[int, ...], told: Callable[[str], None]) -> None:
    from kvloom_store.fsck.repair import forget_state

    for each in segments:
        forget_state(reader.database, each)
        told(f"segment {each}, which is no turn's, was taken out of use")
