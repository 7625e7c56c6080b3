"""What every measurement needs: the model, a text of known length, the machine's description, medians."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
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


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns as wide as their cells."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])
