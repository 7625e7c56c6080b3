"""``kvloom cost``: what a session has cost so far, and what it would have cost elsewhere. It needs no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.terminal import print_facts, print_json
from kvloom.shown import seconds

if TYPE_CHECKING:
    from kvloom.cost import SessionCost


@click.command()
@shared
@ref_argument("session", metavar="SESSION")
@click.option("--price-input", type=click.FloatRange(0), metavar="USD", default=3.00, help="Default 3.00.")
@click.option("--price-cached", type=click.FloatRange(0), metavar="USD", default=0.30, help="Default 0.30.")
@click.option("--price-output", type=click.FloatRange(0), metavar="USD", default=15.00, help="Default 15.00.")
def cost(options: Options, session: str, price_input: float, price_cached: float, price_output: float) -> None:
    """Count the tokens that all turns of SESSION have reused and computed, what reuse saved on this machine, and what a
    hosted model would have charged for the same replies, without and with cached prompts.

    Seconds are reckoned with the speed of prefill that this store's turns have timed, under the same model. Prices
    are US dollars a million tokens; the defaults are a typical mid-size hosted model's as of November 2026. Whatever
    an earlier request had sent counts as cached: as if a cache never forgot.

    \b
    Example:
      kvloom cost trip
      kvloom cost trip --price-input 1 --price-cached 0.1 --price-output 5 --json
    """
    from kvloom.cost import Prices
    from kvloom.cost import cost as count

    with reading(options) as reader:
        found = count(reader.find(parse(session)[0].session), Prices(price_input, price_cached, price_output))
    if options.json:
        return print_json({"session": parse(session)[0].session, **found.to_json()})
    return _print(found)


def _print(found: SessionCost) -> None:
    tokens, hosted, prices = found.tokens, found.hosted, found.prices
    counted = f"reused {tokens.reused:,}, replayed {tokens.replayed:,}, computed {tokens.computed:,}"
    facts: list[tuple[str, object]] = [("tokens", f"{counted}, generated {tokens.generated:,}")]
    if found.unrecorded:
        facts.append(("", f"turns that keep no such figures, and are not counted: {found.unrecorded:,}"))
    facts += [
        ("saved", _saved(found)),
        (
            "hosted",
            f"${hosted.charged_uncached:.4f} without caching, ${hosted.charged_cached:.4f} with:"
            f" {hosted.requests:,} request{'s' * (hosted.requests != 1)},"
            f" {hosted.input:,} tokens in ({hosted.cached:,} cached), {hosted.output:,} out",
        ),
        ("prices", f"${prices.input:.2f}, cached ${prices.cached:.2f}, output ${prices.output:.2f} a million tokens"),
    ]
    print_facts(facts)


def _saved(found: SessionCost) -> str:
    speed = found.speed
    if found.seconds_saved is None:
        return "unknown: no prefill was timed under this model yet"
    of = f" of {speed.at_least} tokens or more" if speed.at_least > 1 else ", all of them short"
    measured = f"as measured in {speed.measurements} prefill{'s' if speed.measurements > 1 else ''}{of}"
    return f"{seconds(found.seconds_saved)} on this machine, at {speed.tokens_per_second:,.0f} tokens/s ({measured})"
