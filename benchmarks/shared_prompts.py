"""Prompts that share their beginning and then differ, on a hybrid model: what each of them reuses.

Where only the state at the end of a prompt is kept, none of them reuses anything: the one point that could be gone on
from is not in any other prompt.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine, spread
from benchmarks.small import OPENING, one_thread, random_engine, sentences

if TYPE_CHECKING:
    from kvloom.report import Tokens

PROMPTS = 64
SHARED = 1500
OWN = 700
QUICK = {"prompts": 6}


def say(path: Path, engine: Any, prompts: int, shared: int, own: int) -> list[Tokens]:
    """Each prompt in a session of its own, one after another, with nothing in memory but the model."""
    import kvloom

    told = []
    with kvloom.open(path, model=engine) as loom:
        beginning = sentences(shared - OPENING, 0)
        for number in range(prompts):
            # The first character behind what is shared is another one in every prompt.
            text = beginning + chr(ord("0") + number) + sentences(own - 1, 1 + number)
            told.append(loom.session(f"prompt-{number}").branch().say(text, max_tokens=1).tokens)
            loom.flush()
            loom.resumer.forget()
    return told


@one_thread()
def run(prompts: int = PROMPTS, shared: int = SHARED, own: int = OWN) -> dict[str, Any]:
    """Tokens reused, run again and computed, of every prompt after the first."""
    engine = random_engine("hybrid")
    with tempfile.TemporaryDirectory() as folder:
        told = say(Path(folder) / "kvloom.db", engine, prompts, shared, own)[1:]
    return {
        "machine": machine(),
        "dtype": engine.dtype,
        "prompts": prompts,
        "shared": shared,
        "spacing": engine.keyframe_spacing,
        "promised": shared - engine.keyframe_spacing,
        **{name: spread([getattr(one, name) for one in told]) for name in ("reused", "replayed", "computed")},
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
