"""One reply being made in a thread of its own: a screen looks at it as often as it likes, and never waits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvloom.errors import KVLoomError

if TYPE_CHECKING:
    from kvloom.browse.actions import Saying
    from kvloom.loom import KVLoom
    from kvloom.report import Reply


class Speech:
    """What is being said. ``run`` is called once, in a thread; all else may be read and called from any other.

    ``stage`` is what is done before the reply begins. When it is over, ``reply`` says how it went, or ``error`` what
    went wrong; neither is there where it was stopped before anything was said.
    """

    def __init__(self, loom: KVLoom, saying: Saying) -> None:
        self.saying = saying
        self.stage = ""
        self.pieces: list[str] = []
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self._loom = loom
        self._cancel = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._cancel.is_set()

    @property
    def text(self) -> str:
        """The reply so far."""
        return "".join(self.pieces)

    def stop(self) -> None:
        """End it soon; what was said by then is kept."""
        self._cancel.set()

    def loading(self, stage: str, fraction: float) -> None:
        """Told by the model's loader how far it got. Stopped there, it ends as by Ctrl-C."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stage = f"{stage} the model" if stage.endswith("ing") else stage
        self.stage += f" {fraction:.0%}"

    def run(self) -> None:
        """Say it. Never raises: what went wrong is in ``error``."""
        try:
            self._say()
        except KeyboardInterrupt:
            pass  # stopped while the model was loading: nothing was said, and nothing is left of it
        except Exception as error:  # one of kvloom's, or a bug: either is told, and ends neither thread nor screen
            self.error = error

    def _say(self) -> None:
        try:
            self.stage = "opening"
            branch = self.saying.place(self._loom)
            run = self.saying.start(branch, cancel=self._cancel, progress=self._reading)
            self.stage = "reading"
            for piece in run:
                self.pieces.append(piece)
            self.reply = run.reply
        finally:
            self.saying.tidy()

    def _reading(self, done: int, total: int) -> None:
        self.stage = f"reading {total} tokens {done / total:.0%}"


def told(error: Exception) -> tuple[str, str]:
    """What went wrong, and what to do about it."""
    if isinstance(error, KVLoomError):
        return str(error), error.hint
    return f"{type(error).__name__}: {error}", "this is a bug; KVLOOM_DEBUG=1 shows where it happened"
