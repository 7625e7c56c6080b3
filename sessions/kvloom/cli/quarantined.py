"""``kvloom fsck --quarantined``: what repairs have set aside, and deleting it."""

from __future__ import annotations

import click

from kvloom.cli.common import Options, reading
from kvloom.cli.terminal import dim, print_json, stdin_is_terminal
from kvloom.shown import clean

SHOWN = 200
"""Characters of a text that are printed."""


def show(options: Options, *, forget: bool, yes: bool) -> None:
    """List what was set aside; ``forget`` deletes it, after asking unless ``yes``."""
    from kvloom.errors import SessionError
    from kvloom_store.fsck import quarantine

    with reading(options) as reader:
        with reader.database.read() as conn:
            found = quarantine.listed(conn)
        if not options.json:
            for each in found:
                click.echo(f"{each.when}  {each.table} {clean(str(each.cells.get('id', '')))}: {clean(each.why)}")
                if each.text is not None:
                    click.echo(f"    {clean(each.text[:SHOWN])}")
            click.echo(f"{len(found):,} rows were set aside" if found else "nothing was set aside")
        gone = 0
        if forget and found:
            if not yes and (options.json or not stdin_is_terminal()):
                raise SessionError("this deletes what was set aside", hint="--yes does it without asking")
            if not yes:
                click.confirm("Delete them?", abort=True, err=True)
            gone = quarantine.forget(reader.database)
        if options.json:
            print_json({"set_aside": [each.to_json() for each in found], "deleted": gone})
        elif gone:
            click.echo(f"{gone:,} rows were deleted")
        elif found:
            dim("--json prints them whole; --forget deletes them")
