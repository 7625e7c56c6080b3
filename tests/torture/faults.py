"""Every write of a process fails in turn: the first, the second ... until none is left that could."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from older import make_schema_1

from kvloom.engine import TransformersEngine
from kvloom.errors import KVLoomError, StoreError
from kvloom_store import merging, writer
from torture import checking, forks, workload
from torture.checking import Acknowledged, listed
from torture.forks import Child, Tell
from torture.workload import World
from torture.writes import failing_at

SCRIPT = [
    workload.say,
    workload.tag,
    workload.regenerate,
    workload.sample,
    workload.fork_at_token,
    workload.edit,
    workload.explore,
    workload.rename,
    workload.remove,
    workload.undo,
    workload.continue_reply,
    workload.reopen,
    workload.fork,
    workload.recode,
    workload.move,
    workload.merge,
    workload.gc,
]
"""Each operation at least once; ``begin`` and ``short_turns`` have been before, so that there are sessions. Opening the
store brings it from schema 1 to this one."""


FEW_TURNS = 6


@dataclass
class Failures:
    """What was found over all runs."""

    runs: int = 0
    every: int = 1
    writes: int = 0
    operations: int = 0
    refused: int = 0
    turns: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, engine: TransformersEngine, seed: int, *, step: int = 1) -> Failures:
    """Let every ``step``-th write fail, once alone and once with all behind it, until a run meets no failure."""
    found = Failures(every=step)
    base, first = begun(folder, engine, seed, found)
    for from_there_on in (False, True):
        number = 1
        while _one(folder, base, engine, first, number, from_there_on, seed, found):
            found.writes = max(found.writes, number)
            number += step
    return found


def begun(folder: Path, engine: TransformersEngine, seed: int, found: Failures) -> tuple[Path, Acknowledged]:
    """A store of schema 1 that some things were said in, and what was acknowledged of it."""
    base, known = folder / "base.db", Acknowledged()

    def begin(tell: Tell) -> None:
        world = World(base, engine, random.Random(f"{seed} base"), tell)
        for _ in range(3):
            workload.perform(world, workload.begin)
        with mock.patch.object(writer, "FEW_SEGMENTS", 10**9), mock.patch.object(merging, "FEW_SEGMENTS", 10**9):
            workload.perform(world, short_turns)
            world.loom.close()
        make_schema_1(base)

    base.unlink(missing_ok=True)
    child = Child(begin)
    for event in child.listen():
        take(event, known, found, "making the store")
    assert child.end() == 0, found.wrong
    return base, known


def short_turns(world: World) -> str:
    """So many that ``merge`` merges some, as the script is run: few, as every run brings all of them back."""
    return workload.short_turns(world, FEW_TURNS)


def script(path: Path, engine: TransformersEngine, seed: int, tell: Tell) -> None:
    """Each operation of the script; one that is refused is told of, with what is there now, and the next one begins."""
    mock.patch.multiple(merging, FEW_SEGMENTS=FEW_TURNS // 2, LEAST_TOKENS=40).start()
    try:
        world = World(path, engine, random.Random(f"{seed} script"), tell, noticed=True)
    except KVLoomError as error:
        tell(refusal("opening", error))
        return
    for number, operation in enumerate(SCRIPT):
        world.rng = random.Random(f"{seed} {number}")  # what is chosen does not depend on what failed before
        try:
            workload.perform(world, operation)
        except KVLoomError as error:
            tell({**refusal(operation.__name__, error), "failed": True, "sessions": listed(world.loom)})
    try:
        world.loom.close()
    except KVLoomError as error:
        tell(refusal("closing", error))


def refusal(what: str, error: KVLoomError) -> dict[str, Any]:
    """An error as it is told."""
    kind = type(error).__name__
    return {"refused": what, "error": kind, "message": str(error), "documented": isinstance(error, StoreError)}


def _one(
    folder: Path,
    base: Path,
    engine: TransformersEngine,
    first: Acknowledged,
    number: int,
    from_there_on: bool,
    seed: int,
    found: Failures,
) -> bool:
    """One run with one failure; whether there was a write left to fail."""
    path = folder / f"fails-{number}.db"
    shutil.copy(base, path)

    def fail(tell: Tell) -> None:
        writes = failing_at(number, from_there_on=from_there_on)
        script(path, engine, seed, tell)
        tell({"writes": writes.count})

    known = Acknowledged(dict(first.sessions), dict(first.states))
    child, count = Child(fail), 0
    where = f"write {number}{' and all behind it' if from_there_on else ''}"
    for event in child.listen():
        count = event.get("writes", count)
        take(event, known, found, where)
    if child.end() != 0:
        found.wrong.append(f"{where}: the process ended with {child.code}")
    found.runs += 1
    found.operations += known.done
    judge(path, engine, known, found, where)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return count >= number


def take(event: dict[str, Any], known: Acknowledged, found: Failures, where: str) -> None:
    """Hear one thing; count what was refused, and how."""
    known.hear(event)
    if "crashed" in event:
        found.wrong.append(f"{where}: {event['crashed']}")
    if "refused" in event:
        found.refused += 1
        found.errors[event["error"]] = found.errors.get(event["error"], 0) + 1
        if not event["documented"]:
            found.wrong.append(f"{where}: {event['refused']} ended with {event['error']}: {event['message']}")


def judge(path: Path, engine: TransformersEngine, known: Acknowledged, found: Failures, where: str) -> None:
    """Look at what is left, where nothing fails any more."""
    found.turns += known.turns
    seen = forks.result(lambda: checking.check(path, engine, known))
    found.wrong += [f"{where}: {text}" for text in ([seen["crashed"]] if "crashed" in seen else seen["wrong"])]
