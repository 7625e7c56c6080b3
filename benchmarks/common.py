"""What every measurement needs: the model, a text of known length, the machine's description, medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent.parent / "examples" / "data" / "pride_and_prejudice.txt"


def machine() -> dict[str, Any]:
    """The machine, the threads and the load: what a figure is worth nothing without."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def words(tokenizer: Any, tokens: int) -> str:
    """Natural text of about so many tokens (the shipped text, over and over if it is too short)."""
    text = TEXT.read_text()
    ids = tokenizer(text)["input_ids"]
    while len(ids) < tokens:
        ids += ids
    return str(tokenizer.decode(ids[:tokens]))


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the action returned."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns for a terminal: the first one to the left, numbers to the right, nothing for None."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(row, widths, strict=True)) for row in cells)
    )


def _cell(value: object) -> str:
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
