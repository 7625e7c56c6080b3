"""The application: opens a session, goes from one to another, and leaves so that nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType

from kvloom.browse.conversation import SPEECH, Conversation
from kvloom.browse.screens import Sessions
from kvloom.errors import KVLoomError, NothingToDo
from kvloom_store import turns

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom.quiet import Progress

OpenLoom = Callable[[Mapping[str, Any], "Progress"], "KVLoom"]
"""Opens the store with the model of a session's settings, which is loaded when it is first needed."""


class Browser(App[None]):
    """``session`` and ``at`` (a turn id) say where to begin; without a session the list of them comes first.

    Whoever runs it closes ``looms`` afterwards: the stores that are still open then.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+q", "leave", "quit", priority=True, show=False)]
    CSS = """
    #panes { height: 1fr; }
    TreePane { width: 2fr; min-width: 24; max-width: 60; border-right: vkey $foreground 40%; }
    Transcript { width: 3fr; padding-left: 1; }
    TreePane, Transcript { overflow-x: hidden; scrollbar-size-vertical: 1; }
    #status { height: auto; max-height: 2; text-style: bold; }
    .keys { height: 1; color: $text-muted; }
    .title { height: auto; text-style: bold; }
    #line { height: 3; }
    OptionList { border: none; height: 1fr; }
    .box { border: round $foreground 60%; width: 100%; height: 100%; }
    .small { height: auto; max-height: 100%; }
    .box OptionList { height: auto; max-height: 1fr; }
    .box Horizontal, .box VerticalScroll, .box TextArea { height: 1fr; }
    """

    def __init__(
        self,
        open_loom: OpenLoom,
        session: str | None = None,
        at: str | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.failed: Exception | None = None
        self.left_by = 0
        self.looms: list[KVLoom] = []
        self._open_loom = open_loom
        self._session = session
        self._at = at
        self._sampling = sampling or {}

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._asked_to_end, number)
        self._browse()

    @work
    async def _browse(self) -> None:
        """From session to session. What fails before there is a screen to tell it on ends the application."""
        try:
            shelf = self._opened({}, _silent)
            while True:
                name = self._session or await self._choose(shelf)
                await self._visit(shelf, name)
                self._session = self._at = None
        except KVLoomError as error:
            self.failed = error
            self.exit()

    async def _choose(self, shelf: KVLoom) -> str:
        rows = [session.row for session in shelf.sessions()]
        if not rows:
            raise NothingToDo("there are no sessions yet", hint='kvloom say NAME "some text" begins one')
        with shelf.database.read() as conn:
            counts = turns.count_by_session(conn)
        return await self.push_screen_wait(Sessions(rows, counts))

    async def _visit(self, shelf: KVLoom, name: str) -> None:
        screen: Conversation | None = None

        def loading(stage: str, fraction: float) -> None:
            if screen is not None:
                screen.model_loading(stage, fraction)

        loom = self._opened(shelf.find(name).settings, loading)
        screen = Conversation(loom, loom.find(name), self._at, self._sampling)
        await self.push_screen_wait(screen)
        self.looms.remove(loom)
        await asyncio.to_thread(loom.close)

    def _opened(self, settings: Mapping[str, Any], progress: Progress) -> KVLoom:
        loom = self._open_loom(settings, progress)
        self.looms.append(loom)
        return loom

    @work
    async def action_leave(self) -> None:
        """Leave; a reply that is being made is stopped first, and kept."""
        self.stop_speaking()
        for worker in [worker for worker in self.workers if worker.group == SPEECH]:
            await worker.wait()
        self.exit()

    def stop_speaking(self) -> None:
        """End a reply that is being made; what was said by then is kept."""
        for screen in self.screen_stack:
            if isinstance(screen, Conversation) and screen.speech is not None:
                screen.speech.stop()

    def _asked_to_end(self, number: int) -> None:
        self.left_by = number
        self.action_leave()

    def _fatal_error(self) -> None:
        """Leave without the traceback that textual would print; ``run`` raises what it was about."""
        if os.environ.get("KVLOOM_DEBUG"):
            return super()._fatal_error()
        self.stop_speaking()
        return self._close_messages_no_wait()


def _silent(_stage: str, _fraction: float) -> None:
    """Nothing is loaded for a list."""


def run(browser: Browser) -> int:
    """Browse until the user leaves; the signal that asked for the end, or 0. Raises what ended it otherwise."""
    browser.run()
    error = browser.failed or browser._exception
    if error is not None:
        raise error
    return browser.left_by
