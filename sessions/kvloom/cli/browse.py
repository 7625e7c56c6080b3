"""``kvloom browse``: the tree in the terminal, to walk about in and to talk in."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, parse, pass_options, reading, ref_argument, store_option, warn_of_network_drive
from kvloom.cli.opening import close, model_options, open_loom
from kvloom.cli.talk import sampling, sampling_options

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom.quiet import Progress

LEAST = (60, 12)
"""Columns and rows below which there is no room for two panes."""


@click.command()
@store_option
@pass_options
@ref_argument(metavar="[SESSION[@REF]]", required=False)
@model_options
@sampling_options
def browse(options: Options, /, ref: str | None, model: str | None, dtype: str | None, **values: Any) -> None:
    """Walk about the tree of SESSION in the terminal: the turns on the left, the path to the cursor on the right.

    Arrows or hjkl walk, s says something at the cursor (on a new branch where none ends), ? shows every key.
    Without SESSION it begins with a list of them. The model is loaded when something is said first.

    \b
    Example:
      kvloom browse
      kvloom browse trip@spain --temperature 0.7
    """
    settings = sampling(values)
    _check_terminal()
    session, at = _point(options, ref)
    warn_of_network_drive(options.path)

    def opened(known: Mapping[str, Any], progress: Progress) -> KVLoom:
        return open_loom(options, known, model, dtype, progress, must_exist=True)

    gc.enable()
    from kvloom.browse.app import Browser, run

    browser = Browser(opened, session, at, sampling=settings)
    try:
        signal = run(browser)
    finally:
        for loom in browser.looms:
            close(loom)
    if signal:
        raise click.exceptions.Exit(128 + signal)


def _check_terminal() -> None:
    """Refuse where there is nothing to draw on. Raises UsageError."""
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)) or os.environ.get("TERM") == "dumb":
        raise click.UsageError("browse draws on a terminal, and this is none; kvloom tree and kvloom log print text")
    columns, rows = os.get_terminal_size(sys.stdout.fileno())  # as it is, whatever COLUMNS and LINES say
    if columns < LEAST[0] or rows < LEAST[1]:
        raise click.UsageError(
            f"browse needs {LEAST[0]} columns and {LEAST[1]} rows, and this terminal has {columns} and {rows};"
            " make it larger"
        )


def _point(options: Options, ref: str | None) -> tuple[str | None, str | None]:
    """The session and the turn to begin at. Raises StoreUnavailable and RefNotFound, before anything is drawn."""
    with reading(options) as reader:
        if ref is None:
            return None, None
        at, point = parse(ref)
        session = reader.find(at.session)
        path = session.log(point) if point is not None else []
        return session.name, path[-1].id if path else None
