"""Stores brought down to 30 % of their state: every branch goes on, fresh; and bit for bit, where it is asked to.

What a plan says it will take to compute all of it anew is held against what it then takes.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exact.worker import WORDS, frame_of, rows_of

from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom.session import Session
from torture.workload import SYSTEM, state_of

SHARE = 0.3
"""How much of the state stays."""

FACTOR = 2.0
"""What was foretold is to be right up to this."""

SESSIONS, EXCHANGES, TOKENS = 2, 4, 16

Bits = tuple[object, object]


@dataclass
class Store:
    """What was found with one model; seconds are those of all branches together."""

    what: str
    branches: int = 0
    lost: int = 0
    before: int = 0
    after: int = 0
    foretold_s: float = 0.0
    took_s: float = 0.0
    exactly_foretold_s: float = 0.0
    exactly_took_s: float = 0.0
    went_on: int = 0
    same_bits: int = 0


@dataclass
class Collected:
    """All of them."""

    rows: list[Store] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def torture(
    folder: Path, engines: Mapping[str, Callable[[], TransformersEngine]], seed: int, *, timed: Collection[str]
) -> Collected:
    """A store of each model; of those ``timed`` the time is judged, too."""
    found = Collected()
    for what, make in engines.items():
        engine, row = make(), Store(what)
        path, copy = folder / f"{what}.db", folder / f"{what}-exact.db"
        _talk(path, engine, random.Random(seed))
        as_it_was = _bits_of_all(path, engine)
        row.branches = len(as_it_was)
        shutil.copy(path, copy)
        _fresh(path, engine, row, found.wrong)
        _exactly(copy, engine, as_it_was, row, found.wrong)
        for foretold, took in ((row.foretold_s, row.took_s), (row.exactly_foretold_s, row.exactly_took_s)):
            if what in timed and max(foretold, took) > FACTOR * min(foretold, took):
                found.wrong.append(f"{what}: {foretold} s were foretold, and it took {took} s")
        found.rows.append(row)
    return found


def _talk(path: Path, engine: TransformersEngine, dice: random.Random) -> None:
    """Sessions of three branches each; one of them leaves a turn in the middle."""

    def text() -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.choice((5, 20, 60)))) + "."

    with KVLoom(path, model=engine) as loom:
        for number in range(SESSIONS):
            main = loom.session(f"s{number}", system=SYSTEM).branch()
            for _ in range(EXCHANGES):
                main.say(text(), max_tokens=TOKENS)
            main.fork("other", back=2).say(text(), max_tokens=TOKENS)
            tokens = sum(turn.tokens for turn in main.log())
            main.session.fork("third", f"main:{tokens // 2}").say(text(), max_tokens=TOKENS)


def _names(loom: KVLoom) -> list[tuple[Session, str]]:
    return [(session, branch.name) for session in loom.sessions() for branch in session.branches()]


def _bits(loom: KVLoom, ref: str) -> Bits:
    """Digests of the state at a branch, brought back from nothing as it first was."""
    loom.resumer.forget()
    state, ids = state_of(loom, ref)
    assert state is not None
    with loom.engine.lock:
        live, _ = loom.resumer.resume(ids[: state.state_end], state, room=1, logits=False, exact=True)
        return rows_of(live, live.length), frame_of(live)


def _bits_of_all(path: Path, engine: TransformersEngine) -> dict[str, Bits]:
    with KVLoom(path, model=engine) as loom:
        refs = [f"{session.name}@{name}" for session, name in _names(loom)]
        return {ref: _bits(loom, ref) for ref in refs}


def _fresh(path: Path, engine: TransformersEngine, row: Store, wrong: list[str]) -> None:
    """Every branch comes back by computing it anew, and goes on."""
    with KVLoom(path, model=engine) as loom:
        before = loom.gc(None).after
        done = loom.gc(int(before * SHARE))
        row.before, row.after, row.lost = before, done.after, len(done.branches)
        row.foretold_s = round(done.seconds or 0.0, 3)
        if done.after > before * SHARE or not done.branches:
            wrong.append(f"{row.what}: {done.after:,} bytes are left of {before:,}")
        began = time.perf_counter()
        for session, name in _names(loom):
            session.warm(name)
        row.took_s = round(time.perf_counter() - began, 3)
        for session, name in _names(loom):
            reply = session.branch(name).say("and then?", max_tokens=3)
            row.went_on += reply.tokens.generated == 3 and reply.notices == ()
    if row.went_on != row.branches:
        wrong.append(f"{row.what}: {row.went_on} of {row.branches} branches went on")


def _exactly(
    path: Path, engine: TransformersEngine, as_it_was: Mapping[str, Bits], row: Store, wrong: list[str]
) -> None:
    """Every branch comes back by running its recorded passes again, and goes on."""
    with KVLoom(path, model=engine) as loom:
        done = loom.gc(int(row.before * SHARE))
        row.exactly_foretold_s = round(done.exact_seconds or 0.0, 3)
        began = time.perf_counter()
        for session, name in _names(loom):
            session.warm(name, exact=True)
        row.exactly_took_s = round(time.perf_counter() - began, 3)
        for session, name in _names(loom):
            ref = f"{session.name}@{name}"
            if _bits(loom, ref) == as_it_was[ref]:
                row.same_bits += 1
            else:
                wrong.append(f"{row.what}: {ref} came back with other bits")
        for session, name in _names(loom):
            session.branch(name).say("and then?", max_tokens=3, exact=True)
