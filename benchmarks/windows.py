"""Sliding windows: the bytes a restore reads, against the state of every row up to that point.

A local layer is read where the next pass can still see it: the last 511 rows of a window of 512. The limit is that and
every row of the global layers; what is read besides is the rest of the chunks that these rows begin and end in.
"""

from __future__ import annotations

import json
import random
import tempfile
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine, spread
from benchmarks.small import WINDOWS, one_thread, random_engine, sentences
from benchmarks.stored import Path, bring_back, path_of

if TYPE_CHECKING:
    from kvloom import KVLoom

LENGTHS = (2000, 4000, 8000)
RANDOM_POINTS = 24
BEYOND = 600
"""Tokens that the conversations go on behind the last length: a point at that length is more than a window back."""
QUICK = {"lengths": (2000,)}


def shares() -> tuple[int, int, int]:
    """Layers in all, global layers, window."""
    types = WINDOWS["layer_types"]
    return len(types), types.count("full_attention"), int(WINDOWS["sliding_window"])


def limit(tokens: int) -> float:
    """How many times fewer rows are needed than there are."""
    layers, full, window = shares()
    return layers * tokens / (full * tokens + (layers - full) * min(tokens, window - 1))


def store(loom: KVLoom, tokens: int) -> dict[str, Path]:
    """Conversations of more than ``tokens`` tokens: in one turn, in many, and a branch that leaves within the window.

    Their state is cut into chunks differently: at the ends of turns, too, and a branch reads two segments.
    """
    length = tokens + BEYOND
    loom.session("one").branch().say(sentences(length, 1), max_tokens=2)
    many = loom.session("many").branch()
    for number in range(10):
        many.say(sentences(length // 10 - 35, 100 + number), max_tokens=16)
    at = tokens - 300
    loom.session("one").fork("left", at=f"main:{at}").say(sentences(300 + BEYOND, 2), max_tokens=2)
    loom.flush()
    return {name: path_of(loom, *name.split("@")) for name in ("one", "many", "one@left")}


def points(tokens: int, seed: int) -> list[int]:
    """The length itself, the worst alignments next to it, and random points behind it."""
    aligned = [
        tokens - tokens % size + more * size + off for size in (64, 256) for more in (0, 1) for off in (-1, 0, 1)
    ]
    draw = random.Random(seed)
    return sorted({tokens, *aligned, *(draw.randrange(tokens, tokens + BEYOND - 20) for _ in range(RANDOM_POINTS))})


@one_thread()
def run(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """For each length, how many times fewer bytes a restore reads than all rows have: at its points, over its limit."""
    import kvloom

    engine = random_engine("windows")
    row = sum(spec.row_bytes * spec.count for spec in engine.layers)
    results: dict[str, Any] = {"machine": machine(), "dtype": engine.dtype, "layers": shares()}
    for tokens in lengths:
        with tempfile.TemporaryDirectory() as folder:
            with kvloom.open(f"{folder}/kvloom.db", model=engine, codec="raw") as loom:
                held = store(loom, tokens)
            # Opened anew: nothing is in memory, neither rows nor which segment they belong to.
            with kvloom.open(f"{folder}/kvloom.db", model=engine, codec="raw") as loom:
                found = {name: _ratios(loom, path, tokens, row) for name, path in held.items()}
        results[str(tokens)] = {"limit": limit(tokens), **found}
    return results


def _ratios(loom: KVLoom, path: Path, tokens: int, row: int) -> dict[str, Any]:
    end = len(path.ids)
    at = {point: point * row / bring_back(loom, path, point)[1].bytes_read for point in points(tokens, end)}
    worst = min(at, key=lambda point: at[point])
    return {
        "points": len(at),
        "times_fewer": spread(list(at.values())),
        "of_limit": spread([ratio / limit(point) for point, ratio in at.items()]),
        "worst_at": worst,
        "end": {"tokens": end, "times_fewer": end * row / bring_back(loom, path, end)[1].bytes_read},
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
