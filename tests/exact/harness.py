"""What the exactness tests stand on: jobs for the referee out of a store, and the referee itself.

State is read here from the tables, row by row, without the code that restores it: a mistake there must not be made
twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import sqlalchemy as sa
import torch
from safetensors.torch import load_file, save_file

from kvloom_proto.records import (
    ITEM_BYTES,
    ChunkSpec,
    LayerKind,
    Manifest,
    TensorSpec,
    expand,
    read_manifest,
    read_provenance,
    read_schedule,
)
from kvloom_store import codec
from kvloom_store.checksum import checked, digest
from kvloom_store.database import Database
from kvloom_store.schema import chunk, node, provenance, segment, turn_state

TESTS = Path(__file__).parent.parent
REFEREE = TESTS / "reference" / "replay.py"
WORKER = Path(__file__).parent / "worker.py"


def environment() -> dict[str, str]:
    """The environment of every process a test starts: offline, and no thread spins while it waits."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}


def work(spec: Mapping[str, Any], *, killed: bool = False) -> dict[str, Any]:
    """Run a worker process; the object it prints last. ``killed``: it is to end by SIGKILL."""
    done = forked.run([WORKER, json.dumps(spec)], env=environment())
    assert done.returncode == (-9 if killed else 0), done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def referee(jobs: Sequence[Path]) -> tuple[int, list[dict[str, Any]]]:
    """The referee's exit status and its verdict on each job."""
    done = forked.run([REFEREE, *jobs], env=environment())
    assert done.returncode in (0, 1), done.stderr[-4000:]
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == len(jobs), done.stderr[-4000:]
    return done.returncode, verdicts


def _one(conn: sa.Connection, table: sa.Table, row: int) -> dict[str, Any]:
    return checked(table, conn.execute(sa.select(table).where(table.c.id == row)).one())


def state_rows(database: Database) -> list[dict[str, Any]]:
    """Every turn state that has rows of its own, stored, oldest first."""
    with database.read() as conn:
        rows = [checked(turn_state, row) for row in conn.execute(sa.select(turn_state).order_by(turn_state.c.id))]
    return [row for row in rows if row["segment"] is not None]


def leaves(database: Database) -> list[dict[str, Any]]:
    """Those whose segment no other segment stands on: together their chains reach every segment."""
    with database.read() as conn:
        bases = set(conn.execute(sa.select(segment.c.base_segment)).scalars())
    return [row for row in state_rows(database) if row["segment"] not in bases]


def path_tokens(conn: sa.Connection, node_id: int, depth: int) -> list[int]:
    """The first ``depth`` tokens of the path that leads into a node, by following its parents."""
    tokens: list[int] = []
    at: int | None = node_id
    while at is not None:
        values = _one(conn, node, at)
        own = np.frombuffer(values["tokens"], "<u4").tolist()
        tokens = own[: max(0, depth - values["start"])] + tokens
        at, depth = values["parent"], min(depth, values["start"])
    return tokens


def _chunks(
    conn: sa.Connection, segment_id: int, manifest: Manifest
) -> Iterator[tuple[ChunkSpec, list[tuple[int, int, TensorSpec]], bytes]]:
    """Each chunk of a segment, the tensors it covers as (layer, number, spec), and its raw bytes."""
    layers = expand(manifest.layers)
    for spec in manifest.chunks:
        key = (chunk.c.segment == segment_id) & (chunk.c.kind == int(spec.kind))
        key &= (chunk.c.layer == spec.layer) & (chunk.c.position == spec.position)
        blob = conn.execute(sa.select(chunk.c.blob).where(key)).scalar_one()
        assert digest(blob) == spec.stored_digest
        held = [n for n in range(spec.layer, spec.layer + spec.layers) if layers[n].kind == spec.kind]
        tensors = [(n, number, tensor) for n in held for number, tensor in enumerate(layers[n].tensors)]
        items = {ITEM_BYTES[tensor.dtype] for _, _, tensor in tensors}
        raw = bytes(codec.decode(blob, items.pop() if len(items) == 1 else 1, spec.raw_length, spec.codec))
        assert digest(raw) == spec.raw_digest
        yield spec, tensors, raw


def stored_rows(conn: sa.Connection, segment_id: int) -> tuple[dict[str, Any], dict[tuple[int, int], np.ndarray]]:
    """A segment's row, and all its rows by (layer, tensor), token axis first; those of windows, too."""
    row = _one(conn, segment, segment_id)
    made: dict[tuple[int, int], np.ndarray] = {}
    layers = expand(read_manifest(row["manifest"]).layers)
    for spec, tensors, data in _chunks(conn, segment_id, read_manifest(row["manifest"])):
        if spec.kind == LayerKind.KEYFRAME:
            continue
        raw = data
        for layer, number, tensor in tensors:
            before = layers[layer].rows_before
            first, count = before(spec.position), before(spec.position + spec.tokens) - before(spec.position)
            size = math.prod(tensor.shape) * count * ITEM_BYTES[tensor.dtype]
            shape = (*tensor.shape[: tensor.token_axis], count, *tensor.shape[tensor.token_axis :])
            rows = np.frombuffer(raw[:size], f"<i{ITEM_BYTES[tensor.dtype]}").reshape(shape)
            raw = raw[size:]
            whole = np.zeros((before(row["end"]) - before(row["start"]), *tensor.shape), rows.dtype)
            whole = made.setdefault((layer, number), whole)
            first -= before(row["start"])
            whole[first : first + count] = np.moveaxis(rows, tensor.token_axis, 0)
        assert not raw
    return row, made


def stored_frames(conn: sa.Connection, segment_id: int) -> dict[int, dict[str, np.ndarray]]:
    """A segment's keyframes by position, each with its tensors by name and layer, as the referee calls them."""
    row = _one(conn, segment, segment_id)
    made: dict[int, dict[str, np.ndarray]] = {}
    for spec, tensors, data in _chunks(conn, segment_id, read_manifest(row["manifest"])):
        if spec.kind != LayerKind.KEYFRAME:
            continue
        assert spec.tokens == 0
        assert row["start"] <= spec.position <= row["end"]
        raw = data
        for layer, _, tensor in tensors:
            size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
            whole = np.frombuffer(raw[:size], f"<i{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
            made.setdefault(spec.position, {})[f"{tensor.name}.{layer}"] = whole
            raw = raw[size:]
        assert not raw
    return made


def chain_of(conn: sa.Connection, state: Mapping[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """The segments a turn's state stands on, first to last, each with the position up to which it counts."""
    at, chain, upto = state["segment"], [], state["state_end"]
    while at is not None:
        row = _one(conn, segment, at)
        assert row["start"] < upto <= row["end"]
        chain.append((row, upto))
        at, upto = row["base_segment"], row["start"]
    return chain[::-1]


def expected_state(conn: sa.Connection, chain: Sequence[tuple[dict[str, Any], int]]) -> dict[str, torch.Tensor]:
    """All rows and keyframes along a chain of segments, under the referee's names."""
    parts: dict[tuple[int, int], list[np.ndarray]] = {}
    frames: dict[int, dict[str, np.ndarray]] = {}
    for row, upto in chain:
        layers = expand(read_manifest(row["manifest"]).layers)
        for key, rows in stored_rows(conn, row["id"])[1].items():
            parts.setdefault(key, []).append(rows[: layers[key[0]].rows_between(row["start"], upto)])
        found = stored_frames(conn, row["id"])
        # One at the very position where a segment begins is its own, whatever its base has there.
        frames |= {position: frame for position, frame in found.items() if position <= upto}
    layers = expand(read_manifest(chain[0][0]["manifest"]).layers)
    expect: dict[str, torch.Tensor] = {}
    for (layer, number), pieces in parts.items():
        tensor = layers[layer].tensors[number]
        whole = np.moveaxis(np.concatenate(pieces), 0, tensor.token_axis)  # heads before tokens, as the model has them
        expect[f"{tensor.name}.{layer}"] = torch.from_numpy(np.ascontiguousarray(whole))
    for position, frame in frames.items():
        for name, array in frame.items():
            expect[f"frame.{position}.{name}"] = torch.from_numpy(array.copy())
    return expect


def export(
    database: Database,
    state_row: int,
    folder: Path,
    model: Mapping[str, Any],
    dtype: str,
    *,
    single: bool = False,
    logits: Mapping[int, bytes] | None = None,
) -> Path:
    """Write what the store holds for a turn, and the passes that made it, as a job for the referee."""
    folder.mkdir(parents=True)
    with database.read() as conn:
        state = _one(conn, turn_state, state_row)
        chain = chain_of(conn, state)
        passes = []
        for row, upto in chain:
            tokens = path_tokens(conn, row["node"], row["end"])
            assert len(tokens) == row["end"]
            record = read_provenance(_one(conn, provenance, row["provenance"])["record"])
            each = list(read_schedule(row["schedule"]).each())
            assert (each[0][0], each[-1][1]) == (row["start"], row["end"])
            passes += [
                {"keep": a, "tokens": tokens[a:b], "positions": list(range(a, b)), "threads": record.threads}
                for a, b in each
                if a < upto  # what the base computed behind the point it is left at has no part in this
            ]
        path = path_tokens(conn, state["node"], state["state_end"])
        expect = expected_state(conn, chain)
    last = state["state_end"] - 1
    if state["hidden"] is not None:
        integers = np.frombuffer(state["hidden"], f"<i{ITEM_BYTES[state['hidden_dtype']]}")
        expect[f"hidden.{last}"] = torch.from_numpy(integers.copy())
    for position, data in (logits or {}).items():
        expect[f"logits.{position}"] = torch.from_numpy(np.frombuffer(data, f"<i{ITEM_BYTES[dtype]}").copy())
    save_file(expect, folder / "expect.safetensors")
    job = {"model": dict(model), "dtype": dtype, "passes": passes, "tokens": path, "single": single}
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def load_job(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A job's description and expectations."""
    return json.loads((folder / "job.json").read_text()), load_file(folder / "expect.safetensors")


def tampered(
    folder: Path, to: Path, job: Mapping[str, Any] | None = None, expect: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A copy of a job with another description, or other expectations."""
    old_job, old_expect = load_job(folder)
    to.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in (expect or old_expect).items()}, to / "expect.safetensors")
    (to / "job.json").write_text(json.dumps(job or old_job))
    return to
