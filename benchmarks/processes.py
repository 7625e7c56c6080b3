"""New processes, the machine's page cache, its free memory: what a measurement of "a new process, cold" consists of."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

BESIDES = 64 << 20
"""Bytes that a restore needs beside the state and its file."""


def in_new_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of one of these modules in a new interpreter; what it returned, as JSON carries it.

    Raises CalledProcessError; what went wrong has been written to stderr.
    """
    module = function.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    command = [sys.executable, "-m", "benchmarks.processes", module, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def drop_cached(path: str | Path) -> None:
    """Let the system forget what it holds of a file, so that it is read from the disk again.

    Only in a process that does not have it open as a database: closing a second descriptor would drop SQLite's locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_through(path: str | Path, start: int = 0) -> None:
    """Let the system hold a file from ``start`` on; like ``drop_cached`` never where it is open as a database."""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        block = bytearray(4 << 20)
        while file.readinto(block):
            continue


def memory_in_hand(*paths: str | Path) -> None:
    """Let the machine have free memory to hold these files, and their state beside them, with room for more."""
    bytes_in_hand(3 * sum(Path(path).stat().st_size for path in paths) + BESIDES)


def bytes_in_hand(size: int) -> None:
    """Let the machine have so much free memory.

    A virtual machine gives free memory back to its host, seconds after it was freed, and gets it again a page at a time
    when it is touched: that takes up to ten times as long as what a process does with fresh memory, and hides it. So
    as much as will be needed is touched and freed, which leaves it fresh for whoever asks for it next.
    """
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE) as held:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            held.madvise(mmap.MADV_HUGEPAGE)
        held[:: mmap.PAGESIZE] = bytes(-(-len(held) // mmap.PAGESIZE))


def counted(name: str) -> int:
    """A counter of this process's input and output (Linux): ``wchar`` are the bytes it wrote, to files and their log;
    ``read_bytes`` those that came from a disk, through mapped files too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[name])


if __name__ == "__main__":
    asked = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    print(json.dumps(asked(**json.loads(sys.argv[3]))))
