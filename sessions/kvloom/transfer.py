"""Rows on their way between the machine's memory and that of a device.

Copies are queued on a lane of their own, beside what the device computes: with CUDA a stream, through pinned memory;
elsewhere they are made at once. Rows that are stored wait for nothing but the passes that made them, and no pass waits
for them; rows that are read go on to the device chunk by chunk, while the next chunk is read.

No such device was at hand where this was written: its order is tested with a lane that makes every copy as late as it
may, its streams were not run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvloom.bits import rows_of, to_bits
from kvloom_proto.records import LayerSpec
from kvloom_store.rows import Rows, RowSink


class Lane:
    """Where copies to and from a device are queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":  # pragma: no cover - no such device where the tests run
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """What is queued from now on waits for all that the device has been asked to compute."""
        if self._stream is not None:  # pragma: no cover
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        """What the device is asked to compute from now on waits for all that is queued; the caller does not."""
        if self._stream is not None:  # pragma: no cover
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def moment(self) -> Any:
        """When all that the device has been asked to compute is done, for ``fetch``."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()  # pragma: no cover

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the machine that a device copies to and from while others go on."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Queue a copy of ``source[n]`` to ``targets[n]``: in one go to the device, and there to their places."""
        with self._queued():
            there = source.to(self._device, non_blocking=True)
            for part, target in zip(there, targets, strict=True):
                target.copy_(part)
                if self._stream is not None:  # pragma: no cover - else its memory might be given away before
                    target.record_stream(self._stream)

    def fetch(self, rows: torch.Tensor, moment: Any) -> torch.Tensor:
        """A copy of rows in memory of the machine, made once ``moment`` is over (None: all that was asked until now).

        Only the calling thread waits for it.
        """
        if moment is None:
            self.begin()
        with self._queued():
            if moment is not None:  # pragma: no cover
                self._stream.wait_event(moment)
            whole = rows.contiguous()
            kept = self.pinned(whole.shape, whole.dtype)
            kept.copy_(whole, non_blocking=True)
            if self._stream is not None:  # pragma: no cover
                self._stream.synchronize()
        return kept

    def _queued(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def lane_to(device: torch.device) -> Lane | None:
    """How rows get to a device; None where they are in the machine's own memory."""
    return None if device.type == "cpu" else Lane(device)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """Rows of a device's tensors, fetched as they are asked for, as they were at a ``moment``."""

    tensors: list[list[torch.Tensor]] = field(repr=False)
    specs: Sequence[LayerSpec]
    lane: Lane
    moment: Any = None

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        held = rows_of(self.specs[layer], self.tensors[layer], tensor, start, end)[0]
        return to_bits(self.lane.fetch(held, self.moment))

    def block(self, layers: object, start: int, end: int) -> Rows | None:
        return None


class Arriving(RowSink):
    """Takes rows in that are read, and sends them on to their place in a device's tensors."""

    def __init__(self, tensors: list[list[torch.Tensor]], specs: Sequence[LayerSpec], lane: Lane) -> None:
        self._tensors, self._specs, self._lane = tensors, specs, lane
        self._asked = threading.local()

    def rows(self, layer: int, tensor: int, start: int, end: int) -> Rows:
        """Memory for the rows of one tensor; they are sent when they are ``placed``."""
        memory: Rows = self._memory([rows_of(self._specs[layer], self._tensors[layer], tensor, start, end)[0]])[0]
        return memory

    def block(self, layers: Sequence[int], start: int, end: int) -> Rows | None:
        """The same for all tensors of layers that are alike, ``[layers, tensors, ...]``."""
        alike = {(self._specs[number].block, self._specs[number].tensors) for number in layers}
        tensors = self._specs[layers[0]].tensors
        if len(alike) != 1 or len({(tensor.dtype, tensor.shape, tensor.token_axis) for tensor in tensors}) != 1:
            return None
        targets = [
            rows_of(self._specs[number], self._tensors[number], index, start, end)[0]
            for number in layers
            for index in range(len(tensors))
        ]
        memory = self._memory(targets)
        return memory.reshape(len(layers), len(tensors), *memory.shape[1:])

    def placed(self) -> None:
        """What this thread asked for is filled."""
        for memory, targets in self._sends():
            self._lane.send(memory, targets)
        self._sends().clear()

    def _memory(self, targets: list[torch.Tensor]) -> Rows:
        memory = self._lane.pinned((len(targets), *targets[0].shape), targets[0].dtype)
        self._sends().append((memory, targets))
        return to_bits(memory)

    def _sends(self) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        if not hasattr(self._asked, "sends"):
            self._asked.sends = []
        sends: list[tuple[torch.Tensor, list[torch.Tensor]]] = self._asked.sends
        return sends


@contextlib.contextmanager
def arriving(tensors: list[list[torch.Tensor]], specs: Sequence[LayerSpec], lane: Lane) -> Iterator[Arriving]:
    """Where rows that are read in the block go; passes that follow it find them there, also where it failed."""
    lane.begin()
    try:
        yield Arriving(tensors, specs, lane)
    finally:
        lane.settle()
