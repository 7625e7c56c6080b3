"""A process that converses at random, and checks what earlier processes left: run by the tests, with one argument.

The argument is a JSON object: scenarios (name, kind, dtype, codec, threads, folder, words, longest, steps), folder,
process, trials, grid, seed, end ("close", "flush" or "kill"). Each scenario has a store and a journal in the folder.
The journal says of each turn what the process that made it saw in its own live state, and what a run that never
stopped generated next, and of random tokens within turns what was restored there; every later process must find the
same. The last line printed is a JSON object with counts and failures.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_model, tiny_tokenizer

import kvloom.passes
from kvloom.engine import TransformersEngine
from kvloom.live import LiveState
from kvloom.loom import KVLoom
from kvloom.sampling import SamplingSettings
from kvloom_proto.records import STORED_BY_ROW, LayerKind
from kvloom_store import refs, trie, turns
from kvloom_store.names import parse_ref
from kvloom_store.turns import TurnState

STEPS = 20
"""Tokens that are generated from what was restored: more than a window has. A scenario can say fewer."""

ENDS_KEPT = 12
"""Ends of passes of a turn that the journal keeps, at most about twice."""
WORDS = [
    "the",
    "and",
    "was",
    "with",
    "😀",
    "naïve",
    "<|im_end|>",
    "she",
    "12",
    "there,",
    "all\n",
    "Ω",
    "would-be",
    "from",
]


def sha(data: bytes) -> str:
    """A short digest for a journal."""
    return hashlib.sha256(data).hexdigest()[:24]


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def rows_of(live: LiveState, end: int) -> list[str]:
    """A digest of the rows [0, end) of each tensor, as they stand in live memory; of a window those still in sight."""
    found = []
    for layer, spec in enumerate(live.specs):
        if spec.kind in STORED_BY_ROW:
            first = max(0, end - spec.window + 1) if spec.kind == LayerKind.WINDOW else 0
            for number in range(len(spec.tensors)):
                found.append(sha(np.ascontiguousarray(live.source.rows(layer, number, first, end)).tobytes()))
    return found


def frame_of(live: LiveState) -> list[str] | None:
    """A digest of each tensor that is overwritten in place, as it is now; None for a model that has none."""
    if not any(spec.kind == LayerKind.KEYFRAME for spec in live.specs):
        return None
    held = live.frame()
    return [sha(array.tobytes()) for layer in sorted(held) for array in held[layer]]


@dataclass(frozen=True)
class Seen:
    """What came out of a pass: how many tokens it ran, and digests of its logits and of the frames after it."""

    tokens: int
    logits: str
    frame: list[str] | None


class Scenario:
    """One model with its store and its journal."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.name = spec["name"]
        self.steps = spec.get("steps", STEPS)
        torch.set_num_threads(spec["threads"])
        if "folder" in spec:
            from kvloom.loom import load_engine

            self.engine = load_engine(spec["folder"], dtype=spec["dtype"])
        else:
            model = tiny_model(spec["kind"], spec["dtype"])
            self.engine = TransformersEngine(model, tiny_tokenizer(), name=f"tiny {spec['kind']}")
        self.loom = KVLoom(folder / f"{self.name}.db", model=self.engine, codec=spec["codec"])
        self.journal_path = folder / f"{self.name}.jsonl"
        self.journal: dict[str, dict[str, Any]] = {}
        self.points: dict[tuple[str, int], dict[str, Any]] = {}
        if self.journal_path.exists():
            for line in self.journal_path.read_text().splitlines():
                self._remember(json.loads(line))
        self.counts = {"trials": 0, "L0": 0, "L1": 0, "replayed": 0, "reused": 0, "live": 0, "turns": 0, "passes": 0}
        self.counts |= {"points": 0, "points again": 0, "points seen live": 0}
        self.failures: list[str] = []
        self.seen: dict[int, Seen] = {}  # by length, of the passes of the last run
        self.trace: list[str] = []
        run_pass = self.engine.run_pass

        def watched(live: LiveState, ids: Any) -> torch.Tensor:
            logits = run_pass(live, ids)
            self.seen[live.length] = Seen(len(ids), sha(bits(logits)), frame_of(live))
            self.trace.append(self.seen[live.length].logits)
            self.counts["passes"] += 1
            return logits

        self.engine.run_pass = watched  # type: ignore[method-assign]

    def note(self, entry: dict[str, Any]) -> None:
        """Write an entry into the journal, for this process and those to come."""
        self._remember(entry)
        with self.journal_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _remember(self, entry: dict[str, Any]) -> None:
        if "point" in entry:
            self.points[entry["turn"], entry["point"]] = entry
        else:
            self.journal[entry["turn"]] = entry

    def check(self, level: str, turn: str, what: str, expected: Any, found: Any) -> None:
        """Count a comparison; keep what failed."""
        if expected == found:
            self.counts[level] += 1
        else:
            self.failures.append(f"{self.name} {level} {turn[:8]} {what}: expected {expected}, found {found}"[:600])

    def state_of(self, turn: str) -> tuple[TurnState, list[int]]:
        """A turn's state, and the tokens of its path."""
        with self.loom.database.read() as conn:
            row = refs.resolve(conn, parse_ref(f"talk@{turn}")).turn
            assert row is not None
            state = turns.best_state(turns.states_of(conn, [row]), self.loom.root)
            assert state is not None
            return state, trie.tokens_to(conn, state.position.node, state.position.offset)

    def go_on(self, live: LiveState, ids: list[int]) -> dict[str, Any]:
        """Generate greedily from a live state, storing nothing: the tokens, and a digest of all logits."""
        logits = self.engine.prefill(live, ids[live.length :]) if live.length < len(ids) else None
        if logits is None:
            assert live.hidden is not None
            logits = self.engine.logits_of(live.hidden)
        first = sha(bits(logits))
        self.trace.clear()
        tokens: list[int] = []
        generator = self.engine.generate(live, logits, SamplingSettings(), seen=ids, seed=0)
        for token in generator:
            tokens.append(token)
            if len(tokens) == self.steps:
                break
        generator.close()
        live.truncate(live.captured)
        return {"tokens": tokens, "first": first, "logits": sha(json.dumps([first, *self.trace]).encode())}

    def observe(self, turn: str, seen: Mapping[int, Seen]) -> None:
        """Right after a run: what live memory holds for a turn of it, and how the run would have gone on."""
        live = self.loom.resumer.live
        state, ids = self.state_of(turn)
        if live is None:
            return
        passes = {at: each for at, each in seen.items() if state.state_start < at <= state.state_end}
        last = passes.get(state.state_end)
        some = sorted(passes)[:: max(1, len(passes) // ENDS_KEPT)]
        entry = {
            "turn": turn,
            "end": state.state_end,
            "rows": rows_of(live, state.state_end),
            "frame": frame_of(live) if live.length == state.state_end else last.frame if last else None,
            "logits": last.logits if last and state.hidden is not None else None,
            "ends": {str(at): asdict(passes[at]) for at in some},
            "next": None,
        }
        if live.length == state.state_end:
            pending = ids if len(ids) - state.state_end <= 1 else ids[: state.state_end]
            if len(pending) > live.length or live.hidden is not None:
                entry["next"] = self.go_on(live, pending)
                self.counts["live"] += 1
        self.note(entry)
        self.counts["turns"] += 1

    def restore(self, turn: str) -> None:
        """Bring a turn back: L0 its state, L1 what comes next, against what was seen when it was made."""
        entry = self.journal[turn]
        state, ids = self.state_of(turn)
        pending = ids if len(ids) - state.state_end <= 1 else ids[: state.state_end]
        with self.engine.lock:
            live, account = self.loom.resumer.resume(pending, state, room=self.steps)
            self.counts["replayed"] += account.replayed
            self.counts["reused"] += account.reused
            self.check("L1", turn, "notices", [], account.notices)
            if live.length >= state.state_end:
                self.check("L0", turn, "rows", entry["rows"], rows_of(live, state.state_end))
            if live.length == state.state_end and entry["frame"] is not None:
                self.check("L0", turn, "frame", entry["frame"], frame_of(live))
            if live.length == state.state_end == len(pending) and live.hidden is not None and entry["logits"]:
                found = sha(bits(self.engine.logits_of(live.hidden)))
                self.check("L1", turn, "logits of the hidden state", entry["logits"], found)
            found_next = self.go_on(live, pending)
        if entry["next"] is None:
            self.note({**entry, "next": found_next})
        else:
            self.check("L1", turn, "what comes next", entry["next"], found_next)

    def point(self, rng: random.Random, turns_known: list[str]) -> None:
        """Restore at a random token of a random turn, or where some process did before, and go on from there."""
        before = [key for key in self.points if key[0] in turns_known]
        if before and rng.random() < 0.5:
            turn, at = rng.choice(before)
        else:
            turn = rng.choice(turns_known)
            end, ends = self.journal[turn]["end"], sorted(map(int, self.journal[turn]["ends"]))
            at = rng.choice(ends) if ends and rng.random() < 0.4 else rng.randint(1, end)
        self.restore_at(turn, at)
        if rng.random() < 0.2:
            self.loom.resumer.forget()
            self.restore_at(turn, at)

    def restore_at(self, turn: str, at: int) -> None:
        """Bring back a turn's first ``at`` tokens: the same as ever, and as the run that never stopped had them."""
        state, ids = self.state_of(turn)
        ends = self.journal[turn]["ends"].get(str(at))
        with self.engine.lock:
            live, account = self.loom.resumer.resume(ids[:at], state, room=self.steps, logits=False)
            self.counts["replayed"] += account.replayed
            self.counts["reused"] += account.reused
            self.check("L1", turn, f"notices at {at}", [], account.notices)
            self.check("L1", turn, f"length at {at}", at, live.length)
            found: dict[str, Any] = {"turn": turn, "point": at, "rows": rows_of(live, at), "frame": frame_of(live)}
            if ends is not None:
                self.check("L1", turn, f"frame live at {at}", ends["frame"], found["frame"])
                self.counts["points seen live"] += 1
            live, _ = self.loom.resumer.resume(ids[:at], state, room=self.steps)
            self.trace.clear()
            found["next"] = self.go_on(live, ids[:at])
        first = found["next"]["first"]
        if ends is not None and (ends["tokens"] == 1 or at == state.state_end):
            self.check("L1", turn, f"logits live at {at}", ends["logits"], first)
        known = self.points.get((turn, at))
        if known is None:
            self.note(found)
        for what in ("rows", "frame", "next") if known else ():
            self.check("L1", turn, f"{what} at {at}", known[what], found[what])
        self.counts["points"] += 1
        self.counts["points again"] += known is not None

    def talk(self, rng: random.Random, turn: str | None) -> None:
        """Fork at a turn (None: begin), and go on from there in some way."""
        session = self.loom.session("talk", system="You are the one who was there.")
        if turn is None:
            branch, last = session.branch(), None
        else:
            branch = session.fork(f"f{rng.getrandbits(48):x}", at=turn)
            last = branch.log()[-1]
        settings: dict[str, Any] = {
            "max_tokens": rng.choice([1, 2, 17, 33]),
            "temperature": rng.choice([0.0, 0.0, 1.0]),
            "seed": rng.getrandbits(32),
        }
        if rng.random() < 0.2:
            settings["stop"] = [rng.choice("etaoin ")]
        how = rng.random()
        cancel, progress = None, None
        if how < 0.3:
            cancel = threading.Event()
            if how < 0.1:

                def progress(done: int, _total: int, cancel: threading.Event = cancel) -> None:
                    if done:
                        cancel.set()  # within the prefill, after its first pass

        what = rng.random()
        if last is not None and last.role == "assistant" and last.finish_reason != "stop" and what < 0.35:
            run = branch.continue_reply(cancel=cancel, progress=progress, **settings)
        elif last is not None and what < 0.5:
            run = branch.regenerate(cancel=cancel, progress=progress, **settings)
        else:
            words = rng.choice(self.spec.get("words", [2, 6, 15, 60]))
            if rng.random() < 0.1:
                words = self.spec.get("many_words", 250)
            text = " ".join(rng.choice(WORDS) for _ in range(words)) + rng.choice(".?!")
            run = branch.stream(text, cancel=cancel, progress=progress, **settings)
        before = {each.id for each in session.tree()}
        self.seen.clear()
        for pieces, _ in enumerate(run, 1):
            if cancel is not None and how > 0.2 and pieces == 3:
                break  # the caller walks away
            if cancel is not None and pieces == 5:
                cancel.set()
        new = [each for each in session.tree() if each.id not in before]
        seen = dict(self.seen)  # to look at a turn may run further
        for each in new:
            self.observe(each.id, seen)

    def trial(self, rng: random.Random, *, unwritten: bool) -> None:
        """Choose a turn, bring it back, compare, go on from there; ``unwritten``: the state of that is lost."""
        self.counts["trials"] += 1
        longest = self.spec.get("longest", 1200)
        known = [turn for turn, entry in self.journal.items() if entry["end"] < longest]
        turn = rng.choice(known) if known else None
        if turn is not None:
            self.point(rng, known)
            self.restore(turn)
            if rng.random() < 0.3:
                self.loom.resumer.forget()
                self.restore(turn)
        if unwritten:
            self.loom.writer.submit = lambda job: None  # type: ignore[method-assign]
        self.talk(rng, turn)


def main() -> None:
    """Run what the argument says."""
    spec = json.loads(sys.argv[1])
    kvloom.passes.GRID = spec["grid"]
    folder = Path(spec["folder"])
    results = {}
    for described in spec["scenarios"]:
        rng = random.Random(f"{described['name']} {spec['process']} {spec.get('seed', 0)}")
        scenario = Scenario(folder, described)
        for number in range(spec["trials"]):
            scenario.trial(rng, unwritten=spec["end"] == "kill" and number == spec["trials"] - 1)
        if spec["end"] == "close":
            scenario.loom.close()
        elif spec["end"] == "flush":
            scenario.loom.flush()
        results[scenario.name] = {**scenario.counts, "failures": scenario.failures}
    print(json.dumps(results), flush=True)
    if spec["end"] != "close":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
