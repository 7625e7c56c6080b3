"""From the shell to the first token: ``kvloom say`` on a session that is there, in a new process, its model converted.

The floor is what nobody who runs a model in transformers can leave out: importing torch and transformers, reading the
weights and one forward pass, by the shortest program that does so. What is between the two is ours: the store, the
tokenizer and the template, and finding out what the model's state is like.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.common import machine, spread
from benchmarks.processes import ROOT, in_new_process
from benchmarks.report import Section, Table, ranged
from benchmarks.stored import SESSION

FLOOR = """
import sys, torch
from transformers import AutoModelForCausalLM
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]), local_files_only=True)
    with torch.inference_mode():
        model(torch.arange(int(sys.argv[3]))[None])
print(1, flush=True)
"""

IMPORTS, BARE, SAY = "imports", "bare", "say"
QUICK = {"rounds": 1, "dtypes": ("float32",)}


def prepare(store: str, model: str, dtype: str) -> dict[str, Any]:
    """A session with one exchange; the folder of the converted model, and the tokens that a turn adds."""
    import kvloom

    with kvloom.open(store, model=model, dtype=dtype) as loom:
        branch = loom.session(SESSION).branch()
        branch.say("Tell me about rivers.", max_tokens=8)
        added = branch.say("And lakes?", max_tokens=1).tokens.computed
        return {"folder": str(loom.engine.model.config.name_or_path), "added": added}


def until_told(command: Sequence[str]) -> dict[str, float]:
    """Run a command; seconds by the clock until its first byte on stdout, and seconds of the processor in all."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        assert process.stdout is not None
        told = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    assert told, f"{command} said nothing"
    assert process.returncode == 0, f"{command} failed"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor": used}


def run(model: str = "smollm2", rounds: int = 5, dtypes: Sequence[str] = ("float32", "bfloat16")) -> dict[str, Any]:
    """The three by turns, round by round; the first round, which fills the page cache, is left out."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            store = str(Path(folder) / f"{dtype}.db")
            made = in_new_process(prepare, store=store, model=model, dtype=dtype)
            bare = [sys.executable, "-c", FLOOR]
            say = [sys.executable, "-m", "kvloom", "--store", store, "say", SESSION, "And seas?", "--max-tokens", "1"]
            commands = {IMPORTS: bare, BARE: [*bare, made["folder"], dtype, str(made["added"])], SAY: say}
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
            for _ in range(rounds + 1):
                for name, command in commands.items():
                    rows[name].append(until_told(command))
            found[dtype] = {
                name: {what: spread([row[what] for row in each[1:]]) for what in each[0]} for name, each in rows.items()
            }
    return found


def section(found: Mapping[str, Any]) -> Section:
    """One table, a column a dtype."""
    names = {
        IMPORTS: "importing torch and transformers",
        BARE: "and the weights, and one forward pass: the floor",
        SAY: "`kvloom say`",
    }
    rows = [
        [said, *(ranged(each[name]["seconds"], report.time) for each in found.values())] for name, said in names.items()
    ]
    ours = [each[SAY]["seconds"]["median"] - each[BARE]["seconds"]["median"] for each in found.values()]
    rows.append(["ours", *map(report.time, ours)])
    rows.append(
        ["processor time, the floor", *(ranged(each[BARE]["processor"], report.time) for each in found.values())]
    )
    rows.append(
        ["processor time, `kvloom say`", *(ranged(each[SAY]["processor"], report.time) for each in found.values())]
    )
    text = (
        "From the shell to the first byte of the reply, in a new process, everything in the page cache; the turn is "
        "short and its prefix stored. The floor is the shortest program that runs the same pass."
    )
    return Section("Start", text, [Table(["", *found], rows)])


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
