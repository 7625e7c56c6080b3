"""``kvloom tree``: the conversation as a drawing in the terminal, as a picture, as a page."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.show import turn_json
from kvloom.cli.terminal import dim, print_json
from kvloom.picture.layout import Place, layout
from kvloom.shown import clean, labels, preview, role_style, short_ids

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn

UNICODE = ("●", "│ ", "├─", "…")
ASCII = ("*", "| ", "+-", "~")
LEAST_TEXT = 8
"""Columns below which the first words of a turn are left out."""


@click.command()
@shared
@ref_argument("session", metavar="SESSION")
@click.option("--svg", metavar="FILE", help="Write it as a picture instead (- is stdout).")
@click.option("--html", metavar="FILE", help="Write it as a page that folds and searches instead (- is stdout).")
def tree(options: Options, session: str, svg: str | None, html: str | None) -> None:
    """Draw SESSION as a tree: each turn's id, role, branches [in brackets], #tags and first words.

    The picture and the page are whole files: they ask for nothing from outside and hold nothing that runs but the
    page's own script. The page holds all text; what is said in it is as private as the file.

    \b
    Example:
      kvloom tree trip
      kvloom tree trip --svg trip.svg --html trip.html
    """
    if (svg is not None and svg == html) or ("-" in (svg, html) and options.json):
        raise click.UsageError("the picture, the page and --json each need a place of their own")
    with reading(options) as reader:
        found = reader.find(parse(session)[0].session)
        turns = found.tree()
        branches = found.branches()
        with reader.database.read() as conn:
            short = short_ids(conn, found.row.row)
    tips = {name for turn in turns for name in turn.branches}
    empty = [branch.name for branch in branches if branch.name not in tips]
    if svg is not None or html is not None:
        return _write_pictures(options, found.name, turns, short, empty, {"svg": svg, "html": html})
    if options.json:
        turns_json = [turn_json(turn) for turn in turns]
        return print_json({"session": found.name, "branch": None, "turns": turns_json})
    return print_tree(found.name, turns, short, empty)


def _write_pictures(
    options: Options,
    name: str,
    turns: Sequence[TreeTurn],
    short: Callable[[str | None], str],
    empty: Sequence[str],
    files: dict[str, str | None],
) -> None:
    from kvloom.picture.page import page
    from kvloom.picture.svg import svg

    wanted = {kind: file for kind, file in files.items() if file is not None}
    for kind, file in wanted.items():
        data = (svg if kind == "svg" else page)(name, turns, short, empty).encode()
        if file == "-":
            click.echo(data, nl=False)
        else:
            Path(file).write_bytes(data)
    if options.json:
        return print_json({"session": name, "turns": len(turns), **wanted})
    for file in wanted.values():
        if file != "-":
            dim(f"{file}: {len(turns)} turns of {name}")
    return None


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
    for place in layout(turns):
        lines.append(_line(place, short(place.node.id), signs, width, current))
    click.echo("\n".join(lines))


def _line(
    place: Place[TreeTurn],
    short: str,
    signs: tuple[str, str, str, str],
    width: int,
    current: str | None,
) -> str:
    from rich.cells import cell_len, set_cell_size

    dot, bar, hook, more = signs
    turn = place.node
    rails, colour = bar * (place.column - place.aside) + (hook if place.aside else ""), role_style(turn.role)
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
