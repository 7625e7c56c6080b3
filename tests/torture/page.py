"""docs/torture.md: what a run found, put between the markers of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "torture.md"
NOT_RUN = "Not run: "

OUTCOMES = ("dead", "healed", "lost", "refused", "crashed")
"""What comes of a bit that flips, in the order of the columns."""


def part(page: str, name: str) -> str:
    """A generated part of the page as it is."""
    start = f"<!-- generated: {name} -->\n"
    return page[page.index(start) + len(start) : page.index("<!-- end -->", page.index(start))].rstrip("\n")


def replaced(page: str, name: str, made: str) -> str:
    """The page with one generated part made anew."""
    return page.replace(f"<!-- generated: {name} -->\n{part(page, name)}\n", f"<!-- generated: {name} -->\n{made}\n", 1)


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Figures, one a line."""
    lines = ["| | |", "|---|--:|"]
    lines += [f"| {what} | {f'{value:,}' if isinstance(value, int) else value} |" for what, value in rows]
    return "\n".join(lines)


def listed(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda each: -each[1])) or "none"


def kills(found: Any) -> str:
    """What killed processes left."""
    return table(
        [
            ("processes killed with SIGKILL", found.kills),
            ("of them just before a write", found.at_writes),
            ("stores", found.stores),
            ("operations acknowledged", found.operations),
            ("what was running", listed(found.during)),
            ("turns that were acknowledged, counted at each death", found.turns),
            ("rows whose checksums were verified", found.rows),
            ("branches and tags brought back", found.restored),
            ("tokens replayed for that", found.replayed),
            ("replies that were cut off and kept", found.replies),
            ("tokens of these", found.tokens),
            ("paths recomputed by the referee", found.jobs),
            ("elements it compared", found.elements),
            ("**lost turns, stores that do not open, wrong bits**", len(found.wrong)),
        ]
    )


def writes(found: Any) -> str:
    """What failing writes left."""
    return table(
        [
            ("the last write that failed: behind it there is none", found.writes),
            ("of them failed, each alone and with all behind it", "all" if found.every == 1 else f"1 in {found.every}"),
            ("runs", found.runs),
            *_failures(found),
        ]
    )


def full(found: Any) -> str:
    """What full disks left."""
    rows = [("disks, each with 192 KiB more room than the one before", found.runs), *_failures(found)]
    return table(rows)


def crowd(found: Any) -> str:
    """What many processes at once left."""
    return table(
        [
            ("processes writing", found.writers),
            ("processes reading", found.readers),
            ("seconds", round(found.seconds)),
            ("replies acknowledged", found.operations),
            ("of them kept on a branch of their own, because theirs had moved", found.kept_apart),
            ("sessions removed meanwhile", found.removed),
            ("errors the writers were told", listed(found.errors)),
            ("reads of a session and its main branch", found.reads),
            ("of them of a session that was removed in that moment", found.reads_that_met_a_removal),
            ("a process's first read, worst (ms): it imports what it needs", found.first_read_worst_ms),
            ("a read after that, median (ms)", found.read_median_ms),
            ("a read after that, worst (ms)", found.read_worst_ms),
            ("**other errors, lost turns, wrong bits**", len(found.wrong)),
        ]
    )


def models(found: Any) -> str:
    """What other models were told."""
    head = ["| what differs | going on in the session | tokens reused by a new session that says the same | its bits |"]
    head += ["|---|---|--:|---|"]
    bits = {True: "those of a store that never saw the other model", False: "**wrong**"}
    rows = [f"| {row.what} | {row.there} | {row.reused} | {bits[row.same_bits]} |" for row in found.rows]
    return "\n".join([*head, *rows, f"| | **wrong** | {len(found.wrong)} | |"])


def flips(found: Any) -> str:
    """What flipped bits did, by the kind of page they were in."""
    head = ["| page | " + " | ".join(OUTCOMES) + " |", "|---|" + "--:|" * len(OUTCOMES)]
    rows = [
        f"| {kind} | " + " | ".join(f"{counts.get(each, 0):,}" for each in OUTCOMES) + " |"
        for kind, counts in sorted(found.outcomes.items())
    ]
    sums = [("bits flipped", found.flips), ("**served, not found, crashed, or state not healed**", len(found.wrong))]
    return "\n".join([*head, *rows, "", table(sums)])


flips_real = flips


def fuzz(found: Any) -> str:
    """What hostile bytes did."""
    return table(
        [
            ("mutated bundles", found.bundles),
            ("of them refused", found.refused),
            ("of them sound, and not taken in", found.sound),
            ("of them taken in, and looked at", found.taken),
            ("mutated manifests", found.manifests),
            ("of them refused", found.manifests_refused),
            ("errors", listed(found.errors)),
            ("what the process grew by after the first 1,000 of each (MiB)", found.grew_mib),
            ("**other errors, stores changed, memory beyond the limit**", len(found.wrong)),
        ]
    )


def gc(found: Any) -> str:
    """What came back of state that was dropped."""
    head = [
        "| model | branches | that lost state | bytes of state | left | foretold, fresh (s) | took"
        " | foretold, exactly (s) | took | went on fresh | came back with the same bits |",
        "|---|" + "--:|" * 10,
    ]
    rows = [
        f"| {row.what} | {row.branches} | {row.lost} | {row.before:,} | {row.after:,} | {row.foretold_s:.2f}"
        f" | {row.took_s:.2f} | {row.exactly_foretold_s:.2f} | {row.exactly_took_s:.2f} | {row.went_on}"
        f" | {row.same_bits} |"
        for row in found.rows
    ]
    return "\n".join([*head, *rows, "", table([("**branches lost, other bits, foretold wrongly**", len(found.wrong))])])


def commits(found: Any) -> str:
    """How long turns took to commit while state was written."""
    return table(
        [
            (f"times that {found.tokens:,} tokens of state were written", found.rounds),
            ("each (MB)", found.state_mb),
            ("each took (s)", found.written_s),
            ("turns that committed meanwhile", found.commits),
            ("a commit, median (ms)", found.median_ms),
            ("a commit, 99th percentile (ms)", found.p99_ms),
            ("a commit, worst (ms)", found.worst_ms),
            ("**lost turns, wrong bits, a 99th percentile over 20 ms**", len(found.wrong)),
        ]
    )


def _failures(found: Any) -> list[tuple[str, Any]]:
    return [
        ("operations done", found.operations),
        ("operations refused, by error", listed(found.errors)),
        ("turns that were acknowledged, counted at each run", found.turns),
        ("**other errors, lost turns, stores that do not open, wrong bits**", len(found.wrong)),
    ]


def told(seed: int, seconds: float, cores: int) -> str:
    """One sentence on the run."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sqlalchemy"))
    return f"Seed {seed}, {seconds / 60:.0f} minutes on {cores} cores ({versions})."


def plain(found: Any) -> dict[str, Any]:
    """The figures of one part, for ``--json``."""
    return asdict(found)
