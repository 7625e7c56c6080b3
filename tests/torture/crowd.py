"""Many processes on one store at once: some write, some read, and none may lose a turn or hold a reader up."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.engine import TransformersEngine
from kvloom.errors import KVLoomError, NothingToDo
from kvloom.loom import KVLoom
from torture import checking, forks, workload
from torture.checking import Acknowledged
from torture.forks import Child, Tell
from torture.workload import World

DOCUMENTED = {"StoreLocked", "RefNotFound", "RefConflict", "RefExists", "RemovedMeanwhile"}
"""What a process may be told whose branch, session or turn another one has changed."""

SESSIONS = 3
"""That all share."""


@dataclass
class Crowd:
    """What was found."""

    writers: int = 0
    readers: int = 0
    seconds: float = 0.0
    operations: int = 0
    turns: int = 0
    kept_apart: int = 0
    removed: int = 0
    reads: int = 0
    reads_that_met_a_removal: int = 0
    read_median_ms: float = 0.0
    read_worst_ms: float = 0.0
    first_read_worst_ms: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def torture(
    folder: Path, engine: TransformersEngine, seed: int, *, writers: int, readers: int, seconds: float
) -> Crowd:
    """So many processes for so long; then the store is looked at."""
    found = Crowd(writers, readers, seconds)
    path = folder / "crowd.db"

    def begin(tell: Tell) -> None:
        world = World(path, engine, random.Random(seed), tell)
        for number in range(SESSIONS):
            world.loom.session(f"shared-{number}", system=workload.SYSTEM).branch().say("who?", max_tokens=4)
        world.loom.close()

    child = Child(begin)
    found.wrong += [event["crashed"] for event in child.listen() if "crashed" in event]
    child.end()
    until = time.monotonic() + seconds
    crowd = [Child(lambda tell, n=n: _write(path, engine, f"{seed} {n}", until, tell)) for n in range(writers)]
    crowd += [Child(lambda tell, n=n: _read(path, f"{seed} r{n}", until, tell)) for n in range(readers)]
    known: dict[str, list[str]] = {}
    times: list[float] = []
    gone: set[str] = set()
    for child in crowd:
        for event in child.listen():
            _take(event, found, known, gone, times)
        if child.end() != 0:
            found.wrong.append(f"a process ended with {child.code}")
    found.turns = len(known)
    if times:
        found.read_median_ms, found.read_worst_ms = (
            round(1000 * value, 1) for value in (sorted(times)[len(times) // 2], max(times))
        )
    seen = forks.result(lambda: checking.check(path, engine, Acknowledged()))
    if "crashed" in seen:
        found.wrong.append(seen["crashed"])
        return found
    found.wrong += seen["wrong"]
    here = {turn: said for session in seen["sessions"].values() for turn, said in session["turns"].items()}
    for turn, (session, *said) in known.items():
        if session not in gone and here.get(turn) != said:
            found.wrong.append(f"turn {turn} of {session}: said {said}, found {here.get(turn)}")
    return found


def _take(event: dict[str, Any], found: Crowd, known: dict[str, list[str]], gone: set[str], times: list[float]) -> None:
    if "crashed" in event:
        found.wrong.append(event["crashed"])
    if "said" in event:
        known |= event["said"]
        found.operations += 1
        found.kept_apart += event["apart"]
    if "gone" in event:
        gone.add(event["gone"])
        found.removed += 1
    if "error" in event:
        found.errors[event["error"]] = found.errors.get(event["error"], 0) + 1
        if event["error"] not in DOCUMENTED:
            found.wrong.append(f"{event['error']}: {event['message']}")
    if "times" in event:
        times += event["times"]
        found.first_read_worst_ms = max(found.first_read_worst_ms, round(1000 * event["first"], 1))
        found.reads += 1 + len(event["times"])
        found.reads_that_met_a_removal += event["missed"]


def _write(path: Path, engine: TransformersEngine, seed: str, until: float, tell: Tell) -> None:
    """Say, fork, regenerate ... in the sessions all share, and now and then begin one and take it away again."""
    rng = random.Random(seed)
    world = World(path, engine, rng, lambda event: None, noticed=True)
    while time.monotonic() < until:
        try:
            if rng.random() < 0.1:
                _come_and_go(world, tell)
                continue
            session = world.loom.find(f"shared-{rng.randrange(SESSIONS)}")
            branch = rng.choice(session.branches())
            if sum(turn.tokens for turn in branch.log()) > workload.LONGEST:
                branch = session.fork(world.name(), at="main~1")
            what = rng.random()
            if what < 0.2:
                branch = session.fork(world.name(), at=world.turn(session))
            reply = (branch.regenerate if what > 0.85 else branch.stream)(
                *(() if what > 0.85 else (world.text(),)), **world.how()
            ).reply
            said = {reply.turn: [session.name, "assistant", reply.text, reply.finish_reason]}
            tell({"said": said, "apart": int(reply.branch != branch.name)})
        except NothingToDo:
            continue
        except KVLoomError as error:
            tell({"error": type(error).__name__, "message": str(error)})
    try:
        world.loom.close()
    except KVLoomError as error:
        tell({"error": type(error).__name__, "message": str(error)})


def _come_and_go(world: World, tell: Tell) -> None:
    """A session of nobody else's, over the beginning of what others have, and any of those there are taken away."""
    mine = world.loom.session(f"own-{world.rng.getrandbits(40):x}", system=workload.SYSTEM)
    reply = mine.branch().say("who?", max_tokens=6)
    tell({"said": {reply.turn: [mine.name, "assistant", reply.text, reply.finish_reason]}, "apart": 0})
    others = [each.name for each in world.loom.sessions() if each.name.startswith("own-")]
    if len(others) > 2:
        name = world.rng.choice(others)
        tell({"gone": name})
        world.loom.remove(name)


def _read(path: Path, seed: str, until: float, tell: Tell) -> None:
    """Open the store's sessions and read one, over and over; how long each took. The first one is told by itself: what
    it needs is imported then, by as many processes at once as there are."""
    rng = random.Random(seed)
    gc.freeze()  # a reader has loaded no model; this one is a copy of who has, and would look through all of that once
    times, missed = [], 0
    with KVLoom(path) as loom:
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                rng.choice(loom.sessions()).log()
            except KVLoomError as error:
                if type(error).__name__ not in DOCUMENTED:
                    tell({"error": type(error).__name__, "message": str(error)})
                missed += 1
            times.append(time.perf_counter() - began)
    tell({"first": times[0], "times": times[1:], "missed": missed})
