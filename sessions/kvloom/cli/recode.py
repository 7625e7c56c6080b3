"""``kvloom recode``: stored state put down with another codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.progress import Bars
from kvloom.cli.talk import interruptible
from kvloom.cli.terminal import dim, print_json, size, stdin_is_terminal, warn
from kvloom.shown import clean
from kvloom_proto.codecs import AUTO, LOSSY, SETTINGS

if TYPE_CHECKING:
    from kvloom_store.recode import Recoded, Survey


@click.command()
@shared
@ref_argument()
@click.option(
    "--codec", type=click.Choice((*SETTINGS, *LOSSY)), default=AUTO, show_default=True, help="What to store it with."
)
@click.option("--shared", "with_shared", is_flag=True, help="With loss: also what other branches stand on.")
@click.option("-y", "--yes", is_flag=True, help="Store with loss without asking.")
@click.option("--dry-run", is_flag=True, help="Only tell what is there.")
def recode(options: Options, ref: str, codec: str, with_shared: bool, yes: bool, dry_run: bool) -> None:
    """Store the state down to REF with another codec: the same bits in other bytes. No model is loaded.

    raw restores fastest, zstd takes least, lz4 lies between; auto takes, of each chunk, the one that is worth it.
    State that other branches stand on, too, is recoded once for all of them. Ctrl-C stops it and keeps what was done;
    the same command goes on. The file keeps its size: what becomes free in it is used by what is stored next.

    q8_0 and q4_0 (llama.cpp's) store rows with loss, in about half and a quarter of bfloat16's bytes: what is said from
    there on is not quite what exact state would say, and every reply warns of it. State that other branches stand on
    stays exact, unless --shared. "kvloom warm REF --exact" computes the exact rows again.

    \b
    Example:
      kvloom recode trip --dry-run
      kvloom recode trip@spain --codec zstd
      kvloom config codec zstd        # of what is stored from now on
    """
    at, point = parse(ref)
    bars = Bars()
    asks = codec in LOSSY and not yes and not dry_run
    if asks and (options.json or not stdin_is_terminal()):
        raise click.UsageError(f"{codec} gives up the exact rows; say --yes if you mean it")
    with reading(options) as reader:
        session = reader.find(at.session)
        found = session.survey(point)
        name = clean(f"{session.name}@{at.at or 'main'}")
        if not options.json:
            _tell_before(name, found, dry_run)
        if dry_run:
            from kvloom.recode import survey_json

            return print_json(survey_json(session.name, at.at or "main", found)) if options.json else None
        if codec in LOSSY and found.shared and not with_shared:
            dim("what is shared stays as it is; --shared takes it, too")
        if asks:
            click.confirm(f"Store {name} with loss?", abort=True, err=True)
        with interruptible() as stopped:
            recoding = session.recode(
                point, codec=codec, shared=with_shared, cancel=stopped.cancel, progress=bars.recoding
            )
            bars.stop()
    if recoding.done.damaged:
        warn(f"{recoding.done.damaged} chunks are damaged, and were left alone; kvloom warm {name} mends them")
    if options.json:
        print_json(recoding.to_json())
    else:
        _tell_after(name, recoding.done)
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)
    return None


def _tell_before(name: str, found: Survey, dry_run: bool) -> None:
    by_codec = ", ".join(f"{size(count)} {codec}" for codec, count in sorted(found.stored.items()))
    lines = [f"{name}: {size(found.raw)} of state in {len(found.segments)} segments, stored as {by_codec or 'nothing'}"]
    if found.others:
        lines.append(f"shared with {clean(_listed(found.others))}: {len(found.shared)} of them")
    if found.lossy:
        lines.append(f"not exact: {len(found.lossy)} of them")
    for line in lines:
        click.echo(line) if dry_run else dim(line)


def _listed(names: tuple[str, ...], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _tell_after(name: str, done: Recoded) -> None:
    times = f", {done.before / done.after:.2f} times smaller" if done.after < done.before else ""
    left = "; stopped: the same command goes on" if done.stopped else ""
    click.echo(f"{name}: {size(done.before)} before, {size(done.after)} after{times} ({done.chunks} chunks){left}")
