"""What the exactness tests stand on: jobs for the referee out of a store, and the referee itself.

State is read here from the tables, row by row, without the code that restores it: a mistake there must not be made
twice.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch
from safetensors.torch import load_file, save_file

from kvloom_proto.records import ITEM_BYTES, expand, read_manifest, read_provenance, read_schedule
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
    done = subprocess.run(
        [sys.executable, "-W", "error", str(WORKER), json.dumps(spec)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == (-9 if killed else 0), done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def referee(jobs: Sequence[Path]) -> tuple[int, list[dict[str, Any]]]:
    """The referee's exit status and its verdict on each job."""
    command = [sys.executable, "-W", "error", str(REFEREE), *map(str, jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
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


def stored_rows(conn: sa.Connection, segment_id: int) -> tuple[dict[str, Any], dict[tuple[int, int], np.ndarray]]:
    """A segment's row, and all its rows by (layer, tensor), token axis first."""
    row = _one(conn, segment, segment_id)
    manifest = read_manifest(row["manifest"])
    layers = expand(manifest.layers)
    made: dict[tuple[int, int], np.ndarray] = {}
    for spec in manifest.chunks:
        key = (chunk.c.segment == segment_id) & (chunk.c.layer == spec.layer) & (chunk.c.position == spec.position)
        blob = conn.execute(sa.select(chunk.c.blob).where(key)).scalar_one()
        assert digest(blob) == spec.stored_digest
        items = {ITEM_BYTES[t.dtype] for layer in layers for t in layer.tensors}
        raw = bytes(codec.decode(blob, items.pop() if len(items) == 1 else 1, spec.raw_length, spec.codec))
        assert digest(raw) == spec.raw_digest
        for layer in range(spec.layer, spec.layer + spec.layers):
            for number, tensor in enumerate(layers[layer].tensors):
                size = math.prod(tensor.shape) * spec.tokens * ITEM_BYTES[tensor.dtype]
                shape = (*tensor.shape[: tensor.token_axis], spec.tokens, *tensor.shape[tensor.token_axis :])
                rows = np.frombuffer(raw[:size], f"<i{ITEM_BYTES[tensor.dtype]}").reshape(shape)
                raw = raw[size:]
                whole = made.setdefault(
                    (layer, number), np.zeros((row["end"] - row["start"], *tensor.shape), rows.dtype)
                )
                first = spec.position - row["start"]
                whole[first : first + spec.tokens] = np.moveaxis(rows, tensor.token_axis, 0)
        assert not raw
    return row, made


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
        at, chain, upto = state["segment"], [], state["state_end"]
        while at is not None:
            row, rows = stored_rows(conn, at)
            chain.append((row, rows, upto))
            assert row["start"] < upto <= row["end"]
            at, upto = row["base_segment"], row["start"]
        chain.reverse()
        passes = []
        for row, _, _ in chain:
            tokens = path_tokens(conn, row["node"], row["end"])
            assert len(tokens) == row["end"]
            record = read_provenance(_one(conn, provenance, row["provenance"])["record"])
            each = list(read_schedule(row["schedule"]).each())
            assert (each[0][0], each[-1][1]) == (row["start"], row["end"])
            passes += [
                {"keep": a, "tokens": tokens[a:b], "positions": list(range(a, b)), "threads": record.threads}
                for a, b in each
            ]
        path = path_tokens(conn, state["node"], state["state_end"])
    expect: dict[str, torch.Tensor] = {}
    for layer, number in chain[0][1]:
        parts = [rows[layer, number][: end - row["start"]] for row, rows, end in chain]
        whole = np.moveaxis(np.concatenate(parts), 0, 1)  # heads before tokens, as the model has them
        expect[f"{('keys', 'values')[number]}.{layer}"] = torch.from_numpy(np.ascontiguousarray(whole))
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
