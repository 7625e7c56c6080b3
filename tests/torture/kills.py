"""Processes killed at random moments, one after another on the same store, which is looked at after each."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exact import harness

from kvloom.engine import TransformersEngine
from torture import checking, forks
from torture.checking import Acknowledged
from torture.forks import Child, Tell
from torture.workload import World, work
from torture.writes import killed_at

KILLS_EACH = 10
"""Deaths of one store, which grows with each; then another one begins."""

OPERATIONS = 40
LONGEST_S = 2.0
"""A moment is chosen between a process's first and this one; every other one dies at a write instead."""

WRITES = 400
"""A write is chosen among so many first ones."""


@dataclass
class Deaths:
    """What was found over all kills."""

    kills: int = 0
    at_writes: int = 0
    stores: int = 0
    operations: int = 0
    turns: int = 0
    rows: int = 0
    restored: int = 0
    replayed: int = 0
    replies: int = 0
    tokens: int = 0
    jobs: int = 0
    elements: int = 0
    during: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, engines: dict[str, TransformersEngine], kills: int, seed: int, *, judged: int = 3) -> Deaths:
    """Kill so many processes; every store is then given to the referee, ``judged`` leaves of its trees each."""
    found = Deaths()
    jobs: list[Path] = []
    while found.kills < kills:
        kind = list(engines)[found.stores % len(engines)]
        path = folder / f"{kind}-{found.stores}.db"
        known = Acknowledged()
        for _ in range(min(KILLS_EACH, kills - found.kills)):
            known = _death(path, engines[kind], known, found, random.Random(f"{seed} {found.kills}"))
        made = forks.result(lambda path=path, kind=kind: checking.jobs(path, folder / "jobs", {"tiny": kind}, judged))
        jobs += [Path(each) for each in made.get("jobs", ())]
        found.wrong += [made["crashed"]] if "crashed" in made else []
        found.stores += 1
        print(f"  {found.kills} of {kills} killed, {len(found.wrong)} wrong", flush=True)
    verdicts = harness.referee(jobs)[1] if jobs else []
    found.wrong += [f"the referee on {each['job']}: {each}" for each in verdicts if not each["ok"]]
    found.jobs, found.elements = len(verdicts), sum(each["compared"] for each in verdicts)
    return found


def _death(
    path: Path, engine: TransformersEngine, known: Acknowledged, found: Deaths, rng: random.Random
) -> Acknowledged:
    """One process, killed; the store as another one then finds it."""
    at_write = rng.randint(1, WRITES) if rng.random() < 0.5 else None
    chosen = random.Random(rng.getrandbits(64))

    def live(tell: Tell) -> None:
        if at_write is not None:
            killed_at(at_write)
        work(World(path, engine, chosen, tell), OPERATIONS)
        os.kill(os.getpid(), signal.SIGKILL)  # with state that may wait to be written

    child = Child(live)
    for event in child.listen(None if at_write is not None else rng.uniform(0, LONGEST_S)):
        _hear(known, event, found)
    child.kill()
    for event in child.listen():
        _hear(known, event, found)
    code = child.end()
    where = f"{path.stem}, kill {found.kills}, while {known.running or 'between operations'}"
    if code != -signal.SIGKILL:
        found.wrong.append(f"{where}: it ended with {code}")
    found.kills += 1
    found.at_writes += at_write is not None
    found.operations += known.done
    found.turns += known.turns
    found.during[known.running or "nothing"] = found.during.get(known.running or "nothing", 0) + 1
    seen = forks.result(lambda: checking.check(path, engine, known))
    if "crashed" in seen:
        found.wrong.append(f"{where}: {seen['crashed']}")
        return Acknowledged()
    found.wrong += [f"{where}: {text}" for text in seen["wrong"]]
    for name in ("rows", "restored", "replayed", "replies", "tokens"):
        setattr(found, name, getattr(found, name) + seen[name])
    return known.renewed(seen)


def _hear(known: Acknowledged, event: dict[str, Any], found: Deaths) -> None:
    if "crashed" in event:
        found.wrong.append(event["crashed"])
    known.hear(event)
