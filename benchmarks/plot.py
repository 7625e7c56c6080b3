"""Plots as SVG text: lines over a logarithmic or linear axis, and horizontal bars.

They bring their colours for light and dark ground (those of ``kvloom.picture``), and ask for nothing from outside.
Series differ in their dashes and marks, too: colour alone tells nothing to everybody.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvloom.picture.palette import DARK, LIGHT

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 32, 84, 56
COLOURS = ("user", "name", "assistant", "system", "dim")
DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 2")
CHARACTER = 7.0
"""Pixels of a character of the legend, about."""

ROW, GAP, LABELS = 20, 12, 250
"""Pixels of a bar plot: a bar, the space between groups, the labels' width."""


@dataclass(frozen=True, slots=True)
class Point:
    """A median, and the least and the most that was measured."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LinePlot:
    """Series over an axis; the labels say units. ``file`` is its name without the ending."""

    file: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class BarPlot:
    """For each label a bar a series, each with its value written behind it."""

    file: str
    title: str
    x: str
    series: Sequence[str]
    groups: Mapping[str, Sequence[float | None]]


def points(spreads: Mapping[float, Mapping[str, float]]) -> list[Point]:
    """Points of a series from its spreads."""
    return [Point(x, s["median"], s["min"], s["max"]) for x, s in sorted(spreads.items())]


def svg(plot: LinePlot | BarPlot) -> str:
    """The picture."""
    return _lines(plot) if isinstance(plot, LinePlot) else _bars(plot)


def _lines(plot: LinePlot) -> str:
    every = [point for series in plot.series.values() for point in series]
    xs = sorted({point.x for point in every})
    floor = min(point.low for point in every) if plot.log_y else 0.0
    top = max(point.high for point in every)
    x_at = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT, log=plot.log_x)
    y_ticks = _log_ticks(floor, top) if plot.log_y else _ticks(top)
    y_at = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log=plot.log_y)
    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y_at(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 8, y_at(tick) + 4, f"{tick:,g}", "end"))
    for x in xs:
        parts.append(f'<path class="grid" d="M{x_at(x):.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(_text(x_at(x), HEIGHT - BOTTOM + 20, f"{x:,g}", "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, plot.x, "middle"))
    parts.append(_text(LEFT - 56, TOP - 14, plot.y, "start"))
    for number, series in enumerate(plot.series.values()):
        parts += _series(number, [(x_at(p.x), y_at(p.y), y_at(p.low), y_at(p.high)) for p in series])
    return _picture(plot.title, HEIGHT, [*_legend(list(plot.series)), *parts])


def _series(number: int, at: Sequence[tuple[float, float, float, float]]) -> Iterator[str]:
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in at)
    yield f'<path class="line s{number}" d="M{line}"{_dash(number)}/>'
    for x, y, low, high in at:
        if abs(low - high) > 1:
            yield f'<path class="line s{number}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        yield f'<circle class="f{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _bars(plot: BarPlot) -> str:
    rows = [sum(value is not None for value in values) for values in plot.groups.values()]
    height = TOP + ROW * sum(rows) + GAP * len(rows) + BOTTOM
    most = max((value for values in plot.groups.values() for value in values if value is not None), default=1.0)
    x_at = _scale(0, most, LABELS, WIDTH - RIGHT - 60, log=False)
    parts, y = [], TOP
    for (label, values), count in zip(plot.groups.items(), rows, strict=True):
        parts.append(_text(LABELS - 8, y + count * ROW / 2 + 4, label, "end"))
        for number, value in enumerate(values):
            if value is None:
                continue
            width = x_at(value) - LABELS
            parts.append(f'<rect class="f{number}" x="{LABELS}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}"/>')
            parts.append(_text(LABELS + width + 6, y + 14, f"{value:,.3g}", "start"))
            y += ROW
        y += GAP
    parts.append(f'<path class="axis" d="M{LABELS} {TOP - 4}V{height - BOTTOM}"/>')
    parts.append(_text((LABELS + WIDTH) / 2, height - 28, plot.x, "middle"))
    return _picture(plot.title, height, [*_legend(plot.series, squares=True), *parts])


def _legend(names: Sequence[str], *, squares: bool = False) -> Iterator[str]:
    if len(names) < 2:
        return
    x = 16.0
    for number, name in enumerate(names):
        if squares:
            yield f'<rect class="f{number}" x="{x + 6:.1f}" y="33" width="12" height="12"/>'
        else:
            yield f'<path class="line s{number}" d="M{x:.1f} 39h24"{_dash(number)}/>'
            yield f'<circle class="f{number}" cx="{x + 12:.1f}" cy="39" r="3.5"/>'
        yield _text(x + 30, 43, name, "start")
        x += 30 + CHARACTER * len(name) + 18


def _picture(title: str, height: int, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
            f' viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_style()}</style>",
            f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
            f'<text class="title" x="16" y="24">{html.escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _dash(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _style() -> str:
    def rules(colour: Mapping[str, str]) -> str:
        series = "".join(
            f".s{number}{{stroke:{colour[name]}}}.f{number}{{fill:{colour[name]}}}"
            for number, name in enumerate(COLOURS)
        )
        return (
            f".ground{{fill:{colour['ground']}}}text{{fill:{colour['text']}}}"
            f".grid{{stroke:{colour['rail']}}}.axis{{stroke:{colour['dim']}}}{series}"
        )

    return (
        "text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:bold}"
        f".line,.axis,.grid{{fill:none}}.line{{stroke-width:2}}{rules(LIGHT)}"
        f"@media(prefers-color-scheme:dark){{{rules(DARK)}}}"
    )


def _scale(low: float, high: float, first: float, last: float, *, log: bool) -> Callable[[float], float]:
    """A value's place in pixels."""

    def along(value: float) -> float:
        return math.log(value) if log else value

    span = along(high) - along(low)
    return lambda value: first + (last - first) * ((along(value) - along(low)) / span if span else 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    """Ones, twos and fives (only ones, where those are many) from below ``low`` to above ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        every = [step * 10.0**power for power in powers for step in steps]
        below = [tick for tick in every if tick <= low]
        above = [tick for tick in every if tick >= high]
        ticks = [below[-1], *(tick for tick in every if low < tick < high), above[0]]
        if len(ticks) <= 9:
            break
    return ticks


def _ticks(high: float) -> list[float]:
    """About five round numbers, from 0 to above ``high``."""
    rough = high / 5 if high > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)] if high > 0 else [0.0, 1.0]
