"""``make exact``: for every kind of model, random conversations over many restarts, and the referee on what they left.

    python -m exact.run --kinds gemma3_text,mamba2 --trials 200 --json found.json

The exit status is 1 if any bit differs anywhere, or if a kind made fewer trials than were asked for. The real model
(``--kinds smollm2``) runs only when it is named: its trials take seconds each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exact import harness, trials

REAL = ("smollm2",)
COLUMNS = ("trials", "restarts", "points", "L0", "L1", "replayed", "differ", "jobs", "elements", "frames", "seconds")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="exact.run", description="Is what is restored what was captured, every bit?")
    parser.add_argument("--kinds", help="names from tests/tiny.py, or smollm2, with commas; all tiny ones otherwise")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="a kind's trials are divided among them")
    parser.add_argument("--trials", type=int, default=200, help="for each kind")
    parser.add_argument("--processes", type=int, default=9, help="one after another; all but the first are restarts")
    parser.add_argument("--jobs", type=int, default=2, help="kinds at a time")
    parser.add_argument("--judged", type=int, default=12, help="leaves of a kind's trees that the referee recomputes")
    parser.add_argument("--folder", type=Path, help="keep the stores and the referee's jobs here")
    parser.add_argument("--seed", type=int, default=20250131)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser.parse_args(given)


def scenarios_of(kind: str, dtypes: Sequence[str]) -> list[trials.Scenario]:
    """A store for each dtype."""
    if kind not in REAL:
        return [trials.tiny_scenario(kind, dtype, number) for number, dtype in enumerate(dtypes)]
    from kvloom.convert import convert
    from kvloom.models import resolve

    folder = str(convert(resolve(kind)))
    few = {"words": [2, 6, 15], "many_words": 40, "longest": 300, "threads": 1, "codec": "auto"}
    return [{"name": f"{kind}-{dtype}", "folder": folder, "dtype": dtype, **few} for dtype in dtypes]


def examine(kind: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Everything about one kind; what went wrong is in ``failures``, never raised."""
    began = time.perf_counter()
    folder = root / kind
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    found |= {"kind": kind, "failures": []}

    def tell(number: int, result: Mapping[str, Any]) -> None:
        wrong = sum(len(each["failures"]) for each in result.values())
        now = time.perf_counter() - began
        print(f"  {kind}: process {number + 1} of {options.processes}, {wrong} differ, {now:.0f} s", flush=True)

    try:
        scenarios = scenarios_of(kind, options.dtypes.split(","))
        shares = trials.spread(-(-options.trials // len(scenarios)), options.processes)
        grid = 64 if kind in REAL else trials.GRID
        results = trials.converse(folder, scenarios, shares, grid=grid, seed=options.seed, tell=tell)
        found["restarts"] = len(results) - 1
        for count in ("trials", "points", "L0", "L1", "replayed"):
            found[count] = trials.total(results, count)
        found["failures"] += trials.failures(results)
        most = max(1, options.judged // len(scenarios))
        jobs = [job for scenario in scenarios for job in trials.jobs_of(folder, scenario, most)]
        _, verdicts = harness.referee(jobs)
        found["jobs"], found["elements"] = len(jobs), sum(verdict["compared"] for verdict in verdicts)
        found["frames"] = sum(verdict["frames"] for verdict in verdicts)
        found["failures"] += [f"referee {json.dumps(verdict)[:600]}" for verdict in verdicts if not verdict["ok"]]
    except Exception as error:  # a kind that fails to run is a finding, and the others go on
        found["failures"].append(f"{type(error).__name__}: {error}"[-2000:])
    found["differ"] = len(found["failures"])
    found["seconds"] = round(time.perf_counter() - began)
    found["ok"] = not found["failures"] and found["trials"] >= options.trials and found["elements"] > 0
    print(f"{kind}: {'exact' if found['ok'] else 'NOT EXACT'}, {found['seconds']} s", flush=True)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was found, a line each kind, and the sums."""
    sums = {name: sum(row[name] for row in rows) for name in COLUMNS}
    lines = [("kind", *COLUMNS)]
    lines += [(row["kind"], *(f"{row[name]:,}" for name in COLUMNS)) for row in [*rows, {"kind": "all", **sums}]]
    lines = [(kind.ljust(max(len(line[0]) for line in lines)), *cells) for kind, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(given: Sequence[str]) -> int:
    """Examine the kinds; 0 if all of them are exact."""
    options = arguments(given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started
    if options.kinds:
        kinds = options.kinds.split(",")
    else:
        from tiny import KINDS, OTHERS

        kinds = [kind for kind in KINDS if kind not in OTHERS]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        root = options.folder or Path(temporary)
        rows = list(pool.map(lambda kind: examine(kind, options, root), kinds))
    print(f"\nseed {options.seed}, {time.perf_counter() - began:.0f} s\n{table(rows)}")
    for row in rows:
        for failure in row["failures"][:5]:
            print(f"\n{row['kind']}: {failure}")
    if options.json:
        versions = {name: version(name) for name in ("transformers", "torch")}
        found = {"seed": options.seed, "versions": versions, "kinds": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
