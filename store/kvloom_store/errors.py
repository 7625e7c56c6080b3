"""What can go wrong with a store: StoreError and its kinds (exit code 20)."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom_proto.errors import KVLoomError


class StoreError(KVLoomError):
    """The database could not be opened, read or written, or does not hold what was asked for."""

    exit_code = 20


class NotAStore(StoreError):
    """The file is there, but it is not a kvloom store."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is not a kvloom store",
            hint="give another file with --store PATH (or KVLOOM_STORE); a new file is created if none is there",
        )
        self.path = path


class StoreUnavailable(StoreError):
    """The file cannot be opened, created or written: a bad path, permissions, a full disk."""


class StoreLocked(StoreError):
    """Another process kept the write lock for longer than the wait."""


class SchemaTooNew(StoreError):
    """The store was written by a newer kvloom."""

    def __init__(self, found: int, supported: int) -> None:
        super().__init__(
            f"this store has schema version {found}; this kvloom knows versions up to {supported}",
            hint="upgrade kvloom: pip install --upgrade kvloom",
        )
        self.found = found
        self.supported = supported


class CorruptRow(StoreError):
    """A row's checksum does not cover what the row says: it was damaged after it was written."""

    def __init__(self, table: str, key: object) -> None:
        super().__init__(
            f"row {key!r} of table {table!r} is damaged (its checksum does not match)",
            hint="kvloom fsck --repair mends it, or sets it aside; other sessions of the store stay readable",
        )
        self.table = table
        self.key = key


class RefNotFound(StoreError):
    """A session, branch, tag or turn that is not there. ``nearest`` lists names that are close."""

    def __init__(self, what: str, name: str, nearest: Sequence[str] = (), *, session: str = "") -> None:
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "kvloom ls lists the sessions"
        super().__init__(f"no {what} {name!r}{f' in session {session!r}' if session else ''}", hint=hint)
        self.what = what
        self.name = name
        self.nearest = tuple(nearest)


class RefExists(StoreError):
    """A session, branch or tag of that name is there already."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"{what} {name!r} exists already", hint="choose another name")
        self.what = what
        self.name = name


class AnotherSession(StoreError):
    """A session of that name is there, and is another conversation than the one that is imported."""

    def __init__(self, name: str, difference: str) -> None:
        super().__init__(
            f"session {name!r} is there already, and is another conversation: {difference}",
            hint="import it under another name: --as NAME",
        )
        self.name = name
        self.difference = difference


class RefConflict(StoreError):
    """A branch moved while it was being used: another process said something on it."""

    def __init__(self, name: str, expected: str | None, actual: str | None) -> None:
        super().__init__(
            f"branch {name!r} moved meanwhile (from {expected} to {actual})",
            hint="look at it with kvloom log, then say it again",
        )
        self.name = name
        self.expected = expected
        self.actual = actual


class RemovedMeanwhile(StoreError):
    """What something was to be added to is gone: another process removed its session, or one whose state it is on."""

    def __init__(self) -> None:
        super().__init__(
            "another process removed meanwhile what this was to be added to",
            hint="kvloom ls lists the sessions there are; say it again in one of them",
        )


class StateDropped(StoreError):
    """The state that other state stands on was dropped meanwhile, to make room."""

    def __init__(self, segment: int) -> None:
        super().__init__(
            "state could not be stored: what it stands on was dropped meanwhile, to make room",
            hint="nothing needs to be done: it is computed anew when it is needed",
        )
        self.segment = segment


class NoRoom(StoreError):
    """State is not stored: it would be over the store's quota, or too little is free on the disk."""


class InvalidQuery(StoreError):
    """A search for no word at all, or in a syntax that is not FTS5's."""

    def __init__(self, query: str, reason: str) -> None:
        shown = query if len(query) <= 80 else f"{query[:80]}..."
        super().__init__(
            f"cannot search for {shown!r}: {reason}",
            hint='give some words, "a phrase" in quotation marks, or with --raw what SQLite\'s FTS5 understands',
        )
        self.query = query
        self.reason = reason


class InvalidName(StoreError):
    """A name or ref that cannot be read."""
