"""A process that converses at random, and checks what earlier processes left: run by the tests, with one argument.

The argument is a JSON object: scenarios (name, kind, dtype, codec, threads, folder), folder, process, trials, grid,
seed, end ("close", "flush" or "kill"). Each scenario has a store and a journal in the folder. The journal says of each
turn what the process that made it saw in its own live buffers, and what a run that never stopped generated next; every
later process must find the same. The last line printed is a JSON object with counts and failures.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
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
from kvloom_store import refs, trie, turns
from kvloom_store.names import parse_ref
from kvloom_store.turns import TurnState

STEPS = 20
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
    """A digest of rows [0, end) of each tensor of each layer, as they stand in live memory."""
    return [
        sha(np.ascontiguousarray(live.source.rows(layer, number, 0, end)).tobytes())
        for layer, spec in enumerate(live.specs)
        for number in range(len(spec.tensors))
    ]


class Scenario:
    """One model with its store and its journal."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.name = spec["name"]
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
        if self.journal_path.exists():
            for line in self.journal_path.read_text().splitlines():
                entry = json.loads(line)
                self.journal[entry["turn"]] = entry
        self.counts = {"trials": 0, "L0": 0, "L1": 0, "replayed": 0, "reused": 0, "live": 0, "turns": 0, "passes": 0}
        self.failures: list[str] = []
        self.logits: dict[int, str] = {}
        self.trace: list[str] = []
        run_pass = self.engine.run_pass

        def watched(live: LiveState, ids: Any) -> torch.Tensor:
            logits = run_pass(live, ids)
            self.logits[live.length] = sha(bits(logits))
            self.trace.append(self.logits[live.length])
            self.counts["passes"] += 1
            return logits

        self.engine.run_pass = watched  # type: ignore[method-assign]

    def note(self, entry: dict[str, Any]) -> None:
        """Write an entry into the journal, for this process and those to come."""
        self.journal[entry["turn"]] = entry
        with self.journal_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

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
            if len(tokens) == STEPS:
                break
        generator.close()
        live.truncate(live.captured)
        return {"tokens": tokens, "logits": sha(json.dumps([first, *self.trace]).encode())}

    def observe(self, turn: str) -> None:
        """Right after a run: what live memory holds for a turn of it, and how the run would have gone on."""
        live = self.loom.resumer.live
        state, ids = self.state_of(turn)
        if live is None:
            return
        entry = {
            "turn": turn,
            "end": state.state_end,
            "rows": rows_of(live, state.state_end),
            "logits": self.logits.get(state.state_end) if state.hidden is not None else None,
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
        """Bring a turn back: L0 its rows, L1 what comes next, against what was seen when it was made."""
        entry = self.journal[turn]
        state, ids = self.state_of(turn)
        pending = ids if len(ids) - state.state_end <= 1 else ids[: state.state_end]
        with self.engine.lock:
            live, account = self.loom.resumer.resume(pending, state, room=STEPS)
            self.counts["replayed"] += account.replayed
            self.counts["reused"] += account.reused
            self.check("L1", turn, "notices", [], account.notices)
            if live.length >= state.state_end:
                self.check("L0", turn, "rows", entry["rows"], rows_of(live, state.state_end))
            if live.length == state.state_end == len(pending) and live.hidden is not None and entry["logits"]:
                found = sha(bits(self.engine.logits_of(live.hidden)))
                self.check("L1", turn, "logits of the hidden state", entry["logits"], found)
            found_next = self.go_on(live, pending)
        if entry["next"] is None:
            self.note({**entry, "next": found_next})
        else:
            self.check("L1", turn, "what comes next", entry["next"], found_next)

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
            words = rng.choice([2, 6, 15, 60]) if rng.random() < 0.9 else 250
            text = " ".join(rng.choice(WORDS) for _ in range(words)) + rng.choice(".?!")
            run = branch.stream(text, cancel=cancel, progress=progress, **settings)
        before = {each.id for each in session.tree()}
        for pieces, _ in enumerate(run, 1):
            if cancel is not None and how > 0.2 and pieces == 3:
                break  # the caller walks away
            if cancel is not None and pieces == 5:
                cancel.set()
        new = [each for each in session.tree() if each.id not in before]
        for each in new:
            self.observe(each.id)

    def trial(self, rng: random.Random, *, unwritten: bool) -> None:
        """Choose a turn, bring it back, compare, go on from there; ``unwritten``: the state of that is lost."""
        self.counts["trials"] += 1
        known = [turn for turn, entry in self.journal.items() if entry["end"] < 1200]
        turn = rng.choice(known) if known else None
        if turn is not None:
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
