"""Codecs on real state: how much smaller each makes it, and how fast it packs and unpacks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks.common import ids, machine, timed
from benchmarks.processes import in_new_process
from benchmarks.report import Bar, Section, Table

TOKENS = 4096
ROUNDS = 5
QUICK = {"tokens": 1024, "dtypes": ("bfloat16",)}


class Chunk(NamedTuple):
    """The raw bytes of a chunk, and the bytes of one of its elements."""

    raw: bytes
    item_bytes: int


def state(model: str, dtype: str, tokens: int) -> list[Chunk]:
    """A model's state of the shipped novel's first tokens, cut into chunks as the store cuts it."""
    from kvloom import load_engine
    from kvloom_proto.records import expand
    from kvloom_store import segments
    from kvloom_store.rows import Captured

    engine = load_engine(model, dtype=dtype)
    live = engine.new_state(tokens)
    engine.prefill(live, ids(engine.tokenizer, tokens))
    layers, source = expand(live.layers), Captured(live.source, {})
    return [
        Chunk(segments.gather(source, layers, spec), segments.item_bytes(layers, spec))
        for spec in segments.cut(live.layers, 0, tokens)
    ]


def measure(chunks: list[Chunk], name: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times smaller, bits an element, and GB/s of raw bytes, the best of some rounds."""
    from kvloom_store import codec
    from kvloom_store.loading import READERS

    def pack() -> list[tuple[str, bytes]]:
        return [codec.encode(chunk.raw, chunk.item_bytes, name) for chunk in chunks]

    def unpack(at: int) -> int:
        used, stored = packed[at]
        return len(codec.decode(stored, chunks[at].item_bytes, len(chunks[at].raw), used))

    packed = pack()
    raw, stored = sum(len(chunk.raw) for chunk in chunks), sum(len(each) for _, each in packed)
    each = range(len(chunks))
    with ThreadPoolExecutor(READERS) as pool:
        seconds = {
            "pack": min(timed(pack)[0] for _ in range(2)),
            "unpack": min(timed(lambda: [unpack(at) for at in each])[0] for _ in range(rounds)),
            "together": min(timed(lambda: list(pool.map(unpack, each)))[0] for _ in range(rounds)),
        }
    return {
        "times_smaller": raw / stored,
        "bits": 8 * stored / (raw / chunks[0].item_bytes),
        "used": sorted({used for used, _ in packed}),
        "threads": READERS,
        "gb_per_second": {which: raw / each / 1e9 for which, each in seconds.items()},
    }


def measure_all(model: str, dtype: str, tokens: int) -> dict[str, Any]:
    """In a process of its own: every codec that can be set."""
    from kvloom_proto import codecs

    chunks = state(model, dtype, tokens)
    return {name: measure(chunks, name) for name in codecs.SETTINGS}


def run(
    model: str = "smollm2", tokens: int = TOKENS, dtypes: Sequence[str] = ("bfloat16", "float32")
) -> dict[str, Any]:
    """Every codec, in both dtypes."""
    return {
        "tokens": tokens,
        **{dtype: in_new_process(measure_all, model=model, dtype=dtype, tokens=tokens) for dtype in dtypes},
    }


def section(found: Mapping[str, Any]) -> Section:
    """A row a codec; the bars of show 6."""
    rows, bars, threads = [], [], 1
    for dtype, codecs in ((name, value) for name, value in found.items() if isinstance(value, dict)):
        for name, each in codecs.items():
            used = name if each["used"] == [name] else f"{name} ({', '.join(each['used'])})"
            rates = [f"{each['gb_per_second'][which]:.2f}" for which in ("pack", "unpack", "together")]
            rows.append([dtype, used, f"{each['times_smaller']:.3f}", f"{each['bits']:.2f}", *rates])
            threads = each["threads"]
        if dtype == "bfloat16":
            best = max(codecs, key=lambda name: codecs[name]["times_smaller"])
            smaller, speed = codecs[best]["times_smaller"], codecs[best]["gb_per_second"]["together"]
            bars.append(Bar(f"codec {best}, {dtype}: times smaller than raw", smaller, 1.58, at_least=True))
            bars.append(Bar(f"codec {best}, {dtype}: unpacking", speed, 2, at_least=True, unit=" GB/s"))
    columns = ["", "codec", "times smaller", "bits an element", "pack GB/s", "unpack GB/s", f"on {threads} threads"]
    text = (
        f"The state of {found['tokens']:,} tokens of natural text, cut into chunks as the store cuts it: how much "
        "smaller each lossless codec makes it, and how fast it packs and unpacks (GB of raw bytes a second, the best "
        "of some rounds)."
    )
    return Section("Codecs", text, [Table(columns, rows)], bars=bars)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), **run()}, indent=2))
