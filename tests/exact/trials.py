"""Random conversations over many processes, and the referee on what they left: for the tests and for ``make exact``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exact import harness
from kvloom_store.database import Database

Scenario = dict[str, Any]
Results = list[dict[str, dict[str, Any]]]
"""What each process found, by scenario."""

GRID = 32
ENDS = ("close", "kill", "flush")
"""How processes end, in turn: the store closed, killed before all state is written, killed behind that."""

CODECS = ("raw", "lz4", "zstd", "auto")
SHORT = {"words": [2, 6, 15, 30], "many_words": 90, "longest": 400}
"""Texts that keep a trial under a second."""

FEW_STEPS = {"steps": 6}
"""Enough where each token is computed from all that was restored, as the first one is. It is not where windows leave
tokens behind, blocks fill or some tokens are chosen: there state may be wrong that comes into play tokens later."""


def tiny_scenario(kind: str, dtype: str, number: int) -> Scenario:
    """A store of its own for a tiny model; codecs take turns."""
    codec = CODECS[number % len(CODECS)]
    return {"name": f"{kind}-{dtype}", "kind": kind, "dtype": dtype, "codec": codec, "threads": 1, **SHORT}


def spread(trials: int, processes: int) -> list[int]:
    """How many trials each process makes; none makes none."""
    shares = [trials // processes + (number < trials % processes) for number in range(processes)]
    return [max(1, share) for share in shares]


def converse(
    folder: Path,
    scenarios: Sequence[Scenario],
    shares: Sequence[int],
    *,
    grid: int = GRID,
    seed: int,
    tell: Callable[[int, Mapping[str, Any]], None] = lambda number, found: None,
) -> Results:
    """Processes one after another, each with its share of trials in every scenario's store."""
    results = []
    for number, trials in enumerate(shares):
        end = ENDS[number % len(ENDS)]
        spec = {"folder": str(folder), "process": number, "trials": trials, "grid": grid, "seed": seed, "end": end}
        results.append(harness.work({**spec, "scenarios": list(scenarios)}, killed=end != "close"))
        tell(number, results[-1])
    return results


def total(results: Results, count: str, name: str | None = None) -> int:
    """A count over all processes, of one scenario or of all."""
    return sum(found[count] for result in results for each, found in result.items() if name in (None, each))


def failures(results: Results, name: str | None = None) -> list[str]:
    """What differed, in words."""
    return [text for result in results for each in result if name in (None, each) for text in result[each]["failures"]]


def jobs_of(folder: Path, scenario: Scenario, most: int, *, single: bool = False) -> list[Path]:
    """Jobs for the referee: leaves of a scenario's tree, spread over it, at most about so many."""
    database = Database(folder / f"{scenario['name']}.db")
    found = harness.leaves(database)
    model = {"folder": scenario["folder"]} if "folder" in scenario else {"tiny": scenario["kind"]}
    jobs = []
    for state in found[:: max(1, -(-len(found) // most))]:
        to = folder / "jobs" / f"{scenario['name']}-{state['id']}"
        jobs.append(harness.export(database, state["id"], to, model, scenario["dtype"], single=single))
    database.close()
    return jobs
