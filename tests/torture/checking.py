"""What must be true of a store whose process died: found by another process, which opens it as a user's would."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exact import harness, whole
from exact.worker import frame_of, rows_of

from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom.passes import KEYFRAME_SPACING
from kvloom_proto.records import read_schedule
from kvloom_store import outlook, turns
from torture.workload import described, state_of


@dataclass
class Acknowledged:
    """What a process told before it died: by session its turns and names, and of turns what their state was.

    ``busy`` are the sessions that an operation was about to change; ``removing`` those it may have taken away.
    """

    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    running: str = "opening"
    removing: str | None = None
    done: int = 0

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in one thing that was told."""
        if "begins" in event:
            self.running = event["begins"]
        elif "removing" in event:
            self.removing = event["removing"]
        if "session" in event:
            if event.get("gone"):
                self.sessions.pop(event["session"], None)
            else:
                self.sessions[event["session"]] = {"turns": event["turns"], "names": event["names"]}
            self.states |= event.get("state", {})
        if "failed" in event:
            self.running, self.removing, self.sessions = "", None, dict(event["sessions"])
        if "done" in event:
            self.running, self.done = "", self.done + 1
            if self.removing is not None:
                self.sessions.pop(self.removing, None)
            self.removing = None

    @property
    def turns(self) -> int:
        """How many turns were acknowledged that no operation was taking away."""
        return sum(len(each["turns"]) for name, each in self.sessions.items() if name != self.removing)

    def renewed(self, found: Mapping[str, Any]) -> Acknowledged:
        """What is known when the store was looked at: also what had come through without a word."""
        return Acknowledged(dict(found["sessions"]), {**self.states, **found["states"]})


def check(path: Path, engine: TransformersEngine, known: Acknowledged) -> dict[str, Any]:
    """Open the store, compare it with what was acknowledged, and bring every branch back; what is wrong, in words."""
    wrong: list[str] = []
    with KVLoom(path, model=engine) as loom:
        kept = {each.turn: each.tokens for each in loom.kept}
        with loom.database.read() as conn:
            integrity = conn.exec_driver_sql("PRAGMA integrity_check").scalars().all()
            if integrity != ["ok"]:
                wrong.append(f"SQLite: {integrity[:3]}")
            rows = whole.check(conn, crashed=True)
        here = listed(loom)
        wrong += _lost(known, here, set(kept))
        states, restored, replayed = _restored(loom, known, here, wrong)
        loom.flush()
        with loom.database.read() as conn:
            whole.check(conn, crashed=True)
        sessions = listed(loom)
    return {
        "wrong": wrong,
        "rows": rows,
        "replies": len(loom.kept),
        "tokens": sum(kept.values()),
        "restored": restored,
        "replayed": replayed,
        "sessions": sessions,
        "states": states,
    }


def listed(loom: KVLoom) -> dict[str, Any]:
    """The turns and the names of every session."""
    found = [described(loom, each.name) for each in loom.sessions()]
    return {each["session"]: {"turns": each["turns"], "names": each["names"]} for each in found}


def _lost(known: Acknowledged, here: Mapping[str, Any], kept: set[str]) -> list[str]:
    """What was acknowledged and is not there; ``kept`` are turns made of replies that had not ended.

    Such a reply may have been refused when it was to end (a full disk), with its branch where it was: from there the
    branch has then moved to it, and else it would be on a branch of its own.
    """
    wrong = []
    for name, session in known.sessions.items():
        if name == known.removing:
            continue
        if name not in here:
            wrong.append(f"session {name} is gone")
            continue
        for turn, said in session["turns"].items():
            if here[name]["turns"].get(turn) != said:
                wrong.append(f"turn {turn} of {name}: said {said}, found {here[name]['turns'].get(turn)}")
        for point, turn in session["names"].items():
            found = here[name]["names"].get(point)
            # A branch may have been moved by what was running; that it is there still holds.
            if found != turn and found not in kept and (not known.running or found is None):
                wrong.append(f"{name}@{point} was at {turn}, is at {found}")
    return wrong


def _restored(
    loom: KVLoom, known: Acknowledged, here: Mapping[str, Any], wrong: list[str]
) -> tuple[dict[str, Any], int, int]:
    """Every branch brought back, and digests of that: by turn, how many, and how many tokens were replayed."""
    states: dict[str, Any] = {}
    replayed = 0
    for name, session in here.items():
        for turn in set(session["names"].values()) - set(states):
            state, ids = state_of(loom, f"{name}@{turn}")
            if state is None:
                continue
            with loom.database.read() as conn:  # what was dropped is to come back as it was first
                state = turns.original_of(conn, state)
                path, exact = ids[: state.state_end], {"logits": False, "exact": True}
                if outlook.of_tokens(conn, loom.root, path, state, grid=KEYFRAME_SPACING, **exact).gone:
                    continue  # what it stood on was dropped, and removed with its session
            with loom.engine.lock:
                live, account = loom.resumer.resume(path, state, room=1, **exact)
                found = [rows_of(live, state.state_end), frame_of(live)]
            replayed += account.replayed
            wrong += [f"{name}@{turn}: {notice}" for notice in account.notices]
            if live.length != state.state_end:
                wrong.append(f"{name}@{turn}: {live.length} tokens of {state.state_end} came back")
            if known.states.get(turn, found) != found:
                wrong.append(f"{name}@{turn}: other bits than before")
            states[turn] = found
    return states, len(states), replayed


def _alone(chain: Sequence[tuple[Mapping[str, Any], int]]) -> bool:
    schedules = [read_schedule(row["schedule"]) for row, _ in chain]
    return not any(each.unknown or any(one.is_sibling for one in each.passes) for each in schedules)


def jobs(path: Path, folder: Path, model: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Export some leaves of a store for the referee; the folders."""
    from kvloom_store.database import Database

    database = Database(path, must_exist=True)
    with database.read() as conn:
        # The referee knows passes of one path alone, not of siblings that were decoded together; and whole ones, not
        # those that a bundle cut where another path went on.
        found = [state for state in harness.leaves(database) if _alone(harness.chain_of(conn, state))]
    made = []
    for state in found[:: max(1, -(-len(found) // most))]:
        to = folder / f"{path.stem}-{state['id']}"
        made.append(os.fspath(harness.export(database, state["id"], to, model, "float32")))
    database.close()
    return {"jobs": made}
