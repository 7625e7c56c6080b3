"""What a check of a store finds: each a record of its own, so that programs can count and repairs can be planned."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


class Severity(enum.StrEnum):
    """How bad a finding is: nothing is wrong; all of it can be made anew; something cannot."""

    NOTE = "note"
    HEALS = "heals"
    LOST = "lost"


class Kind(enum.StrEnum):
    """What a finding is of."""

    PAGE = "page"
    """SQLite cannot read a part of the file."""
    SQL_INDEX = "sql-index"
    """An index of SQLite's own does not fit its table."""
    ROW = "row"
    """A row is not the one that was written: its checksum says so."""
    BIT = "bit"
    """Such a row of which the checksum says what it was: a bit of it changed, or what others have a copy of."""
    VALUE = "value"
    """A row is as it was written, and says what no row may say."""
    POINTER = "pointer"
    """A row names another one that is not there, or is not one it may name."""
    TRIE = "trie"
    """Edges of the trie, or the tokens on a path, contradict each other."""
    CHUNK = "chunk"
    """A stored piece of state is missing, or is not what was written."""
    STATE = "state"
    """A segment does not hold what it says, or does not stand on what it should."""
    INDEX = "index"
    """The full-text index does not fit the turns."""
    UNWRITTEN = "unwritten"
    """State that was never stored, or was dropped; it is computed when it is needed."""
    ORPHAN = "orphan"
    """A row that nothing refers to any more."""
    SET_ASIDE = "set-aside"
    """Rows that an earlier repair took out of use."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    ``row`` is the key of a row of ``table``, where it is of one; ``at`` the turn it concerns (``session@turn``), where
    one is known. ``words`` say what is wrong and what that means for whoever uses the store.
    """

    kind: Kind
    severity: Severity
    table: str
    row: tuple[int | str, ...] | None
    at: str | None
    words: str

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found, and how much it read: rows, and bytes of state (0 if it was told to leave those out)."""

    findings: tuple[Finding, ...]
    rows: int
    bytes: int

    @property
    def sound(self) -> bool:
        """Whether there are at most notes."""
        return all(each.severity == Severity.NOTE for each in self.findings)

    def count(self, severity: Severity) -> int:
        """How many findings there are of a severity."""
        return sum(each.severity == severity for each in self.findings)

    def of(self, *kinds: Kind) -> Sequence[Finding]:
        """The findings of some kinds."""
        return [each for each in self.findings if each.kind in kinds]

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        counts = {severity.value: self.count(severity) for severity in Severity}
        return {
            "sound": self.sound,
            **counts,
            "rows": self.rows,
            "bytes": self.bytes,
            "findings": [each.to_json() for each in self.findings],
        }
