"""Several paths that begin alike, decoded together: what they share is held, and read, once.

Each pass runs one token of every path, as a batch. The rows of the shared prefix stay where they are, in the live
state; each path's own rows stand in a buffer of the batch, their ends aligned, so that a pass writes one column. The
bits of a path's rows depend on how many paths there are, which of them it is, how many rows are shared and how wide
the buffer was, never on the tokens of the others: that much is recorded, and running it again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom.bits import rows_of, to_bits
from kvloom.errors import EngineError
from kvloom.live import LiveState
from kvloom.shared_attention import attending
from kvloom_proto.records import LayerKind, LayerSpec, Pass
from kvloom_store.rows import Rows

if TYPE_CHECKING:
    from kvloom.engine import TransformersEngine


class _Column(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A cache layer of the paths' own rows: ``update`` writes one column."""

    def __init__(self, siblings: Siblings, number: int) -> None:
        super().__init__()
        self._siblings, self._number = siblings, number
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._siblings.write(self._number, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._siblings.shared_tokens + self._siblings.own


class Siblings:
    """Paths of a live state, of which the first ``shared`` tokens are common to all.

    ``lengths`` are the tokens that each path has behind the shared ones; their rows come with ``put``. They stand in
    ``own`` columns, by default as many as the longest needs. There is room for ``steps`` more of each.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        live: LiveState,
        shared: int,
        lengths: Sequence[int],
        steps: int,
        *,
        own: int | None = None,
    ) -> None:
        self._engine = engine
        self._live = live
        self.shared_tokens = shared
        self.own = max(lengths) if own is None else own
        self._pads = [self.own - length for length in lengths]
        self._numbers = [n for n, spec in enumerate(live.specs) if spec.kind in (LayerKind.ROWS, LayerKind.WINDOW)]
        if len(self._numbers) != sum(spec.kind != LayerKind.EMPTY for spec in live.specs):
            raise EngineError("only paths of layers of rows are decoded together")
        self.tensors = {n: _buffers(live, n, len(lengths), self.own + steps) for n in self._numbers}
        self._pad = torch.tensor(self._pads, device=live.device)[:, None, None, None]
        self._columns = torch.arange(self.own + steps, device=live.device)
        self.hidden: torch.Tensor | None = None
        self._cache: Any = DynamicCache()
        self._cache.layers = [_Column(self, n) if n in self.tensors else DynamicLayer() for n in range(len(live.specs))]

    @property
    def positions(self) -> list[int]:
        """The position of each path's next token."""
        return [self.shared_tokens + self.own - pad for pad in self._pads]

    def put(self, path: int, live: LiveState) -> None:
        """Take a path's own rows from a live state that has been brought to its end: of windows those that are seen, as
        the others may not be there."""
        end = self.shared_tokens + self.own - self._pads[path]
        for number, tensors in self.tensors.items():
            spec = live.specs[number]
            first = (
                max(self.shared_tokens, end + 1 - spec.window) if spec.kind == LayerKind.WINDOW else self.shared_tokens
            )
            for index, own in enumerate(tensors):
                rows = rows_of(spec, live.tensors[number], index, first, end)
                axis = 1 + spec.tensors[index].token_axis
                own[path : path + 1].narrow(axis, self.own - (end - first), end - first).copy_(rows)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Run one token of each path; the logits ``[paths, vocab]``. ``hidden`` is then ``[paths, 1, hidden_size]``."""
        with attending(self._engine.config, self):
            logits, self.hidden = self._engine.run_batch(self._cache, tokens, self.positions)
        self.own += 1
        return logits

    def select(self, paths: Sequence[int], *, steps: int | None = None) -> Siblings:
        """Some of the paths, in this order, perhaps one several times, in memory of their own.

        There is room for ``steps`` more of each: as many as there is room for here, unless they are given.
        """
        lengths = [self.own - self._pads[path] for path in paths]
        left = next(iter(self.tensors.values()))[0].shape[2] - self.own if self.tensors else 0
        room = left if steps is None else steps
        chosen = Siblings(self._engine, self._live, self.shared_tokens, lengths, room, own=self.own)
        for number, tensors in self.tensors.items():
            for mine, theirs in zip(tensors, chosen.tensors[number], strict=True):
                theirs[:, :, : self.own] = mine[list(paths), :, : self.own]
        chosen.hidden = None if self.hidden is None else self.hidden[list(paths)]
        return chosen

    def last_pass(self, path: int) -> Pass:
        """How the last token of a path was run."""
        own = self.own - 1
        return Pass(self.positions[path] - 1, 1, 1, len(self._pads), path, self.shared_tokens, own)

    def source(self, path: int) -> PathRows:
        """The rows of a path, for the writer: they stay in place, later passes only add to them."""
        return PathRows(self.tensors, self._live.specs, path, self.shared_tokens - self._pads[path])

    def write(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a column of keys and values ``[paths, kv_heads, 1, head_dim]`` in place; all own rows of the layer."""
        tensors, end = self.tensors[number], self.own + 1
        tensors[0][:, :, self.own : end].copy_(keys)
        if len(tensors) > 1:
            tensors[1][:, :, self.own : end].copy_(values)
        return tensors[0][:, :, :end], tensors[-1][:, :, :end]

    # --- what attention asks ---

    def shared(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the shared rows that the next token of every path sees."""
        spec, tensors = self._live.specs[layer], self._live.tensors[layer]
        first = self._first_seen(spec)
        return tuple(rows_of(spec, tensors, n, first, self.shared_tokens) for n in (0, len(tensors) - 1))  # type: ignore[return-value]

    def hidden_rows(self, layer: int) -> torch.Tensor:
        """Columns before a path's own rows, and those its window has left behind: bool ``[paths, 1, 1, own + 1]``."""
        spec = self._live.specs[layer]
        first = self._pad
        if spec.kind == LayerKind.WINDOW:
            first = first.clamp(min=self.own + 1 - spec.window)
        return self._columns[: self.own + 1] < first

    def _first_seen(self, spec: LayerSpec) -> int:
        if spec.kind != LayerKind.WINDOW:
            return 0
        if len(set(self._pads)) > 1:
            raise EngineError("paths over windows are decoded together only where they are equally long")
        return min(max(0, self.positions[0] + 1 - spec.window), self.shared_tokens)


def _buffers(live: LiveState, number: int, paths: int, room: int) -> list[torch.Tensor]:
    return [
        # Zeros: what stands before a path's own rows is hidden, but 0 * NaN would not be.
        torch.zeros((paths, *s.shape[: s.token_axis], room, *s.shape[s.token_axis :]), dtype=t.dtype, device=t.device)
        for s, t in zip(live.specs[number].tensors, live.tensors[number], strict=True)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class PathRows:
    """One path's rows in a batch's buffers; the row of position p stands in column p - ``first``."""

    tensors: dict[int, list[torch.Tensor]]
    specs: Sequence[LayerSpec]
    path: int
    first: int

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        axis = self.specs[layer].tensors[tensor].token_axis
        held = self.tensors[layer][tensor][self.path].narrow(axis, start - self.first, end - start)
        return to_bits(held.contiguous().cpu())

    def block(self, layers: object, start: int, end: int) -> Rows | None:
        return None


def replay(engine: TransformersEngine, live: LiveState, ids: Sequence[int], entry: Pass) -> None:
    """Run recorded passes of one path of a batch again, behind what ``live`` holds: the same bits come out.

    The other paths are stood in for by this one: their tokens have no part in its bits, only that they are there.
    """
    start = entry.start
    siblings = Siblings(engine, live, entry.shared, [start - entry.shared] * entry.batch, entry.count, own=entry.own)
    for path in range(entry.batch):
        siblings.put(path, live)
    for position in range(start, entry.end):
        siblings.step([ids[position]] * entry.batch)
    assert siblings.hidden is not None
    live.extend(siblings.source(entry.path), start, entry.end)
    live.hidden = siblings.hidden[entry.path : entry.path + 1]


TRIED, STEPS, PATHS = 5, 2, 3
"""Tokens of the prefix, steps and paths of the trial that finds out whether a model's paths can be decoded together."""

TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""How far logits may be off those of a path decoded alone, relative to the largest; of other dtypes 0.05."""


def reason_against(engine: TransformersEngine) -> str | None:
    """Why a model's paths must be decoded one after another; None if they can be together. Found out by trying.

    Together each path must come out as alone but for rounding, and bit for bit the same whatever the other paths say.
    """
    if any(spec.kind not in (LayerKind.ROWS, LayerKind.WINDOW, LayerKind.EMPTY) for spec in engine.layers):
        return "some of its state is overwritten in place, or compressed"
    if unknown := set(getattr(engine.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"some of its layers have {min(unknown).replace('_', ' ')}"
    ids = [(7 * position + 3) % engine.vocab_size for position in range(TRIED + STEPS + PATHS * PATHS)]
    try:
        live = engine.new_state(TRIED + STEPS)
        engine.prefill(live, ids[:TRIED])
        alone = [engine.run_pass(live, [token]) for token in ids[TRIED : TRIED + STEPS]][-1].float()
        live.truncate(TRIED)
        found = [_tried(engine, live, ids, beside) for beside in range(1, PATHS)]
    except Exception as error:  # whatever it fails with, decoding one path after another does not need it
        return f"trying it failed: {error or type(error).__name__}"
    allowed = TOLERANCE.get(engine.dtype, 0.05) * float(alone.abs().max())
    if any(float((logits[0] - alone).abs().max()) > allowed for logits in found):
        return "its attention works in a way of its own"
    if any(not torch.equal(logits[0], found[0][0]) for logits in found):
        return "its paths round otherwise beside other paths (as experts do)"
    return None


def _tried(engine: TransformersEngine, live: LiveState, ids: Sequence[int], beside: int) -> torch.Tensor:
    """The logits of paths of which the first is always the same, the others differ with ``beside``."""
    siblings = Siblings(engine, live, TRIED, [0] * PATHS, STEPS)
    logits = torch.empty(0)
    for step in range(STEPS):
        others = [ids[TRIED + STEPS + (beside * path + step) % (PATHS * PATHS)] for path in range(1, PATHS)]
        logits = siblings.step([ids[TRIED + step], *others])
    return logits.float()
