"""Noting a reply while it is generated, so that a killed process loses a few tokens of it and no more."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from kvloom.steps import NewTurn
from kvloom_proto.scores import pack_scores
from kvloom_store import journal, segments
from kvloom_store.errors import StoreError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.commit import Addition, Commits
    from kvloom.loom import KVLoom

EVERY_TOKENS = 8
EVERY_S = 1.0
"""A reply is noted when it has so many tokens more, or after so many seconds, whichever comes first."""

SHARE = 0.01
"""Of the time of a reply, noting it takes no more than this: where it takes long, or tokens come fast, it is done more
rarely, but at least every EVERY_S."""


class Journal:
    """What a run notes of its reply, or of several that grow together. Where the store is busy or full they go on, and
    it is tried again."""

    def __init__(self, loom: KVLoom, replies: int = 1) -> None:
        self._loom = loom
        self._runs = [secrets.token_bytes(16) for _ in range(replies)]
        self._noted = 0
        self._is_there = False
        self._provenance: int | None = None
        self._last = time.perf_counter()
        self._took = 0.0

    def is_due(self, tokens: int) -> bool:
        """Whether a reply of so many tokens (the longest, of several) should be noted now."""
        if tokens == self._noted:
            return False
        since = time.perf_counter() - self._last
        return since >= EVERY_S or (tokens - self._noted >= EVERY_TOKENS and since * SHARE >= self._took)

    def note(self, *replies: tuple[Commits, Addition]) -> None:
        """Note each reply, always in the same order, as the turn it would be if it ended now."""
        began, tokens = time.perf_counter(), 0
        try:
            with self._loom.database.write(wait=False) as conn:
                for run, (commits, addition) in zip(self._runs, replies, strict=True):
                    reply = self._unfinished(conn, commits, addition)
                    journal.note(conn, run, reply, first=not self._is_there)
                    tokens = max(tokens, len(reply.tokens))
        except StoreError:
            return
        self._is_there, self._noted = True, tokens
        self._last = time.perf_counter()
        self._took = self._last - began

    def _unfinished(self, conn: sa.Connection, commits: Commits, addition: Addition) -> journal.Unfinished:
        new, held = addition.new, addition.held
        assert isinstance(new, NewTurn)
        assert held is not None
        assert addition.parent is not None
        assert addition.tip is not None
        if self._provenance is None:
            self._provenance = segments.add_provenance(conn, self._loom.engine.provenance())
        base = held.chain[-1].handle if held.chain else None
        return journal.Unfinished(
            branch=commits.place,
            turn=addition.parent.row,
            tip=addition.tip.row,
            root=self._loom.root,
            tokens=list(addition.ids[addition.start :]),
            text=new.message["content"],
            finish_reason=new.finish_reason or journal.INTERRUPTED,
            continues=new.continues,
            settings=new.settings,
            timings=new.timings,
            scores=pack_scores(new.scores) if new.scores else None,
            state_start=held.captured,
            state_end=held.length,
            base_state=base.state if base else None,
            base_segment=base.segment if base else None,
            schedule=addition.passes,
            provenance=self._provenance,
            variant=not commits.reuse,
        )

    def ended(self, conn: sa.Connection, _turns: object) -> None:
        """The replies' turns are being added: what was noted of them goes, in the same transaction."""
        for run in self._runs:  # also if none seems to be noted: Ctrl-C may have come behind the commit of a note
            journal.remove(conn, run)

    def over(self) -> None:
        """The run is over; what is still noted (the turn could not be added) may be taken up."""
        for run in self._runs:
            journal.over(run)
