"""Time to the first token, its state restored, against the same token on state in memory, and against recomputing.

A round of a length is a new process. The model is loaded and has run once; then the state is brought back from the
file and one token is run on it. The same token again, on the state that is in memory now, is the limit. What it is
compared with is transformers' own fastest prefill of the same tokens, in one pass or in passes of 1,024. Cold: the
store was closed and its file dropped from the page cache before. Opening the store, and what tells one model from
another, are not counted: they do not grow with the length.

Memory for the state is fresh, and such as the machine has in hand. It is also measured without seeing to that, in
processes of its own: a virtual machine may have to get memory from its host first.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ids, machine, recompute, spread, timed
from benchmarks.plot import LinePlot, points
from benchmarks.processes import drop_cached, in_new_process, memory_in_hand, read_through
from benchmarks.report import Bar, Section, Table, ranged, time
from benchmarks.stored import SESSION, bring_back, path_of, tell

LENGTHS = (256, 512, 1024, 2048, 4096, 8000)
SHORT = (8, 16, 32, 64)
"""Lengths about where restoring begins to pay: one process measures them all, their state is small."""

PASSES = (1 << 20, 1024)
"""Tokens in a pass of a prefill: all of them, or as many."""

AGAIN = 5
WARM = 256
TWICE = 1024
"""Up to so many tokens recomputing is measured twice, and the better one counts: the first of its shape is slower."""

FEW = 4096
"""Recomputing more tokens than these is measured once in each way."""

QUICK = {"lengths": (1024,), "short": (32, 256), "rounds": 1, "dtypes": ("float32",)}


def prepare(stores: Mapping[str, str], model: str, dtype: str) -> None:
    """For each length a store with a conversation of one turn, whose state is held for one more token than that."""
    import kvloom

    engine = kvloom.load_engine(model, dtype=dtype)
    for tokens, store in stores.items():
        with kvloom.open(store, model=engine, codec="raw") as loom:
            tell(loom, SESSION, ids(engine.tokenizer, int(tokens) + 1))


def measure(
    stores: Mapping[str, str], model: str, dtype: str, passes: Sequence[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """In a process of its own, for each length of ``stores``: warm, in memory, cold, and recomputed in ``passes``."""
    import kvloom

    engine = kvloom.load_engine(model, dtype=dtype)
    # The first passes of a process read the weights and prepare kernels: neither side's are timed.
    engine.run_pass(engine.new_state(1), [0])
    recompute(engine.model, ids(engine.tokenizer, WARM), WARM)
    found = {}
    for tokens, store in stores.items():
        length = int(tokens)
        read_through(store)
        warm = [_restored(engine, store, length) for _ in range(rounds)]
        drop_cached(store)
        cold = _restored(engine, store, length)
        told = ids(engine.tokenizer, length + 1)
        tries = 2 if length <= TWICE else 1
        times = {str(step): min(timed(recompute, engine.model, told, step)[0] for _ in range(tries)) for step in passes}
        found[tokens] = {"warm": warm, "cold": cold, "recompute": times}
    return found


def measure_host(store: str, model: str, dtype: str, length: int) -> dict[str, Any]:
    """In a process of its own: warm, in memory that the machine may have to get from its host."""
    import kvloom

    engine = kvloom.load_engine(model, dtype=dtype)
    engine.run_pass(engine.new_state(1), [0])
    read_through(store)
    return _restored(engine, store, length, in_hand=False)


def _restored(engine: Any, store: str, length: int, *, in_hand: bool = True) -> dict[str, Any]:
    """From the file to the next token, in seconds, and the same token on state that is in memory."""
    import kvloom

    gc.collect()
    if in_hand:
        memory_in_hand(store)
    with kvloom.open(store, model=engine, codec="raw") as loom:
        path = path_of(loom, SESSION)
        _ = loom.resumer
        restore, (live, account) = timed(bring_back, loom, path, length)
        token = path.ids[length : length + 1]
        first, chosen = timed(_choose, engine, live, token)
        again = []
        for _ in range(AGAIN):
            live.show(length)
            seconds, same = timed(_choose, engine, live, token)
            assert same == chosen, "the same token on the same state chose another one"
            again.append(seconds)
        return {
            "restore": restore,
            "first_token": restore + first,
            "in_memory": spread(again)["median"],
            "bytes": account.bytes_read,
        }


def _choose(engine: Any, live: Any, tokens: Sequence[int]) -> int:
    return int(engine.run_pass(live, tokens).argmax())


def run(
    model: str = "smollm2",
    lengths: Sequence[int] = LENGTHS,
    short: Sequence[int] = SHORT,
    rounds: int = 3,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Each length of each dtype in new processes, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {dtype: _prepared(Path(folder), model, dtype, (*short, *lengths)) for dtype in dtypes}
        rows: dict[str, dict[str, list[Any]]] = {dtype: {} for dtype in dtypes}
        for number in range(rounds):
            for dtype in dtypes:
                for some in ([*short], *([length] for length in lengths)):
                    made = _round(stores[dtype], model, dtype, some, rows[dtype], number, rounds)
                    for tokens, row in made.items():
                        row["host"] = _from_host(stores[dtype][tokens], model, dtype, int(tokens))
                        rows[dtype].setdefault(tokens, []).append(row)
    return {dtype: {tokens: _summary(found) for tokens, found in rows[dtype].items()} for dtype in dtypes}


def _prepared(folder: Path, model: str, dtype: str, lengths: Sequence[int]) -> dict[str, str]:
    stores = {str(tokens): str(folder / f"{dtype}-{tokens}.db") for tokens in lengths}
    in_new_process(prepare, stores=stores, model=model, dtype=dtype)
    return stores


def _from_host(store: str, model: str, dtype: str, length: int) -> Any:
    """None where the state is so small that its memory does not show."""
    if length <= max(SHORT):
        return None
    return in_new_process(measure_host, store=store, model=model, dtype=dtype, length=length)


def _round(
    stores: Mapping[str, str],
    model: str,
    dtype: str,
    lengths: Sequence[int],
    before: Mapping[str, Sequence[Any]],
    number: int,
    rounds: int,
) -> Any:
    """One process over some lengths. After the first round only the way to recompute that was faster is measured."""
    passes: Sequence[int] = PASSES[:1] if max(lengths) <= PASSES[1] else PASSES
    if number and len(passes) > 1:
        times = before[str(lengths[0])][0]["recompute"]
        passes = () if lengths[0] > FEW else (int(min(times, key=lambda step: times[step])),)
    return in_new_process(
        measure,
        stores={str(tokens): stores[str(tokens)] for tokens in lengths},
        model=model,
        dtype=dtype,
        passes=passes,
        rounds=1 if max(lengths) > max(SHORT) else rounds,
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A length over its rounds. Ratios are taken within a process, but for that to recomputing."""
    warm = [each for row in rows for each in row["warm"]]
    host = [row["host"] for row in rows if row["host"] is not None]
    best = min((row["recompute"] for row in rows if row["recompute"]), key=lambda times: min(times.values()))
    way = min(best, key=lambda step: best[step])
    recomputed = spread([row["recompute"][way] for row in rows if way in row["recompute"]])
    return {
        "bytes": warm[0]["bytes"],
        "restore": spread([each["restore"] for each in warm]),
        "first_token": spread([each["first_token"] for each in warm]),
        "in_memory": spread([each["in_memory"] for each in warm]),
        "cold": spread([row["cold"]["first_token"] for row in rows]),
        "host": spread([each["first_token"] for each in host]) if host else None,
        "recompute": recomputed,
        "recompute_passes_of": int(way),
        "of_in_memory": spread([each["first_token"] / each["in_memory"] for each in warm]),
        "host_of_in_memory": spread([each["first_token"] / each["in_memory"] for each in host]) if host else None,
        "restore_of_recompute": spread([each["restore"] / recomputed["median"] for each in warm]),
        "times_sooner": spread([recomputed["median"] / each["first_token"] for each in warm]),
        "times_sooner_cold": spread([recomputed["median"] / row["cold"]["first_token"] for row in rows]),
    }


def break_even(lengths: Mapping[str, Mapping[str, Any]], what: str) -> int | None:
    """The least measured length from which on restoring was never slower than recomputing; None: there is none."""
    least = None
    for tokens in sorted(map(int, lengths), reverse=True):
        each = lengths[str(tokens)]
        if each[what]["median"] > each["recompute"]["median"]:
            break
        least = tokens
    return least


def section(found: Mapping[str, Any]) -> Section:
    """Tables and plots by dtype; the bars of issue 5, shows 1 and 3."""
    tables, plots, bars = [], [], []
    for dtype, each in found.items():
        lengths = {tokens: each[tokens] for tokens in sorted(each, key=int)}
        warm, cold = break_even(lengths, "first_token"), break_even(lengths, "cold")
        caption = (
            f"**{dtype}.** Restoring was not slower than recomputing from {_tokens(warm)} on, cold from "
            f"{_tokens(cold)} on (the shortest measured: {min(map(int, lengths))})."
        )
        tables.append(_table(lengths, caption))
        plots.append(_plot(dtype, lengths))
        bars += _bars(dtype, lengths)
    text = (
        "Time to the next token at a stored prefix, in a new process for every round; the model is loaded and has "
        "run once, memory for the state is fresh, and the machine has it in hand. *Restored* is from the file to the "
        "next token; *in memory* is the same pass on state that is there: the limit. *Recomputed* is transformers' "
        "own prefill of the same tokens in one pass or in passes of 1,024, whichever was faster. Cold: the file was "
        "dropped from the page cache before. *From the host*: without seeing to it that the machine has the memory; "
        "a virtual one gives it back to its host while it is free, and gets it again a page at a time."
    )
    return Section("Time to the first token", text, tables, plots, bars)


def _tokens(length: int | None) -> str:
    return "no length" if length is None else f"{length:,} tokens"


def _table(lengths: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    columns = [
        "tokens", "restore alone", "restored", "in memory", "over in memory", "restored, cold",
        "restored, from the host", "over in memory", "recomputed", "times sooner", "restore of recomputed",
    ]  # fmt: skip
    rows = [
        [
            f"{int(tokens):,}",
            ranged(each["restore"], time),
            ranged(each["first_token"], time),
            ranged(each["in_memory"], time),
            ranged(each["of_in_memory"]),
            ranged(each["cold"], time),
            ranged(each["host"], time) if each["host"] else "",
            ranged(each["host_of_in_memory"]) if each["host"] else "",
            ranged(each["recompute"], time),
            ranged(each["times_sooner"]),
            f"{each['restore_of_recompute']['median']:.2%}",
        ]
        for tokens, each in lengths.items()
    ]
    return Table(columns, rows, caption)


def _plot(dtype: str, lengths: Mapping[str, Mapping[str, Any]]) -> LinePlot:
    names = {"recompute": "recomputed", "cold": "restored, cold", "first_token": "restored", "in_memory": "in memory"}
    series = {said: points({int(n): each[name] for n, each in lengths.items()}) for name, said in names.items()}
    title = f"Time to the first token, {dtype}"
    return LinePlot(f"first-token-{dtype}", title, "tokens of the prefix", "seconds", series, log_y=True)


def _bars(dtype: str, lengths: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    bars = []
    at_4096, at_8000 = lengths.get("4096"), lengths.get("8000")
    if at_4096 is not None:
        bar, wish = {"float32": (1.8, 1.5), "bfloat16": (1.35, 1.25)}[dtype]
        over = at_4096["of_in_memory"]["median"]
        bars.append(
            Bar(
                f"4,096 tokens, {dtype}, the model loaded before, memory in hand: restored over in memory",
                over,
                bar,
                wish=wish,
                unit=" times",
            )
        )
        alone = 100 * at_4096["restore_of_recompute"]["median"]
        bars.append(Bar(f"4,096 tokens, {dtype}, memory in hand: restore alone, of recomputing", alone, 1, unit=" %"))
    if at_8000 is not None and dtype == "float32":
        sooner = at_8000["times_sooner"]["median"]
        bars.append(
            Bar("8,000 tokens, float32, memory in hand: times sooner than recomputing", sooner, 100, at_least=True)
        )
    for name, said in (("times_sooner", "warm"), ("times_sooner_cold", "cold")):
        worst = min((each[name]["median"] for tokens, each in lengths.items() if int(tokens) >= 32), default=None)
        figure = f"from 32 tokens on, {dtype}, {said}: times sooner than recomputing, at worst"
        bars.append(Bar(figure, worst, 1, at_least=True))
    return bars


if __name__ == "__main__":
    arguments = QUICK if "quick" in sys.argv[1:] else {}
    print(json.dumps({"machine": machine(), **run(**arguments)}, indent=2))  # type: ignore[arg-type]
