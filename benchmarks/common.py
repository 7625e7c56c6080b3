"""What every measurement needs: a text of known length, the machine's description, medians, plain recomputation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent.parent / "examples" / "data" / "pride_and_prejudice.txt"
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "sqlalchemy", "xxhash", "llama-cpp-python")


def machine() -> dict[str, Any]:
    """The machine, the threads and the load: what a figure is worth nothing without."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "temporary_files_on": _filesystem(Path(tempfile.gettempdir())),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from kvloom._version import __version__

    found = {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version, "kvloom": __version__}
    for name in LIBRARIES:
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _filesystem(path: Path) -> str:
    """The kind of file system: a "cold" read of tmpfs would read no disk."""
    import psutil

    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def ids(tokenizer: Any, tokens: int) -> list[int]:
    """So many tokens of natural text (the shipped text, over and over if it is too short)."""
    found: list[int] = tokenizer(TEXT.read_text())["input_ids"]
    while len(found) < tokens:
        found += found
    return found[:tokens]


def words(tokenizer: Any, tokens: int) -> str:
    """Natural text of about so many tokens."""
    return str(tokenizer.decode(ids(tokenizer, tokens)))


def recompute(model: Any, tokens: Sequence[int], step: int) -> Any:
    """transformers' own prefill, in passes of ``step`` tokens; its cache."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for start in range(0, len(tokens), step):
            part = torch.tensor([list(tokens[start : start + step])])
            positions = torch.arange(start, start + part.shape[1])[None]
            model(part, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return cache


def timed(action: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Seconds, and what the action returned."""
    start = time.perf_counter()
    result = action(*given)
    return time.perf_counter() - start, result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns for a terminal: the first one to the left, numbers to the right, nothing for None."""
    cells = [list(head), *([cell_text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(row, widths, strict=True)) for row in cells)
    )


def cell_text(value: object) -> str:
    """A figure of a table."""
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main(measure: Callable[[bool], dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> None:
    """``python -m benchmarks.NAME [quick] [json]``: one measurement as a table, or all that it found."""
    found = measure("quick" in sys.argv[1:])
    if "json" in sys.argv[1:]:
        print(json.dumps(found, indent=2))
        return
    here = found["machine"]
    print(f"{here['processor']}, {here['cores']} cores, {here['memory_gb']} GB, load {here['load'][0]} when it began")
    print(show(found))
