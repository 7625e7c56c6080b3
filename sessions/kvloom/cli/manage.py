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
@ref_argument("ref", metavar="[SESSION[@BRANCH]]", required=False)
@click.option("--erase", is_flag=True, help="For good: leave nothing of it in the file.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(options: Options, ref: str | None, erase: bool, yes: bool) -> None:
    """Delete SESSION: its turns, its branches, and the state no other session shares. It asks first.

    With @BRANCH, delete that branch, the turns that no other branch and no tag leads to, and all below them.

    With --erase nothing of the text, its tokens and its state stays in the file: edges that other paths share are cut
    short, the state of those that was computed over what goes is dropped (and computed anew when it is needed), and the
    file is written anew, which takes the room of a second one meanwhile. "kvloom rm --erase" alone does that last step,
    for what was deleted without it, or where it was stopped.

    \b
    Example:
      kvloom rm trip
      kvloom rm trip --yes
      kvloom rm trip@spain --erase
    """
    if ref is None and not erase:
        raise click.UsageError("name what to delete")
    with reading(options) as reader:
        if ref is None:
            reader.scrub()
            return print_json({"erased": True}) if options.json else click.echo("the file was written anew")
        at, _ = parse(ref)
        found = reader.find(at.session)
        if at.back or at.token is not None:
            raise click.UsageError(f"{ref} is not a branch; kvloom rm takes SESSION or SESSION@BRANCH")
        turns = len(found.tree()) if at.point is None else found.only_on(at.point)
        if not yes:
            if not sys.stdin.isatty() or options.json:
                raise click.UsageError(f"this deletes {turns} turns; say --yes if you mean it")
            click.confirm(f"Delete {clean(ref)} with its {turns} turns?", abort=True, err=True)
        if at.point is None:
            done = reader.remove(at.session, erase=erase)
        else:
            done = reader.remove_branch(at.session, at.point, erase=erase)
    if options.json:
        about = {"session": at.session, "branch": at.point, "turns": turns, "erased": erase}
        return print_json({**about, "state_dropped": done.dropped, "set_aside": done.set_aside})
    click.echo(f"{ref} is {'erased' if erase else 'deleted'} ({turns} turns)")
    if done.dropped:
        click.echo(
            f"{done.dropped} turns of others shared a beginning with it: their state is computed anew when needed"
        )
    if done.set_aside:
        click.echo(f"{done.set_aside} rows that a repair had set aside went with it")
    return None


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
