"""Forking: one row and no state, in the same time whatever the length."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, timed
from benchmarks.plot import LinePlot, points
from benchmarks.report import Section, Table, ranged, time

LENGTHS = (500, 1000, 2000, 4000, 8000)
QUICK = {"lengths": (500, 8000), "rounds": 12}


def run(lengths: Sequence[int] = LENGTHS, rounds: int = 30) -> dict[str, Any]:
    """Seconds of a fork at each length, by turns; rows and bytes added by all of them. The first two do not count."""
    import kvloom
    from kvloom.session import Session
    from kvloom_proto.records import Provenance, Schedule
    from kvloom_store import refs, roots, segments, trie, turns
    from kvloom_store.stats import stats

    with tempfile.TemporaryDirectory() as folder, kvloom.open(Path(folder) / "kvloom.db") as loom:
        sessions = {}
        with loom.database.write() as conn:
            root = roots.root_for(conn, roots.add_model(conn, b"m" * 16, "model", {}))
            provenance = segments.add_provenance(conn, Provenance(1, "", "", "", "", "", ""))
            for length in lengths:
                row = refs.create_session(conn, f"s{length}", {})
                turn = turns.add_turn(conn, row.row, None, {"role": "user", "content": "x"})
                ids = [length, *range(length - 1)]
                at = trie.extend(conn, root, ids)
                turns.add_state(
                    conn, turn.row, root, ids, 0, at, state_start=0, state_end=length, base_state=None,
                    base_segment=None, schedule=Schedule(), provenance=provenance, hidden=None, hidden_dtype=None,
                )  # fmt: skip
                refs.move_branch(conn, refs.branches(conn, row.row)[0].row, None, turn.row)
                sessions[length] = Session(loom, row)
        times: dict[int, list[float]] = {length: [] for length in lengths}
        before = stats(loom.database)
        for number in range(rounds):
            for length, session in sessions.items():
                times[length].append(timed(session.fork, f"b{number}")[0])
        after = stats(loom.database)
        return {
            "seconds": {str(length): spread(times[length][2:]) for length in lengths},
            "branches_added": after["branches"] - before["branches"],
            "turns_added": after["turns"] - before["turns"],
            "state_added": after["bytes"]["state_stored"] - before["bytes"]["state_stored"],
        }


def section(found: Mapping[str, Any]) -> Section:
    """A row a length, and a plot."""
    rows = [[f"{int(length):,}", ranged(each, time)] for length, each in found["seconds"].items()]
    text = (
        f"Forking a branch at so many tokens: {found['branches_added']} branches added {found['turns_added']} turns "
        f"and {found['state_added']} bytes of state."
    )
    milliseconds = {
        int(length): {name: 1e3 * value for name, value in each.items()} for length, each in found["seconds"].items()
    }
    plot = LinePlot("fork", "Forking", "tokens of the branch", "milliseconds", {"a fork": points(milliseconds)})
    return Section("Forking", text, [Table(["tokens", "a fork"], rows)], [plot])


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
