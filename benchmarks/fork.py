"""Forking: one row and no state, in the same time whatever the length."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, timed

LENGTHS = (500, 8000)
ROUNDS = 30


def run() -> dict[str, Any]:
    """Milliseconds of a fork at 500 and at 8,000 tokens, in turn; rows and bytes added by one."""
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
            for length in LENGTHS:
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
        times: dict[int, list[float]] = {length: [] for length in LENGTHS}
        before = stats(loom.database)
        for number in range(ROUNDS):
            for length, session in sessions.items():
                times[length].append(timed(lambda s=session, n=number: s.fork(f"b{n}"))[0] * 1000)  # type: ignore[misc]
        after = stats(loom.database)
        return {
            "machine": machine(),
            "milliseconds": {str(length): spread(times[length][2:]) for length in LENGTHS},
            "branches_added": after["branches"] - before["branches"],
            "turns_added": after["turns"] - before["turns"],
            "state_added": after["bytes"]["state_stored"] - before["bytes"]["state_stored"],
        }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
