"""``kvloom diff``: where two branches part, and the two sides beside each other."""

from __future__ import annotations

import itertools
import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, reading, ref_argument, shared
from kvloom.cli.scores import percent
from kvloom.cli.show import turn_json
from kvloom.cli.terminal import print_facts, print_json, stdout_is_terminal, wants_color
from kvloom.shown import clean, labels, role_style

if TYPE_CHECKING:
    from rich.text import Text

    from kvloom.diff import Diff, Side
    from kvloom.listing import TreeTurn

LEAST_COLUMNS = 60
"""Of a terminal that is narrower, two sides are shown below each other."""


@click.command()
@shared
@ref_argument("a", metavar="A")
@ref_argument("b", metavar="B")
@click.option("--plain", is_flag=True, help="Below each other, as where stdout is no terminal.")
def diff(options: Options, a: str, b: str, plain: bool) -> None:
    """Show where the paths to A and B part (the turn, the token, the text around it), then what each says from there.

    A and B are refs, to tokens too, of one session or of two.

    \b
    Example:
      kvloom diff trip trip@spain
      kvloom diff trip@main~2 trip:90 --plain
      kvloom diff trip other --json
    """
    with reading(options) as reader:
        found = reader.diff(a, b)
    if options.json:
        return print_json(_json(found))
    if found.same:
        return click.echo(f"{clean(a)} and {clean(b)} are the same: {_shared(found)}")
    print_facts(parting(found))
    width = shutil.get_terminal_size().columns
    if plain or not stdout_is_terminal() or width < LEAST_COLUMNS:
        return _print_below(found)
    return _print_beside(found, width)


def _json(found: Diff) -> dict[str, Any]:
    def side(each: Side) -> dict[str, Any]:
        told = {name: getattr(each, name) for name in ("ref", "tokens", "token", "text", "logprob", "other_logprob")}
        return {**told, "turns": [turn_json(turn) for turn in each.turns]}

    rest = {name: getattr(found, name) for name in ("same", "shared", "position", "character", "before")}
    return {**rest, "a": side(found.a), "b": side(found.b)}


def parting(found: Diff) -> list[tuple[str, object]]:
    """What is told of the point itself: what both share, and what each has there."""
    return [
        ("shared", _shared(found)),
        ("after", repr(found.before) if found.before else "the end of a turn" if found.shared else "nothing"),
        *((f"{name} goes on", _there(side)) for name, side in (("A", found.a), ("B", found.b))),
    ]


def _shared(found: Diff) -> str:
    parts = [f"{found.shared} turns" if found.shared != 1 else "1 turn"]
    if found.position is not None:
        parts.append(f"{found.position} tokens")
    return ", ".join(parts)


def _there(side: Side) -> str:
    if not side.turns or not side.text:
        return "it ends there"
    turn = side.turns[0]
    token = f"token {side.token} {_chances(side)}" if side.token is not None else ""
    return f"{token}{side.text!r} in turn {turn.id[:8]} ({turn.role})"


def _chances(side: Side) -> str:
    """What the model thought of the token, and of the other side's; "" where none generated it."""
    if side.logprob is None:
        return ""
    other = f", the other's {percent(side.other_logprob)}" if side.other_logprob is not None else ""
    return f"(the model gave it {percent(side.logprob)}{other}) "


def _print_below(found: Diff) -> None:
    for name, side in (("A", found.a), ("B", found.b)):
        click.echo()
        click.echo(click.style(f"{name}  {clean(side.ref)}", bold=True))
        for turn in side.turns:
            click.echo(f"{click.style(_head(turn), fg=role_style(turn.role))}\n{clean(turn.text)}")


def _print_beside(found: Diff, width: int) -> None:
    """The turns of both sides in two columns, those at the same place in one row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0), width=width, show_edge=False, header_style="bold")
    for name, side in (("A", found.a), ("B", found.b)):
        table.add_column(f"{name}  {clean(side.ref)}", ratio=1, overflow="fold")
    for number, pair in enumerate(itertools.zip_longest(found.a.turns, found.b.turns)):
        table.add_row(*(_cell(turn, found.character if number == 0 else None) for turn in pair))
    click.echo()
    Console(file=sys.stdout, width=width, no_color=wants_color() is False, highlight=False).print(table)


def _cell(turn: TreeTurn | None, character: int | None) -> Text:
    """One turn, the part that the other side has not in bold."""
    from rich.text import Text

    if turn is None:
        return Text("")
    text = Text(f"{_head(turn)}\n", style=role_style(turn.role))
    at = len(clean(turn.text[:character])) if character is not None else len(turn.text)
    shown = clean(turn.text)
    return text.append(shown[:at], style="default").append(shown[at:], style="bold default")


def _head(turn: TreeTurn) -> str:
    return " ".join([clean(turn.role), turn.id[:8], *(clean(note) for note in labels(turn))])
