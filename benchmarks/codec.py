"""Codecs on real state: how much smaller each makes it, and how fast it packs and unpacks."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks.common import machine, table, timed, words

TOKENS = 4096
ROUNDS = 5


class Chunk(NamedTuple):
    """The raw bytes of a chunk, and the bytes of one of its elements."""

    raw: bytes
    item_bytes: int


def state(dtype: str, tokens: int) -> list[Chunk]:
    """SmolLM2's state of the shipped novel's first tokens, cut into chunks as the store cuts it."""
    from kvloom import load_engine
    from kvloom_proto.records import expand
    from kvloom_store import segments
    from kvloom_store.rows import Captured

    engine = load_engine("smollm2", dtype=dtype)
    ids = engine.tokenizer(words(engine.tokenizer, tokens))["input_ids"][:tokens]
    live = engine.new_state(len(ids))
    engine.prefill(live, ids)
    layers, source = expand(live.layers), Captured(live.source, {})
    return [
        Chunk(segments.gather(source, layers, spec), segments.item_bytes(layers, spec))
        for spec in segments.cut(live.layers, 0, len(ids))
    ]


def measure(chunks: list[Chunk], name: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times smaller, bits an element, and GB/s of raw bytes, the best of some rounds."""
    from kvloom_store import codec
    from kvloom_store.restore import DECODERS

    def pack() -> list[tuple[str, bytes]]:
        return [codec.encode(chunk.raw, chunk.item_bytes, name) for chunk in chunks]

    def unpack(at: int) -> int:
        used, stored = packed[at]
        return len(codec.decode(stored, chunks[at].item_bytes, len(chunks[at].raw), used))

    packed = pack()
    raw, stored = sum(len(chunk.raw) for chunk in chunks), sum(len(each) for _, each in packed)
    each = range(len(chunks))
    with ThreadPoolExecutor(DECODERS) as pool:
        seconds = {
            "pack": min(timed(pack)[0] for _ in range(2)),
            "unpack": min(timed(lambda: [unpack(at) for at in each])[0] for _ in range(rounds)),
            "together": min(timed(lambda: list(pool.map(unpack, each)))[0] for _ in range(rounds)),
        }
    return {
        "times_smaller": raw / stored,
        "bits": 8 * stored / (raw / chunks[0].item_bytes),
        "used": sorted({used for used, _ in packed}),
        "threads": DECODERS,
        "gb_per_second": {which: raw / each / 1e9 for which, each in seconds.items()},
    }


def run(tokens: int = TOKENS, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> dict[str, Any]:
    """Every codec, in both dtypes."""
    from kvloom_proto import codecs

    results: dict[str, Any] = {"machine": machine(), "tokens": tokens}
    for dtype in dtypes:
        chunks = state(dtype, tokens)
        results[dtype] = {name: measure(chunks, name) for name in codecs.SETTINGS}
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The results as a table."""
    found = []
    for dtype, codecs in results.items():
        for name, each in codecs.items() if dtype.startswith(("bfloat", "float")) else ():
            used = name if each["used"] == [name] else f"{name} ({', '.join(each['used'])})"
            rates = [f"{each['gb_per_second'][which]:.2f}" for which in ("pack", "unpack", "together")]
            found.append([dtype, used, f"{each['times_smaller']:.3f}", f"{each['bits']:.2f}", *rates])
    return found


if __name__ == "__main__":
    results = run()
    print(f"{results['tokens']} tokens; {results['machine']}", file=sys.stderr)
    head = ["dtype", "codec", "times smaller", "bits an element", "pack GB/s", "unpack GB/s", "on all threads"]
    print(table(head, rows(results)))
