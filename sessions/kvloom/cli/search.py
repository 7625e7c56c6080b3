"""``kvloom search``: what was said, wherever it was said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, complete_ref, reading, shared
from kvloom.cli.terminal import dim, iso_time, print_json, stdout_is_terminal, styled_role, warn
from kvloom.shown import clean, local_time

if TYPE_CHECKING:
    from kvloom_store.search import Hit


@click.command()
@shared
@click.argument("text", metavar="TEXT", nargs=-1, required=True)
@click.option("--session", metavar="SESSION", shell_complete=complete_ref, help="Only in this session.")
@click.option("--role", metavar="ROLE", help="Only what this role said: user, assistant, system.")
@click.option("--limit", type=click.IntRange(1), default=20, metavar="N", help="At most N turns (default 20).")
@click.option("--newest", is_flag=True, help="The newest first, instead of the best.")
@click.option("--raw", is_flag=True, help="TEXT is a query in the syntax of SQLite's FTS5.")
@click.option("--rebuild", is_flag=True, help="Build the index anew first.")
def search(
    options: Options,
    text: tuple[str, ...],
    session: str | None,
    role: str | None,
    limit: int,
    newest: bool,
    raw: bool,
    rebuild: bool,
) -> None:
    """Find the turns that hold all words of TEXT, in any order; with "quotation marks" inside it, in that one.

    Case and accents make no difference. Each hit begins with the ref that names it.

    \b
    Example:
      kvloom search florence
      kvloom search '"three cities" Italy' --role user --newest
      kvloom search --raw 'flor* NOT venice' --json
    """
    with reading(options) as reader:
        found = reader.search(
            " ".join(text), session=session, role=role, limit=limit, newest=newest, raw=raw, rebuild=rebuild
        )
    if found.damaged:
        warn(f"{found.damaged} turns that may match are damaged and were left out")
    if options.json:
        return print_json({"hits": [_json(hit) for hit in found.hits], "damaged": found.damaged})
    for hit in found.hits:
        _print(hit)
    return None if found.hits else dim("nothing was found")


def _json(hit: Hit) -> dict[str, object]:
    return {**{name: getattr(hit, name) for name in hit.__slots__}, "created": iso_time(hit.created)}


def _print(hit: Hit) -> None:
    """Two lines: which turn, and the part around the match, marked."""
    when = click.style(local_time(hit.created), dim=True)
    click.echo(f"{click.style(clean(hit.ref), bold=True)}  {styled_role(hit.role)}  {when}")
    colour, parts, at = stdout_is_terminal(), [], 0
    for start, end in hit.marks:
        match = clean(hit.snippet[start:end])
        parts += [clean(hit.snippet[at:start]), click.style(match, fg="yellow", bold=True) if colour else f"[{match}]"]
        at = end
    shown = "".join([*parts, clean(hit.snippet[at:])])
    click.echo(f"  {' '.join(shown.split())}")
