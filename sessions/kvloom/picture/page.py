"""A tree as one HTML page that needs nothing else: it folds, searches and shows the path to any turn.

Every turn's text stands in the page once, as escaped text; the script only moves elements about, so no text is ever
parsed as anything else. A content security policy allows that script alone, by its digest, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvloom.picture.layout import Place, layout
from kvloom.picture.page_parts import SCRIPT, style
from kvloom.picture.palette import role_class
from kvloom.shown import clean, labels
from kvloom_store.names import MAIN

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn


def page(
    name: str,
    turns: Sequence[TreeTurn],
    short: Callable[[str | None], str],
    empty: Sequence[str] = (),
) -> str:
    """The page of a session's turns (parents before their children) as HTML text; it takes what ``svg`` takes."""
    places = layout(turns)
    forks = _forks(places)
    rows = (_row(row, each, row in forks, short) for row, each in enumerate(places))
    names = "".join(f' <span class="name">{_safe(f"[{branch}]")}</span>' for branch in empty)
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_safe(name)}</title><style>{style()}</style></head><body>",
            f'<header><h1>{_safe(name)}{names}</h1><span class="dim">{len(places)} turns</span>',
            '<input id="search" type="search" placeholder="search ( / )" aria-label="search">',
            '<span id="found" class="dim" role="status"></span></header>',
            '<ol id="tree" role="tree" tabindex="0" aria-label="turns">',
            *rows,
            f'</ol><main id="path" tabindex="0" aria-label="the path to the turn"></main><script>{SCRIPT}</script>',
            "</body></html>\n",
        ]
    )


def _forks(places: Sequence[Place[TreeTurn]]) -> set[int]:
    """The rows that can be folded: where the tree branches, and where what stands aside begins."""
    seen: set[int] = set()
    forks = {row for row, place in enumerate(places) if place.aside and place.below}
    for place in places:
        if place.above is not None and place.above in seen:
            forks.add(place.above)
        if place.above is not None:
            seen.add(place.above)
    return forks


def _row(row: int, place: Place[TreeTurn], foldable: bool, short: Callable[[str | None], str]) -> str:
    turn = place.node
    notes = [f'<bdi class="{"name" if note[0] in "[#" else "dim"}">{_safe(note)}</bdi>' for note in labels(turn)]
    button = '<button tabindex="-1" aria-expanded="true" aria-label="fold">\u25be</button>' if foldable else ""
    main = " data-main" if MAIN in turn.branches else ""
    above = -1 if place.above is None else place.above
    return (
        f'<li id="t{row}" role="treeitem" aria-level="{place.column + 1}" style="--c:{place.column}"'
        f' data-a="{above}" data-n="{place.below}"{main}>{button}'
        f'<b class="{role_class(turn.role)}">{_safe(turn.role)}</b> <code>{_safe(short(turn.id))}</code> '
        f'{" ".join([*notes, ""])}<p dir="auto">{_safe(turn.text)}</p></li>'
    )


def _safe(text: str) -> str:
    return html.escape(clean(text))
