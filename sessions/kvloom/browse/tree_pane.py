"""The tree on the left: only the lines that are seen are ever drawn, so its size does not matter."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from kvloom.browse.outline import Outline
from kvloom.shown import clean, labels, preview, role_style

HELD, NOT_HELD = "●", "○"
MARKS = "AB"
"""The signs of the two marked turns."""

DIM, NAME, HIT, CURSOR = Style(dim=True), Style(color="yellow", bold=True), Style(underline=True), Style(reverse=True)


class TreePane(ScrollView, can_focus=True):
    """The rows of an outline, one of which is under the cursor. Rows below a folded one are not shown."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down,j", "step(1)", "next row"),
        Binding("up,k", "step(-1)", "row before"),
        Binding("left,h", "parent", "to the turn before"),
        Binding("right,l", "child", "to the first reply"),
        Binding("pagedown", "page(1)", "a page down"),
        Binding("pageup", "page(-1)", "a page up"),
        Binding("home", "row(0)", "to the beginning"),
        Binding("end", "row(-1)", "to the last row"),
        Binding("space", "fold", "fold what is below, or unfold it"),
    ]

    class Moved(Message):
        """The cursor went to another row."""

    def __init__(self) -> None:
        super().__init__(id="tree")
        self.outline = Outline("", [], str)
        self.cursor = 0
        self.marks: list[str] = []
        self.hits: Collection[int] = ()
        self._folded: set[str | None] = set()
        self._visible: list[int] = [0]

    @property
    def at(self) -> str | None:
        """The id of the turn under the cursor; None at the very beginning."""
        return self.outline.id(self.cursor)

    def show(self, outline: Outline, at: str | None) -> None:
        """Show an outline with the cursor at a turn; folds and marks stay."""
        self.outline, self.hits = outline, ()
        self.marks = [mark for mark in self.marks if mark in outline.rows]
        self._folded &= outline.rows.keys()
        self.go(outline.rows.get(at, 0))

    def go(self, row: int) -> None:
        """Move the cursor to a row; what hides it is unfolded."""
        self.cursor, above = row, row
        while above and self._folded:
            above = self.outline.above(above)
            self._folded.discard(self.outline.id(above))
        self._arrange()
        self.post_message(self.Moved())

    def mark(self) -> None:
        """Mark the turn under the cursor, or take its mark away; of three, the first mark goes."""
        at = self.at
        if at in self.marks:
            self.marks.remove(at)
        elif at is not None:
            self.marks = [*self.marks, at][-len(MARKS) :]
        self.refresh()

    def action_step(self, by: int) -> None:
        self._go_visible(self._line() + by)

    def action_page(self, by: int) -> None:
        self._go_visible(self._line() + by * max(1, self.size.height - 1))

    def action_row(self, row: int) -> None:
        self._go_visible(row if row >= 0 else len(self._visible) - 1)

    def action_parent(self) -> None:
        self.go(self.outline.above(self.cursor))

    def action_child(self) -> None:
        if self.outline.below(self.cursor):
            self.go(self.cursor + 1)

    def action_fold(self) -> None:
        if self.outline.below(self.cursor):
            self._folded ^= {self.at}
            self._arrange()

    def on_click(self, event: Click) -> None:
        self._go_visible(round(self.scroll_y) + event.y)

    def _go_visible(self, line: int) -> None:
        self.go(self._visible[min(max(line, 0), len(self._visible) - 1)])

    def _line(self) -> int:
        return bisect_right(self._visible, self.cursor) - 1

    def _arrange(self) -> None:
        """Find the rows that can be seen, and scroll to the cursor."""
        self._visible, row = [], 0
        while row < len(self.outline):
            self._visible.append(row)
            row += 1 + (self.outline.below(row) if self.outline.id(row) in self._folded else 0)
        self.virtual_size = Size(self.size.width, len(self._visible))
        self.scroll_to_region(Region(0, self._line(), 1, 1), animate=False, force=True, x_axis=False)
        self.refresh()

    def on_resize(self) -> None:
        self._arrange()

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        line, width = y + round(self.scroll_y), self.size.width
        if line >= len(self._visible):
            return Strip.blank(width, self.rich_style)
        row = self._visible[line]
        text = self._row(row)
        text.truncate(width, overflow="ellipsis", pad=True)
        if row in self.hits:
            text.stylize(HIT)
        if row == self.cursor:
            text.stylize(CURSOR if self.has_focus else Style(reverse=True, dim=True))
        return Strip(text.render(self.app.console), width).apply_style(self.rich_style)

    def _row(self, row: int) -> Text:
        outline, turn = self.outline, self.outline.turn(row)
        more = f" +{outline.below(row)}" if outline.id(row) in self._folded else ""
        if turn is None:
            empty = "".join(f" [{clean(name)}]" for name in outline.empty)
            return Text.assemble((clean(outline.name), "bold"), (empty, NAME), (more, DIM), no_wrap=True)
        place, role = outline.places[row - 1], role_style(turn.role)
        rails = "│ " * (place.column - place.aside) + ("├─" if place.aside else "")
        text = Text(no_wrap=True)
        text.append(rails[-(self.size.width // 2) :], DIM)
        text.append(HELD if outline.is_held(turn) else NOT_HELD, role)
        if turn.id in self.marks:
            text.append(MARKS[self.marks.index(turn.id)], Style(reverse=True, bold=True))
        text.append(f" {clean(turn.role)[:1]}", role)
        if turn.tokens:
            text.append(f" {turn.tokens}", DIM)
        for note in labels(turn):
            text.append(f" {clean(note)}", NAME if note[0] in "[#" else DIM)
        return text.append(more, DIM).append(f" {preview(turn.text)}")
