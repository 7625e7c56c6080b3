"""How much room state may take: a quota that a store keeps among its settings, and what is left free on its disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import sqlalchemy as sa

from kvloom_store import gc
from kvloom_store.checksum import checked, insert, unpacked, update
from kvloom_store.database import Database
from kvloom_store.errors import NoRoom
from kvloom_store.schema import meta, segment

MAX_STATE, MIN_FREE = "max_state_bytes", "min_free_bytes"
"""The keys of the settings."""

FREE_BYTES = 256 << 20
FREE_SHARE = 20
"""Left free on the disk unless something else was set: so much, or of a small disk one part in so many."""

SLACK = 0.9
"""A store over its quota comes down to so much of it, so that not every turn has to make room for itself."""


COUNT_EVERY = 64
"""Pieces of state written before all that there is is counted again: other processes write, too."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that state may take (None: as many as there are), and that stay free on the disk (None: the default)."""

    max_state: int | None = None
    min_free: int | None = None

    def free_floor(self, disk: int) -> int:
        """Bytes that stay free on a disk of this size."""
        return self.min_free if self.min_free is not None else min(FREE_BYTES, disk // FREE_SHARE)


def read(conn: sa.Connection) -> Limits:
    """What is set."""
    rows = conn.execute(sa.select(meta).where(meta.c.key.in_([MAX_STATE, MIN_FREE])))
    found = {row["key"]: unpacked(row["value"], "meta", row["key"]) for row in (checked(meta, each) for each in rows)}
    return Limits(found.get(MAX_STATE), found.get(MIN_FREE))


def put(conn: sa.Connection, limits: Limits) -> None:
    """Set what is given, and take away what is None (inside a write transaction)."""
    for key, value in ((MAX_STATE, limits.max_state), (MIN_FREE, limits.min_free)):
        old = conn.execute(sa.select(meta).where(meta.c.key == key)).one_or_none()
        if value is None:
            conn.execute(meta.delete().where(meta.c.key == key))
        elif old is None:
            insert(conn, meta, {"key": key, "value": msgpack.packb(value)})
        else:
            update(conn, meta, checked(meta, old), value=msgpack.packb(value))


def state_bytes(conn: sa.Connection) -> int:
    """What all state takes."""
    return int(conn.execute(sa.select(sa.func.coalesce(sa.func.sum(segment.c.stored_bytes), 0))).scalar_one())


def check_disk(conn: sa.Connection, path: Path, expected: int = 0) -> None:
    """Make sure that as much of the disk is free as is to stay so, once ``expected`` more bytes are written.

    Raises:
        NoRoom
    """
    disk = shutil.disk_usage(path.absolute().parent)
    floor = read(conn).free_floor(disk.total)
    if disk.free - expected < floor:
        raise NoRoom(
            f"only {disk.free - expected >> 20:,} MiB would be free on the disk, and {floor >> 20:,} are to stay so",
            hint="free some disk, run kvloom gc, or set another limit with kvloom quota --min-free",
        )


def check(conn: sa.Connection, path: Path) -> None:
    """Refuse state that was written in this transaction, if it leaves the store over its quota or too little disk free.

    Raises:
        NoRoom: the transaction is to be undone.
    """
    check_disk(conn, path)
    limits, taken = read(conn), state_bytes(conn)
    if limits.max_state is not None and taken > limits.max_state:
        raise NoRoom(
            f"state would take {taken / 1e6:,.1f} MB, more than the store's quota of {limits.max_state / 1e6:,.1f} MB",
            hint="kvloom quota sets another one, kvloom gc drops state",
        )


@dataclass(slots=True)
class Room:
    """Makes room for state that is about to be written, or says that there is none. Used by one thread.

    ``notices`` are what the user should be told: each reason once.
    """

    database: Database
    notices: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)
    _taken: int = 0
    _counted: int = 0

    def make(self, expected: int, base: int | None) -> None:
        """See to it that ``expected`` more bytes may be stored on top of a segment, which stays.

        Raises:
            NoRoom: they would be over the quota, and not enough may be dropped; or too little is free on the disk.
        """
        with self.database.read() as conn:
            limits = read(conn)
            if limits.max_state is not None:
                self._count(conn, limits.max_state, expected)
        disk = shutil.disk_usage(self.database.path.absolute().parent)
        floor = limits.free_floor(disk.total)
        if disk.free - expected < floor:
            self._refuse(
                "disk",
                f"only {disk.free >> 20:,} MiB are free on the disk, and {floor >> 20:,} are to stay so: state is not"
                " stored any more, only what is said",
                "free some disk, run kvloom gc, or set another limit with kvloom quota --min-free",
            )
        if limits.max_state is not None and self._taken + expected > limits.max_state:
            self._come_down(limits.max_state, expected, base)
        self._taken += expected

    def _count(self, conn: sa.Connection, most: int, expected: int) -> None:
        """Know what is taken: reckoned from what was written here, and counted when that is much, or was long ago."""
        self._counted = (self._counted + 1) % COUNT_EVERY
        if self._counted == 1 or self._taken + expected > most:
            self._taken = state_bytes(conn)

    def _come_down(self, most: int, expected: int, base: int | None) -> None:
        keep = frozenset() if base is None else frozenset({base})
        wanted = max(0, min(int(most * SLACK), most - expected))
        done = gc.collect(self.database, wanted, keep=keep, agree=lambda planned: planned.after + expected <= most)
        if done.dry_run and self._taken > most:  # it does not fit in any case, and the store is to keep to its quota
            done = gc.collect(self.database, most)
        if done.dry_run or done.after + expected > most:
            self._refuse(
                "quota",
                f"state would take more than the store's quota of {most / 1e6:,.1f} MB, and not enough may be dropped:"
                " it is not stored any more, only what is said",
                "kvloom quota sets another one, kvloom unpin lets more be dropped",
            )
        self._taken = done.after
        if done.segments:
            self.notices.append(
                f"state of {done.tokens:,} tokens was dropped to keep within the store's quota; it is computed anew"
                " when it is needed"
            )

    def _refuse(self, reason: str, message: str, hint: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self.notices.append(f"{message} ({hint})")
        raise NoRoom(message, hint=hint)
