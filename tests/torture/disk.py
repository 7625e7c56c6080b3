"""A disk that is really full: a small tmpfs, of one size after another, which the script fills at some point."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvloom.engine import TransformersEngine
from torture.checking import Acknowledged
from torture.faults import Failures, begun, judge, script, take
from torture.forks import Child, Tell

STEP_BYTES = 192 << 10


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes; needs root, and a system that lets it mount."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def reason_against(folder: Path) -> str:
    """Why no disk can be had here; empty if one can."""
    if os.geteuid() != 0:
        return "not root, so no small disk could be mounted"
    try:
        with disk(folder / "tried", 1 << 20):
            return ""
    except (OSError, subprocess.CalledProcessError):
        return "this system let no small disk be mounted"


def torture(folder: Path, engine: TransformersEngine, seed: int, *, most: int = 1000) -> Failures:
    """Disks with more and more room, until the script ends without having filled one; ``most`` of them."""
    found = Failures()
    base, first = begun(folder, engine, seed, found)
    room = 0
    while found.runs < most:
        room += STEP_BYTES
        where, refused = f"a disk with {room >> 10} KiB free", found.refused
        known = Acknowledged(dict(first.sessions), dict(first.states))
        with disk(folder / "disk", base.stat().st_size + room) as small:
            path = small / "kvloom.db"
            shutil.copy(base, path)

            def fill(tell: Tell, path: Path = path) -> None:
                script(path, engine, seed, tell)

            child = Child(fill)
            for event in child.listen():
                take(event, known, found, where)
            if child.end() != 0:
                found.wrong.append(f"{where}: the process ended with {child.code}")
            rescued = folder / "rescued"
            shutil.copytree(small, rescued)  # as it lies there, log and all, to where there is room
        found.runs += 1
        found.operations += known.done
        judge(rescued / "kvloom.db", engine, known, found, where)
        shutil.rmtree(rescued)
        if found.refused == refused:
            break
    found.writes = room
    return found
