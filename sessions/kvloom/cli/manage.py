"""Commands that move names: fork, tag, rename, rm, config. None of them needs a model."""

from __future__ import annotations

import sys

import click

from kvloom.cli.common import Options, json_option, parse, pass_options, reading, ref_argument, shared
from kvloom.cli.terminal import print_json
from kvloom.shown import clean


@click.command()
@shared
@ref_argument()
@click.argument("branch", metavar="BRANCH")
def fork(options: Options, ref: str, branch: str) -> None:
    """Begin BRANCH at REF (default: the tip of main): one row, whatever the conversation's length.

    At a token inside a turn, it begins with that turn cut there; no state is copied.

    \b
    Example:
      kvloom fork trip@main~2 instead
      kvloom say trip@instead "Name a city in Spain."
      kvloom fork trip@main:90 again
      kvloom continue trip@again --temperature 1
    """
    at, point = parse(ref)
    with reading(options) as reader:
        session = reader.find(at.session)
        session.fork(branch, point)
        turns = session.log(branch)
    turn = turns[-1].id if turns else None
    if options.json:
        return print_json({"session": session.name, "branch": branch, "turn": turn, "turns": len(turns)})
    return click.echo(f"{session.name}@{branch} begins after {len(turns)} turns")


@click.command()
@shared
@ref_argument()
@click.argument("name", metavar="NAME")
def tag(options: Options, ref: str, name: str) -> None:
    """Give the turn at REF a NAME that stays there while branches move on.

    \b
    Example:
      kvloom tag trip@main~2 before-spain
      kvloom log trip@before-spain
    """
    at, point = parse(ref)
    with reading(options) as reader:
        session = reader.find(at.session)
        session.tag(name, point)
        turn = session.log(name)[-1].id
    if options.json:
        return print_json({"session": session.name, "tag": name, "turn": turn})
    return click.echo(f"{session.name}@{name} is turn {turn[:8]}")


@click.command()
@shared
@ref_argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
def rename(options: Options, old: str, new: str) -> None:
    """Rename session OLD to NEW.

    \b
    Example:
      kvloom rename chat-2025-01-31 trip
    """
    with reading(options) as reader:
        session = reader.find(old)
        session.rename(new)
    if options.json:
        return print_json({"session": new, "was": old})
    return click.echo(f"{old} is now {new}")


@click.command()
@shared
@ref_argument("session", metavar="SESSION")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(options: Options, session: str, yes: bool) -> None:
    """Delete SESSION: its turns, its branches, and the state no other session shares. It asks first.

    \b
    Example:
      kvloom rm trip
      kvloom rm trip --yes
    """
    with reading(options) as reader:
        found = reader.find(session)
        turns = len(found.tree())
        if not yes:
            if not sys.stdin.isatty() or options.json:
                raise click.UsageError(f"this deletes {turns} turns; say --yes if you mean it")
            click.confirm(f"Delete {clean(session)} with its {turns} turns?", abort=True, err=True)
        reader.remove(session)
    if options.json:
        return print_json({"session": session, "turns": turns})
    return click.echo(f"{session} is deleted ({turns} turns)")


@click.command()
@json_option
@pass_options
@click.argument("key", metavar="[KEY", required=False)
@click.argument("value", metavar="[VALUE]]", required=False)
@click.option("--unset", is_flag=True, help="Go back to the default of KEY.")
def config(options: Options, key: str | None, value: str | None, unset: bool) -> None:
    """Show your defaults, or set one: model, dtype (auto, float32, bfloat16), device (auto, cpu, cuda, mps),
    codec (raw, lz4, zstd, auto), keyframe_spacing (tokens).

    A session keeps the model it began with; KVLOOM_MODEL goes before the config file.

    \b
    Example:
      kvloom config
      kvloom config model ~/models/smollm2
      kvloom config dtype --unset
    """
    from kvloom import config as stored

    if key is not None and key not in stored.DEFAULTS:
        raise click.UsageError(f"there is no setting {key!r}; there are {', '.join(stored.DEFAULTS)}")
    if unset and (key is None or value is not None):
        raise click.UsageError("--unset takes one KEY and no VALUE")
    if key is not None and (unset or value is not None):
        stored.put(key, value)
    chosen = stored.load()
    values = {name: getattr(chosen, name) for name in stored.DEFAULTS}
    shown = {key: values[key]} if key is not None else values
    if options.json:
        return print_json({"path": str(stored.path()), "values": shown})
    if key is not None and value is None and not unset:
        return click.echo(clean(values[key]))
    for name in shown:
        click.echo(f"{name} = {clean(values[name])}")
    return None
