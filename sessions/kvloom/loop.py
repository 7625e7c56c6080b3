"""For people with a loop of their own: the longest stored prefix as a transformers cache, and such a cache back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from kvloom.bits import rows_of, to_bits
from kvloom.errors import UnsupportedInput
from kvloom.layers import row_tensors, states_of
from kvloom.live import LiveState
from kvloom.overwritten import StateList
from kvloom.resume import Resumer
from kvloom.row_layers import RowLayer, WindowLayer, same_bits
from kvloom_proto.records import STORED_BY_ROW, LayerKind, Schedule
from kvloom_store import segments, trie
from kvloom_store.rows import Rows

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
        loom.follow(engine.identity())
        resumer = Resumer(engine, loom.database, loom.writer, loom.root)
        live, _ = resumer.resume(ids[:-1], None, room=256, logits=False)
    cache = live.cache
    return cache.state if isinstance(cache, StateList) else cache, live.length


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
        loom.follow(engine.identity())
        live = _live_of(loom, cache, len(ids))
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


def _live_of(loom: KVLoom, cache: Any, tokens: int) -> LiveState:
    """The caller's state in memory of our own: they may go on changing theirs.

    ``tokens`` is what a cache without rows holds: it does not count them itself.
    """
    live = loom.engine.new_state(1)
    held = list(states_of(StateList(cache) if isinstance(cache, list) else cache))
    if [kind for kind, _ in held] != [spec.kind for spec in live.specs]:
        raise UnsupportedInput(
            f"the cache holds {len(held)} layer states, the model {len(live.specs)}, or of other kinds",
            hint="make it with transformers' own DynamicCache(config=model.config), or take the one of lookup()",
        )
    counting = [holder for kind, holder in held if kind in (LayerKind.ROWS, LayerKind.WINDOW)]
    lengths = {holder.get_seq_length() for holder in counting} or {tokens}
    length = lengths.pop()
    if lengths:
        raise UnsupportedInput("the layers of the cache do not hold the same number of tokens")
    live.reserve(length)
    live.window_base = max((h.window_base for _, h in held if isinstance(h, WindowLayer)), default=0)
    frame: dict[int, list[Rows]] = {}
    for number, (kind, holder) in enumerate(held):
        if kind == LayerKind.KEYFRAME:
            frame[number] = [to_bits(tensor[0].cpu().contiguous()) for tensor in holder.tensors().values()]
        elif kind in STORED_BY_ROW:
            _take_rows(live, number, holder, length)
    live.show(length)
    if frame:
        live.put_frame(frame, length)
        live.keep_frame()
    return live


def _take_rows(live: LiveState, number: int, layer: Any, length: int) -> None:
    """Copy one layer's rows [0, length), of windows too: those that are not seen any more are stored as well.

    Of a cache that was looked up, those before its ``window_base`` may be missing; ``_share_prefix`` leaves them alone.
    """
    rows = layer.all_rows(length) if isinstance(layer, RowLayer) else row_tensors(layer)
    layer_spec = live.specs[number]
    specs, needed = layer_spec.tensors, layer_spec.rows_before(length)
    if "values" in rows and "values" not in {spec.name for spec in specs} and not same_bits(layer.keys, layer.values):
        raise UnsupportedInput(f"layer state {number} holds values; this model's are its keys")
    for spec, target in zip(specs, live.tensors[number], strict=True):
        source, axis = rows[spec.name], 1 + spec.token_axis
        if source.shape[axis] < needed:
            raise UnsupportedInput(
                f"layer state {number} has let go of rows behind its window, and cannot be stored whole",
                hint="take the cache from lookup(), which keeps them",
            )
        place = target.narrow(axis, 0, needed)
        if source.shape != place.shape or source.dtype != place.dtype:
            raise UnsupportedInput(
                f"layer state {number} holds {spec.name} {source.dtype} {tuple(source.shape)}; "
                f"this model's are {spec.name} {place.dtype} {tuple(place.shape)}"
            )
        place.copy_(source)


def _share_prefix(loom: KVLoom, resumer: Resumer, live: LiveState, ids: Sequence[int]) -> None:
    """Stand on the longest stored prefix, as far as the cache begins with its very bits.

    What is overwritten in place cannot be compared at a point that is past: it is stored at the end, and there only.

    Raises:
        UnsupportedInput: the cache lacks rows of its windows, and those it was made from are not stored any more.
    """
    stored, _ = resumer.resume(ids, None, room=0, logits=False, whole=True)
    same = stored.length
    if same == live.length and not _same_frames(stored, live):
        same -= 1  # so that the last token, and with it the keyframe, is stored beside the other
    for spec, held, own in zip(live.specs, stored.tensors, live.tensors, strict=True):
        first = max(0, live.window_base - spec.window + 1) if spec.kind == LayerKind.WINDOW else 0
        for number in range(len(own)):
            if same > first:
                a, b = rows_of(spec, held, number, first, same), rows_of(spec, own, number, first, same)
                alike, axis = _same_rows(a, b, 1 + spec.tensors[number].token_axis), 1 + spec.tensors[number].token_axis
                if alike < a.shape[axis]:
                    same = (spec.rows_before(first) + alike) * (spec.block or 1)
    if not live.sees(same):
        raise UnsupportedInput(
            f"the cache holds the rows of its windows from token {live.window_base} on, and begins otherwise than "
            "what is stored",
            hint="look the tokens up again, and run what is new on that cache",
        )
    live.chain = [replace(k, end=min(k.end, same)) for k in stored.chain if k.start < same]


def _same_frames(a: LiveState, b: LiveState) -> bool:
    """Whether what is overwritten in place has the same bits."""
    mine, theirs = a.frame(), b.frame()
    return all(x.tobytes() == y.tobytes() for number in mine for x, y in zip(mine[number], theirs[number], strict=True))


def _same_rows(a: torch.Tensor, b: torch.Tensor, axis: int) -> int:
    """How many leading rows along an axis of two tensors have the same bits."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    differs = (a.view(width) != b.view(width)).movedim(axis, 0).flatten(1).any(dim=1)
    found = torch.nonzero(differs)
    return int(found[0, 0]) if len(found) else a.shape[axis]
