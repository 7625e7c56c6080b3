"""The golden bundle: a small conversation, record by record, the same bytes in every process.

``python tests/golden.py`` writes it to tests/data/bundles; a test fails when what would be written there
has changed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack

from kvloom.template import ChatTemplate
from kvloom_proto.bundle import (
    BranchRecord,
    ChunkRecord,
    Encoding,
    Head,
    Model,
    NodeRecord,
    ProvenanceRecord,
    Record,
    SegmentRecord,
    SessionRecord,
    StateRecord,
    TagRecord,
    TurnRecord,
)
from kvloom_proto.codecs import LZ4
from kvloom_proto.frames import Writer
from kvloom_proto.records import LayerKind, LayerSpec, Manifest, Pass, Provenance, Schedule, TensorSpec, pack
from kvloom_proto.scores import TokenScore, pack_scores
from kvloom_store import codec, segments
from kvloom_store.checksum import digest
from kvloom_store.trie import pack_tokens
from kvloom_store.turns import chained_digest

FOLDER = Path(__file__).parent / "data" / "bundles"
FILES = {"talk.kvb": Encoding.PROTOBUF, "talk.kvm": Encoding.MSGPACK}

PAIR = (TensorSpec("keys", "bfloat16", (1, 2), 1), TensorSpec("values", "bfloat16", (1, 2), 1))
LAYERS = (
    LayerSpec(0, 1, LayerKind.ROWS, PAIR),
    LayerSpec(1, 1, LayerKind.KEYFRAME, (TensorSpec("recurrent_states.0", "float32", (2, 3), 0),)),
    LayerSpec(2, 1, LayerKind.WINDOW, PAIR, window=4),
)
PATH = (5, 6, 7, 300, 70_000, 9, 10, 11, 12)
ASIDE = (*PATH[:3], 8, 13)
FIELDS = {"config": "00", "weights": "11", "dtype": "bfloat16"}


def records() -> Iterator[Record]:
    """All records but the last."""
    template = ChatTemplate("{{ messages }}", {}, "2025-01-31T12:00:00")
    settings = {
        "model": "smollm2",
        "model_digest": (b"m" * 16).hex(),
        "model_fields": FIELDS,
        "tokenizer": "22",
        "dtype": "bfloat16",
        "chat_template": template.source,
        "template_digest": template.digest,
        "template_options": {},
        "clock": template.clock,
    }
    yield Head(1_700_000_000_000_000, "golden", False)
    yield Model(b"m" * 16, "smollm2", msgpack.packb(FIELDS), b"", b"")
    yield ProvenanceRecord(pack(Provenance(1, "2.9", "5.23", "cpu", "AVX2", "sdpa", "golden")))
    yield SessionRecord("golden", msgpack.packb(settings))
    yield NodeRecord(0, None, 0, pack_tokens(PATH), digest(pack_tokens(PATH)))
    yield NodeRecord(0, 0, 3, pack_tokens(ASIDE[3:]), digest(pack_tokens(ASIDE)))
    first, second, third = _turns()
    yield from (first, second, third)
    yield from _segment(0, None, 0, 5, (0, 5))
    yield from _segment(0, 0, 5, 8, (8,))
    yield from _segment(1, 0, 3, 5, (3, 5))
    yield _state(0, PATH[:5], 0, 0, 0, 5, None, None, 0)
    scores = pack_scores([TokenScore(token, -0.5, 1.0, ((token, -0.5), (3, -2.0))) for token in PATH[5:]])
    yield replace(_state(1, PATH[5:], 5, 0, 5, 8, 0, None, 1), scores=scores)
    yield _state(2, ASIDE[3:], 3, 1, 3, 5, None, 0, 2)
    yield BranchRecord("main", 1)
    yield BranchRecord("aside", 2)
    yield TagRecord("asked", 0)


def _turns() -> list[TurnRecord]:
    said = [("user", "Who?", None), ("assistant", "He.", 0), ("user", "Whö, then?", None)]
    found: list[TurnRecord] = []
    for number, (role, text, parent) in enumerate(said):
        message = {"role": role, "content": text}
        before = b"" if parent is None else found[parent].digest
        found.append(
            TurnRecord(
                public_id=bytes([number + 1]) * 16,
                parent=parent,
                role=role,
                continues=False,
                message=msgpack.packb(message),
                finish_reason="length" if role == "assistant" else None,
                settings=msgpack.packb({"temperature": 0.0, "stop": []} if role == "assistant" else {}),
                timings=msgpack.packb({"total": 0.5, "tokens": {"reused": 0, "computed": 3}}),
                digest=chained_digest(before, message),
                created=1_700_000_000_000_000 + number,
            )
        )
    return found


def _segment(node: int, base: int | None, start: int, end: int, keyframes: Sequence[int]) -> Iterator[Record]:
    chunks, blobs = [], []
    for spec in segments.cut(LAYERS, start, end, keyframes):
        raw = bytes((7 * at + spec.position) % 5 for at in range(spec.raw_length))
        name, stored = codec.encode(raw, 4 if spec.kind == LayerKind.KEYFRAME else 2, LZ4)
        digests = {"raw_digest": digest(raw), "stored_digest": digest(stored)}
        chunks.append(replace(spec, codec=name, stored_length=len(stored), **digests))
        blobs.append(stored)
    manifest = Manifest(start, end, 256, LAYERS, tuple(chunks))
    yield SegmentRecord(node, base, pack(Schedule((Pass(start, end - start),))), 0, pack(manifest))
    order = sorted(range(len(chunks)), key=lambda at: (chunks[at].kind, chunks[at].layer, chunks[at].position))
    yield from (ChunkRecord(blobs[at]) for at in order)


def _state(
    turn: int,
    tokens: Sequence[int],
    start: int,
    node: int,
    state_start: int,
    state_end: int,
    base_state: int | None,
    base_segment: int | None,
    segment: int,
) -> StateRecord:
    return StateRecord(
        turn=turn,
        model=0,
        start=start,
        tokens=pack_tokens(tokens),
        node=node,
        offset=start + len(tokens) - (3 if node else 0),
        state_start=state_start,
        state_end=state_end,
        base_state=base_state,
        base_segment=base_segment,
        segment=segment,
        schedule=pack(Schedule((Pass(state_start, state_end - state_start),))),
        provenance=0,
        hidden=b"hidden st.",
        hidden_dtype="bfloat16",
        variant=False,
        scores=None,
    )


def written(some: Sequence[Record], encoding: Encoding) -> bytes:
    """A bundle of some records, and an end that fits them."""
    file = io.BytesIO()
    writer = Writer(file, encoding)
    for record in some:
        writer.add(record)
    writer.finish()
    return file.getvalue()


def golden(name: str) -> bytes:
    """A golden bundle, as it is kept."""
    return (FOLDER / name).read_bytes()


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, encoding in FILES.items():
        (FOLDER / file).write_bytes(written(list(records()), encoding))
        print(FOLDER / file, (FOLDER / file).stat().st_size, file=sys.stderr)
