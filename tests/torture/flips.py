"""Single bits of a store's file that flip, anywhere: found where they matter, mended where they can be, never served.

Each flip is followed by opening the store and going on with a conversation, and then, from the flipped file again, by
checking and repairing it and going on. What is compared are the reply and the bits of the state it ends in.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exact.worker import rows_of

from kvloom.engine import TransformersEngine
from kvloom.errors import KVLoomError
from kvloom.loom import KVLoom

NEXT = "And who else was there?"

HEALED = 0.99
"""Of the flips in state so many are to be put right bit for bit."""

STATE, SPARE = "state", "free pages and the file's own lists"
"""Kinds of page; the others are named in ``pages``."""


CRASHED = "crashed"
"""An outcome that must not be: an error that is none of kvloom's."""


@dataclass
class Flips:
    """What was found: how often, by the kind of page that was hit and by what came of it.

    ``dead``: SQLite reads the same from the file as ever. Of the others, ``healed``: all is as it was, bit for bit;
    ``lost``: something was set aside, and said to be; ``refused``: with an error of ours.
    """

    flips: int = 0
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def live(self) -> int:
        """How many changed what SQLite reads."""
        return sum(count for each in self.outcomes.values() for what, count in each.items() if what != "dead")


def torture(folder: Path, engine: TransformersEngine, seed: int, *, flips: int) -> Flips:
    """So many flips in copies of one small store, each kind of page in turn."""
    found = Flips()
    path = folder / "flipped.db"
    sound = made(folder / "sound.db", engine)
    put(path, sound)
    expected = going_on(path, engine)
    if isinstance(expected, str):
        found.wrong.append(f"nothing flipped, and {expected}")
        return found
    put(path, sound)
    normal = content(path)
    kinds, dice = pages(path), random.Random(seed)
    for number in range(flips):
        kind = sorted(kinds)[number % len(kinds)]
        at = _byte(sound, dice.choice(kinds[kind]), dice, used=bool(number // len(kinds) % 2))
        data = bytearray(sound)
        data[at] ^= 1 << dice.randrange(8)
        where = f"flip {number} at byte {at}, {kind}"
        try:
            outcome = _one(path, bytes(data), engine, expected, normal, where, found)
        except Exception as error:  # not one of ours: a mistake in the code, and the rest goes on
            found.wrong.append(f"{where}: {type(error).__name__}: {error}")
            outcome = CRASHED
        counts = found.outcomes.setdefault(kind, {})
        counts[outcome] = counts.get(outcome, 0) + 1
        found.flips += 1
    _judge(found)
    return found


def _judge(found: Flips) -> None:
    state = Counter(found.outcomes.get(STATE, {}))
    live = state.total() - state["dead"]
    if state["healed"] < HEALED * live:
        found.wrong.append(f"of {live} flips in state {state['healed']} were healed")


def _one(
    path: Path, data: bytes, engine: TransformersEngine, expected: Any, normal: Any, where: str, found: Flips
) -> str:
    """What came of one flip; what is wrong with that goes to ``found``."""
    put(path, data)
    live = content(path) != normal
    put(path, data)
    before = going_on(path, engine)
    if before != expected and not isinstance(before, str):
        found.wrong.append(f"{where} was served")
    put(path, data)
    outcome = _repaired(path, engine, where, found)
    after = going_on(path, engine)
    if live and outcome == "unseen":
        found.wrong.append(f"{where} was not found")
    if after != expected and (
        outcome not in ("refused", "lost") or (outcome == "refused" and not isinstance(after, str))
    ):
        found.wrong.append(f"{where}: {outcome}, then {after if isinstance(after, str) else 'other bits'}")
    return outcome if live else "dead"


def _repaired(path: Path, engine: TransformersEngine, where: str, found: Flips) -> str:
    """What a repair made of it: unseen, healed, lost (something was set aside), or refused."""
    done: list[str] = []
    try:
        with KVLoom(path, model=engine, must_exist=True) as loom:
            report = loom.repair(told=done.append)
    except KVLoomError:
        return "refused"
    if not report.sound:
        found.wrong.append(f"{where}: repaired, and still {[each.words for each in report.findings][:3]}")
    if not done and not report.findings:
        return "unseen"
    return "lost" if report.findings else "healed"


def made(path: Path, engine: TransformersEngine) -> bytes:
    with KVLoom(path, model=engine) as loom:
        main = loom.session("talk", system="Be brief.").branch()
        main.say("hello, and what was it?", max_tokens=6)
        main.fork("other").say("who was there?", max_tokens=4)
        main.say("and when was that?", max_tokens=6)
    return path.read_bytes()


def going_on(path: Path, engine: TransformersEngine) -> Any:
    """What the model replies and the bits it ends in; the kind of error where it is refused."""
    try:
        with KVLoom(path, model=engine, must_exist=True) as loom:
            reply = loom.find("talk").branch().say(NEXT, max_tokens=3)
            live = loom.resumer.live
            assert live is not None
            return reply.text, rows_of(live, live.captured)
    except KVLoomError as error:
        return type(error).__name__


def put(path: Path, data: bytes) -> None:
    """Let the file hold these bytes, with no log beside it."""
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    path.write_bytes(data)


def content(path: Path) -> Any:
    """All that SQLite reads in a file, without any of kvloom's code; what it says where it cannot."""
    raw = sqlite3.connect(path)
    raw.text_factory = bytes
    try:
        schema = raw.execute("SELECT name, sql FROM sqlite_master WHERE rootpage > 0 ORDER BY name").fetchall()
        tables = [name.decode() for name, sql in schema if sql and sql.startswith(b"CREATE TABLE")]
        rows = [raw.execute(f"SELECT * FROM '{name}'").fetchall() for name in tables]
        version = [raw.execute(f"PRAGMA {name}").fetchall() for name in ("application_id", "user_version")]
        return schema, rows, version, raw.execute("PRAGMA integrity_check").fetchall()
    except (sqlite3.Error, UnicodeDecodeError) as error:  # names of columns are always read as text
        return str(error)
    finally:
        raw.close()


def pages(path: Path) -> dict[str, list[range]]:
    """Which bytes of a sound file are pages of which kind; SQLite built without ``dbstat`` knows two kinds only."""
    raw = sqlite3.connect(path)
    try:
        size, count = (raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))
        indexes = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        names = dict(raw.execute("SELECT pageno, name FROM dbstat"))
    except sqlite3.OperationalError:
        indexes, names = set(), {}
    finally:
        raw.close()
    found: dict[str, list[range]] = {}
    for page in range(1, count + 1):
        found.setdefault(_kind(names.get(page), indexes), []).append(range((page - 1) * size, page * size))
    return found


def _kind(name: str | None, indexes: set[str]) -> str:
    if name is None:
        return SPARE
    if name == "chunk":
        return STATE
    if name.startswith("turn_text"):
        return "full-text index"
    if name == "sqlite_schema":
        return "first page: the schema"
    if name in indexes:
        return "indexes"
    return "text, tokens, names and how state was computed"


def _byte(data: bytes, page: range, dice: random.Random, *, used: bool) -> int:
    """A byte of a page; ``used``: one that is not zero, for most of a small file is empty."""
    chosen = [at for at in page if data[at]] if used else []
    return dice.choice(chosen) if chosen else dice.choice(page)
