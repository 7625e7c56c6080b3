"""What storing state costs: tokens a second while replies are made, and bytes written for each turn.

Three sides by turns, in one process, with one model: a conversation whose state is stored behind it; the same one with
its turns committed, but no state stored; and the decode loop alone, without a store, at the same lengths. A round is
several turns without a pause, so the state of a reply is written while the next one is made. What is left to be written
then is waited for before the next side, and not timed.

A virtual machine's speed changes by more than storing costs, so beside the rates there is the processor time of the
thread that stores, as a share of the time that the replies took: what storing takes away, if it gets in the way of all
cores at once.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ids, machine, spread, words
from benchmarks.processes import counted, in_new_process
from benchmarks.report import Bar, Section, Table, number, ranged
from benchmarks.stored import SESSION

PREFIX, TOKENS, TURNS = 1024, 32, 2
"""Tokens before the first round; tokens of a reply; turns of a round."""

WRITTEN = 8
"""Turns whose bytes are counted."""

QUESTION = "Chapter {}: tell me at length what happens next, and why."
QUICK = {"prefix": 256, "tokens": 12, "rounds": 3, "written": 2}


def measure(folder: str, model: str, dtype: str, prefix: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """In a process of its own: of each round the tokens a second of each side, and the writer's share of the time."""
    import kvloom

    engine = kvloom.load_engine(model, dtype=dtype)
    with (
        kvloom.open(Path(folder) / "stored.db", model=engine) as stored,
        kvloom.open(Path(folder) / "unstored.db", model=engine) as unstored,
    ):
        unstored.writer.submit = lambda job: None  # type: ignore[method-assign]  # turns are committed, no state is
        said: dict[str, list[str]] = {"stored": [], "unstored": []}
        branches = {"stored": stored.session(SESSION).branch(), "unstored": unstored.session(SESSION).branch()}
        for branch in branches.values():
            branch.say(words(engine.tokenizer, prefix), max_tokens=1)
        live = engine.new_state(prefix + rounds * TURNS * (2 * tokens + 64))
        engine.prefill(live, ids(engine.tokenizer, prefix))
        rates: dict[str, list[float]] = {"stored": [], "unstored": [], "bare": []}
        names, shares = list(rates), []
        for number in range(rounds):
            stored.flush()
            before = _writer_seconds()
            for side in names[number % 3 :] + names[: number % 3]:  # each comes first as often as the others
                if side == "bare":
                    rates[side].append(_bare(engine, live, number, tokens))
                else:
                    rates[side].append(_talk(branches[side], number, tokens, said[side]))
                stored.flush()
            shares.append((_writer_seconds() - before) * rates["stored"][-1] / (TURNS * (tokens - 1)))
    assert said["stored"] == said["unstored"], "the two conversations are not the same"
    return {**rates, "writer": shares}


def _writer_seconds() -> float:
    """Processor time of the thread that stores state."""
    [writer] = [thread for thread in threading.enumerate() if thread.name == "kvloom-writer"]
    assert writer.ident is not None
    return clock.clock_gettime(clock.pthread_getcpuclockid(writer.ident))


def _talk(branch: Any, number: int, tokens: int, said: list[str]) -> float:
    """The turns of a round; tokens a second of their replies."""
    made, seconds = 0, 0.0
    for turn in range(TURNS):
        question = QUESTION.format(TURNS * number + turn)
        reply = branch.say(question, max_tokens=tokens, temperature=1.0, seed=number)
        said.append(reply.text)
        if reply.tokens_per_second is not None:
            made += reply.tokens.generated - 1
            seconds += (reply.tokens.generated - 1) / reply.tokens_per_second
    return made / seconds


def _bare(engine: Any, live: Any, number: int, tokens: int) -> float:
    """The same by the engine alone: what is said is as long, chosen and scored in the same way."""
    from kvloom.sampling import SamplingSettings

    settings, made, seconds = SamplingSettings(temperature=1.0), 0, 0.0
    for turn in range(TURNS):
        asked = engine.tokenizer(QUESTION.format(TURNS * number + turn))["input_ids"]
        logits, times = engine.prefill(live, asked), []
        for _ in engine.generate(live, logits, settings, seen=asked, seed=number, scores=[]):
            times.append(clock.perf_counter())
            if len(times) == tokens:
                break
        made += tokens - 1
        seconds += times[-1] - times[0]
    return made / seconds


def count_written(store: str, model: str, dtype: str, prefix: int, tokens: int, turns: int) -> dict[str, Any]:
    """In a process of its own: bytes that turns write, each moved into the file as at the end of a process, and rows.

    ``turns`` more are then written without that, and closed once: the log is moved whenever it is full.
    """
    import kvloom
    from kvloom_store.stats import stats

    found: dict[str, list[float]] = {"log": [], "file": [], "grown": [], "rows": []}
    with kvloom.open(store, model=model, dtype=dtype, codec="raw") as loom:
        branch = loom.session(SESSION).branch()
        branch.say(words(loom.engine.tokenizer, prefix), max_tokens=1)
        log = Path(f"{store}-wal")
        for turn in range(turns):
            loom.flush()
            loom.database.checkpoint()
            size, rows = Path(store).stat().st_size, stats(loom.database)["bytes"]["state_stored"]
            branch.say(QUESTION.format(turn), max_tokens=tokens)
            loom.flush()
            found["log"].append(log.stat().st_size)
            before = counted("wchar")
            loom.database.checkpoint()
            found["file"].append(counted("wchar") - before)
            found["grown"].append(Path(store).stat().st_size - size)
            found["rows"].append(stats(loom.database)["bytes"]["state_stored"] - rows)
        rows, before = stats(loom.database)["bytes"]["state_stored"], counted("wchar")
        for turn in range(turns, 2 * turns):
            branch.say(QUESTION.format(turn), max_tokens=tokens)
        loom.flush()
        rows = stats(loom.database)["bytes"]["state_stored"] - rows
        loom.database.checkpoint()
        together = {"written": counted("wchar") - before, "rows": rows}
    return {"turns": turns, "a_process_a_turn": found, "one_process": together}


def run(
    model: str = "smollm2",
    dtype: str = "float32",
    prefix: int = PREFIX,
    tokens: int = TOKENS,
    rounds: int = 15,
    written: int = WRITTEN,
) -> dict[str, Any]:
    """Rates, and then bytes."""
    settings = {"model": model, "dtype": dtype, "prefix": prefix, "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        rates = in_new_process(measure, folder=folder, rounds=rounds, **settings)
        writer = rates.pop("writer")
        counts = in_new_process(count_written, store=str(Path(folder) / "written.db"), turns=written, **settings)
    each = counts["a_process_a_turn"]
    return {
        "dtype": dtype,
        "prefix": prefix,
        "tokens": tokens,
        "turns": counts["turns"],
        "rates": {side: spread(values) for side, values in rates.items()},
        "cost": spread([1 - a / b for a, b in zip(rates["stored"], rates["unstored"], strict=True)]),
        "cost_of_bare": spread([1 - a / b for a, b in zip(rates["stored"], rates["bare"], strict=True)]),
        "writer": spread(writer),
        "bytes": {name: spread(values) for name, values in each.items()},
        "file_of_rows": spread([a / b for a, b in zip(each["file"], each["rows"], strict=True)]),
        "all_of_rows": spread([(a + b) / c for a, b, c in zip(each["log"], each["file"], each["rows"], strict=True)]),
        "together_of_rows": counts["one_process"]["written"] / counts["one_process"]["rows"],
    }


def section(found: Mapping[str, Any]) -> Section:
    """Rates and bytes; the bars of show 4."""
    text = (
        f"Tokens a second of replies of {found['tokens']} tokens behind {found['prefix']:,} and more, "
        f"{found['dtype']}, {TURNS} turns a round without a pause. *Stored*: as kvloom does by default; *unstored*: "
        "the turns are committed, their state is not written; *bare*: the decode loop without a store. Bytes a "
        "turn: its rows raw, in the log (SQLite's own copy), and moved from there into the file, which happens when "
        "a process closes the store, or the log is full."
    )
    rates = [[side, ranged(each)] for side, each in found["rates"].items()]
    rates.append(["storing costs, of unstored", f"{found['cost']['median']:.1%}"])
    rates.append(["storing costs, of bare", f"{found['cost_of_bare']['median']:.1%}"])
    rates.append(["the writer's processor time, of the replies'", f"{found['writer']['median']:.1%}"])
    names = {"rows": "new rows", "log": "log", "file": "moved into the file", "grown": "the file grows by"}
    kilobytes = [[said, ranged(_thousandth(found["bytes"][name]))] for name, said in names.items()]
    kilobytes.append(["all that is written, over new rows", ranged(found["all_of_rows"])])
    kilobytes.append([f"the same of {found['turns']} turns in one process", number(found["together_of_rows"])])
    bars = [
        Bar("storing state, of decode tokens a second", 100 * found["cost"]["median"], 3, unit=" %"),
        Bar(
            "bytes a turn beyond the log's copy, over its new rows", found["file_of_rows"]["median"], 1.3, unit=" times"
        ),
    ]
    tables = [Table(["", "tokens a second"], rates), Table(["a turn", "kB"], kilobytes)]
    return Section("Storing while talking", text, tables, bars=bars)


def _thousandth(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value / 1e3 for name, value in values.items()}


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
