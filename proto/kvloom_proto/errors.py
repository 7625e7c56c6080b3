"""The root of every error kvloom raises, and the errors of reading bytes.

    KVLoomError                     catch-all; carries .hint (what to do next) and .exit_code
      FormatError          exit 10  bytes that are not what they should be
        NotABundle                  a file that is neither a bundle nor another conversation
        Truncated                   fewer bytes than announced
        LimitExceeded               a length or count over its named limit
        UnsupportedVersion          written by a newer kvloom
        UnknownCodec                a codec name this version does not know
        ChecksumMismatch            the bytes are not those that were written

The store adds StoreError (exit 20), the engine EngineError (30), conversations SessionError (40);
``kvloom.errors`` draws the whole tree.
"""

from __future__ import annotations

from typing import Self

from kvloom_proto.codecs import LOSSLESS


class KVLoomError(Exception):
    """Anything kvloom refuses or could not do. ``hint`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class FormatError(KVLoomError):
    """Bytes that do not follow FORMAT.md. ``field`` names the part that is wrong, ``offset`` the byte of the file at
    which its record begins, where there is a file."""

    exit_code = 10

    def __init__(self, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.field = field
        self.offset: int | None = None

    def at(self, offset: int) -> Self:
        """The same error, found in the record that begins at this byte of a file."""
        self.offset = offset if self.offset is None else self.offset
        return self

    def __str__(self) -> str:
        told = super().__str__()
        return told if self.offset is None else f"{told} ({self.field or 'record'}, at byte {self.offset})"


class NotABundle(FormatError):
    """A file that is neither a bundle nor anything else a conversation can be read from."""


class Truncated(FormatError):
    """Fewer bytes than the record announced."""


class LimitExceeded(FormatError):
    """A length or a count read from outside is over its limit (see ``kvloom_proto.limits``)."""

    def __init__(self, field: str, value: int, limit: int) -> None:
        super().__init__(f"{field} is {value}, over the limit of {limit}", field=field)
        self.value = value
        self.limit = limit


class UnsupportedVersion(FormatError):
    """A record of a version this kvloom does not know."""

    def __init__(self, field: str, found: int, supported: int) -> None:
        super().__init__(
            f"{field} has version {found}; this kvloom reads up to {supported}",
            field=field,
            hint="upgrade kvloom: pip install --upgrade kvloom",
        )
        self.found = found
        self.supported = supported


class UnknownCodec(FormatError):
    """A chunk names a codec this kvloom does not have."""

    def __init__(self, codec: str) -> None:
        super().__init__(
            f"unknown codec {codec!r}",
            field="codec",
            hint=f"this kvloom has {', '.join(LOSSLESS)}; a newer one may have more",
        )
        self.codec = codec


class ChecksumMismatch(FormatError):
    """Bytes that are not the ones that were written."""

    def __init__(self, what: str, expected: bytes, actual: bytes) -> None:
        super().__init__(f"{what} is damaged: checksum {actual.hex()} instead of {expected.hex()}", field=what)
        self.what = what
        self.expected = expected
        self.actual = actual
