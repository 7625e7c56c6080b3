"""``kvloom browse`` driven by keys, without a terminal: what is on its screen, and when it has got so far."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual.events import Key
from textual.pilot import Pilot

from kvloom.browse.app import Browser
from kvloom.browse.conversation import Conversation
from kvloom.browse.outline import Outline
from kvloom.browse.tree_pane import TreePane
from kvloom.listing import TreeTurn
from kvloom.loom import KVLoom

PATIENCE = 60
"""Seconds until a test that waits for something has failed."""


class Walk:
    """Somebody at the keys."""

    def __init__(self, app: Browser, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot
        self.told: list[str] = []  # the messages that popped up
        notify = app.notify
        app.notify = lambda message, **options: self.told.append(message) or notify(message, **options)

    @property
    def screen(self) -> Conversation:
        assert isinstance(self.app.screen, Conversation)
        return self.app.screen

    @property
    def tree(self) -> TreePane:
        return self.screen.tree_pane

    @property
    def outline(self) -> Outline:
        return self.tree.outline

    @property
    def turn(self) -> TreeTurn:
        """The turn under the cursor."""
        turn = self.outline.turn(self.tree.cursor)
        assert turn is not None
        return turn

    @property
    def lines(self) -> list[str]:
        """What is on the screen."""
        strips = self.app.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip).rstrip() for strip in strips]

    @property
    def shown(self) -> str:
        return "\n".join(self.lines)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def hit(self, *keys: str) -> None:
        """Press keys and wait for nothing: ``press`` waits until the process is idle, which no model lets it be."""
        for key in keys:
            self.app.post_message(Key(key, key if len(key) == 1 else None))

    async def type(self, text: str) -> None:
        """Type into the line at the bottom, and send it."""
        await self.until(lambda: self.screen.line.has_focus)
        await self.press(*("space" if char == " " else "minus" if char == "-" else char for char in text), "enter")

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await self.pilot.pause(0.01)

    async def until_said(self, turns: int) -> None:
        """Wait until the session has so many turns and nothing is being said."""
        await self.until(lambda: self.screen.speech is None and len(self.outline.places) == turns)
        await self.pilot.pause()


def walk(
    path: Path,
    drive: Callable[[Walk], Awaitable[None]],
    session: str | None = "trip",
    at: str | None = None,
    *,
    model: str | None = None,
    size: tuple[int, int] = (80, 24),
    **options: Any,
) -> Browser:
    """Browse a store in this process; ``drive`` presses the keys."""
    app = Browser(lambda _, told: KVLoom(path, model=model, must_exist=True, progress=told), session, at, **options)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            walker = Walk(app, pilot)
            if session is not None:
                await walker.until(lambda: isinstance(app.screen, Conversation) and walker.outline.name)
            await pilot.pause()
            try:
                await drive(walker)
            finally:
                app.stop_speaking()  # else what failed would wait for the end of the reply

    try:
        asyncio.run(run())
    finally:
        for loom in app.looms:
            loom.close()
    if app.failed is not None:
        raise app.failed
    return app
