"""A whole turn at a stored prefix as ``kvloom say`` makes it, in a new process: to the first token of the reply.

State is read while the model loads; time counts from the moment the model is there. The limit is the same forward pass
on state that is in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, spread, timed, words
from benchmarks.processes import in_new_process
from benchmarks.report import Bar, Section, Table, ranged, time
from benchmarks.stored import SESSION

PREFIX = 4096
QUESTION = "Question {}: who speaks first, and to whom?"
AGAIN = 3
BARS = {"float32": (1.8, 1.5), "bfloat16": (1.35, 1.25)}
"""At most so much more than the pass on state in memory, and what would be better still."""

QUICK = {"prefix": 512, "rounds": 1, "dtypes": ("float32",)}


def prepare(store: str, model: str, dtype: str, tokens: int) -> None:
    """A conversation whose state is held up to about ``tokens`` tokens."""
    import kvloom

    with kvloom.open(store, model=model, dtype=dtype, codec="raw") as loom:
        loom.session(SESSION).branch().say(words(loom.engine.tokenizer, tokens - 50), max_tokens=24)


def measure(store: str, model: str, dtype: str) -> dict[str, float]:
    """In a process of its own: one turn at the stored prefix, and then its forward pass on state in memory."""
    import kvloom
    from kvloom_store import trie, turns

    with kvloom.open(store, model=model, dtype=dtype, codec="raw") as loom:
        branch = loom.session(SESSION).branch()
        tries = len(branch.session.branches())  # the same question again would be found in the store
        # As ``kvloom say`` does: the model is loaded when it is needed, and the time counts from then on.
        reply = branch.fork(f"try-{tries}").say(QUESTION.format(tries), max_tokens=1)
        live = loom.resumer.live
        assert live is not None
        assert reply.seconds.first_token is not None
        with loom.database.read() as conn:
            last = max(turns.of_session(conn, branch.session.row.row), key=lambda turn: turn.row)
            position = turns.states_of(conn, [last.row])[0].position
            ids = trie.tokens_to(conn, position.node, position.offset)
        held, end = reply.tokens.reused, reply.tokens.reused + reply.tokens.computed
        limit = []
        for _ in range(AGAIN):
            live.show(held)
            limit.append(timed(loom.engine.prefill, live, ids[held:end])[0])
        live.show(held)
        return {
            "reused": held,
            "computed": end - held,
            "first_token": reply.seconds.first_token,
            "restore": reply.seconds.restore,
            "in_memory": min(limit),
            "of_limit": min(limit) / reply.seconds.first_token,
        }


def run(
    model: str = "smollm2", prefix: int = PREFIX, rounds: int = 3, dtypes: Sequence[str] = ("float32", "bfloat16")
) -> dict[str, Any]:
    """Several new processes a dtype, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {dtype: str(Path(folder) / f"{dtype}.db") for dtype in dtypes}
        for dtype, store in stores.items():
            in_new_process(prepare, store=store, model=model, dtype=dtype, tokens=prefix)
        rows: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in dtypes}
        for _ in range(rounds):
            for dtype, store in stores.items():
                rows[dtype].append(in_new_process(measure, store=store, model=model, dtype=dtype))
    return {dtype: {name: spread([row[name] for row in found]) for name in found[0]} for dtype, found in rows.items()}


def section(found: Mapping[str, Any]) -> Section:
    """One table, a column a dtype; the bar of show 1 as a user meets it."""
    said = {
        "stored tokens": lambda each: ranged(each["reused"]),
        "new tokens": lambda each: ranged(each["computed"]),
        "first token": lambda each: ranged(each["first_token"], time),
        "of it waiting for state": lambda each: ranged(each["restore"], time),
        "the same pass on state in memory": lambda each: ranged(each["in_memory"], time),
        "of the limit": lambda each: ranged(each["of_limit"]),
    }
    rows = [[name, *(tell(each) for each in found.values())] for name, tell in said.items()]
    text = (
        "A short turn as `kvloom say` makes it, in a new process, from the moment the model is loaded (its state is "
        "read meanwhile) to the first token of the reply: identity check, template, tokenizer and committing the "
        "turn included."
    )
    bars = [
        Bar(
            f"a turn at 4,096 tokens, {dtype}, its state read while the model loads: over in memory",
            1 / each["of_limit"]["median"],
            BARS[dtype][0],
            wish=BARS[dtype][1],
            unit=" times",
        )
        for dtype, each in found.items()
        if each["reused"]["median"] >= PREFIX * 0.95
    ]
    return Section("A whole turn", text, [Table(["", *found], rows)], bars=bars)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
