"""``kvloom tree``: the conversation as a drawing that grows to the right only where it branches.

The longest way down from a turn stays in its column; the others hang off it, one step to the right. A branch
drawn aside holds at most half of the turns below its turn, so a tree of n turns is at most log2(n) steps wide.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared, short_ids
from kvloom.cli.show import labels, turn_json
from kvloom.cli.terminal import clean, preview, print_json, role_style

if TYPE_CHECKING:
    from kvloom.session import TreeTurn

UNICODE = ("●", "│ ", "├─", "…")
ASCII = ("*", "| ", "+-", "~")
LEAST_TEXT = 8
"""Columns below which the first words of a turn are left out."""


@click.command(short_help="Draw a session as a tree.")
@shared
@ref_argument("session", metavar="SESSION")
def tree(options: Options, session: str) -> None:
    """Draw SESSION as a tree: each turn's id, role, branches [in brackets], #tags and first words.

    \b
    Example:
      kvloom tree trip
    """
    with reading(options) as reader:
        found = reader.find(parse(session)[0].session)
        turns = found.tree()
        with reader.database.read() as conn:
            short = short_ids(conn, found.row.row)
    if options.json:
        turns_json = [turn_json(turn) for turn in turns]
        return print_json({"session": found.name, "branch": None, "turns": turns_json})
    empty = [branch.name for branch in found.branches() if not any(branch.name in turn.branches for turn in turns)]
    return print_tree(found.name, turns, short, empty)


def print_tree(
    name: str,
    turns: Sequence[TreeTurn],
    short: Callable[[str | None], str],
    empty: Sequence[str] = (),
    current: str | None = None,
) -> None:
    """Draw turns on stdout; ``empty`` are branches at the very beginning, ``current`` the one to mark."""
    width = shutil.get_terminal_size().columns
    signs = UNICODE if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII
    head = click.style(clean(name), bold=True)
    lines = [" ".join([head, *(click.style(f"[{branch}]", fg="yellow", bold=True) for branch in empty)])]
    for turn, columns in layout(turns):
        lines.append(_line(turn, columns, short(turn.id), signs, width, current))
    click.echo("\n".join(lines))


def layout(turns: Sequence[TreeTurn]) -> Iterator[tuple[TreeTurn, tuple[int, bool]]]:
    """The turns in the order of their lines, each with (steps to the right, whether it hangs off the line above)."""
    children: dict[str | None, list[TreeTurn]] = {}
    below: dict[str, int] = {}
    for turn in turns:
        children.setdefault(turn.parent, []).append(turn)
    for turn in reversed(turns):
        below[turn.id] = 1 + sum(below[child.id] for child in children.get(turn.id, ()))
    waiting: list[tuple[TreeTurn, int, bool]] = _placed(children.get(None, []), below, 0)
    while waiting:
        turn, depth, aside = waiting.pop()
        yield turn, (depth, aside)
        waiting += _placed(children.get(turn.id, []), below, depth)


def _placed(turns: list[TreeTurn], below: dict[str, int], depth: int) -> list[tuple[TreeTurn, int, bool]]:
    """Siblings as a stack: the last one is drawn first, the first one stays in the column."""
    if not turns:
        return []
    trunk = max(turns, key=lambda turn: below[turn.id])
    aside = [(turn, depth + 1, True) for turn in reversed(turns) if turn is not trunk]
    return [(trunk, depth, False), *aside]


def _line(
    turn: TreeTurn,
    columns: tuple[int, bool],
    short: str,
    signs: tuple[str, str, str, str],
    width: int,
    current: str | None,
) -> str:
    from rich.cells import cell_len, set_cell_size

    dot, bar, hook, more = signs
    depth, aside = columns
    rails, colour = bar * (depth - aside) + (hook if aside else ""), role_style(turn.role)
    notes = [clean(note) for note in labels(turn)]
    room = width - cell_len(" ".join([f"{rails}{dot}", short, turn.role, *notes])) - 2
    parts = [click.style(rails, dim=True) + click.style(dot, fg=colour), click.style(short, dim=True)]
    parts += [click.style(clean(turn.role), fg=colour), *(_styled_note(note, current) for note in notes)]
    text = preview(turn.text) if room >= LEAST_TEXT else ""
    if text:
        fits = cell_len(text) <= room
        parts.append(" " + (text if fits else set_cell_size(text, room - 1).rstrip() + more))
    return " ".join(parts)


def _styled_note(note: str, current: str | None) -> str:
    if note == f"[{current}]":
        return click.style(note, bold=True, reverse=True)
    return click.style(note, fg="yellow", bold=True) if note[0] in "[#" else click.style(note, dim=True)
