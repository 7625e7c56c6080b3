"""A tree search over a long problem: its time against recomputing each node's prefix, what it computes and stores; and
the same search killed five times along the way.

Recomputing is measured on a sample of the nodes: transformers' own fastest prefill of all tokens before a node's step,
in one pass or in passes of 1,024, and then the node's tokens one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, recompute, timed, words

PROBLEM, SAMPLE = 2000, 6
SETTINGS = {"width": 4, "keep": 4, "depth": 14, "step_tokens": 32, "seed": 1}
"""4 nodes, and then 16 a level: 212, if no path ends early."""

KILLS = 5
QUICK = {"depth": 3, "kills": 1}


def search(store: Path, settings: dict[str, Any], kill_after: int = 0) -> dict[str, Any]:
    """The search, begun or gone on with; killed after so many steps of a batch, if any are given."""
    import kvloom

    left = kill_after

    def told(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with kvloom.open(store, model="smollm2", dtype="float32", codec="raw") as loom:
        session = loom.session("puzzle")
        text = words(loom.engine.tokenizer, PROBLEM - 60)
        _ = loom.root
        began = time.perf_counter()
        going = session.explore(prompt=f"{text}\n\nWhat will happen next?", resume=True, told=told, **settings)
        found = going.result
        seconds = time.perf_counter() - began
        loom.flush()
        engine = loom.engine
        row = sum(spec.row_bytes * spec.count for spec in engine.layers)
        stats = session_stats(loom)
        texts = {node.branch: session.branch(node.branch).log()[-1].text for node in found.nodes}
        return {
            "seconds": seconds,
            "nodes": len(found.nodes),
            "node_tokens": sum(node.tokens for node in found.nodes),
            "computed": found.tokens.computed,
            "unique_tokens": stats["tokens"],
            "state_stored": stats["bytes"]["state_stored"],
            "unique_state": stats["tokens"] * row,
            "tree": [[node.branch, node.status, node.score, node.tokens, texts[node.branch]] for node in found.nodes],
            "path": list(found.path),
        }


def session_stats(loom: Any) -> Any:
    """What is stored of the one session there is."""
    from kvloom_store.stats import stats

    return stats(loom.database)


def recomputed(store: Path, settings: dict[str, Any]) -> float:
    """Seconds a node takes whose prefix is computed anew, the mean of a sample."""
    import torch

    import kvloom
    from kvloom.explore.rounds import start_at
    from kvloom_store import explorations

    with kvloom.open(store, model="smollm2", dtype="float32", codec="raw") as loom:
        engine = loom.engine
        with loom.database.read() as conn:
            of = explorations.get(conn, loom.find("puzzle").row.row, "explore")
            made = explorations.candidates(conn, of)
        seconds = []
        for each in random.Random(0).sample(made, min(SAMPLE, len(made))):
            ids = list(start_at(loom, each.turn).ids)
            before = len(ids) - each.tokens
            prefills = [timed(recompute, engine.model, ids[:before], step) for step in (before, 1024)]
            cache = prefills[0][1]

            def decode(cache: Any = cache, before: int = before, ids: Any = ids) -> None:
                with torch.inference_mode():
                    for token in ids[before:]:
                        engine.model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)

            seconds.append(min(each for each, _ in prefills) + timed(decode)[0])
        return sum(seconds) / len(seconds)


def run(*, depth: int = SETTINGS["depth"], kills: int = KILLS) -> dict[str, Any]:
    """Once through, and once killed along the way, each in processes of its own."""
    settings = {**SETTINGS, "depth": depth}
    with tempfile.TemporaryDirectory() as folder:
        whole = _child(Path(folder) / "whole.db", settings)
        a_node = _child(Path(folder) / "whole.db", settings, "--recompute")
        steps = depth * SETTINGS["step_tokens"]  # a batch each, of 4 paths and then of 16
        for number in range(kills):
            _child(Path(folder) / "killed.db", settings, "--kill-after", str(steps // (kills + 2) + 7 * number))
        again = _child(Path(folder) / "killed.db", settings)
    return {
        "machine": machine(),
        "nodes": whole["nodes"],
        "seconds": whole["seconds"],
        "seconds_recomputed": a_node * whole["nodes"],
        "times": a_node * whole["nodes"] / whole["seconds"],
        "computed_of_unique": whole["computed"] / whole["node_tokens"],
        "stored_of_unique": whole["state_stored"] / whole["unique_state"],
        "kills": kills,
        "same_after_kills": (again["tree"], again["path"]) == (whole["tree"], whole["path"]),
    }


def _child(store: Path, settings: dict[str, Any], *more: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.explore", "--store", str(store), "--settings", json.dumps(settings)]
    done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=False)
    if "--kill-after" in more:
        assert done.returncode == -signal.SIGKILL, f"it ended with {done.returncode} before it was killed"
        return None
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path)
    parser.add_argument("--settings", type=json.loads, default=SETTINGS)
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--depth", type=int, default=SETTINGS["depth"])
    given = parser.parse_args()
    if given.recompute:
        print(json.dumps(recomputed(given.store, given.settings)))
    elif given.store:
        print(json.dumps(search(given.store, given.settings, given.kill_after)))
    else:
        print(json.dumps(run(depth=given.depth), indent=2))
