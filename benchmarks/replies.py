"""Restoring a conversation of many short turns, against the same tokens computed by one prefill.

The turns were added by one process, or each exchange by one of its own, as ``kvloom say`` does it. Turns and prompt are
given, so that all stores hold the same tokens; they were closed before they are restored from, in turn, in one process
with the model loaded, into fresh memory.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, words

TOKENS = 4096
REPLIES = 200
NEW = 16
NAMES = ("replies", "processes", "prompt")
DTYPES = ("float32", "bfloat16")
QUICK = {"rounds": 1, "tokens": 512, "replies": 10, "dtypes": ("float32",)}


def prepare(folder: Path, dtype: str, tokens: int, replies: int) -> None:
    """Three stores of the same tokens: two of so many exchanges, a message and a reply each, and one of one message."""
    from kvloom.append import Append
    from kvloom.commit import Commits
    from kvloom.loom import KVLoom, load_engine
    from kvloom.steps import NewTurn, Step
    from kvloom_store import refs, turns

    engine = load_engine("smollm2", dtype=dtype)
    ids = engine.tokenizer(words(engine.tokenizer, tokens + 100))["input_ids"][:tokens]
    for name, count, together in zip(NAMES, (2 * replies, 2 * replies, 1), (2 * replies, 2, 1), strict=True):
        cuts = [tokens * number // count for number in range(count + 1)]
        steps = [
            Step(
                NewTurn({"role": "user" if n % 2 == 0 else "assistant", "content": engine.tokenizer.decode(ids[a:b])}),
                a,
                tuple(ids[a:b]),
            )
            for n, (a, b) in enumerate(itertools.pairwise(cuts))
        ]
        for first in range(0, count, together):
            with KVLoom(folder / f"{name}.db", model=engine, codec="raw") as loom:
                session, tip = loom.session("talk"), None
                with loom.database.read() as conn:
                    branch = refs.branches(conn, session.row.row)[0]
                    parent = turns.get(conn, branch.turn) if branch.turn is not None else None
                    if parent is not None:
                        tip = turns.states_of(conn, [parent.row])[-1]
                Append(loom, Commits(loom, branch), parent, tip, ids[: steps[first].start]).run(
                    "talk", steps[first : first + together]
                )


def measure(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of each restore, and the segments read, by store."""
    from kvloom.loom import KVLoom, load_engine
    from kvloom_store import trie, turns

    engine = load_engine("smollm2", dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    segments: dict[str, int] = {}
    for number in range(rounds + 1):  # the first one of each is not counted: it compiles queries
        for name in NAMES if number % 2 else NAMES[::-1]:
            with KVLoom(folder / f"{name}.db", model=engine) as loom:
                session = loom.find("talk")
                with loom.database.read() as conn:
                    tip = turns.states_of_session(conn, session.row.row)[-1]
                    ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
                live, account = loom.resumer.resume([*ids, *ids[:NEW]], tip, room=64)  # as for a message of NEW tokens
                assert account.reused == live.length == len(ids)
                segments[name] = len({link.handle.segment for link in live.chain})
                seconds[name] += [account.seconds] if number else []
                del live
    return {"seconds": seconds, "segments": segments}


def run(
    rounds: int = 9, *, tokens: int = TOKENS, replies: int = REPLIES, dtypes: tuple[str, ...] = DTYPES
) -> dict[str, Any]:
    """Each dtype: seconds of a restore, and how many times those of one prompt that of many replies takes, added by one
    process (``times``) and by as many (``processes_times``)."""
    results: dict[str, Any] = {"machine": machine(), "tokens": tokens, "replies": replies}
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            _child("prepare", folder, dtype, str(tokens), str(replies))
            found = json.loads(_child("measure", folder, dtype, str(rounds)))
        many, each, one = (found["seconds"][name] for name in NAMES)
        results[dtype] = {
            **{name: spread(found["seconds"][name]) for name in NAMES},
            "segments": found["segments"],
            "times": spread([a / b for a, b in zip(many, one, strict=True)]),
            "processes_times": spread([a / b for a, b in zip(each, one, strict=True)]),
        }
    return results


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.replies", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def main() -> None:
    """Measure, or be the process that prepares or measures."""
    if len(sys.argv) == 1:
        print(json.dumps(run(), indent=2))
    elif sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))


if __name__ == "__main__":
    main()
