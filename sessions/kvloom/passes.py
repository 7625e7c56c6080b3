"""Where forward passes begin and end: the grid of a prefill, and the schedule that is recorded.

Prefill is cut at multiples of GRID, counted from the conversation's first token, so that the state of a shared prefix
is the same whoever computed it. State that is overwritten in place can be copied only between passes, so it is also cut
where keyframes are due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvloom_proto.records import Pass, Schedule

GRID = 1024
"""Tokens of a prefill pass. On SmolLM2 at 4,096 tokens this costs 0 to 6 % against one single pass, where 512 costs
about 10 % (benchmarks/NOTES.md); a smaller grid would share more, a larger one would hold Ctrl-C up for longer."""

KEYFRAME_SPACING = 256
"""How many tokens apart, at most, copies are kept of state that is overwritten in place (recurrent, SSM, convolution).

A keyframe of K bytes every s tokens of a path of n costs n K / s bytes to write; a restore at any of its tokens runs
s / 2 of them again on average, t seconds each. With w seconds a byte written and p such restores a path, the sum
n K w / s + p t s / 2 is least at s = sqrt(2 w K n / (p t)): Young's interval for checkpoints (J. W. Young, A first
order approximation to the optimum checkpoint interval, 1974). K and t both grow with the number of layers, so s depends
little on a model's size: 98 to 334 were measured (n = 4,096, p from 0.5 to 2; benchmarks/NOTES.md)."""


def grid_passes(start: int, end: int, *, keyframes: int = 0, one_by_one: bool = False) -> Iterator[tuple[int, int]]:
    """[start, end) cut at multiples of GRID, and of ``keyframes`` if the model needs any.

    What begins off the grid and fits into one pass is one pass: cutting a short turn in two doubles the time to its
    first token, and its state is not one that others begin with. ``one_by_one``: behind the first pass of a path the
    model takes only single tokens.
    """
    grid = min(GRID, keyframes) if keyframes else GRID
    if one_by_one and start:
        yield from ((at, at + 1) for at in range(start, end))
        return
    if start % grid and start < end <= start + grid:
        yield start, end
        return
    while start < end:
        stop = min(end, start - start % grid + grid)
        if keyframes:
            stop = min(stop, start - start % keyframes + keyframes)
        yield start, stop
        start = stop
        if one_by_one:
            yield from ((at, at + 1) for at in range(start, end))
            return


def schedule_of(passes: Sequence[tuple[int, int]]) -> Schedule:
    """Passes as they ran, runs of equal length counted together."""
    entries: list[Pass] = []
    for start, end in passes:
        if entries and entries[-1].tokens == end - start:
            last = entries.pop()
            entries.append(Pass(last.start, last.tokens, last.count + 1))
        else:
            entries.append(Pass(start, end - start))
    return Schedule(tuple(entries))


def joined(passes: Sequence[Pass]) -> Schedule:
    """Passes of one token each, in order; those that went on in the same place of the same batch counted together."""
    entries: list[Pass] = []
    for each in passes:
        last = entries[-1] if entries else None
        follows = last is not None and replace(last, start=last.end, count=1, own=_columns(last)) == each
        if last is not None and follows:
            entries[-1] = replace(last, count=last.count + 1)
        else:
            entries.append(each)
    return Schedule(tuple(entries))


def _columns(entry: Pass) -> int:
    """How many columns a batch had after a pass."""
    return entry.own + entry.count if entry.is_sibling else 0
