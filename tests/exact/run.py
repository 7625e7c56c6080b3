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
COLUMNS = ("trials", "restarts", "points", "L0", "L1", "replayed", "differ", "jobs", "elements", "frames")
SEED = 20250131


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="exact.run", description="Is what is restored what was captured, every bit?")
    parser.add_argument("--kinds", help="names from tests/tiny.py, or smollm2, with commas; all tiny ones otherwise")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="a kind's trials are divided among them")
    parser.add_argument("--trials", type=int, default=200, help="for each kind")
    parser.add_argument("--processes", type=int, default=9, help="one after another; all but the first are restarts")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--together", type=int, default=3, help="kinds in one process, which costs seconds to start")
    parser.add_argument("--judged", type=int, default=12, help="leaves of a kind's trees that the referee recomputes")
    parser.add_argument("--folder", type=Path, help="keep the stores and the referee's jobs here")
    parser.add_argument("--seed", type=int, default=SEED)
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


def examine(kinds: Sequence[str], options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Everything about some kinds, which share their processes; what went wrong is in ``failures``, never raised."""
    began = time.perf_counter()
    folder = root / "-".join(kinds)
    folder.mkdir(parents=True, exist_ok=True)
    label = ", ".join(kinds)

    def tell(number: int, result: Mapping[str, Any]) -> None:
        wrong = sum(len(each["failures"]) for each in result.values())
        now = time.perf_counter() - began
        print(f"  {label}: process {number + 1} of {options.processes}, {wrong} differ, {now:.0f} s", flush=True)

    try:
        scenarios = {kind: scenarios_of(kind, options.dtypes.split(",")) for kind in kinds}
        every = [scenario for mine in scenarios.values() for scenario in mine]
        shares = trials.spread(-(-options.trials * len(kinds) // len(every)), options.processes)
        grid = 64 if any(kind in REAL for kind in kinds) else trials.GRID
        results = trials.converse(folder, every, shares, grid=grid, seed=options.seed, tell=tell)
        most = max(1, options.judged * len(kinds) // len(every))
        jobs = [(scenario["name"], job) for scenario in every for job in trials.jobs_of(folder, scenario, most)]
        verdicts = list(zip([name for name, _ in jobs], harness.referee([job for _, job in jobs])[1], strict=True))
        rows = [row_of(kind, [each["name"] for each in scenarios[kind]], results, verdicts) for kind in kinds]
    except Exception as error:  # kinds that fail to run are findings, and the others go on
        nothing = {**dict.fromkeys(COLUMNS, 0), "differ": 1, "failures": [f"{type(error).__name__}: {error}"[-2000:]]}
        rows = [{"kind": kind, **nothing} for kind in kinds]
    for row in rows:
        row["ok"] = not row["failures"] and row["trials"] >= options.trials and row["elements"] > 0
        print(f"{row['kind']}: {'exact' if row['ok'] else 'NOT EXACT'}", flush=True)
    return rows


def row_of(
    kind: str, names: Sequence[str], results: trials.Results, verdicts: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """What was found about one kind, whose stores are ``names``."""
    judged = [verdict for name, verdict in verdicts if name in names]
    wrong = [text for name in names for text in trials.failures(results, name)]
    wrong += [f"referee {json.dumps(verdict)[:600]}" for verdict in judged if not verdict["ok"]]
    counts = {
        count: sum(trials.total(results, count, name) for name in names)
        for count in ("trials", "points", "L0", "L1", "replayed")
    }
    return {
        "kind": kind,
        **counts,
        "restarts": len(results) - 1,
        "differ": len(wrong),
        "jobs": len(judged),
        "elements": sum(verdict["compared"] for verdict in judged),
        "frames": sum(verdict["frames"] for verdict in judged),
        "failures": wrong,
    }


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
        groups = [kinds[first : first + options.together] for first in range(0, len(kinds), options.together)]
        rows = [row for some in pool.map(lambda group: examine(group, options, root), groups) for row in some]
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
