"""``python -m benchmarks`` (or ``make bench``): measure, and write the results, a page and plots.

    make bench                              all that is on the page: benchmarks/RESULTS.md, its plots, results.json
    make bench QUICK=1                      the same with fewer lengths and rounds, into .bench/
    make bench ARGS="first_token restore"   only these, into .bench/
    make bench ARGS=siblings                one that is not on the page: prints what it found as JSON

The page is printed, too. A measurement's own ``python -m benchmarks.NAME`` prints its data.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.common import machine
from benchmarks.processes import ROOT

ON_PAGE = (
    *("first_token", "turn", "restore", "capture", "decode", "memory", "tree", "codec", "fork", "start"),
    *("scale", "long"),
)
"""In the order of the page. Each is a module of this package with ``run``, ``section`` and ``QUICK``."""

BESIDES = ("siblings", "explore", "windows", "keyframes", "shared_prompts", "replies", "lossy", "grid")
"""Measurements of single decisions, quoted in NOTES.md: run when they are named, printed as JSON."""

MODEL = "smollm2"


def measure(name: str, *, quick: bool, model: str) -> dict[str, Any]:
    """One measurement: what it found, how long it took, and the load before and after."""
    module = importlib.import_module(f"benchmarks.{name}")
    arguments: dict[str, Any] = dict(module.QUICK) if quick else {}
    if "model" in inspect.signature(module.run).parameters:
        arguments["model"] = model
    before, began = _load(), time.perf_counter()
    found = module.run(**arguments)
    return {"found": found, "seconds": time.perf_counter() - began, "load": [before, _load()]}


def measure_all(names: Sequence[str], *, quick: bool, model: str) -> dict[str, Any]:
    """All of them, one after another, as the JSON has it."""
    results: dict[str, Any] = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "model": model,
        "machine": machine(),
        "measured": {},
    }
    began = time.perf_counter()
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr)
        results["measured"][name] = measure(name, quick=quick, model=model)
        print(f"  {results['measured'][name]['seconds']:.0f} s", file=sys.stderr)
    results["seconds"] = time.perf_counter() - began
    return results


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*ON_PAGE, *BESIDES)))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("QUICK")))
    parser.add_argument("--model", default=MODEL, help="what the model is (smollm2); a folder, a .gguf file, an alias")
    parser.add_argument("--out", type=Path, help="where the files go (benchmarks/, or .bench/ for less than all)")
    parser.add_argument("--page", action="store_true", help="measure nothing: write page and plots again")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - {*ON_PAGE, *BESIDES})
    if unknown:
        parser.error(f"no measurement is called {unknown[0]}; there are {', '.join((*ON_PAGE, *BESIDES))}")
    whole = not given.quick and not given.names and given.model == MODEL
    out = given.out or (ROOT / "benchmarks" if whole or given.page else ROOT / ".bench")
    if given.page:
        page.write(json.loads((out / page.RESULTS).read_text()), out)
        return 0
    for name in (name for name in given.names if name in BESIDES):
        print(json.dumps(measure(name, quick=given.quick, model=given.model), indent=2))
    chosen = [name for name in ON_PAGE if name in given.names or not given.names]
    if chosen:
        results = measure_all(chosen, quick=given.quick, model=given.model)
        out.mkdir(parents=True, exist_ok=True)
        (out / page.RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        page.write(results, out)
        print((out / page.PAGE).read_text())
        print(f"written: {out / page.RESULTS}, {page.PAGE} and {page.PLOTS} beside it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
