"""``make torture``: processes that are killed, disks that fill, crowds and wrong models, and docs/torture.md about it.

    python -m torture.run                           all of it, and the page anew
    python -m torture.run --small --json found.json    as the tests run it; the page stays as it is

The exit status is 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny import tiny_model, tiny_tokenizer

import kvloom.journal
import kvloom.passes
from kvloom.engine import TransformersEngine
from torture import crowd, disk, faults, kills, others, page

KINDS = ("llama", "gemma3_text", "jamba")
"""Rows alone, windows, and state that is overwritten in place."""

SEED = 20250401
GRID = 64
"""Tokens of a prefill pass, so that short texts have several."""


class Size(NamedTuple):
    """How much of everything."""

    kinds: int
    kills: int
    every_write: int
    disks: int
    crowd: tuple[int, int, float]


FULL = Size(len(KINDS), 300, 1, 1000, (8, 8, 60.0))
SMALL = Size(1, 6, 150, 1, (3, 2, 3.0))
"""Seconds, for ``make test``."""


def engine_of(kind: str) -> TransformersEngine:
    """A tiny model, and its engine."""
    return TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}", keyframe_spacing=64)


def parts(folder: Path, size: Size, seed: int) -> dict[str, Callable[[], Any]]:
    """What is done, by the part of the page it is for; a text says why it was not done."""
    engines = {kind: engine_of(kind) for kind in KINDS[: size.kinds]}
    first = engines[KINDS[0]]

    def full() -> Any:
        reason = disk.reason_against(folder)
        return page.NOT_RUN + reason if reason else disk.torture(folder, first, seed, most=size.disks)

    return {
        "kills": lambda: kills.torture(folder, engines, size.kills, seed),
        "writes": lambda: faults.torture(folder, first, seed, step=size.every_write),
        "full": full,
        "models": lambda: others.torture(folder),
        "crowd": lambda: crowd.torture(
            folder, first, seed, writers=size.crowd[0], readers=size.crowd[1], seconds=size.crowd[2]
        ),
    }


def main(given: Sequence[str]) -> int:
    """Torture, and tell."""
    parser = argparse.ArgumentParser(prog="torture.run", description="Is anything ever lost, or silently wrong?")
    parser.add_argument("--small", action="store_true", help="a few seconds of each; the page stays as it is")
    parser.add_argument("--only", help="some parts alone, with commas; the others stay on the page as they are")
    parser.add_argument("--kills", type=int, help=f"processes that are killed ({FULL.kills})")
    parser.add_argument("--every", type=int, help=f"of the writes that fail, every so many-th ({FULL.every_write})")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # a fork of a process with threads would hang
    transformers.logging.set_verbosity_error()
    kvloom.passes.GRID = GRID
    kvloom.journal.SHARE = float("inf")  # a tiny model's tokens come so fast that it would hardly ever be noted
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        size = SMALL if options.small else FULL
        size = size._replace(kills=options.kills or size.kills, every_write=options.every or size.every_write)
        everything = parts(Path(temporary), size, options.seed)
        for name in options.only.split(",") if options.only else everything:
            found[name] = everything[name]()
            wrong = [] if isinstance(found[name], str) else found[name].wrong
            print(f"{name}: {len(wrong)} wrong, {time.perf_counter() - began:.0f} s", flush=True)
            print("\n".join(wrong[:5]), end="\n" if wrong else "", flush=True)
    made = {name: each if isinstance(each, str) else page.plain(each) for name, each in found.items()}
    if options.json:
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    if not options.small:
        text = page.PAGE.read_text()
        for name, each in found.items():
            text = page.replaced(text, name, each if isinstance(each, str) else getattr(page, name)(each))
        if not options.only:
            seconds = time.perf_counter() - began
            text = page.replaced(text, "run", page.told(options.seed, seconds, os.cpu_count() or 1))
        page.PAGE.write_text(text)
    return 1 if any(not isinstance(each, str) and each["wrong"] for each in made.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
