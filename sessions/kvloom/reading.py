"""Putting stored state into a live one: the rows and the keyframe of a plan, beside what is in memory already."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
import torch

from kvloom.bits import TORCH_DTYPES
from kvloom.engine import Progress
from kvloom.live import Link, LiveState
from kvloom_store import loading, planner, restore


@dataclass(slots=True)
class Account:
    """What bringing back cost: tokens loaded, tokens run again, seconds, what was read (``report.Restored``), and what
    the user should be told. Of the loaded tokens, the rows of ``lossy`` are not exact.

    And what was asked: ``whole``: rows behind windows are wanted, too; ``exact``: rows that are not exact count as
    missing; ``cancel`` and ``progress``: for passes that are run again."""

    reused: int = 0
    replayed: int = 0
    seconds: float = 0.0
    rows: int = 0
    window_rows: int = 0
    keyframe: int | None = None
    bytes_read: int = 0
    lossy: int = 0
    whole: bool = False
    exact: bool = False
    notices: list[str] = field(default_factory=list)
    cancel: threading.Event | None = None
    progress: Progress | None = None


def rows_in_memory(live: LiveState, reads: Sequence[planner.Read]) -> int:
    """How many leading rows in memory belong to the same segments as those of a plan."""
    kept = 0
    for (segment, start, end), read in zip(_by_segment(live.chain), reads, strict=False):
        if segment != read.segment or start != read.start:
            break
        kept = min(end, read.end)
        if end != read.end:
            break
    return kept


def _by_segment(chain: Sequence[Link]) -> Iterator[tuple[int | None, int, int]]:
    """Which rows [start, end) belong to which segment: several turns' may be in one."""
    for segment, some in itertools.groupby(chain, key=lambda link: link.handle.segment):
        links = list(some)
        yield segment, links[0].start, links[-1].end


def read_plan(
    live: LiveState,
    conn: sa.Connection,
    links: list[planner.Link],
    plan: planner.Plan,
    kept: int,
    account: Account,
) -> None:
    """Read the rows and the keyframe of a plan, of which ``kept`` rows are in place."""
    rows = [planner.Read(r.segment, max(r.start, kept), r.end) for r in plan.rows if r.end > kept]
    windows, base = (plan.rows, 0) if account.whole else (plan.windows, plan.base)
    if live.window_base <= base <= kept:  # the rows of windows are there as far as all others are
        windows = tuple(planner.Read(r.segment, max(r.start, kept), r.end) for r in windows if r.end > kept)
        base = live.window_base
    with live.arriving() as sink:
        count(account, rows, windows, loading.load(conn, links, rows, windows, sink))
    live.show(plan.position)
    live.window_base = base  # only now: if reading fails, or is stopped, what is in sight here is still missing
    if plan.keyframe is None:
        return
    account.keyframe = at = plan.keyframe.position
    if plan.keyframe.segment is not None:
        frame, size = restore.load_keyframe(conn, links, plan.keyframe)
        account.bytes_read += size
        live.put_frame(frame, at)
        live.frames[at] = frame
    elif live.frame_at != at:
        live.put_frame(live.frames.get(at), at)


def count(account: Account, rows: Sequence[planner.Read], windows: Sequence[planner.Read], size: int) -> None:
    """Note what was read."""
    account.rows += sum(read.end - read.start for read in rows)
    account.window_rows += sum(read.end - read.start for read in windows)
    account.bytes_read += size


def hidden_tensor(data: bytes, dtype: str, device: torch.device) -> torch.Tensor:
    """A stored final hidden state as ``[1, 1, hidden_size]``."""
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype])[None, None].to(device)


def hidden_bytes(hidden: torch.Tensor) -> bytes:
    """The inverse: the raw little-endian bytes of a final hidden state."""
    return hidden.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()
