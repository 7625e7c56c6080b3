"""What a command of the command line did, and what is expected of one that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Command = Callable[..., Result]


def fails(result: Result, code: int, *words: str) -> None:
    """One line that says what is wrong, one with what to do; nothing on stdout."""
    assert (result.code, result.out) == (code, "")
    lines = result.err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    for word in words:
        assert word in result.err
