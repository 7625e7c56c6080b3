"""Keyframes: what a restore at any token runs again, against keeping states at ends only, in the same bytes.

``run`` counts tokens, on small models, over a conversation of many turns. ``spacings`` takes the times on which the
default spacing stands, on a few layers of models as wide as real ones.
"""

from __future__ import annotations

import json
import math
import pathlib
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine, spread, timed
from benchmarks.small import engine_of, one_thread, random_engine, sentences
from benchmarks.stored import Path, bring_back, path_of

if TYPE_CHECKING:
    from kvloom import KVLoom, TransformersEngine

EXCHANGES = 22
POINTS = 200
AT_TURNS = 0.7
"""The share of branch points that are turn starts; the others are any tokens."""

PATH = 4096
"""Tokens of the path in the formula for the spacing, and the prefill that is timed: 1,024."""
TIMED = 1024
SPACINGS = (256, 1024)
RESTORES = (0.5, 1, 2)
QUICK = {"exchanges": 4, "points": 20}


@dataclass(frozen=True, slots=True)
class Held:
    """A stored conversation: its path, where turns begin, where its keyframes are, the bytes of a keyframe and of
    a token's rows, and what ``planner.plan`` runs again to bring each position back."""

    path: Path
    turns: list[int]
    replies: list[int]
    keyframes: list[int]
    keyframe_bytes: int
    row_bytes: int
    replayed: list[int]

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.path.ids)


def converse(loom: KVLoom, exchanges: int, seed: int = 0) -> None:
    """Messages of 60 to 240 tokens and replies of 60 to 240, drawn at random."""
    draw = random.Random(seed)
    branch = loom.session("talk").branch()
    for number in range(exchanges):
        branch.say(sentences(draw.randint(60, 240), 1000 * seed + number), max_tokens=draw.randint(60, 240))
    loom.flush()


def held(loom: KVLoom) -> Held:
    """What is stored of it."""
    from kvloom_proto.records import LayerKind, expand
    from kvloom_store import planner, restore

    path = path_of(loom, "talk")
    assert path.tip.segment is not None
    with loom.database.read() as conn:
        links = restore.chain(conn, path.tip.segment)
    layers = loom.engine.layers
    plans = [planner.plan(links, at, layers) for at in range(1, len(path.ids) + 1)]
    state = [0, 0]
    for spec in expand(layers):
        state[spec.kind == LayerKind.KEYFRAME] += spec.row_bytes
    return Held(
        path,
        [link.start for link in links[1:]],
        [link.end for link in links[1::2]],  # a message and its reply are a segment each
        sorted({at for link in links for at in link.manifest.keyframes}),
        state[1],
        state[0],
        [0, *(plan.replayed for plan in plans)],
    )


def workload(turns: Sequence[int], length: int, count: int = POINTS, seed: int = 0) -> list[int]:
    """Branch points: ``AT_TURNS`` of them where a turn begins, the others at any token."""
    draw = random.Random(seed)
    at_turns = round(count * AT_TURNS)
    return [
        *(draw.choice(list(turns)) for _ in range(at_turns)),
        *(draw.randint(1, length) for _ in range(count - at_turns)),
    ]


def recomputed(keyframes: Sequence[int], points: Sequence[int]) -> int:
    """Tokens that are run again for all points, each from the last keyframe at or before it, or from nothing."""
    return sum(point - max((at for at in keyframes if at <= point), default=0) for point in points)


def last_that_fit(ends: Sequence[int], budget: int, keyframe_bytes: int, row_bytes: int) -> list[int]:
    """The most recent of some states that fit into so many bytes; one of n tokens has n rows, and a keyframe."""
    kept: list[int] = []
    for end in reversed(ends):
        budget -= keyframe_bytes + row_bytes * end
        if budget < 0:
            break
        kept.append(end)
    return kept[::-1]


def against_ends(state: Held) -> dict[str, Any]:
    """Tokens recomputed over the workload, by kvloom and by three ways of keeping states at ends only.

    ``conversation_end``: one keyframe, at the end of the conversation, as a session that was saved once has it.
    ``request_ends``: a keyframe at the end of each request (its reply), the most recent ones that fit the bytes that
    kvloom's keyframes take; the rows are free, as if they were shared. ``snapshots``: the same, but each state is saved
    whole, rows and all, in all the bytes that kvloom takes.
    """
    points = workload(state.turns, state.length)
    of_keyframes = len(state.keyframes) * state.keyframe_bytes
    kept = {
        "conversation_end": [state.length],
        "request_ends": last_that_fit(state.replies, of_keyframes, state.keyframe_bytes, 0),
        "snapshots": last_that_fit(
            state.replies, of_keyframes + state.row_bytes * state.length, state.keyframe_bytes, state.row_bytes
        ),
    }
    ours = sum(state.replayed[point] for point in points)
    others = {name: recomputed(ends, points) for name, ends in kept.items()}
    return {
        "kvloom": {"keyframes": len(state.keyframes), "recomputed": ours},
        **{
            name: {"keyframes": len(kept[name]), "recomputed": count, "times": count / max(ours, 1)}
            for name, count in others.items()
        },
    }


@one_thread()
def run(exchanges: int = EXCHANGES, points: int = POINTS) -> dict[str, Any]:
    """A hybrid model and a purely recurrent one: tokens replayed at any point, and against keeping ends only."""
    import kvloom

    results: dict[str, Any] = {"machine": machine(), "dtype": "float32"}
    for kind in ("hybrid", "recurrent"):
        engine = random_engine(kind)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/kvloom.db"
            with kvloom.open(file, model=engine, codec="raw") as loom:
                converse(loom, exchanges)
            with kvloom.open(file, model=engine, codec="raw") as loom:
                state = held(loom)
                draw = random.Random(1)
                drawn = [draw.randint(1, state.length) for _ in range(points)]
                accounts = [(at, bring_back(loom, state.path, at)[1]) for at in drawn]
        assert all(account.replayed == state.replayed[at] for at, account in accounts), "as planned"
        results[kind] = {
            "tokens": state.length,
            "turns": len(state.turns) + 1,
            "spacing": engine.keyframe_spacing,
            "replayed_at_random_tokens": spread([account.replayed for _, account in accounts]),
            "replayed_at_every_token": spread(state.replayed[1:]),
            "replayed_at_turn_starts": spread([state.replayed[at] for at in state.turns]),
            **against_ends(state),
        }
    return results


WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next 80B-A3B, 4 of 48 layers": (
        "qwen3_next",
        {"num_hidden_layers": 4, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2}
        | {"head_dim": 256, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "num_experts": 16}
        | {"num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    ),
    "Granite 4.0 H Micro, 5 of 40 layers": (
        "granitemoehybrid",
        {"num_hidden_layers": 5, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"layer_types": [*["linear_attention"] * 4, "full_attention"], "mamba_n_heads": 64, "mamba_d_head": 64}
        | {"mamba_d_state": 128, "mamba_n_groups": 1, "shared_intermediate_size": 8192, "num_local_experts": 0},
    ),
    "Mamba-2 780M, 6 of 48 layers": (
        "mamba2",
        {"num_hidden_layers": 6, "hidden_size": 1536, "num_heads": 48, "head_dim": 64, "state_size": 128}
        | {"n_groups": 1, "chunk_size": 256},
    ),
}
"""As wide as the real ones: a keyframe's bytes and a token's seconds both grow with the layers."""


def best_spacing(keyframe_bytes: int, write: float, token: float, restores: float, path: int = PATH) -> float:
    """``passes.KEYFRAME_SPACING``'s formula: sqrt(2 w K n / (p t))."""
    return math.sqrt(2 * write * keyframe_bytes * path / (restores * token))


def spacings() -> dict[str, Any]:
    """Keyframe bytes, seconds a replayed token, seconds a byte written, and the spacing that follows, per shape."""
    results: dict[str, Any] = {"machine": machine(), "dtype": "float32", "path": PATH}
    for name, (model_type, settings) in WIDE.items():
        print(f"measuring {name} ...", file=sys.stderr)
        results[name] = _shape(model_type, settings, name)
        print(json.dumps(results[name]), file=sys.stderr)  # minutes each: what is known is told at once
    return results


def _shape(model_type: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
    import kvloom
    from kvloom_proto.records import LayerKind

    engine = engine_of(model_type, settings, name=name)
    engines = {s: kvloom.TransformersEngine(engine.model, engine.tokenizer, keyframe_spacing=s) for s in SPACINGS}
    ids = [random.Random(0).randrange(256) for _ in range(TIMED)]
    prefill: dict[int, list[float]] = {spacing: [] for spacing in SPACINGS}
    single: list[float] = []
    for _ in range(2):
        for spacing, each in engines.items():
            live = each.new_state(TIMED + 8)
            prefill[spacing].append(timed(lambda e=each, s=live: e.prefill(s, ids))[0])  # type: ignore[misc]
            single.append(timed(lambda e=each, s=live: [e.run_pass(s, [1]) for _ in range(8)])[0] / 8)  # type: ignore[misc]
    size = sum(spec.row_bytes * spec.count for spec in engine.layers if spec.kind == LayerKind.KEYFRAME)
    token, write = min(prefill[SPACINGS[0]]) / TIMED, _seconds_a_byte(engine, ids)
    return {
        "keyframe_bytes": size,
        "seconds_a_token": token,
        "seconds_a_token_alone": min(single),
        "gigabytes_a_second": 1e-9 / write,
        "spacing": {str(p): round(best_spacing(size, write, token, p)) for p in RESTORES},
        "spacing_alone": {str(p): round(best_spacing(size, write, min(single), p)) for p in RESTORES},
        "prefill_seconds": {str(spacing): min(times) for spacing, times in prefill.items()},
        "load": machine()["load"],
    }


def _seconds_a_byte(engine: TransformersEngine, ids: list[int]) -> float:
    """Writing a segment of 1,024 tokens and its keyframes."""
    from kvloom_proto.records import Schedule
    from kvloom_store import roots, segments, stats, trie
    from kvloom_store.database import Database

    live = engine.new_state(len(ids))
    engine.prefill(live, ids)
    source = live.take_captured()
    with tempfile.TemporaryDirectory() as folder:
        database = Database(pathlib.Path(folder) / "kvloom.db")
        with database.write() as conn:
            root = roots.root_for(conn, roots.add_model(conn, b"m" * 16, "model", {}))
            node = trie.extend(conn, root, ids).node
            provenance = segments.add_provenance(conn, engine.provenance())
        draft = segments.Draft(
            node, 0, len(ids), None, live.layers, Schedule(unknown=True), provenance, tuple(sorted(source.frames))
        )
        seconds, _ = timed(lambda: segments.write(database, source, draft, codec_name="raw", finish=lambda *_: None))
        stored = stats.stats(database)["bytes"]["state_stored"]
        database.close()
    return seconds / int(stored)


if __name__ == "__main__":
    print(json.dumps(spacings() if sys.argv[1:] == ["spacings"] else run(), indent=2))
