"""What reaches the terminal: text that is only text, one JSON object, dim lines, warnings."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from kvloom.shown import clean, role_style

_UNSAFE_JSON = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def print_json(value: Any) -> None:
    """The one object ``--json`` puts on stdout."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    click.echo(_UNSAFE_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Names and what they are, one a line; those that are nothing are left out."""
    for name, value in facts:
        if value:
            click.echo(f"{click.style(f'{name:<11} ', dim=True)}{clean(str(value))}")


def dim(text: str) -> None:
    """A remark: on stderr, dim where that is a terminal."""
    click.echo(click.style(clean(text), dim=True), err=True)


def warn(text: str) -> None:
    """A warning, in one line on stderr."""
    click.echo(f"{click.style('warning:', fg='yellow')} {clean(text)}", err=True)


def styled_role(role: str) -> str:
    """A role in its colour."""
    return click.style(clean(role), fg=role_style(role), bold=True)


def iso_time(us: int) -> str:
    """A moment as programs read it."""
    return datetime.fromtimestamp(us / 1e6, UTC).isoformat(timespec="seconds")


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def stdin_is_terminal() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


def stdout_is_terminal() -> bool:
    """Whether what is printed is read by a person, now."""
    return sys.stdout.isatty()


def wants_color() -> bool | None:
    """What click's ``color`` is set to: False where the user asked for none, None to look at the stream."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def never_fail_to_print() -> None:
    """Have characters that the locale cannot show replaced: a reply must not end in an encoding error.

    A stream that was closed before we began is one nobody reads.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open as long as we run)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def columns(rows: list[list[str]], header: list[str]) -> None:
    """A plain table: as wide as its cells, the last column cut at the terminal's edge."""
    from rich.cells import cell_len, set_cell_size

    widths = [max(cell_len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    room = shutil.get_terminal_size().columns
    for number, row in enumerate([header, *rows]):
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row[:-1], widths, strict=False)]
        left = max(room - sum(widths[:-1]) - 2 * len(cells), 8)
        last = row[-1] if cell_len(row[-1]) <= left else set_cell_size(row[-1], left - 1) + "…"
        line = "  ".join([*cells, last]).rstrip()
        click.echo(click.style(line, dim=True) if number == 0 else line)
