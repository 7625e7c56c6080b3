"""``kvloom explore``: search continuations of a point, and see which is worth going on with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, parse, ref_argument, shared
from kvloom.cli.opening import model_options, new_session_options, talking
from kvloom.cli.talk import choosing_options, interruptible, read_text, sampling
from kvloom.cli.terminal import dim, print_json, warn
from kvloom.shown import clean, preview, seconds

if TYPE_CHECKING:
    from kvloom.explore.search import Event, Found, Search
    from kvloom.session import Session

STRATEGIES = ["tree", "best-first", "best-of", "beam"]

SETTINGS = (
    "strategy",
    "width",
    "keep",
    "depth",
    "step_tokens",
    "step_stop",
    "score",
    "judge",
    "budget_tokens",
    "batch",
)


@click.command()
@shared
@ref_argument()
@click.option("--prompt", metavar="TEXT|-", help="Say this first, on a branch of the search's name.")
@click.option(
    "--strategy", type=click.Choice(["tree", "best-first", "best-of", "beam"]), help="How to search (default tree)."
)
@click.option("--width", type=int, metavar="N", help="Continuations of each path that goes on (default 4).")
@click.option("--keep", type=int, metavar="N", help="How many paths go on: of a level, or at a time (default 4).")
@click.option("--depth", type=int, metavar="N", help="Steps at most (default 4).")
@click.option("--step-tokens", type=int, metavar="N", help="Tokens of a step at most (default 32).")
@click.option("--step-stop", multiple=True, metavar="TEXT", help=r"End a step at TEXT, and go on after it. Repeatable.")
@click.option("--score", metavar="HOW", help="What a path is worth (default length-normalised); see above.")
@click.option("--judge", metavar="MODEL", help="The model that judges (default: the session's own).")
@click.option("--budget-tokens", type=int, metavar="N", help="Begin no round that could compute more tokens in all.")
@click.option("--batch", type=int, metavar="N", help="Paths decoded together at most (default 16).")
@click.option("--name", default="explore", metavar="NAME", help="What the search and its branches are called.")
@click.option("--resume", is_flag=True, help="Go on with the search of that name; begin it if there is none.")
@click.option("--accept", metavar="BRANCH", help="Afterwards move BRANCH to the best path.")
@click.option("--prune", is_flag=True, help="Afterwards delete the branches that do not lead to the best path.")
@new_session_options
@model_options
@choosing_options
def explore(options: Options, ref: str, prompt: str | None, **values: Any) -> None:
    """Search continuations of REF: the replies to its last message, or what could follow a stopped reply.

    Every path is a branch (explore/1, its continuations explore/1.1 ...) with its score: look at them with log, diff
    and tree, go on with them as with any other. Killed at any point, it is taken up again with --resume and ends in
    the same tree; Ctrl-C stops it between two tokens.

    \b
    --strategy tree        level by level, of each the best --keep go on
               best-first  always the best --keep that are open
               best-of     --width replies of one step (give --step-tokens)
               beam        the likeliest replies, --width beams token by token
    --score    length-normalised, logprob  what the model itself thought
               self-consistency            how many others answer the same
               judge                       a model rates each (--judge MODEL)
               python:MODULE:FUNCTION      your own function of the text

    \b
    Example:
      kvloom explore puzzle --prompt "17 * 24 = ?" --step-stop "." --depth 6
      kvloom explore puzzle --resume --accept main --prune
    """
    settings = _settings(values)
    resume, name, accept, prune = (values.pop(each) for each in ("resume", "name", "accept", "prune"))
    said = None if prompt is None else read_text(prompt)
    session, at = parse(ref)
    with talking(options, session.session, create=said is not None, **values) as talk, interruptible() as stopped:
        search = talk.session.explore(
            at, prompt=said, name=name, resume=resume, cancel=stopped.cancel, told=talk.progress.chosen, **settings
        )
        for event in search:
            if event.kind == "made":
                talk.progress.doing = _doing(event)
        talk.progress.stop()
        done = _conclude(talk.session, search, accept, prune)
        _show(options, talk.session, search.result, done)
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)


def _doing(event: Event) -> str:
    """What is shown while a search goes on, besides tokens a second."""
    tokens, depth = event.tokens, max(node.depth for node in event.nodes)
    return f"depth {depth}, {event.frontier} paths, reused {tokens.reused:,}, computed {tokens.computed:,}"


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, taken out of a command's options and checked before anything is opened."""
    from kvloom.explore.plan import ExploreSettings

    given = {name: values.pop(name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    ExploreSettings(**given)
    return {**given, **sampling(values)}


def _conclude(session: Session, search: Search, accept: str | None, prune: bool) -> dict[str, Any]:
    """Accept and prune, if the search is over and that was asked for; what was done."""
    found, done = search.result, dict[str, Any](accepted=None, deleted=[])
    if found.finished and found.best is not None:
        if accept:
            search.accept(accept)
            done["accepted"] = accept
        if prune:
            done["deleted"] = search.prune()
    return done


def _show(options: Options, session: Session, found: Found, done: dict[str, Any]) -> None:
    for notice in found.notices:
        warn(notice)
    if options.json:
        told = asdict(found)
        return print_json({"session": session.name, **told, **done})
    name = clean(session.name)
    for node in sorted(found.nodes, key=lambda node: [int(part) for part in node.branch.rpartition("/")[2].split(".")]):
        mark = "*" if node.branch in found.path else " "
        score = "" if node.score is None else f"{node.score:8.3f}"
        ends = "" if node.status == "open" else f" ({node.status})"
        click.echo(f"{mark} {'  ' * (node.depth - 1)}{node.branch} {score}  {node.tokens} tokens{ends}")
    if found.best is not None:
        click.echo()
        click.echo(clean(found.text))
        dim(f"best: {name}@{found.best.branch} · {preview(found.reason)}")
    tokens = found.tokens
    parts = [f"{len(found.nodes)} nodes", f"reused {tokens.reused}, computed {tokens.computed}", seconds(found.seconds)]
    if not found.finished:
        parts.insert(0, "stopped; the same command with --resume goes on")
    if done["accepted"]:
        parts.append(f"{done['accepted']} is at {found.best.branch if found.best else ''} now")
    if done["deleted"]:
        parts.append(f"{len(done['deleted'])} branches deleted")
    return dim(" · ".join(parts))
