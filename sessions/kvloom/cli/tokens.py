"""``kvloom show REF --tokens``: which token stands where, around a point. It needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.cli.common import Options, reading
from kvloom.cli.terminal import columns, dim, print_json, warn
from kvloom.shown import clean, short_ids

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom_store.names import Ref
    from kvloom_store.spans import Span

RULE = "──"
"""Stands in the row of the point itself: tokens above it are kept."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token of a path: the point before it is ``REF:position``."""

    position: int
    id: int
    text: str | None
    turn: str
    role: str


def show_tokens(options: Options, ref: Ref, around: int) -> None:
    """The tokens on each side of the point a ref names; of a turn, the point is its end."""
    from kvloom.tokens import pieces

    with reading(options) as reader:
        session = reader.find(ref.session)
        with reader.database.read() as conn:
            spans, ids, point = path_of(conn, ref)
            short = short_ids(conn, session.row.row)
            tokenizer = session.decoder(conn, spans[-1].state.root) if spans else None
        first, last = max(0, point - around), min(len(ids), point + around)
        # One more in front, which the text of the first one may depend on.
        before = max(0, first - 1)
        texts = pieces(tokenizer, ids[before:last])[first - before :] if tokenizer is not None else None
        settings = session.settings
    rows = _rows(spans, ids, first, last, texts)
    turn = next((span.turn.id for span in spans if span.start < point <= span.end), None)
    if tokenizer is None and rows:
        warn(f"{no_tokenizer(settings)}, so only the ids of tokens are shown")
    if options.json:
        tokens = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
        return print_json({"session": ref.session, "turn": turn, "token": point, "tokens": tokens})
    if not rows:
        return dim("nothing was said yet")
    named = replace(ref, token=point)
    cells = [_cells(row, short(row.turn)) for row in rows]
    cells.insert(point - first, [RULE, "", "", f"{RULE} {named}"])
    return columns(cells, ["position", "id", "text", "turn"])


def no_tokenizer(settings: Mapping[str, Any]) -> str:
    """Why there is no text."""
    return f"the tokenizer this session was made with (of {settings['model']}) is not here"


def path_of(conn: sa.Connection, ref: Ref) -> tuple[list[Span], list[int], int]:
    """The turns and the tokens of the path a ref's token is on, and where on it the point is."""
    from kvloom_store import refs, spans, turns

    refs.resolve(conn, ref)
    whole = refs.resolve(conn, replace(ref, token=None))
    found = spans.of_path(conn, turns.path_to(conn, whole.turn))
    ids = spans.tokens_of(conn, found)
    return found, ids, len(ids) if ref.token is None else ref.token


def _rows(spans: Sequence[Span], ids: Sequence[int], first: int, last: int, texts: Sequence[str] | None) -> list[Row]:
    rows = []
    for position in range(first, last):
        turn = next(span.turn for span in spans if span.start <= position < span.end)
        text = texts[position - first] if texts is not None else None
        rows.append(Row(position, ids[position], text, turn.id, turn.role))
    return rows


def _cells(row: Row, short: str) -> list[str]:
    shown = "" if row.text is None else clean(repr(row.text))
    return [str(row.position), str(row.id), shown, f"{clean(row.role)} {short}"]
