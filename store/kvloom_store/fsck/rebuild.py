"""Writing a store anew from the rows that can be read, where SQLite itself cannot read all of its file."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa

from kvloom_store import fulltext, scan, sqlite
from kvloom_store.database import Database
from kvloom_store.errors import StoreLocked
from kvloom_store.fsck.mending import mended
from kvloom_store.fsck.reading import is_intact
from kvloom_store.schema import chunk, meta, metadata, sequence


def rebuild(database: Database) -> Path:
    """Put every row that can be read into a new file, and that in the place of the old one, which is kept beside it;
    where the old one is now. Rows that are damaged in one bit are mended on the way.

    Raises:
        StoreLocked: another process wrote to the store meanwhile; nothing was changed.
        StoreUnavailable: no space is left for the new file, or for the old one beside it; nothing was changed.
    """
    database.checkpoint()
    # The old file is closed when no connection is left: closing a second descriptor of it drops SQLite's locks.
    with sqlite.keeping_files(database.path), database.path.open("rb") as old:
        kept = _rebuilt(database, old)
        database.engine.dispose()
    return kept


def _rebuilt(database: Database, old: BinaryIO) -> Path:
    with (
        tempfile.TemporaryDirectory(dir=database.path.parent, prefix=".kvloom-rebuild-") as folder,
        contextlib.closing(Database(Path(folder) / database.path.name)) as fresh,
        database.queued(background=False),
        sqlite.translated(database.path),
        database.engine.connect() as conn,
    ):
        before = sqlite.data_version(conn)
        with sqlite.in_any_order(fresh.engine) as to:
            _copy(conn, to)
        with _kept(database.path, old) as kept:
            conn.rollback()  # its snapshot ends; what others have written since shows
            if sqlite.data_version(conn) != before:
                raise StoreLocked(f"{database.path} was written to meanwhile", hint="try again")
            conn.rollback()
            sqlite.overwrite(database.engine, fresh.engine)
    return kept


@contextlib.contextmanager
def _kept(path: Path, old: BinaryIO) -> Iterator[Path]:
    """A copy of a file beside it, as private; none where something fails meanwhile: the file is what it was then."""
    kept = _free_path(path)
    try:
        sqlite.create_file(kept)
        with kept.open("wb") as to:
            shutil.copyfileobj(old, to)
        yield kept
    except Exception:
        kept.unlink(missing_ok=True)
        raise


def _free_path(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in range(10_000))
    return next(each for each in names if not each.exists())


def _copy(conn: sa.Connection, to: sa.Connection) -> None:
    """All rows, those first that are what was written: of two that claim one key, they have it."""
    for table in (meta, sequence):
        to.execute(table.delete())
    for intact in (True, False):
        for table in metadata.tables.values():
            for found in _readable(conn, table):
                if is_intact(table, found) == intact:
                    scan.add(to, table, found if intact or table is chunk else mended(table, found) or found)
    fulltext.drop(to)


def _readable(conn: sa.Connection, table: sa.Table) -> Iterator[dict[str, Any]]:
    for found in scan.scan(conn, table):
        if not isinstance(found, scan.Gap):
            yield found[1]
