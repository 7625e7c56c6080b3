"""State in use: cache layers that grow in place, over memory that can be captured from and restored into.

transformers' own dynamic layer concatenates, which copies the whole cache for every token. Here each layer is a view of
a preallocated buffer; a forward pass writes its new rows behind the old ones, where they stay until they are stored.
Tensors that a pass overwrites in place are copied at the points worth coming back to: keyframes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvloom.bits import TORCH_DTYPES, from_bits, rows_of, to_bits
from kvloom.layers import attach
from kvloom.overwritten import Overwritten
from kvloom.row_layers import RowLayer
from kvloom.transfer import DeviceRows, arriving, lane_to
from kvloom_proto.records import STORED_BY_ROW, LayerKind, LayerSpec, TensorSpec, expand
from kvloom_store.rows import Captured, Frame, RowBuffer, RowSink, RowSource, shape_with
from kvloom_store.writer import Handle

CAPACITY_STEP = 256
LEAST_CAPACITY = 1024
"""Buffers hold a multiple of so many tokens, and at least so many. Huge pages make the room that is not used resident,
too, and to touch it for the first time costs as much as for state."""


@dataclass(frozen=True, slots=True)
class Link:
    """Rows [start, end) of the live state belong to this stored, or about to be stored, segment.

    ``lossy``: they are not the exact ones, or were computed on such.
    """

    handle: Handle
    start: int
    end: int
    lossy: bool = False


class LiveState:
    """The attention state of one path while it is being extended.

    ``cache`` is what the model is given. ``chain`` says which segment each row belongs to; rows behind its end are not
    captured yet. ``hidden`` is the final hidden state ``[1, 1, hidden_size]`` of the last position, from which the next
    token is chosen.

    Of windows only the rows are there that a pass at ``window_base``, or behind it, can see. State that is overwritten
    in place stands at ``frame_at`` (None: nowhere; it must be brought back). ``frames`` are
    copies of it by position, ``stored`` the positions whose copies are in segments of the chain already.
    """

    def __init__(
        self,
        layers: tuple[LayerSpec, ...],
        new_cache: Callable[[], tuple[Any, Any]],
        capacity: int,
        device: torch.device,
        buffer: RowBuffer | None = None,
    ) -> None:
        """Room for ``capacity`` tokens; in ``buffer``, if there is one already (on the CPU).

        ``new_cache`` gives an empty cache of the model's own, and one like it that has seen tokens.
        """
        self.layers = layers
        self.specs = expand(layers)
        self.device = device
        self.capacity = 0
        self.tensors: list[list[torch.Tensor]] = []
        self.source: RowBuffer | DeviceRows
        self._lane = lane_to(device)
        if buffer is not None:
            self._use(buffer)
        else:
            self._allocate(capacity)
        self.cache, like = new_cache()
        self._row_layers: list[RowLayer]
        self._overwritten: dict[int, Overwritten]
        self._row_layers, self._overwritten = attach(self.cache, like, self)
        self._count = 0
        self._windowed = any(spec.kind == LayerKind.WINDOW for spec in self.specs)
        self.chain: list[Link] = []
        self.hidden: torch.Tensor | None = None
        self.window_base = 0
        self.frame_at: int | None = 0
        self.frames: dict[int, Frame] = {}
        self.stored: set[int] = set()
        self._before: dict[int, dict[str, torch.Tensor]] = {}
        self._before_at: int | None = None

    def _allocate(self, capacity: int) -> None:
        self.capacity = max(-(-capacity // CAPACITY_STEP) * CAPACITY_STEP, LEAST_CAPACITY)
        if self._lane is None:
            self._use(RowBuffer(self.layers, self.capacity))
        else:
            self.tensors = [
                [self._empty(spec, tensor) for tensor in spec.tensors] if spec.kind in STORED_BY_ROW else []
                for spec in self.specs
            ]
            self.source = DeviceRows(self.tensors, self.specs, self._lane)

    def _use(self, buffer: RowBuffer) -> None:
        self.capacity = buffer.capacity
        self.tensors = [
            [from_bits(array, tensor.dtype)[None] for array, tensor in zip(arrays, spec.tensors, strict=False)]
            for arrays, spec in zip(buffer.tensors, self.specs, strict=True)
        ]
        self.source = buffer

    def _empty(self, spec: LayerSpec, tensor: TensorSpec) -> torch.Tensor:
        shape = (1, *shape_with(tensor, spec.rows_before(self.capacity)))
        return torch.empty(shape, dtype=self.torch_dtype(tensor), device=self.device)

    @staticmethod
    def torch_dtype(spec: TensorSpec) -> torch.dtype:
        """The dtype of a tensor's elements."""
        return TORCH_DTYPES[spec.dtype]

    @property
    def length(self) -> int:
        """Tokens held: those of the layer that has fewest, so that a pass that was cut short counts for nothing."""
        return min((layer.length for layer in self._row_layers), default=self._count)

    @property
    def captured(self) -> int:
        """Tokens whose rows belong to a segment."""
        return self.chain[-1].end if self.chain else 0

    @property
    def has_keyframes(self) -> bool:
        """Whether some of the state is overwritten in place."""
        return bool(self._overwritten)

    @property
    def ready(self) -> bool:
        """Whether a pass may go on from here: all state stands at the same position, and what it sees is there."""
        return self.sees(self.length) and (not self._overwritten or self.frame_at == self.length)

    def sees(self, position: int) -> bool:
        """Whether the rows of windows are there that a pass at a position sees."""
        return not self._windowed or self.window_base <= position

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens; what is held is copied if the buffers must grow."""
        if tokens <= self.capacity:
            return
        was = self.capacity, self.tensors, self.source
        held = max((layer.length for layer in self._row_layers), default=0)
        try:
            self._allocate(max(tokens, self.capacity + self.capacity // 4))
            for spec, new_tensors, old_tensors in zip(self.specs, self.tensors, was[1], strict=True):
                for number in range(len(new_tensors)):
                    rows_of(spec, new_tensors, number, 0, held).copy_(rows_of(spec, old_tensors, number, 0, held))
        except BaseException:  # Ctrl-C, or no memory: what is held is where it was
            self.capacity, self.tensors, self.source = was
            raise
        for layer in self._row_layers:
            layer.show(layer.length)

    def advance(self, tokens: int) -> None:
        """Note that a pass over so many tokens has been run."""
        self._count += tokens
        self.frame_at = self.length

    def truncate(self, tokens: int) -> None:
        """Forget everything behind so many tokens. Rows that wait to be stored must not be among them.

        State that is overwritten in place goes back to a copy of it at that very position; if there is none, the live
        state is not ``ready`` any more.
        """
        self.show(min(self.length, tokens))
        self.chain = [replace(k, end=min(k.end, tokens)) for k in self.chain if k.start < tokens]
        self.hidden = None
        if tokens == 0:
            self.window_base = 0
        self.frames = {position: frame for position, frame in self.frames.items() if position <= tokens}
        self.stored = {position for position in self.stored if position <= tokens}
        if self._overwritten and self.frame_at != self.length:
            self._go_back()

    def _go_back(self) -> None:
        self.frame_at = None
        if self.length == 0:
            self.put_frame(None, 0)
        elif self.length in self.frames:
            self.put_frame(self.frames[self.length], self.length)

    def show(self, tokens: int) -> None:
        """Let every layer end after so many tokens, whose rows have been put in place."""
        for layer in self._row_layers:
            layer.show(tokens)
        self._count = tokens

    @contextmanager
    def arriving(self) -> Iterator[RowSink]:
        """Where rows that are read from a store in the block are put."""
        if isinstance(self.source, RowBuffer):
            yield self.source
        else:
            with arriving(self.tensors, self.specs, self.source.lane) as sink:
                yield sink

    def extend(self, rows: RowSource, start: int, end: int) -> None:
        """Hold rows [start, end), computed elsewhere, behind those that are here. Nothing is overwritten in place."""
        self.reserve(end)
        for index, spec in enumerate(self.specs):
            for number, tensor in enumerate(spec.tensors if spec.kind in STORED_BY_ROW else ()):
                loaded = from_bits(np.ascontiguousarray(rows.rows(index, number, start, end)), tensor.dtype)
                rows_of(spec, self.tensors[index], number, start, end)[0].copy_(loaded)
        self.show(end)
        self.frame_at = end

    def put_aside(self, start: int, end: int) -> Callable[[], None]:
        """Copy rows [start, end) of every layer; what is returned puts them back and lets the layers end there."""
        saved = [
            [rows_of(spec, ts, number, start, end).clone() for number in range(len(ts))]
            for ts, spec in zip(self.tensors, self.specs, strict=True)
        ]

        def put_back() -> None:
            for ts, spec, copies in zip(self.tensors, self.specs, saved, strict=True):
                for number, copy in enumerate(copies):
                    rows_of(spec, ts, number, start, end).copy_(copy)
            self.show(end)

        return put_back

    # --- state that is overwritten in place ---

    def frame(self) -> Frame:
        """A copy of the state that is overwritten in place, by layer."""
        return {
            number: [to_bits(tensor[0].detach().cpu().clone().contiguous()) for tensor in held.tensors().values()]
            for number, held in self._overwritten.items()
        }

    def put_frame(self, frame: Frame | None, position: int) -> None:
        """Let the state that is overwritten in place be this copy, taken at ``position``; None for the beginning."""
        self.frame_at = None  # while it is neither the one nor the other
        for number, held in self._overwritten.items():
            held.put({} if frame is None else self._tensors_of(number, frame), position)
        self.frame_at = position

    def _tensors_of(self, number: int, frame: Frame) -> dict[str, torch.Tensor]:
        return {
            spec.name: from_bits(np.array(array), spec.dtype)[None].to(self.device)  # a copy: passes write into it
            for spec, array in zip(self.specs[number].tensors, frame[number], strict=True)
        }

    def remember(self) -> None:
        """Copy the state that is overwritten in place, for ``recall``; into the same memory every time."""
        self._before_at = self.frame_at
        for number, held in self._overwritten.items():
            kept, now = self._before.setdefault(number, {}), held.tensors()
            for name, tensor in now.items():
                if name not in kept:
                    kept[name] = torch.empty_like(tensor)
                kept[name].copy_(tensor)

    def recall(self) -> None:
        """Put back what was copied last: a pass was broken off in the middle."""
        for number, held in self._overwritten.items():
            before = {name: tensor.clone() for name, tensor in self._before[number].items()} if self._before_at else {}
            held.put(before, self._before_at or 0)
        self.frame_at = self._before_at

    def keep_frame(self) -> None:
        """Copy the state that is overwritten in place, to be stored with the next segment; once a position."""
        at = self.frame_at
        if self._overwritten and at and at == self.length and at not in self.frames:
            self.frames[at] = self.frame()

    def take_captured(self) -> Captured:
        """What the rows behind the chain's end are stored from; only copies at that end stay in ``frames``."""
        self.keep_frame()
        start, end = self.captured, self.length
        new = {p: frame for p, frame in self.frames.items() if start <= p <= end and p not in self.stored}
        self.stored.update(new)
        self.frames = {p: frame for p, frame in self.frames.items() if p == end}
        source = self.source
        if isinstance(source, DeviceRows):  # it is read by another thread, and later
            source = replace(source, moment=source.lane.moment())
        return Captured(source, new)
