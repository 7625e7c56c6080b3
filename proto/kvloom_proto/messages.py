"""What every message of the wire format is read with: its version first, within its limits."""

from __future__ import annotations

from typing import Protocol

from google.protobuf.message import DecodeError

from kvloom_proto import limits
from kvloom_proto.errors import FormatError, LimitExceeded, UnsupportedVersion

VERSION = 1


class Versioned(Protocol):
    """A generated message that says its version."""

    version: int

    def ParseFromString(self, serialized: bytes) -> int: ...


def parse(message: Versioned, data: bytes, field: str) -> None:
    """Fill a message from bytes. Raises FormatError (LimitExceeded, UnsupportedVersion among them)."""
    check_limit(field, len(data), limits.MAX_MESSAGE_BYTES)
    try:
        message.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"the {field} is not a protobuf message: {error}", field=field) from error
    if message.version != VERSION:
        raise UnsupportedVersion(field, message.version, VERSION)


def check_limit(field: str, value: int, limit: int) -> None:
    """Refuse a length or count over its limit. Raises LimitExceeded."""
    if value > limit:
        raise LimitExceeded(field, value, limit)
