"""``make torture``: processes that are killed, disks that fill, crowds and wrong models, and docs/torture.md about it.

    python -m torture.run                           all of it, and the page anew
    python -m torture.run --small --json found.json    as the tests run it; the page stays as it is

The exit status is 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny import tiny_model, tiny_tokenizer

import kvloom.journal
import kvloom.passes
from kvloom.engine import TransformersEngine
from kvloom.loom import load_engine
from torture import collected, commits, crowd, disk, faults, flips, fuzz, kills, others, page
from torture.forks import Child

KINDS = ("llama", "gemma3_text", "jamba")
"""Rows alone, windows, and state that is overwritten in place."""

SEED = 20250401
GRID = 64
"""Tokens of a prefill pass, so that short texts have several."""


class Size(NamedTuple):
    """How much of everything; ``real``: SmolLM2, too."""

    kinds: int
    kills: int
    every: int
    disks: int
    crowd: tuple[int, int, float]
    flips: int
    flips_real: int
    cases: int
    rounds: int
    real: bool


FULL = Size(len(KINDS), 300, 1, 1000, (8, 8, 60.0), 1000, 40, 100_000, 40, real=True)
SMALL = Size(1, 6, 150, 1, (3, 2, 3.0), 24, 0, 200, 2, real=False)
"""Seconds, for ``make test``."""

NUMBERS = {
    "kills": "processes that are killed",
    "every": "of the writes that fail, every so many-th",
    "flips": "bits of a tiny model's store that flip",
    "flips_real": "bits of SmolLM2's store that flip",
    "cases": "bundles, and manifests, that are mutated",
    "rounds": "times that 4,096 tokens of state are written while turns commit",
}
"""What can be set of a run."""

REAL = "smollm2"

SIDE_BY_SIDE = ("kills", "writes", "flips", "fuzz", "flips_real", "full", "models")
"""Parts that another one beside them may slow down; the rest times something, and runs alone afterwards."""


def engine_of(kind: str) -> TransformersEngine:
    """A tiny model, and its engine; or the real one."""
    if kind == REAL:
        return load_engine(REAL, dtype="auto", device="cpu", keyframe_spacing=None, progress=None)
    return TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}", keyframe_spacing=64)


def parts(folder: Path, size: Size, seed: int) -> dict[str, Callable[[], Any]]:
    """What is done, by the part of the page it is for; a text says why it was not done."""
    engines = {kind: engine_of(kind) for kind in KINDS[: size.kinds]}
    first = engines[KINDS[0]]
    makers = {kind: lambda kind=kind: engine_of(kind) for kind in [*engines, *([REAL] if size.real else [])]}

    def at(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    def full() -> Any:
        reason = disk.reason_against(folder)
        return page.NOT_RUN + reason if reason else disk.torture(at("full"), first, seed, most=size.disks)

    def flips_real() -> Any:
        if not size.real:
            return page.NOT_RUN + "it was a small run"
        return flips.torture(at("flips_real"), engine_of(REAL), seed, flips=size.flips_real)

    writers, readers, seconds = size.crowd
    return {
        "kills": lambda: kills.torture(at("kills"), engines, size.kills, seed),
        "writes": lambda: faults.torture(at("writes"), first, seed, step=size.every),
        "flips": lambda: flips.torture(at("flips"), first, seed, flips=size.flips),
        "fuzz": lambda: fuzz.torture(at("fuzz"), seed, cases=size.cases),
        "flips_real": flips_real,
        "full": full,
        "models": lambda: others.torture(at("models")),
        "gc": lambda: collected.torture(at("gc"), makers, seed, timed=makers if size.real else ()),
        "crowd": lambda: crowd.torture(at("crowd"), first, seed, writers=writers, readers=readers, seconds=seconds),
        "commits": lambda: commits.torture(at("commits"), first, seed, rounds=size.rounds, timed=size.real),
    }


def told(name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Do a part, in a process of its own: its figures, and what the page is to show of it."""
    began = time.perf_counter()
    found = work()
    made = {"wrong": [], "not_run": found} if isinstance(found, str) else page.plain(found)
    print(f"{name}: {len(made['wrong'])} wrong, {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(made["wrong"][:5]), end="\n" if made["wrong"] else "", flush=True)
    return {"found": made, "shown": found if isinstance(found, str) else getattr(page, name)(found)}


def done(chosen: Mapping[str, Callable[[], Any]], at_once: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do parts, so many at once where that spoils nothing, each as soon as there is room; what came of each."""
    waiting, running = list(chosen), dict[Child, str]()
    while waiting or running:
        while waiting and (not running or (len(running) < at_once and waiting[0] in SIDE_BY_SIDE)):
            name = waiting.pop(0)
            running[Child(lambda tell, name=name: tell(told(name, chosen[name])))] = name
        for child in select.select(list(running), [], [])[0]:
            name, events = running.pop(child), list(child.listen())
            code = child.end()
            crashed = {"found": {"wrong": [f"{name} ended with {code}"]}}
            yield name, next((each for each in events if "found" in each), crashed)
            print(*(each["crashed"] for each in events if "crashed" in each), sep="\n", end="", flush=True)


def main(given: Sequence[str]) -> int:
    """Torture, and tell."""
    parser = argparse.ArgumentParser(prog="torture.run", description="Is anything ever lost, or silently wrong?")
    parser.add_argument("--small", action="store_true", help="a few seconds of each; the page stays as it is")
    parser.add_argument("--only", help="some parts alone, with commas; the others stay on the page as they are")
    for name, what in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} ({getattr(FULL, name)})")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2, help="parts at once, where that spoils no figure (2)")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # a fork of a process with threads would hang
    transformers.logging.set_verbosity_error()
    kvloom.passes.GRID = GRID
    kvloom.journal.SHARE = float("inf")  # a tiny model's tokens come so fast that it would hardly ever be noted
    began = time.perf_counter()
    size = SMALL if options.small else FULL
    size = size._replace(**{name: getattr(options, name) for name in NUMBERS if getattr(options, name)})
    found: dict[str, Any] = {}
    text = page.PAGE.read_text()
    with tempfile.TemporaryDirectory() as temporary:
        everything = parts(Path(temporary), size, options.seed)
        chosen = {name: everything[name] for name in (options.only.split(",") if options.only else everything)}
        for name, made in done(chosen, options.jobs):
            found[name] = made["found"]
            text = page.replaced(text, name, made.get("shown") or page.part(text, name))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not options.small:
        if not options.only:
            seconds = time.perf_counter() - began
            text = page.replaced(text, "run", page.told(options.seed, seconds, os.cpu_count() or 1))
        page.PAGE.write_text(text)
    return 1 if any(each["wrong"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
