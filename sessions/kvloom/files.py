"""Files that are written whole or not at all, for their owner's eyes; and files that are read with a bound."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvloom.errors import InvalidText, SessionError
from kvloom_proto.limits import MAX_TURN_BYTES


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write: made beside ``path`` with mode 0600, and put in its place when all went well.

    A pipe or a device that is there is written to as it is. Raises SessionError where it cannot be written.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                yield file
            return
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError | ValueError) -> SessionError:
    reason = getattr(error, "strerror", None) or error
    return SessionError(f"cannot write {path}: {reason}", hint="give another file, or free some disk space")


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """A file to read; "-" is stdin. Raises InvalidText where it cannot be opened."""
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 (it is closed below)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise _cannot_read(name, error) from error
    with file:
        try:
            yield file
        except OSError as error:  # a folder opens, and cannot be read
            if isinstance(error, BrokenPipeError):
                raise
            raise _cannot_read(name, error) from error


def read_messages(name: str) -> bytes:
    """What is in a file of messages, or one byte more than may be. Raises InvalidText where it cannot be read."""
    with opened(name) as file:
        return file.read(MAX_TURN_BYTES + 1)


def _cannot_read(name: str, error: OSError | ValueError) -> InvalidText:
    reason = getattr(error, "strerror", None) or error
    return InvalidText(f"cannot read {name}: {reason}", hint="give another file")
