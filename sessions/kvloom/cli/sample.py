"""``kvloom sample``: several replies to one message at once, sampled or found by beam search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, ref_argument, shared
from kvloom.cli.opening import Talk, model_options, new_session_options, talking
from kvloom.cli.talk import interruptible, read_text, sampling, sampling_options
from kvloom.cli.terminal import columns, dim, print_json, warn
from kvloom.shown import preview

if TYPE_CHECKING:
    from kvloom.sample import Sample, SampleRun

SIBLINGS = 8
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


@click.command()
@shared
@ref_argument()
@click.argument("text", metavar="[TEXT|-]", required=False)
@click.option("-n", "count", type=int, metavar="N", help=f"How many replies to sample (default {SIBLINGS}).")
@click.option("--beam", type=int, metavar="K", help="Sample nothing: find the K likeliest replies by beam search.")
@click.option("--length-penalty", type=float, metavar="X", help="Of --beam: above 0 favours long replies (default 1).")
@click.option(
    "--early-stopping",
    type=click.Choice(list(EARLY_STOPPING)),
    help="Of --beam: stop at K ended replies (true, default), when better ones are unlikely (false), or ruled out.",
)
@click.option("--accept", is_flag=True, help="Move the branch to the best reply.")
@new_session_options
@model_options
@sampling_options
def sample(options: Options, ref: str, text: str | None, count: int | None, accept: bool, **values: Any) -> None:
    """Get several replies to TEXT at REF at once, decoded together, each on a new branch; best first. "-" reads TEXT
    from stdin. Without TEXT they are other replies to the last message, or go on with one that was stopped.

    They are sampled with temperature 1 unless you give another, and scored by their mean log-probability a token.
    With --beam they are those that beam search finds likeliest, as transformers defines it, scored by their
    log-probability over their length to the power of --length-penalty. The branch stays at the message, unless you
    --accept the best. Ctrl-C stops them all; what was said is kept.

    \b
    Example:
      kvloom sample trip "Name a city in Italy." -n 8 --max-tokens 40
      kvloom sample trip -n 4 --temperature 0.7 --seed 1 --accept
      kvloom sample trip --beam 4 --length-penalty 0.8
    """
    from kvloom.sampling import check_siblings

    search, n = _search(values, count), SIBLINGS if count is None else count
    check_siblings("n", n)
    settings = sampling(values)
    if search is not None and (others := sorted(set(settings) - {"max_tokens", "stop"})):
        raise click.UsageError(f"--{others[0].replace('_', '-')} is for replies that are sampled, not for --beam")
    said = None if text is None else read_text(text)
    with talking(options, ref, create=said is not None, **values) as talk, interruptible() as stopped:
        how: dict[str, Any] = {"cancel": stopped.cancel, "progress": talk.progress.passes, **settings}
        how["told"] = talk.progress.chosen
        if search is not None:
            run = talk.branch.beaming(said, **search, **how)
        else:
            run = talk.branch.sampling(said, n=n, **how)
        found = sorted(run.finished(), key=lambda each: -each.score)
        talk.progress.stop()
        accepted = accept and bool(found) and not stopped.signal
        if accepted:
            talk.branch.move_to(found[0].reply.turn)
        _show(options, talk, run, found, accepted)
    if stopped.signal:
        raise click.exceptions.Exit(128 + stopped.signal)


def _search(values: dict[str, Any], count: int | None) -> dict[str, Any] | None:
    """How to search, taken out of a command's options and checked before anything is opened; None to sample."""
    width = values.pop("beam")
    others = {name: value for name in ("length_penalty", "early_stopping") if (value := values.pop(name)) is not None}
    if width is None:
        if others:
            raise click.UsageError(f"--{next(iter(others)).replace('_', '-')} is for --beam")
        return None
    if count is not None:
        raise click.UsageError("-n is for replies that are sampled: --beam says how many it finds")
    from kvloom.beam import BeamSettings

    if "early_stopping" in others:
        others["early_stopping"] = EARLY_STOPPING[others["early_stopping"]]
    search = {"width": width, **others}
    BeamSettings(**search)
    return search


def _show(options: Options, talk: Talk, run: SampleRun, found: list[Sample], accepted: bool) -> None:
    """What was said, best first; and on stderr what it should be known for."""
    reply = run.reply
    for notice in reply.notices:
        warn(notice)
    if options.json:
        told = {
            "session": talk.session.name,
            "branch": talk.branch.name,
            "accepted": found[0].reply.branch if accepted else None,
            "model": reply.model,
            "finish_reason": reply.finish_reason,
            "samples": [each.to_json() for each in found],
            "tokens": reply.to_json()["tokens"],
            "tokens_per_second": reply.tokens_per_second,
            "notices": list(reply.notices),
        }
        return print_json(told | ({"template": talk.template} if talk.template else {}))
    if found:
        rows = [
            [e.reply.branch, f"{e.score:.3f}", str(e.tokens), e.reply.finish_reason, preview(e.reply.text)]
            for e in found
        ]
        columns(rows, ["branch", "score", "tokens", "finish", "text"])
    if talk.note:
        dim(talk.note)
    tokens = reply.tokens
    parts = [f"{talk.session.name}@{talk.branch.name}" + (f" is at {found[0].reply.branch} now" if accepted else "")]
    parts.append(
        "interrupted"
        if reply.finish_reason == "interrupted"
        else f"{len(found)} {'reply' if len(found) == 1 else 'replies'}"
    )
    parts.append(f"reused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}")
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:.1f} tokens/s")
    return dim(" · ".join(parts))
