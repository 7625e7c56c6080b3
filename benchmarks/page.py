"""The page and its plots, made of the results and nothing else: a pure function, so that both can be checked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import svg
from benchmarks.report import Bar, Section, Table, number

PAGE, RESULTS, PLOTS = "RESULTS.md", "results.json", "plots"


def files(results: Mapping[str, Any]) -> dict[str, str]:
    """The text of every file that belongs beside the results, by its path from there."""
    sections = {name: section_of(name, each["found"]) for name, each in results["measured"].items()}
    made = {PAGE: page(results, sections)}
    for section in sections.values():
        made |= {f"{PLOTS}/{plot.file}.svg": svg(plot) for plot in section.plots}
    return made


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write them, and take away plots that are not among them any more."""
    made = files(results)
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    for old in (folder / PLOTS).glob("*.svg"):
        if f"{PLOTS}/{old.name}" not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text)


def section_of(name: str, found: Mapping[str, Any]) -> Section:
    """What a measurement shows of what it found."""
    section: Section = importlib.import_module(f"benchmarks.{name}").section(found)
    return section


def page(results: Mapping[str, Any], sections: Mapping[str, Section]) -> str:
    """The page as Markdown."""
    lines = ["# Results", "", *_opening(results), ""]
    bars = [bar for section in sections.values() for bar in section.bars]
    if bars:
        lines += ["## Figures and their bars", "", *_table(_bars(bars)), ""]
    for name, section in sections.items():
        lines += [f"## {section.title}", "", section.text, ""]
        for table in section.tables:
            lines += [*([table.caption, ""] if table.caption else []), *_table(table), ""]
        lines += [line for plot in section.plots for line in (f"![{plot.title}]({PLOTS}/{plot.file}.svg)", "")]
        lines += [_told(name, results["measured"][name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _opening(results: Mapping[str, Any]) -> Iterator[str]:
    command = "make bench QUICK=1" if results["quick"] else "make bench"
    yield (
        f"Written by `{command}` from `results.json`, which has every figure; `python -m benchmarks --page` writes "
        "it again."
    )
    if results["quick"]:
        yield "A quick run: fewer lengths, fewer rounds. It shows that all is well, and is nothing to quote."
    yield (
        "All figures are of one run on one machine. What is compared was measured by turns, round by round; a "
        "figure is the median of its rounds, with the least and the most behind it. No figure here was measured "
        "elsewhere."
    )
    yield ""
    machine = dict(results["machine"])
    versions = machine.pop("versions")
    rows = [
        ["model", results["model"]],
        ["begun", results["began"]],
        ["took", f"{results['seconds'] / 60:.1f} minutes"],
        *([name.replace("_", " "), _said(value)] for name, value in machine.items()),
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
    ]
    yield from _table(Table(["", ""], rows))


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bars(bars: Sequence[Bar]) -> Table:
    rows = []
    for bar in bars:
        bound = "at least" if bar.at_least else "at most"
        wish = f" (better: {number(bar.wish)})" if bar.wish is not None else ""
        measured = "not measured" if bar.measured is None else f"{number(bar.measured)}{bar.unit}"
        kept = "" if bar.measured is None else "yes" if bar.met else "**no**"
        rows.append([bar.figure, measured, f"{bound} {number(bar.bar)}{bar.unit}{wish}", kept])
    return Table(["figure", "measured", "bar", "met"], rows)


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{'---|' * len(table.columns)}"
    for row in table.rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _told(name: str, each: Mapping[str, Any]) -> str:
    before, after = each["load"]
    return f"`python -m benchmarks {name}`: {each['seconds']:.0f} s, load {before} before and {after} after."
