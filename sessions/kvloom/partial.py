"""What a turn says up to one of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from kvloom.textstream import TextStream
from kvloom.tokens import Decoder, text_of
from kvloom_store import refs, spans, trie, turns
from kvloom_store.spans import Span
from kvloom_store.turns import Turn

CONTEXT = 64
"""Tokens before a reply that goes on with an earlier one which decoding its first token may depend on."""

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Partial:
    """The text of a turn up to a token; a character that was cut in two is left out.

    ``settings`` are what a turn of that text must keep for a continuation to be joined to it.
    """

    text: str
    settings: dict[str, Any] = field(default_factory=dict)


def partial(tokenizer: Decoder, turn: Turn, tokens: Sequence[int], kept: int, before: Sequence[int]) -> Partial:
    """What ``turn`` says in the first ``kept`` of its tokens; ``before`` are the tokens of its path before them."""
    if turn.role == "assistant":
        return _reply(tokenizer, turn, tokens[:kept], before)
    return Partial(_message(tokenizer, turn.text, tokens, kept))


def _reply(tokenizer: Decoder, turn: Turn, tokens: Sequence[int], before: Sequence[int]) -> Partial:
    """The text a reply would have if it had been stopped there."""
    stream = TextStream(tokenizer, before=before[-CONTEXT:] if turn.continues else ())
    text = "".join([stream.push(token) for token in tokens])
    rest = stream.finish()
    kept = rest.rstrip(_REPLACEMENT)
    return Partial(text + kept, {"reopened": stream.reopened, "dropped": rest[len(kept) :]})


def _message(tokenizer: Decoder, content: str, tokens: Sequence[int], kept: int) -> str:
    """The part of a message that lies within its first tokens: the template wrote something before and behind it."""
    whole = text_of(tokenizer, tokens, control=False)
    seen = content.strip()  # templates trim
    at = _place(tokenizer, seen, tokens, whole)
    if at is None:  # the template rendered something else
        return content
    reach = _reach(tokenizer, tokens[:kept], whole) - at
    if reach >= len(seen):
        return content
    return content[: content.index(seen) + reach] if reach > 0 else ""


def _place(tokenizer: Decoder, content: str, tokens: Sequence[int], whole: str) -> int | None:
    """Where in the text of a turn its content begins: the last place before what introduces the reply.

    That follows the last control token, or, in a template that has none, is the last line.
    """
    special = frozenset(tokenizer.all_special_ids)
    controls = [at for at, token in enumerate(tokens) if token in special]
    introduced = _reach(tokenizer, tokens[: controls[-1]], whole) if controls else whole.rfind("\n")
    for end in (introduced, len(whole)):
        at = whole.rfind(content, 0, max(end, 0))
        if at >= 0:
            return at
    return None


def _reach(tokenizer: Decoder, tokens: Sequence[int], whole: str) -> int:
    """How many characters of ``whole`` are certain with its first tokens."""
    text = text_of(tokenizer, tokens, control=False)
    return next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole)))


def partial_of(conn: sa.Connection, tokenizer: Decoder, span: Span, token: int) -> Partial:
    """The turn of a span up to a token of its path."""
    state = span.state
    before = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.start]
    return partial(tokenizer, span.turn, state.tokens, token - state.start, before)


def span_of(conn: sa.Connection, point: refs.Point) -> Span:
    """The turn a point is inside of, with its tokens."""
    return spans.of_path(conn, turns.path_to(conn, point.turn))[-1]
