"""Time to the first token at a stored prefix, in a new process: against the limit, and against recomputing.

The limit is the same forward pass on state that is in memory already; what it is compared with is transformers'
own fastest prefill of the same ids (one single pass, or passes of 1,024).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, timed, words

PREFIX = 4096
QUESTION = "Question {}: who speaks first, and to whom?"


def prepare(store: Path, dtype: str, tokens: int) -> None:
    """Make a session whose state is held up to about ``tokens`` tokens."""
    import kvloom

    with kvloom.open(store, model="smollm2", dtype=dtype, codec="raw") as loom:
        text = words(loom.engine.tokenizer, tokens - 50)
        loom.session("novel").branch().say(text, max_tokens=24)


def measure(store: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """In a process of its own: one say at the stored prefix, then the limit and the recomputation."""
    import torch
    from transformers import DynamicCache

    import kvloom

    with kvloom.open(store, model="smollm2", dtype=dtype, codec="raw") as loom:
        branch = loom.session("novel").branch()
        tries = len(branch.session.branches())  # the same question again would be found in the store
        # As ``kvloom say`` does: the model is loaded when it is needed, and the time counts from then on.
        reply = branch.fork(f"try-{tries}").say(QUESTION.format(tries), max_tokens=1)
        engine = loom.engine
        live = loom.resumer.live
        assert live is not None
        with loom.database.read() as conn:
            from kvloom_store import trie, turns

            last = max(turns.of_session(conn, branch.session.row.row), key=lambda turn: turn.row)
            state = turns.states_of(conn, [last.row])[0]
            ids = trie.tokens_to(conn, state.position.node, state.position.offset)
        held, end = reply.tokens.reused, reply.tokens.reused + reply.tokens.computed
        limit = []
        for _ in range(rounds):
            live.show(held)
            limit.append(timed(lambda: engine.prefill(live, ids[held:end]))[0])
        recompute = []
        for step in (end, 1024):
            cache = DynamicCache(config=engine.model.config)

            def prefill(step: int = step, cache: DynamicCache = cache) -> None:
                with torch.inference_mode():
                    for start in range(0, end, step):
                        part = torch.tensor([ids[start : min(end, start + step)]])
                        positions = torch.arange(start, start + part.shape[1])[None]
                        engine.model(part, past_key_values=cache, position_ids=positions, logits_to_keep=1)

            recompute.append(timed(prefill)[0])
        live.show(held)
        return {
            "reused": reply.tokens.reused,
            "computed": reply.tokens.computed,
            "first_token": reply.seconds.first_token,
            "restore": reply.seconds.restore,
            "limit": min(limit),
            "recompute": min(recompute),
        }


def run(rounds: int = 3) -> dict[str, Any]:
    """Both dtypes, several new processes each."""
    results: dict[str, Any] = {"machine": machine()}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "kvloom.db"
            _child("prepare", store, dtype, rounds)
            rows = [json.loads(_child("measure", store, dtype, rounds)) for _ in range(rounds)]
        results[dtype] = {
            "reused": rows[0]["reused"],
            "computed": rows[0]["computed"],
            **{name: spread([row[name] for row in rows]) for name in ("first_token", "restore", "limit", "recompute")},
            "of_limit": spread([row["limit"] / row["first_token"] for row in rows]),
            "times_sooner": spread([row["recompute"] / row["first_token"] for row in rows]),
        }
    return results


def _child(what: str, store: Path, dtype: str, rounds: int) -> str:
    command = [sys.executable, "-m", "benchmarks.first_token", what, str(store), dtype, str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(run(), indent=2))
    elif sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), sys.argv[3], PREFIX)
    else:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
