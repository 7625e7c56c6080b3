"""A tree as one SVG picture: a row a turn, a dot and a line to its parent, names, and its first words.

It brings its colours for light and dark ground, and asks for nothing from outside: no font, no script.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvloom.picture.layout import Place, layout
from kvloom.picture.palette import DARK, LIGHT, ROLES, role_class
from kvloom.shown import clean, labels, preview

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn

ROW, COLUMN, RADIUS, EDGE = 24, 20, 5, 16
"""Pixels: the height of a row, the width of a column, a dot, the margin."""

CELL = 7.9
"""Pixels of one character of the monospaced font at 13 px, the widest that is common."""

CHARACTERS = 96
"""Cells of a row's text; what is longer is clipped."""

LEAST_TEXT = 8
"""Cells below which the first words of a turn are left out."""

_NOT_XML = {0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
"""The two characters besides control characters that XML has no way to write."""


def svg(
    name: str,
    turns: Sequence[TreeTurn],
    short: Callable[[str | None], str],
    empty: Sequence[str] = (),
) -> str:
    """The picture of a session's turns (parents before their children) as SVG text.

    ``short`` gives the shown part of a turn's id, ``empty`` are branches at the very beginning.
    """
    places = layout(turns)
    right = max((place.column for place in places), default=0)
    width = round(2 * EDGE + (right + 1) * COLUMN + CHARACTERS * CELL)
    height = 2 * EDGE + ROW * (len(places) + 1)
    head = " ".join([_text(name, "b"), *(_text(f"[{branch}]", "name") for branch in empty)])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" role="img">',
            f"<title>{_safe(name)}</title>",
            f"<style>{_style()}</style>",
            f'<rect class="ground" width="{width}" height="{height}"/>',
            f'<text x="{EDGE}" y="{_y(-1) + 5}">{head}</text>',
            f'<path class="rail" d="{"".join(_lines(places))}"/>',
            *(_row(row, place, short) for row, place in enumerate(places)),
            "</svg>\n",
        ]
    )


def _lines(places: Sequence[Place[TreeTurn]]) -> Iterator[str]:
    """From each turn up to its parent; where it stands aside, round the corner."""
    for row, place in enumerate(places):
        x, y = _x(place.column), _y(row)
        top = _y(-1 if place.above is None else place.above) + (10 if place.above is None else 0)
        if place.aside:
            yield f"M{x - COLUMN} {top}V{y - 8}q0 8 8 8H{x}"
        elif place.above is not None:
            yield f"M{x} {top}V{y}"


def _row(row: int, place: Place[TreeTurn], short: Callable[[str | None], str]) -> str:
    from rich.cells import cell_len, set_cell_size

    turn, role = place.node, role_class(place.node.role)
    parts = [(short(turn.id), "dim"), (clean(turn.role), role), *_notes(turn)]
    room = CHARACTERS - sum(cell_len(text) + 1 for text, _ in parts)
    text = preview(turn.text) if room >= LEAST_TEXT else ""
    if cell_len(text) > room:
        text = set_cell_size(text, room - 1).rstrip() + "…"
    x, y = _x(place.column), _y(row)
    told = " ".join(_text(*part) for part in [*parts, (text, "text")] if part[0])
    return (
        f'<circle class="{role}" cx="{x}" cy="{y}" r="{RADIUS}"/>'
        f'<text x="{x + COLUMN - RADIUS}" y="{y + 5}">{told}</text>'
    )


def _notes(turn: TreeTurn) -> list[tuple[str, str]]:
    return [(clean(note), "name" if note[0] in "[#" else "dim") for note in labels(turn)]


def _text(text: str, style: str) -> str:
    return f'<tspan class="{style}">{_safe(text)}</tspan>'


def _safe(text: str) -> str:
    return html.escape(clean(text).translate(_NOT_XML))


def _x(column: int) -> int:
    return EDGE + RADIUS + column * COLUMN


def _y(row: int) -> int:
    return EDGE + ROW * (row + 1) + ROW // 2


def _style() -> str:
    """tspans are isolated, so that text which runs from right to left moves nothing beside it."""
    colours = ("text", "dim", "name", *ROLES)

    def rules(colour: Mapping[str, str]) -> str:
        fills = "".join(f".{each}{{fill:{colour[each]}}}" for each in ("ground", *colours))
        return f"text{{fill:{colour['text']}}}{fills}.rail{{stroke:{colour['rail']}}}"

    return (
        "text{font:13px ui-monospace,Menlo,Consolas,monospace;white-space:pre}tspan{unicode-bidi:isolate}"
        f".b,.name{{font-weight:bold}}.rail{{fill:none;stroke-width:2}}{rules(LIGHT)}"
        f"@media(prefers-color-scheme:dark){{{rules(DARK)}}}"
    )
