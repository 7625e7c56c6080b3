"""Conversations over tiny models of every kind, for the tests of what each kind of state may be relied upon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from exact.worker import frame_of, rows_of
from tiny import KINDS, OTHERS, tiny_model, tiny_tokenizer
from tiny_configs import COMPRESSED, HYBRID, RECURRENT, WINDOWS

from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom.session import Session
from kvloom_proto.records import Manifest, read_manifest
from kvloom_store import trie
from kvloom_store.schema import segment
from kvloom_store.turns import TurnState

GRID, SPACING = 32, 64

TAKEN = tuple(kind for kind in KINDS if kind not in OTHERS)
"""Every kind the engine takes."""

OVERWRITING = (*COMPRESSED, *RECURRENT, *HYBRID)
"""Those that keep state which a pass overwrites in place."""

SLIDING = tuple(WINDOWS)

Digests = tuple[list[str], list[str] | None]


def engine(kind: str, dtype: str = "float32", *, spacing: int = SPACING) -> TransformersEngine:
    """An engine that has run nothing yet."""
    return TransformersEngine(tiny_model(kind, dtype), tiny_tokenizer(), name=f"tiny {kind}", keyframe_spacing=spacing)


def ending(kind: str, dtype: str = "float32", also: tuple[int, ...] = ()) -> TransformersEngine:
    """A model that does end its replies: where another token is likely, one that ends them is about as likely."""
    model, tokenizer = tiny_model(kind, dtype), tiny_tokenizer()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for number, token in enumerate((tokenizer.eos_token_id, *also)):
            head[token] = 1.1 * head[31 + 9 * number] + 0.7 * head[77 + number]
    if also:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *also]
    return TransformersEngine(model, tokenizer, name=f"tiny {kind}")


@contextmanager
def opened(path: Path, kind: str, dtype: str = "float32", **options: Any) -> Iterator[KVLoom]:
    """A store under a model that has run nothing yet, as a new process finds it."""
    with KVLoom(path, model=engine(kind, dtype, **options)) as loom:
        yield loom


def live_digests(loom: KVLoom) -> Digests:
    """The live state: rows, of windows those that are still seen, and what is overwritten in place."""
    live = loom.resumer.live
    return rows_of(live, live.length), frame_of(live)


def tip(branch: Branch) -> TurnState:
    """What the model made of a branch's last turn."""
    path, states = branch._path()
    return states[path[-1].row]


def ids_of(loom: KVLoom, branch: Branch) -> list[int]:
    """The tokens of a branch, as the model saw them."""
    position = tip(branch).position
    with loom.database.read() as conn:
        return trie.tokens_to(conn, position.node, position.offset)


def digests(loom: KVLoom, branch: Branch) -> Digests:
    """The same of a branch's tip, brought back from the store alone."""
    loom.resumer.forget()
    state = tip(branch)
    with loom.engine.lock:
        loom.resumer.resume(ids_of(loom, branch)[: state.state_end], state, room=1, logits=False)
        return live_digests(loom)


def manifests(loom: KVLoom) -> list[Manifest]:
    """Of every segment, in the order they were stored."""
    loom.flush()
    with loom.database.read() as conn:
        packed = conn.execute(sa.select(segment.c.manifest).where(segment.c.complete == 1).order_by(segment.c.id))
        return [read_manifest(each) for each in packed.scalars()]


@contextmanager
def counted(loom: KVLoom, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each forward pass meanwhile."""
    passes: list[int] = []
    run = loom.engine.run_pass
    with monkeypatch.context() as patch:
        patch.setattr(loom.engine, "run_pass", lambda live, ids: passes.append(len(ids)) or run(live, ids))
        yield passes


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """A model's decoder layers."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(some for some in lists if len(some) == model.config.num_hidden_layers)


def fork(session: Session, name: str, at: str = "main") -> Branch:
    return session.fork(name, at=at)
