"""For people with a loop of their own: the longest stored prefix as a transformers cache, and such a cache back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom.errors import UnsupportedInput
from kvloom.live import Link, LiveState, RowLayer
from kvloom.resume import Resumer
from kvloom_proto.records import Schedule
from kvloom_store import segments, trie

if TYPE_CHECKING:
    from kvloom.loom import KVLoom


def lookup(loom: KVLoom, ids: Sequence[int]) -> tuple[DynamicCache, int]:
    """A cache that holds the longest stored prefix of ``ids``, and its length.

    At least one token is left to run, so the cache is ready for
    ``model.generate(input_ids, past_key_values=cache)`` with all of ``ids``. It is the caller's own: running it
    changes nothing that is stored.

    Raises:
        UnsupportedInput, ContextOverflow
    """
    engine = loom.engine
    engine.check_ids(ids, room=0)
    with engine.lock:
        resumer = Resumer(engine, loom.database, loom.writer, loom.root)
        live, _ = resumer.resume(ids[:-1], None, room=256, logits=False)
    return live.cache, live.length


def capture(loom: KVLoom, ids: Sequence[int], cache: DynamicCache) -> int:
    """Store the state a cache holds for the first tokens of ``ids``; how many tokens it holds.

    The cache may come from ``lookup`` or be transformers' own: what is stored already is not stored again, if its
    bits are the same. Its passes are unknown, so it is restored bit for bit, but cannot be replayed.

    Raises:
        UnsupportedInput: a batch, fewer ids than the cache holds, or layers that are not rows.
    """
    engine = loom.engine
    engine.check_ids(ids, room=0)
    with engine.lock:
        live = _live_of(loom, cache)
        length = live.length
        if length > len(ids):
            raise UnsupportedInput(f"the cache holds {length} tokens, but {len(ids)} ids were given")
        taken = list(ids[:length])
        resumer = Resumer(engine, loom.database, loom.writer, loom.root)
        _share_prefix(loom, resumer, live, taken)
        with loom.database.write() as conn:
            position = trie.extend(conn, loom.root, taken)
            provenance = segments.add_provenance(conn, engine.provenance())
        resumer.capture(live, position, Schedule(unknown=True), provenance, None)
    return length


def _live_of(loom: KVLoom, cache: DynamicCache) -> LiveState:
    """The caller's rows in memory of our own: they may go on changing theirs."""
    live = loom.engine.new_state(1)
    if len(cache.layers) != len(live.specs):
        raise UnsupportedInput(f"the cache has {len(cache.layers)} layers, the model {len(live.specs)}")
    length = cache.get_seq_length()
    live.reserve(length)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, RowLayer) or layer.get_seq_length() != length:
            raise UnsupportedInput(f"cache layer {index} ({type(layer).__name__}) does not hold one row per token")
        target_keys, target_values = live.tensors[index]
        for source, target in ((layer.keys, target_keys), (layer.values, target_values)):
            if source.shape != target[:, :, :length].shape or source.dtype != target.dtype:
                raise UnsupportedInput(
                    f"cache layer {index} holds {source.dtype} {tuple(source.shape)}; "
                    f"this model's are {target.dtype} {tuple(target[:, :, :length].shape)}"
                )
            target[:, :, :length].copy_(source)
    live.show(length)
    return live


def _share_prefix(loom: KVLoom, resumer: Resumer, live: LiveState, ids: Sequence[int]) -> None:
    """Stand on the longest stored prefix, as far as the cache begins with its very bits."""
    stored, _ = resumer.resume(ids, None, room=0, logits=False)
    same = stored.length
    for held, own in zip(stored.tensors, live.tensors, strict=True):
        for a, b in zip(held, own, strict=True):
            same = min(same, _same_rows(a[:, :, :same], b[:, :, :same]))
    live.chain = [Link(k.handle, k.start, min(k.end, same)) for k in stored.chain if k.start < same]


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many leading rows of two tensors ``[1, heads, tokens, dim]`` have the same bits."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    differs = (a.view(width) != b.view(width)).any(dim=-1).any(dim=1)[0]
    found = torch.nonzero(differs)
    return int(found[0, 0]) if len(found) else a.shape[2]
