"""The screens that open over a conversation: an editor, a comparison, a choice, the keys; and the list of sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widgets import OptionList, Static, TextArea

from kvloom.browse.transcript import Block, Transcript
from kvloom.shown import clean, local_time
from kvloom_store.refs import SessionRow

CLOSE = Binding("escape", "leave", "close")


class Sessions(Screen[str]):
    """Every session, the one used last first; its result is the name of the one that was chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "list('cursor_down')", "next"),
        Binding("k", "list('cursor_up')", "before"),
        Binding("q", "app.leave", "quit"),
    ]

    def __init__(self, rows: Sequence[SessionRow], counts: Mapping[int, int]) -> None:
        super().__init__()
        self._rows = rows
        self._counts = counts

    def compose(self) -> ComposeResult:
        yield Static("sessions", classes="title")
        yield OptionList(*(self._line(row) for row in self._rows))
        yield Static("Enter opens · j k move · q quits", classes="keys")

    def _line(self, row: SessionRow) -> Content:
        turns, model = self._counts.get(row.row, 0), clean(str(row.settings.get("model")))
        name = set_cell_size(row.name, max(24, cell_len(row.name)))
        return Content(f"{name}  {turns:>6} turns  {local_time(row.updated)}  {model}")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._rows[event.option_index].name)

    def action_list(self, move: str) -> None:
        getattr(self.query_one(OptionList), f"action_{move}")()


class Edit(ModalScreen[str | None]):
    """A message in an editor; its result is the text to say, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "say", "say it", priority=True), CLOSE]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("the message, to be said on a new branch", classes="title")
            yield TextArea(self._text, soft_wrap=True)
            yield Static("Ctrl-S says it · Esc leaves it as it was", classes="keys")

    def on_mount(self) -> None:
        editor = self.query_one(TextArea)
        editor.move_cursor(editor.document.end)

    def action_say(self) -> None:
        self.dismiss(self.query_one(TextArea).text)

    def action_leave(self) -> None:
        self.dismiss(None)


class Choose(ModalScreen[str | None]):
    """One of some names, or none; what does nothing comes first."""

    BINDINGS: ClassVar[list[BindingType]] = [CLOSE]

    def __init__(self, question: str, nothing: str, names: Mapping[str, str]) -> None:
        super().__init__()
        self._question = question
        self._choices: list[tuple[str | None, str]] = [(None, nothing), *names.items()]

    def compose(self) -> ComposeResult:
        with Vertical(classes="box small"):
            yield Static(Content(self._question), classes="title")
            yield OptionList(*(Content(clean(label)) for _, label in self._choices))
            yield Static("Enter chooses · Esc closes", classes="keys")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._choices[event.option_index][0])

    def action_leave(self) -> None:
        self.dismiss(None)


class Compare(ModalScreen[None]):
    """Two paths from where they part, side by side."""

    BINDINGS: ClassVar[list[BindingType]] = [CLOSE, Binding("q,d", "leave", "close")]

    def __init__(self, title: str, left: Sequence[Block], right: Sequence[Block]) -> None:
        super().__init__()
        self._title = title
        self._columns = [left, right]

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(Content(self._title), classes="title")
            with Horizontal():
                for name in ("left", "right"):
                    yield Transcript(id=name)
            yield Static("Tab changes the column · arrows scroll · Esc closes", classes="keys")

    def on_mount(self) -> None:
        for column, blocks in zip(self.query(Transcript), self._columns, strict=True):
            column.show(blocks, from_start=True)

    def action_leave(self) -> None:
        self.dismiss(None)


class Keys(ModalScreen[None]):
    """Every key and what it does."""

    BINDINGS: ClassVar[list[BindingType]] = [CLOSE, Binding("q,question_mark", "leave", "close")]

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        self._lines = lines

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("keys", classes="title")
            with VerticalScroll():
                yield Static(Content("\n".join(self._lines)), id="keys")
            yield Static("arrows scroll · Esc closes", classes="keys")

    def action_leave(self) -> None:
        self.dismiss(None)
