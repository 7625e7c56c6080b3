"""Children of a process that has torch and a model in memory already: a fork takes milliseconds, an import seconds.

The parent must have no threads of its own: it opens no store, and a child does all that needs one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

Tell = Callable[[dict[str, Any]], None]
Work = Callable[[Tell], None]


class Child:
    """A fork that does some work and tells of it, one JSON object a line, through a pipe."""

    def __init__(self, work: Work) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            os._exit(_run(work, told))
        os.close(told)
        self._rest = b""
        self.code: int | None = None

    def listen(self, seconds: float | None = None) -> Iterator[dict[str, Any]]:
        """What it tells within so many seconds, or until it ends; a line that was not finished was never told."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def fileno(self) -> int:
        """Of the pipe, for ``select``."""
        return self._pipe

    def kill(self) -> None:
        """SIGKILL; what it told before can still be heard."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end: its exit status, or the signal it was killed by as a negative number."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self.code


def _run(work: Work, told: int) -> int:
    def tell(event: dict[str, Any]) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(told, data) :]

    try:
        work(tell)
    except BaseException:
        tell({"crashed": traceback.format_exc()[-3000:]})
        return 1
    return 0


def result(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do some work in a fork, and hand back what it returns; ``crashed`` is there if it raised."""
    child = Child(lambda tell: tell(work()))
    found = list(child.listen())
    code = child.end()
    return found[-1] if found else {"crashed": f"it ended with {code} and said nothing"}
