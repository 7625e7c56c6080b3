"""Progress bars on stderr, where that is a terminal and the wait is long enough to ask for one."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from kvloom.cli.terminal import size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 0.5
"""Seconds of loading before a bar is shown."""

LONG_PREFILL = 512
"""Tokens from which running them is a wait."""


class Bars:
    """One bar at a time; ``stop`` takes it away before text is printed."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._chosen = 0
        self._deciding: float | None = None  # when the first tokens were chosen
        self.doing = ""  # what is told besides, while they are

    def stage(self, name: str, fraction: float) -> None:
        """Loading or converting a model has got so far."""
        if self._shown and time.monotonic() - self._began > PATIENCE:
            self._show(f"{name} the model" if name.endswith("ing") else name, fraction)

    def passes(self, done: int, total: int) -> None:
        """So many tokens of a prefill have been run."""
        if self._shown and total >= LONG_PREFILL:
            self._show(f"reading {total} tokens", done / total)

    def recoding(self, done: int, total: int) -> None:
        """So many bytes of state have been put down again."""
        if self._shown and time.monotonic() - self._began > PATIENCE:
            self._show(f"recoding {size(total)}", done / total)

    def dropped(self, done: int, total: int) -> None:
        """So many bytes of state have been dropped."""
        if self._shown and time.monotonic() - self._began > PATIENCE:
            self._show("dropping state", done / max(total, 1))

    def chosen(self, tokens: int) -> None:
        """So many more tokens were chosen, of several replies together."""
        self._chosen += tokens
        now = time.monotonic()
        if self._deciding is None:
            self._deciding = now
        if self._shown and now - self._deciding > PATIENCE:
            rate = self._chosen / (now - self._deciding)
            told = [self.doing, f"{self._chosen:,} tokens, {rate:.1f} tokens/s"]
            self._show("decoding", None, " · ".join(filter(None, told)))

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._title = ""
        self._began = time.monotonic()

    def _show(self, title: str, fraction: float | None, note: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            look = (
                TextColumn("[dim]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*look, console=Console(stderr=True), transient=True)
            self._bar.start()
        if title != self._title:
            if self._task is not None and self._title:
                self._bar.remove_task(self._task)
            self._task, self._title = (
                self._bar.add_task(title, total=None if fraction is None else 1.0, note=note),
                title,
            )
        assert self._task is not None
        self._bar.update(self._task, completed=min(max(fraction or 0.0, 0.0), 1.0), note=note)
