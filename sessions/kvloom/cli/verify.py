"""``kvloom verify``: a receipt that stored state is what was written, and, with --replay, what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.opening import model_options, use, with_model
from kvloom.cli.talk import interruptible
from kvloom.cli.terminal import print_facts, print_json, size
from kvloom.shown import clean

if TYPE_CHECKING:
    from kvloom.verify import Difference, Receipt

DAMAGED = 10
"""The exit code where something is not as it was written."""


@click.command()
@shared
@ref_argument()
@click.option("--replay", is_flag=True, help="Run all its recorded passes again, and compare every row.")
@model_options
def verify(options: Options, ref: str, replay: bool, model: str | None, dtype: str | None) -> None:
    """Print a receipt for REF: of its path, all stored state is read back and held against the checksums it was
    written with. With --replay the model computes it again from the first token on, pass by pass as it was recorded,
    and every row is compared: it is identical, or the receipt says from which token on, in which layer and by how much
    it differs (on another processor or build of torch, roundings differ).

    Of a session that several models read, it is the state of its own that is verified, or that of --model.

    The exit code is 0 only if all of it is there, sound and, with --replay, identical; else 10.

    \b
    Example:
      kvloom verify trip
      kvloom verify trip@main~2 --replay
      kvloom verify trip:90 --json
    """
    name, at = parse(ref)
    if replay:
        with (
            with_model(options, name.session, model=model, dtype=dtype, add=False) as (session, bars),
            interruptible() as stopped,
        ):
            from kvloom.engine import Cancelled

            try:
                receipt = session.verify(at, replay=True, cancel=stopped.cancel, progress=bars.passes)
            except Cancelled:
                raise click.exceptions.Exit(128 + (stopped.signal or 2)) from None
    else:
        with reading(options) as reader:
            found = reader.find(name.session)
            use(found, model, dtype)
            receipt = found.verify(at)
    if options.json:
        print_json(receipt.to_json())
    else:
        print_facts(list(_facts(receipt)))
    if not receipt.ok:
        raise click.exceptions.Exit(DAMAGED)


def _facts(receipt: Receipt) -> Iterator[tuple[str, object]]:
    yield "point", f"{receipt.session}@{receipt.at}" + (f", turn {receipt.turn[:8]}" if receipt.turn else "")
    pending = f", {receipt.pending:,} not run yet" if receipt.pending else ""
    yield "tokens", f"{receipt.tokens:,} in {receipt.turns:,} turns{pending}"
    if receipt.model:
        yield "model", f"{clean(receipt.model)} {receipt.dtype or ''} ({(receipt.digest or '')[:16]})"
    for each in receipt.provenances:
        yield (
            "computed on",
            f"{each.engine}, torch {each.torch}, transformers {each.transformers}, {each.device} {each.cpu_capability},"
            f" {each.attention}, {each.threads} thread{'s' * (each.threads != 1)}",
        )
    yield "held", f"{receipt.held:,} tokens in {receipt.segments:,} segments"
    yield "read back", f"{size(receipt.bytes)}, {'as written' if not receipt.damaged else 'DAMAGED'}"
    for words in receipt.damaged:
        yield "damaged", words
    if receipt.damaged:
        yield "", "kvloom fsck --repair computes it again; so does going on with the conversation"
    if receipt.unwritten:
        yield "unwritten", f"{receipt.unwritten:,} tokens; kvloom warm computes and stores their state"
    if receipt.replayed is not None:
        yield "replayed", f"{receipt.replayed:,} tokens, {_compared(receipt.difference)}"
    yield "receipt", "all is well" if receipt.ok else "not all is well"


def _compared(found: Difference | None) -> str:
    if found is None:
        return "identical bit for bit"
    return (
        f"different from token {found.token:,} on (layer {found.layer}, {found.tensor}),"
        f" {found.tokens:,} tokens in all, by {found.largest:.3g} at most"
    )
