"""The transcript on the right: the end of a path, wrapped to the pane, and a reply that is still growing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from kvloom.shown import clean

LINES = 600
"""Lines that are kept wrapped: of a longer path, what goes before is told as so many turns."""

BLOCKS = LINES // 3
"""Blocks that may be needed for that: none has fewer than three lines."""

CHARACTERS = 50_000
"""Of a turn that is longer, its end is shown."""

GROWING = 5_000
"""The same for a text that still grows, and is wrapped again each time it is looked at."""

CACHED = 4_096
"""Turns that stay wrapped: walking down a path wraps one more at a step."""


@dataclass(frozen=True)
class Block:
    """A turn as the transcript shows it: a line about it, and its text. ``key`` is None while the text still grows."""

    key: str | None
    head: Text
    text: str


class Transcript(ScrollView, can_focus=True):
    """Blocks one below the other."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._blocks: Sequence[Block] = ()
        self._above = 0
        self._from_start = False
        self._lines: list[Text] = []
        self._wrapped: dict[tuple[str, int], list[Text]] = {}

    def show(self, blocks: Sequence[Block], *, above: int = 0, from_start: bool = False) -> None:
        """Show other blocks, scrolled to their end, or to their start; ``above`` more turns go before them."""
        self._blocks, self._above, self._from_start = blocks, above, from_start
        self._arrange()

    def _arrange(self) -> None:
        width = self.size.width - 1
        if width < 1:
            return  # it has no place yet; ``on_resize`` comes when it has
        kept: list[list[Text]] = []
        lines, blocks = 0, self._blocks if self._from_start else self._blocks[::-1]
        for block in blocks:
            if lines >= LINES:
                break
            kept.append(self._wrap(block, width))
            lines += len(kept[-1])
        more = len(blocks) - len(kept) + self._above
        told = [Text(f"… {more} turns {'below' if self._from_start else 'above'}", style="dim")] if more else []
        if self._from_start:
            self._lines = [line for wrapped in kept for line in wrapped] + told
        else:
            self._lines = [*told, *([Text()] if told else []), *(line for wrapped in kept[::-1] for line in wrapped)]
        self.virtual_size = Size(width, len(self._lines))
        scroll = self.scroll_home if self._from_start else self.scroll_end
        scroll(animate=False, force=True, immediate=True)
        self.refresh()

    def _wrap(self, block: Block, width: int) -> list[Text]:
        body = self._wrapped.get((block.key, width)) if block.key else None
        if body is None:
            cut = len(block.text) - (CHARACTERS if block.key else GROWING)
            text = f"(… {cut} characters above)\n{block.text[cut:]}" if cut > 0 else block.text
            wrapped = Text(clean(text).rstrip("\n")).wrap(self.app.console, width, tab_size=4)
            body = [*wrapped, Text()]
            if block.key:
                if len(self._wrapped) >= CACHED:
                    self._wrapped.clear()
                self._wrapped[block.key, width] = body
        return [*block.head.wrap(self.app.console, width), *body]

    def on_resize(self) -> None:
        self._arrange()

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        line, width = y + round(self.scroll_y), self.size.width
        if line >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        text = self._lines[line].copy()
        text.truncate(width, pad=True)
        return Strip(text.render(self.app.console), width).apply_style(self.rich_style)


def heading(role: str, colour: str, notes: Sequence[str]) -> Text:
    """The line about a turn."""
    return Text.assemble((clean(role), Style(color=colour, bold=True)), "  ", (clean(" ".join(notes)), "dim"))
