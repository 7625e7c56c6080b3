"""Single bits of a store's file that flip, anywhere: found where they matter, mended where they can be, never served.

``FLIPS`` of them, each followed by opening the store, going on with a conversation, checking, repairing, and going on
with the conversation again. What came of them is printed (``pytest -s``).
"""

from __future__ import annotations

import functools
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import KVLoomError

FLIPS = int(os.environ.get("KVLOOM_FLIPS", "60"))
NEXT = "And who else was there?"


@functools.cache
def engine() -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(path: Path) -> bytes:
    with kvloom.open(path, model=engine()) as loom:
        main = loom.session("talk", system="Be brief.").branch()
        main.say("hello, and what was it?", max_tokens=6)
        main.fork("other").say("who was there?", max_tokens=4)
        main.say("and when was that?", max_tokens=6)
    return path.read_bytes()


def going_on(path: Path) -> Any:
    """What the model replies and the bits it ends in; the kind of error where it is refused."""
    try:
        with kvloom.open(path, model=engine(), must_exist=True) as loom:
            reply = loom.find("talk").branch().say(NEXT, max_tokens=3)
            live = loom.resumer.live
            return reply.text, rows_of(live, live.captured)
    except KVLoomError as error:
        return type(error).__name__


def put(path: Path, data: bytes) -> None:
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


def test_no_flipped_bit_is_served_and_every_one_that_matters_is_found(tmp_path: Path) -> None:
    path = tmp_path / "flipped.db"
    sound = made(tmp_path / "sound.db")
    put(path, sound)
    expected, normal = going_on(path), None
    put(path, sound)
    normal = content(path)
    rng = random.Random(20)
    written = [at for at, byte in enumerate(sound) if byte]
    counts: Counter[str] = Counter()
    for number in range(FLIPS):
        at = rng.choice(written) if number % 2 else rng.randrange(len(sound))  # most of a small file is empty
        data = bytearray(sound)
        data[at] ^= 1 << rng.randrange(8)
        where = f"flip {number} at byte {at}"
        put(path, bytes(data))
        live = content(path) != normal

        if live:
            put(path, bytes(data))
            before = going_on(path)
            assert before == expected or isinstance(before, str), f"{where} was served"

        put(path, bytes(data))
        outcome = _repaired(path)
        after = going_on(path)
        assert outcome != "unseen" or not live, f"{where} was not found"
        assert after == expected or outcome in ("refused", "lost"), f"{where}: {outcome}, then {after}"
        assert after == expected or isinstance(after, str) or outcome == "lost"
        counts[f"{'live' if live else 'dead'}: {outcome}"] += 1
    print(f"\n{FLIPS} flips: {dict(sorted(counts.items()))}")
    assert counts["live: healed"] > 0.7 * sum(count for name, count in counts.items() if name.startswith("live"))


def _repaired(path: Path) -> str:
    """What a repair made of it: unseen, healed, lost (something was set aside), or refused."""
    done: list[str] = []
    try:
        with kvloom.open(path, model=engine(), must_exist=True) as loom:
            report = loom.repair(told=done.append)
    except KVLoomError:
        return "refused"
    assert report.sound, [each.words for each in report.findings]
    if not done and not report.findings:
        return "unseen"
    return "lost" if report.findings else "healed"
