"""What is needed to bring state back: pure functions from what a store holds to what is read and what is run again.

State at position T of a segment is the segment's own rows up to T, its base's rows up to where it starts, and so on
down to the snapshot. Of windows only the rows are read that a pass can still see. State that is overwritten in place
comes from the nearest keyframe at or before T; from there to T the recorded passes are run again, the last one cut at
T.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvloom_proto.errors import FormatError
from kvloom_proto.limits import CHUNK_TOKENS
from kvloom_proto.records import LayerKind, LayerSpec, Manifest, Schedule, read_manifest, read_schedule
from kvloom_store.errors import StoreError


class StateDamaged(StoreError):
    """Stored state is not what was written. Rows below ``intact`` are sound; the rest can be recomputed."""

    def __init__(self, what: str, intact: int) -> None:
        super().__init__(f"stored state is damaged: {what}", hint="it is recomputed from the tokens when it is needed")
        self.what = what
        self.intact = intact


class StateInexact(StateDamaged):
    """Stored state is sound, but not exact, where exact state was asked for."""


@dataclass(frozen=True)
class Link:
    """One segment of a chain."""

    id: int
    node: int
    start: int
    end: int
    base_segment: int | None
    provenance: int
    packed_manifest: bytes
    packed_schedule: bytes
    lossy: int = 0

    @cached_property
    def manifest(self) -> Manifest:
        """What the segment holds. Raises StateDamaged."""
        try:
            return read_manifest(self.packed_manifest)
        except FormatError as error:
            raise StateDamaged(f"manifest of segment {self.id}: {error}", self.start) from error

    @cached_property
    def schedule(self) -> Schedule:
        """The passes that made it. Raises StateDamaged."""
        try:
            return read_schedule(self.packed_schedule)
        except FormatError as error:
            raise StateDamaged(f"schedule of segment {self.id}: {error}", self.start) from error


@dataclass(frozen=True, slots=True)
class Read:
    """Rows [start, end) are taken from this segment."""

    segment: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Keyframe:
    """State that is overwritten in place, as it was after ``position`` tokens: of a segment, or (None) in memory, or
    (position 0) what a model begins with."""

    segment: int | None
    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """A pass over positions [start, end), run again as it is recorded under ``provenance``."""

    start: int
    end: int
    provenance: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the state at ``position`` is brought back: rows to read, a keyframe to begin from, passes to run again.

    ``rows`` are those of layers that see all tokens, from the first one on. ``windows`` are those of layers that see
    the last ``window`` tokens, from ``base`` less the window on: ``base`` is where the first pass begins.
    ``keyframe`` is None for a model that overwrites nothing.
    """

    position: int
    rows: tuple[Read, ...]
    windows: tuple[Read, ...]
    keyframe: Keyframe | None
    replay: tuple[Step, ...]

    @property
    def base(self) -> int:
        """Where the next pass over this state begins: at the keyframe, if there is something to replay."""
        return self.replay[0].start if self.replay else self.position

    @property
    def replayed(self) -> int:
        """Tokens that are run again."""
        return self.position - self.base


def reads_of(links: Sequence[Link], position: int) -> list[Read]:
    """Which rows of which segment make up the rows [0, position).

    Each segment gives its rows up to where the next one starts: a delta may begin inside its base.
    """
    reads: list[Read] = []
    upto = position
    for link in reversed(links):
        if link.start < upto <= link.end:
            reads.append(Read(link.id, link.start, upto))
            upto = link.start
        elif upto > link.end:
            raise StateDamaged(f"no rows are held between {link.end} and {upto}", link.end)
    return reads[::-1]


def check_exact(links: Sequence[Link], reads: Sequence[Read]) -> None:
    """Raises StateInexact if some rows to be read are not exact, or were computed on such."""
    wanted = {read.segment for read in reads}
    lossy = next((link for link in links if link.lossy and link.id in wanted), None)
    if lossy is not None:
        raise StateInexact(f"the rows of segment {lossy.id} are lossy", lossy.start)


def plan(
    links: Sequence[Link], position: int, layers: tuple[LayerSpec, ...], *, in_memory: bool = False, grid: int = 0
) -> Plan:
    """What to read and what to run again, so that the state at ``position`` of a chain is there.

    ``in_memory``: the keyframe of this very position need not be read. ``grid`` cuts passes that nobody recorded.

    Raises:
        StateDamaged: the chain does not hold all rows up to ``position``.
    """
    reads = reads_of(links, position)
    keyframe = None
    steps: tuple[Step, ...] = ()
    if any(spec.kind == LayerKind.KEYFRAME for spec in layers):
        keyframe = Keyframe(None, position) if in_memory else _nearest(links, reads, position)
        steps = tuple(_steps(links, reads, keyframe.position, grid or CHUNK_TOKENS))
    window = max((spec.window for spec in layers if spec.kind == LayerKind.WINDOW), default=0)
    first = max(0, (steps[0].start if steps else position) - window + 1)
    windows = tuple(Read(r.segment, max(r.start, first), r.end) for r in reads if r.end > first) if window else ()
    return Plan(position, tuple(reads), windows, keyframe, steps)


def _nearest(links: Sequence[Link], reads: Sequence[Read], position: int) -> Keyframe:
    """The last stored keyframe at or before a position."""
    upto = {read.segment: read.end for read in reads}
    for link in reversed(links):
        # A delta may stand on a point of its base behind which the base goes on: that part is another path's. The
        # keyframe where a delta begins is the delta's own.
        last = upto.get(link.id, link.start if link.start == position else -1)
        found = [p for p in link.manifest.keyframes if p <= last] if last >= 0 else []
        if found:
            return Keyframe(link.id, found[-1])
    return Keyframe(None, 0)


def _steps(links: Sequence[Link], reads: Sequence[Read], first: int, grid: int) -> Iterator[Step]:
    """The recorded passes over [first, end of the last read), each cut where the next segment takes over."""
    by_id = {link.id: link for link in links}
    for read in reads:
        start = max(first, read.start)
        if start >= read.end:
            continue
        link = by_id[read.segment]
        passes = list(link.schedule.each())
        if not passes or passes[0][0] > start or passes[-1][1] < read.end:
            cuts = [start, *range(start - start % grid + grid, read.end, grid), read.end]
            passes = list(itertools.pairwise(cuts))
        for begin, end in passes:
            if end > start and begin < read.end:
                yield Step(max(begin, start), min(end, read.end), link.provenance)
