"""``--scores`` of ``kvloom show`` and ``kvloom log``: what the model thought of its tokens. It needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, reading
from kvloom.cli.terminal import columns, dim, print_json, warn
from kvloom.cli.tokens import no_tokenizer, path_of
from kvloom.shown import clean

if TYPE_CHECKING:
    from kvloom.scores import TokenScore
    from kvloom.tokens import Decoder
    from kvloom_store.names import Ref


LEAST_SHOWN = 0.0005
"""Others of a lower probability would be shown as 0.0%; --json has them all."""


def show_scores(options: Options, ref: Ref, point: str | None) -> None:
    """Each token of the turn a ref names: its probability, the entropy there, what might have stood in its place."""
    with reading(options) as reader:
        session = reader.find(ref.session)
        shown = session.log(point)
        scores = session.token_scores(shown[-1]) if shown else ()
        with reader.database.read() as conn:
            spans, ids, _ = path_of(conn, ref)
            tokenizer = session.decoder(conn, spans[-1].state.root) if spans else None
        start = next((span.start for span in spans if shown and span.turn.id == shown[-1].id), 0)
        rows = _rows(tokenizer, ids[:start], scores)
    if tokenizer is None and rows:
        warn(f"{no_tokenizer(session.settings)}, so only the ids of tokens are shown")
    if options.json:
        turn = shown[-1].id if shown else None
        return print_json({"session": session.name, "turn": turn, "tokens": rows, **summary(scores)})
    if not rows:
        return dim("no scores are kept of this turn: no model generated it here" if shown else "nothing was said yet")
    columns([_cells(row) for row in rows], ["position", "text", "probability", "entropy", "others"])
    return click.echo(click.style(told(scores), dim=True))


def summary(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """A reply as a whole; nothing is known of one without scores."""
    from kvloom.scores import mean_logprob, perplexity

    if not scores:
        return {"mean_logprob": None, "perplexity": None}
    return {"mean_logprob": mean_logprob(scores), "perplexity": perplexity(scores)}


def told(scores: Sequence[TokenScore]) -> str:
    """The same in words; "" without scores."""
    found = summary(scores)
    if not scores:
        return ""
    return (
        f"{len(scores)} tokens, mean log-probability {found['mean_logprob']:.3f}, perplexity {found['perplexity']:.2f}"
    )


def _rows(tokenizer: Decoder | None, before: Sequence[int], scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    from kvloom.tokens import piece

    rows, last = [], list(before[-1:])
    for position, score in enumerate(scores, len(before)):

        def entry(token: int, logprob: float, last: Sequence[int] = tuple(last)) -> dict[str, Any]:
            text = None if tokenizer is None else piece(tokenizer, last, token)
            return {"id": token, "text": text, "logprob": logprob}

        top = [entry(token, logprob) for token, logprob in score.top]
        rows.append(
            {"position": position, **entry(score.token, score.logprob), "entropy": score.entropy, "top": top},
        )
        last = [score.token]
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    likely = [each for each in row["top"] if each["id"] != row["id"] and math.exp(each["logprob"]) >= LEAST_SHOWN]
    others = [f"{_named(each)} {percent(each['logprob'])}" for each in likely]
    return [str(row["position"]), _named(row), percent(row["logprob"]), f"{row['entropy']:.2f}", "  ".join(others)]


def _named(token: dict[str, Any]) -> str:
    return str(token["id"]) if token["text"] is None else clean(repr(token["text"]))


def percent(logprob: float) -> str:
    """A probability as people read it."""
    return f"{100 * math.exp(logprob):.1f}%"
