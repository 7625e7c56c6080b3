"""Which process a row belongs to, and whether that one still lives: a row is no lock, and outlives who wrote it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

SAME_START_S = 2.0
"""Two looks at when a process started may differ by so much, where the clock was set in between."""


@functools.cache
def machine() -> str:
    """What sees the same process numbers: this machine since it was started and, on Linux, this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import psutil

        return f"{platform.node()}/{psutil.boot_time():.0f}"


def this_process() -> str:
    """This process, as ``lives`` takes it."""
    import psutil  # only where a reply is noted, or was: opening a store is to be quick

    return f"{machine()} {os.getpid()} {psutil.Process().create_time():.2f}"


def lives(owner: str) -> bool | None:
    """Whether that process is still there; None if it is of another machine, or container, and cannot be seen."""
    import psutil

    where, _, rest = owner.partition(" ")
    number, _, started = rest.partition(" ")
    if where != machine():
        return None
    try:
        process = psutil.Process(int(number))
        same = abs(process.create_time() - float(started)) < SAME_START_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True
