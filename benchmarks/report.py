"""What a measurement puts on the page: tables, plots, and the figures that were promised, each beside its bar.

A measurement is a module with two functions: ``run`` measures and returns data that JSON can carry, ``section`` makes
of that data what is shown, and is a pure function. ``QUICK`` are the arguments of a quick run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.plot import BarPlot, LinePlot


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that was promised: ``measured`` is to be at most ``bar`` (or at least).

    None: this run has no such figure. ``wish`` is the bar that would be better still.
    """

    figure: str
    measured: float | None
    bar: float
    at_least: bool = False
    wish: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        if self.measured is None:
            return False
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and rows of as many cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One measurement, to be read."""

    title: str
    text: str
    tables: Sequence[Table] = ()
    plots: Sequence[LinePlot | BarPlot] = ()
    bars: Sequence[Bar] = ()


def number(value: float) -> str:
    """Three digits that count: 0.123, 1.23, 12.3, 1,234."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def time(seconds: float) -> str:
    """Seconds, as people say them."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"


def rate(bytes_per_second: float) -> str:
    """Bytes a second."""
    return f"{number(bytes_per_second / 1e9)} GB/s"


def ranged(spread: Mapping[str, float], said: Callable[[float], str] = number) -> str:
    """A median, and what lay around it."""
    if spread["min"] == spread["max"]:
        return said(spread["median"])
    return f"{said(spread['median'])} ({said(spread['min'])} to {said(spread['max'])})"
