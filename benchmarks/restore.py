"""How fast state comes from its file into fresh memory, checked; against the machine's limits and other formats.

Every side of a round is a process of its own, and all have the same task: the rows of every layer, from a file into a
new buffer such as kvloom's cache layers use. ``first`` is the first time in a process, ``again`` the same into buffers
that are as fresh; the machine has the memory in hand (``first_token`` tells what it takes if not). Each peer in its
best form: the tensors contiguous in one file, mapped, one copy into the same buffers. Neither checks what it reads;
kvloom checks every byte.

Cold: the file was dropped from the page cache before. ``from_disk`` says how much of it then really came from there.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import limits, llama_state
from benchmarks.common import ids, machine, spread, timed
from benchmarks.limits import BESIDE, ROOM
from benchmarks.plot import BarPlot
from benchmarks.processes import counted, drop_cached, in_new_process, memory_in_hand, read_through
from benchmarks.report import Bar, Section, Table, number, ranged, rate, time
from benchmarks.stored import tell

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom_proto.records import LayerSpec
    from kvloom_store.rows import RowBuffer

TOKENS, REPLIES = 4096, 200
AGAIN = 3
QUICK = {"tokens": 1024, "replies": 20, "rounds": 1, "dtypes": ("bfloat16",)}

WHOLE, MANY, PACKED = "whole", "replies", "packed"
"""Sessions: one turn; as many tokens in so many exchanges; the turn again, in a store with the default codec."""

DISK = "disk, sequential"


def prepare(folder: str, model: str, dtype: str, tokens: int, replies: int) -> int:
    """The store, and the same state in the peers' files; bytes of that state."""
    import kvloom

    with kvloom.open(Path(folder) / "kvloom.db", model=model, dtype=dtype, codec="raw") as loom:
        text = ids(loom.engine.tokenizer, 2 * tokens)  # other words for the other one: state of the same is shared
        tell(loom, WHOLE, text[:tokens])
        tell(loom, MANY, text[tokens:], 2 * replies)
    with kvloom.open(Path(folder) / "packed.db", model=model, dtype=dtype) as loom:
        tell(loom, PACKED, text[:tokens])
    with kvloom.open(Path(folder) / "kvloom.db") as loom, loom.database.read() as conn:
        buffer = _kvloom(conn, _segment(conn, WHOLE), tokens)
    _save_peers(Path(folder), buffer, tokens)
    return tokens * row_bytes(buffer.layers)


def row_bytes(layers: Sequence[LayerSpec]) -> int:
    """Bytes of the state of one token."""
    return sum(spec.row_bytes * spec.count for spec in layers)


def _save_peers(folder: Path, buffer: RowBuffer, tokens: int) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{place}": _tensor(rows[:, :tokens], spec.dtype).contiguous()
        for layer, (held, specs) in enumerate(zip(buffer.tensors, _tensors(buffer), strict=True))
        for place, (rows, spec) in enumerate(zip(held, specs, strict=True))
    }
    save_file(tensors, folder / "state.safetensors")
    torch.save(tensors, folder / "state.pt")


def _tensors(buffer: RowBuffer) -> list[Any]:
    from kvloom_proto.records import expand

    return [spec.tensors for spec in expand(buffer.layers)]


def _tensor(rows: Any, dtype: str) -> Any:
    """A torch tensor over the same memory (``kvloom.live.from_bits`` would import transformers into every process)."""
    import torch

    return torch.from_numpy(rows.view(f"i{rows.itemsize}")).view(getattr(torch, dtype))


# The sides: each is a function that brings the state into a new buffer, ready to be timed.


def _kvloom(conn: sa.Connection, segment: int, tokens: int) -> RowBuffer:
    from kvloom_store import loading, planner, restore
    from kvloom_store.rows import RowBuffer

    links = restore.chain(conn, segment)
    layers = links[-1].manifest.layers
    plan = planner.plan(links, tokens, layers)
    buffer = RowBuffer(layers, tokens + ROOM)
    loading.load(conn, links, plan.rows, plan.windows, buffer)
    return buffer


def _segment(conn: sa.Connection, session: str) -> int:
    """The last one of those that the state of a conversation consists of."""
    from kvloom_store import refs, turns
    from kvloom_store.names import MAIN, Ref

    turn = refs.resolve(conn, Ref(session, MAIN, 0)).turn
    assert turn is not None
    segment = turns.states_of(conn, [turn])[0].segment
    assert segment is not None
    return segment


def _safetensors(folder: Path, layers: Any, tokens: int) -> RowBuffer:
    from safetensors.torch import load_file

    return _copied(load_file(folder / "state.safetensors"), layers, tokens)


def _torch_save(folder: Path, layers: Any, tokens: int) -> RowBuffer:
    import torch

    return _copied(torch.load(folder / "state.pt", mmap=True, weights_only=True), layers, tokens)


def _copied(tensors: Mapping[str, Any], layers: Any, tokens: int) -> RowBuffer:
    from kvloom_store.rows import RowBuffer

    buffer = RowBuffer(layers, tokens + ROOM)
    for layer, (held, specs) in enumerate(zip(buffer.tensors, _tensors(buffer), strict=True)):
        for place, (rows, spec) in enumerate(zip(held, specs, strict=True)):
            _tensor(rows, spec.dtype)[:, :tokens].copy_(tensors[f"{layer}.{place}"])
    return buffer


def measure(folder: str, side: str, tokens: int, again: int) -> dict[str, Any]:
    """In a process of its own: seconds of the first time, and of those after it."""
    import kvloom

    for name in ("kvloom_store.planner", "kvloom_store.restore", "kvloom_store.turns", "kvloom_store.rows"):
        importlib.import_module(name)  # not to be timed
    store = _files(Path(folder), {})[side]
    if side in (WHOLE, MANY, PACKED):
        with kvloom.open(store) as loom, loom.database.read() as conn:
            return _times(store, again, _kvloom, conn, _segment(conn, side), tokens)
    importlib.import_module("safetensors.torch")  # and torch with it
    layers = _layers(Path(folder) / "kvloom.db")
    peer = {"safetensors": _safetensors, "torch.save": _torch_save}[side]
    return _times(store, again, peer, Path(folder), layers, tokens)


def _layers(store: Path) -> Any:
    import kvloom
    from kvloom_store import restore

    with kvloom.open(store) as loom, loom.database.read() as conn:
        return restore.link_of(conn, _segment(conn, WHOLE)).manifest.layers


def _times(file: Path, again: int, action: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """Seconds of the action, which reads ``file``; what it made is let go of before it is done again."""
    memory_in_hand(file)
    before = counted("read_bytes")
    first = timed(action, *given)[0]
    from_disk = counted("read_bytes") - before
    return {"first": first, "again": [timed(action, *given)[0] for _ in range(again)], "from_disk": from_disk}


def measure_limits(folder: str, tokens: int, again: int) -> dict[str, float]:
    """In a process of its own, see ``limits``."""
    layers = _layers(Path(folder) / "kvloom.db")
    return limits.stages(f"{folder}/state.safetensors", layers, tokens, again)


def run(
    model: str = "smollm2",
    tokens: int = TOKENS,
    replies: int = REPLIES,
    rounds: int = 5,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """All sides, by turns, round by round, warm and cold."""
    results: dict[str, Any] = {"tokens": tokens, "replies": replies}
    with tempfile.TemporaryDirectory() as name:
        for dtype in dtypes:
            folder = Path(name) / dtype
            folder.mkdir()
            size = in_new_process(prepare, folder=str(folder), model=model, dtype=dtype, tokens=tokens, replies=replies)
            peers = llama_state.prepare_in(folder, tokens) if dtype == "bfloat16" and model == "smollm2" else {}
            rows = [_round(folder, tokens, peers, number) for number in range(rounds)]
            results[dtype] = {"bytes": size, **_summary(rows, size)}
    return results


def _files(folder: Path, peers: Mapping[str, Path]) -> dict[str, Path]:
    stores = {WHOLE: "kvloom.db", MANY: "kvloom.db", PACKED: "packed.db"}
    names = {**stores, "safetensors": "state.safetensors", "torch.save": "state.pt"}
    return {**{side: folder / name for side, name in names.items()}, **peers}


def _round(folder: Path, tokens: int, peers: Mapping[str, Path], number: int) -> dict[str, Any]:
    files = _files(folder, peers)
    order = list(files)[number % len(files) :] + list(files)[: number % len(files)]  # each comes first by turns
    found: dict[str, Any] = {"warm": {}, "cold": {}}
    for heat in ("warm", "cold"):
        for side in order:
            path = files[side]
            read_through(path)
            if heat == "cold":
                drop_cached(path)
            again = AGAIN if heat == "warm" else 0
            if side in peers:
                made = in_new_process(llama_state.measure, path=str(path), tokens=tokens, again=again)
            else:
                made = in_new_process(measure, folder=str(folder), side=side, tokens=tokens, again=again)
            found[heat][side] = made
    read_through(folder / "state.safetensors")
    found["limits"] = in_new_process(measure_limits, folder=str(folder), tokens=tokens, again=AGAIN)
    drop_cached(folder / "state.safetensors")
    found["disk"] = in_new_process(limits.disk, path=str(folder / "state.safetensors"))
    return found


def _summary(rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    sides = list(rows[0]["warm"])  # the first round is in the order of the page
    first = {side: [row["warm"][side]["first"] for row in rows] for side in sides}
    again = {side: [spread(row["warm"][side]["again"])["median"] for row in rows] for side in sides}
    cold = {side: [row["cold"][side]["first"] for row in rows] for side in sides}
    slowest = [min(value for name, value in row["limits"].items() if name != BESIDE) for row in rows]
    return {
        "first": {side: spread(values) for side, values in first.items()},
        "again": {side: spread(values) for side, values in again.items()},
        "cold": {side: spread(values) for side, values in cold.items()},
        "from_disk": {
            **{side: min(row["cold"][side]["from_disk"] for row in rows) for side in sides},
            DISK: min(row["disk"]["from_disk"] for row in rows),
        },
        "limits": {name: spread([row["limits"][name] for row in rows]) for name in rows[0]["limits"]},
        "disk": spread([row["disk"]["rate"] for row in rows]),
        "of_safetensors_first": spread(_over(first["safetensors"], first[WHOLE])),
        "of_safetensors_again": spread(_over(again["safetensors"], again[WHOLE])),
        "of_slowest_stage": spread([size / ours / limit for ours, limit in zip(again[WHOLE], slowest, strict=True)]),
        "cold_of_disk": spread(
            [size / ours / row["disk"]["rate"] for ours, row in zip(cold[WHOLE], rows, strict=True)]
        ),
        "replies_first": spread(_over(first[MANY], first[WHOLE])),
        "replies_again": spread(_over(again[MANY], again[WHOLE])),
    }


def _over(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def section(found: Mapping[str, Any]) -> Section:
    """A table of sides and one of limits for each dtype; the bars of show 2, and the parts of show 3."""
    tokens, replies = found["tokens"], found["replies"]
    names = {WHOLE: "kvloom, one turn", MANY: f"kvloom, {replies} exchanges", PACKED: "kvloom, as stored by default"}
    tables, plots, bars = [], [], []
    for dtype, each in ((name, value) for name, value in found.items() if isinstance(value, dict)):
        tables.append(_sides(dtype, each, names))
        tables.append(_limits(dtype, each))
        plots.append(_plot(dtype, each, names))
        for name, said in (("first", "a process's first"), ("again", "then")):
            ratio = each[f"of_safetensors_{name}"]["median"]
            bars.append(Bar(f"restore, {dtype}, {said}: of safetensors' bandwidth", ratio, 0.5, at_least=True))
        bars.append(
            Bar(f"restore, {dtype}: of its slowest stage", each["of_slowest_stage"]["median"], 0.6, at_least=True)
        )
        cold = each["cold_of_disk"]["median"] if _was_cold(each, WHOLE) and _was_cold(each, DISK) else None
        bars.append(Bar(f"restore, {dtype}, cold: of the disk's sequential read", cold, 0.8, at_least=True))
        figure = f"{tokens:,} tokens of {replies} exchanges, {dtype}: over one turn's"
        bars.append(
            Bar(figure, max(each[f"replies_{name}"]["median"] for name in ("first", "again")), 1.5, unit=" times")
        )
    text = (
        f"The state of {tokens:,} tokens, raw (and as stored by default, packed where that is worth it), from its file "
        "into a new buffer, every chunk checked; each side in processes of its own, in memory the machine has in "
        "hand. *First*: the first time in its process; *then*: into "
        "other buffers, as fresh. safetensors and torch.save: mapped, one copy into the same buffers, "
        "nothing checked. Cold: the file dropped from the page cache. llama.cpp reads its own f16 state into a "
        "context whose memory has been touched, where it is installed (`make bench-peers`)."
    )
    return Section("Restoring", text, tables, plots, bars)


def _sides(dtype: str, each: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    size = each["bytes"]
    rows = []
    for side in each["first"]:
        cold = _was_cold(each, side)
        rows.append(
            [
                names.get(side, side),
                ranged(each["first"][side], time),
                ranged(each["again"][side], time),
                rate(size / each["again"][side]["median"]),
                ranged(each["cold"][side], time) if cold else "not read from a disk",
                rate(size / each["cold"][side]["median"]) if cold else "",
            ]
        )
    return Table(["", "first", "then", "", "cold", ""], rows, f"**{dtype}**, {size / 1e6:.0f} MB")


def _was_cold(each: Mapping[str, Any], side: str) -> bool:
    """Whether it came from a disk, all of it but what a look at the file's beginning had brought."""
    least = 0.5 if side == PACKED else 0.9  # packed it is two thirds as long
    return bool(each["from_disk"][side] > least * each["bytes"])


def _limits(dtype: str, each: Mapping[str, Any]) -> Table:
    rows = [[name, ranged(found, rate)] for name, found in each["limits"].items()]
    rows.append([DISK, ranged(each["disk"], rate) if _was_cold(each, DISK) else "not read from a disk"])
    stages = [found["median"] for name, found in each["limits"].items() if name != BESIDE]
    rows.append(
        ["read, hash and copy into fresh memory, one after another", rate(1 / sum(1 / stage for stage in stages))]
    )
    rows.append(["kvloom, of the slowest of these", number(each["of_slowest_stage"]["median"])])
    return Table(["limits, one thread", dtype], rows)


def _plot(dtype: str, each: Mapping[str, Any], names: Mapping[str, str]) -> BarPlot:
    size = each["bytes"]
    groups: dict[str, list[float | None]] = {
        names.get(side, side): [size / each[heat][side]["median"] / 1e9 for heat in ("first", "again", "cold")]
        for side in each["first"]
    }
    for name, found in each["limits"].items():
        groups[f"limit: {name}"] = [None, found["median"] / 1e9, None]
    groups[f"limit: {DISK}"] = [None, None, each["disk"]["median"] / 1e9]
    return BarPlot(
        f"restore-{dtype}", f"Restoring {size / 1e6:.0f} MB, {dtype}", "GB/s", ["first", "then", "cold"], groups
    )


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
