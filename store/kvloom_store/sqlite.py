"""Everything that is SQLite's alone: pragmas, file creation, its error messages. No other module knows them."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, DBAPIError, NoResultFound, OperationalError, SQLAlchemyError

from kvloom_store.errors import NotAStore, RemovedMeanwhile, StoreError, StoreLocked, StoreUnavailable

APPLICATION_ID = 0x4B564C4D
"""``KVLM``: tells a kvloom store from any other SQLite file."""

PAGE_BYTES = 16384
"""Measured (benchmarks/NOTES.md): blobs of about 1 MiB are written 1.3 to 1.9 times as fast as with 4 KiB pages."""

MMAP_BYTES = 2 << 30
"""SQLite's own cap. Mapped pages are copied once on their way out instead of twice."""

NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smbfs", "smb3", "afpfs", "fuse.sshfs", "9p", "ceph", "glusterfs", "davfs"}
)

LOG_BYTES = 64 << 20
"""From here on the write-ahead log is moved into the file: much of a long prompt's state goes in one go."""

MOST_LOG_BYTES = 4 * LOG_BYTES
"""A log of more is moved even if its readers must be waited for: it would grow for as long as there is always one."""

MOVES = 4
"""How often it is tried to reach the end of a log that others are writing to."""

CHECKPOINT_MS = 1000
"""How long moving the log into the file waits for readers of it."""


DAMAGED = "kvloom fsck --repair mends what it can; else restore it from a backup"


def kind_of(path: Path) -> str:
    """``file``, ``folder`` or ``nothing``. Raises NotAStore, StoreUnavailable."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "nothing"
    except (OSError, ValueError) as error:  # not allowed to look, a part of the path is a file, too long a name
        raise StoreUnavailable(
            f"cannot open {path}: {getattr(error, 'strerror', None) or error}",
            hint="give another place with --store PATH (or KVLOOM_STORE)",
        ) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise NotAStore(str(path))
    return "file"


def create_file(path: Path) -> None:
    """Make an empty private file (0600) in a private folder (0700).

    SQLite gives its WAL the permissions of the main file. The file is only ever opened here while it does
    not exist: closing a second descriptor of an open database would drop SQLite's locks.
    """
    try:
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return  # another process was first
    except OSError as error:
        raise StoreUnavailable(
            f"cannot create the store {path}: {error.strerror or error}",
            hint="give another place with --store PATH (or KVLOOM_STORE)",
        ) from error


def make_engine(path: Path, *, read_only: bool, synchronous: str, busy_ms: int) -> sa.Engine:
    """An engine whose transactions say BEGIN themselves (see ``begin_write``), with the pragmas we rely on."""
    mode = "ro" if read_only else "rw"
    engine = sa.create_engine(
        f"sqlite:///file:{_quoted(path)}?mode={mode}&uri=true",
        connect_args={"timeout": busy_ms / 1000},
        pool_size=8,
        pool_timeout=30,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves: pysqlite's own is deferred and late
        connection.text_factory = _text
        pragmas = [f"mmap_size={MMAP_BYTES}", "foreign_keys=ON", "trusted_schema=OFF", "cell_size_check=ON"]
        if not read_only:
            # Before the log: that writes the first page, which says whether a file can be made smaller. Only then: of a
            # file that is there it would be written anew each time it is opened.
            if not connection.execute("PRAGMA page_count").fetchone()[0]:
                pragmas += [f"page_size={PAGE_BYTES}", "auto_vacuum=INCREMENTAL"]
            pragmas += ["journal_mode=WAL", f"synchronous={synchronous}"]
            # Whoever writes state moves the log (``move_log``); a commit does where nobody has, and takes long then.
            pragmas += [f"wal_autocheckpoint={2 * LOG_BYTES // PAGE_BYTES}", f"journal_size_limit={LOG_BYTES}"]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if options.get("kvloom_bare", False):
            return  # what cannot be done in a transaction
        write = options.get("kvloom_write", False)
        with _patience(connection, None if options.get("kvloom_wait", True) else 0):
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


_text = functools.partial(str, encoding="utf-8", errors="replace")
"""How text is read: damaged text, too, so that its row's checksum tells, and not an error of the driver's."""


def _quoted(path: Path) -> str:
    text = str(path.absolute())
    for char, code in (("%", "%25"), ("?", "%3f"), ("#", "%23")):
        text = text.replace(char, code)
    return text


def identify(conn: sa.Connection, path: Path) -> int:
    """The schema version of the file: 0 for an empty one. Raises NotAStore."""
    application = conn.exec_driver_sql("PRAGMA application_id").scalar_one()
    found = version(conn)
    if application == APPLICATION_ID:
        return found
    tables = conn.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
    if application or found or tables:
        raise NotAStore(str(path))
    return 0


def mark(conn: sa.Connection, version: int) -> None:
    """Stamp the file as a kvloom store of this schema version."""
    conn.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    conn.exec_driver_sql(f"PRAGMA user_version={version:d}")


def version(conn: sa.Connection) -> int:
    """The schema version that the file says it has."""
    return int(conn.exec_driver_sql("PRAGMA user_version").scalar_one())


def put_aside(conn: sa.Connection, table: sa.Table) -> str:
    """Call a table otherwise, so that it can be made anew under its name, in a transaction ``in_any_order``; how it is
    called now. What other tables say of it is then said of the new one; its indexes go."""
    quote = conn.dialect.identifier_preparer.quote
    aside = f"{table.name}_before"
    conn.exec_driver_sql("PRAGMA legacy_alter_table=ON")
    conn.exec_driver_sql(f"ALTER TABLE {quote(table.name)} RENAME TO {quote(aside)}")
    query = "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
    for name in conn.exec_driver_sql(query, (aside,)).scalars().all():
        conn.exec_driver_sql(f"DROP INDEX {quote(name)}")
    return aside


def forget_table(conn: sa.Connection, name: str, behind: Sequence[str]) -> None:
    """Take a virtual table away that is too damaged for DROP TABLE, with the tables ``behind`` it."""
    conn.exec_driver_sql("PRAGMA writable_schema=ON")
    conn.exec_driver_sql("DELETE FROM sqlite_master WHERE type = 'table' AND name = ?", (name,))
    conn.exec_driver_sql("PRAGMA writable_schema=RESET")
    for table in behind:
        conn.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")


def uint32_at(blob: sa.ColumnElement[bytes], at: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """The little-endian 32-bit unsigned integer that begins at byte ``at`` of a blob.

    SQLite has no function for the value of a byte: it is where that byte stands among all 256.
    """
    every = sa.literal(bytes(range(256)), sa.LargeBinary)
    digits = [sa.func.instr(every, sa.func.substr(blob, at + 1 + place, 1), type_=sa.Integer) - 1 for place in range(4)]
    return digits[0] + 0x100 * digits[1] + 0x10000 * digits[2] + 0x1000000 * digits[3]


def integrity(conn: sa.Connection, *, quick: bool) -> Iterator[str]:
    """What SQLite's own check says is wrong with the file, a line each; ``quick`` leaves its indexes out."""
    try:
        for line in conn.exec_driver_sql("PRAGMA quick_check" if quick else "PRAGMA integrity_check").scalars():
            if line != "ok":
                yield str(line)
        if not quick:
            yield from _unreadable_indexes(conn)
    except DBAPIError as error:
        yield str(error.orig)


def _unreadable_indexes(conn: sa.Connection) -> Iterator[str]:
    """Indexes that SQLite cannot read: an entry that is longer than it says passes its own check."""
    query = "SELECT name, tbl_name, coalesce(sql, '') FROM sqlite_master WHERE type = 'index'"
    for name, table, sql in conn.exec_driver_sql(query).all():
        columns = [column for _, _, column in conn.exec_driver_sql(f'PRAGMA index_info("{name}")')]
        read = ", ".join(f'total(length("{column}"))' for column in ["rowid", *columns])
        _, where, condition = str(sql).partition(" WHERE ")
        try:
            conn.exec_driver_sql(f'SELECT {read} FROM "{table}" INDEXED BY "{name}"{where}{condition}').all()
        except DBAPIError as error:
            yield f"an entry in index {name} cannot be read: {error.orig}"


def tree_names(conn: sa.Connection) -> dict[int, tuple[str, str]]:
    """What each tree of the file holds, by its root page: ``table`` or ``index``, and the table's name."""
    rows = conn.exec_driver_sql("SELECT rootpage, type, tbl_name FROM sqlite_master WHERE rootpage > 0")
    return {page: (kind, name) for page, kind, name in rows}


def definitions(conn: sa.Connection) -> dict[str, str]:
    """What the file's catalogue says of each table and index, cell by cell with its type, by the name in small letters.

    A flipped bit may leave a name that SQLite takes for the same one: in another case, or as a blob.
    """
    cells = "quote(type) || quote(name) || quote(tbl_name) || quote(sql)"
    rows = conn.exec_driver_sql(f"SELECT CAST(lower(name) AS BLOB), CAST({cells} AS BLOB) FROM sqlite_master")
    return {bytes(name).decode(errors="replace"): bytes(said).decode(errors="replace") for name, said in rows}


def reindex(conn: sa.Connection) -> None:
    """Make every index anew from its table (inside a write transaction)."""
    conn.exec_driver_sql("REINDEX")


def overwrite(target: sa.Engine, source: sa.Engine) -> None:
    """Put all of another file's content into a file, in one transaction: a crash leaves the one or the other."""
    with contextlib.closing(target.raw_connection()) as to, contextlib.closing(source.raw_connection()) as given:
        assert to.driver_connection is not None
        assert given.driver_connection is not None
        given.driver_connection.backup(to.driver_connection)


def data_version(conn: sa.Connection) -> int:
    """A number that changes when another connection has written to the file."""
    return int(conn.exec_driver_sql("PRAGMA data_version").scalar_one())


@contextmanager
def in_any_order(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A write transaction in which rows may be written before those that they name."""
    with engine.connect().execution_options(kvloom_write=True) as conn:
        driver = conn.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys=OFF")  # of no effect once a transaction has begun
        try:
            with conn.begin():
                yield conn
        finally:
            conn.invalidate()  # nobody else is to be handed such a connection


def checkpoint(engine: sa.Engine) -> None:
    """Move the write-ahead log into the file, where reads are mapped; what a reader still needs stays.

    A reader is not waited for long: it may be one that nobody knows of any more, a query that an error was raised from.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn, _patience(conn, CHECKPOINT_MS):
        conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def log_bytes(path: Path) -> int:
    """Bytes of the write-ahead log's file."""
    try:
        return Path(f"{path}-wal").stat().st_size
    except FileNotFoundError:
        return 0


def move_log(engine: sa.Engine, *, wait: bool) -> bool:
    """Move the write-ahead log into the file while others go on reading and writing. Its file is cut to LOG_BYTES by
    the first write after that.

    What they write meanwhile is moved as well, in a few more goes: only a log that was moved to its end begins anew,
    and only when nobody reads it. ``wait`` for those who do, CHECKPOINT_MS at most, and let those who write wait: who
    begins to read then reads the file. False if somebody still read it then.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        for _ in range(MOVES):
            _, pages, moved = conn.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").one()
            if moved == pages:
                break
        if not wait:
            return True
        with _patience(conn, CHECKPOINT_MS):
            return not conn.exec_driver_sql("PRAGMA wal_checkpoint(RESTART)").one()[0]


def rewrite(engine: sa.Engine, path: Path) -> None:
    """Write all pages anew, without those that are free and what stands between rows, and empty the log.

    Raises StoreLocked where somebody reads what was before: then it is still in the log.
    """
    with engine.connect().execution_options(kvloom_bare=True) as conn:
        conn.exec_driver_sql("VACUUM")
        busy = conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
    if busy:
        raise StoreLocked(f"{path} is being read by another process", hint="try again when it has ended")


@contextmanager
def _patience(conn: sa.Connection, most_ms: int | None) -> Iterator[None]:
    """Wait for others no longer than so many milliseconds meanwhile (None: as long as ever)."""
    if most_ms is None:
        yield
        return
    usual = conn.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
    conn.exec_driver_sql(f"PRAGMA busy_timeout={min(usual, most_ms)}")
    try:
        yield
    finally:
        conn.exec_driver_sql(f"PRAGMA busy_timeout={usual}")


def unmap(conn: sa.Connection) -> None:
    """Let go of the pages of the file that were mapped; what is read next maps its own.

    Where a statement of this connection is half read, SQLite keeps them.
    """
    for size in (0, MMAP_BYTES):
        conn.exec_driver_sql(f"PRAGMA mmap_size={size}").close()


@contextmanager
def cells_unchecked(conn: sa.Connection) -> Iterator[None]:
    """Pages are read without looking at each of their cells first, which is done every time that one is visited.

    For what visits very many, and finds only what is checked elsewhere before it is believed.
    """
    conn.exec_driver_sql("PRAGMA cell_size_check=OFF").close()
    try:
        yield
    finally:
        conn.exec_driver_sql("PRAGMA cell_size_check=ON").close()


ROW: sa.ColumnClause[int] = sa.column("rowid", sa.Integer)
"""Where a row of a table lies, for ``read_blob``: good for one transaction."""


def read_blob(conn: sa.Connection, table: str, column: str, row: int, size: int) -> bytes | None:
    """A blob of ``size`` bytes, copied once on its way out; None where the row is gone or holds something else."""
    driver = conn.connection.driver_connection
    assert driver is not None
    try:
        with driver.blobopen(table, column, row, readonly=True) as blob:
            found: bytes | None = blob.read() if len(blob) == size else None
            return found
    except sqlite3.OperationalError as error:
        if "no such rowid" in str(error) or "cannot open value" in str(error):
            return None
        raise OperationalError(f"blob of {table}", None, error) from error
    except sqlite3.Error as error:
        raise DatabaseError(f"blob of {table}", None, error) from error


SHRINK_PAGES = 512
"""Pages given back in one transaction: 8 MiB."""


def shrink(conn: sa.Connection) -> bool:
    """Give some free pages back to the disk (inside a write transaction); False if there is none, or the file was
    made by a version that could not: free pages are then used again by what is stored next."""
    free = conn.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    if not free or conn.exec_driver_sql("PRAGMA auto_vacuum").scalar_one() != 2:
        return False
    cursor = conn.connection.cursor()
    for _ in range(min(free, SHRINK_PAGES)):  # Python's driver takes one step of a statement without columns: one page
        cursor.execute("PRAGMA incremental_vacuum(1)")
    return bool(conn.exec_driver_sql("PRAGMA freelist_count").scalar_one() < free)


def file_bytes(path: Path) -> int:
    """Bytes of the file and its write-ahead log on disk."""
    return sum(p.stat().st_size for p in (path, Path(f"{path}-wal")) if p.exists())


def network_filesystem(path: Path) -> str | None:
    """The kind of network drive the store lies on, if it does: WAL is not safe there."""
    import psutil

    target = path.absolute()
    best: tuple[int, str] = (0, "")
    for part in psutil.disk_partitions(all=True):
        mount = Path(part.mountpoint)
        if target.is_relative_to(mount) and len(mount.parts) > best[0]:
            best = (len(mount.parts), part.fstype)
    return best[1] if best[1].lower() in NETWORK_FILESYSTEMS else None


@contextmanager
def keeping_files(path: Path) -> Iterator[None]:
    """Turn what the file system says of a store's files, where they are copied or made, into StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"{path} could not be copied: {error.strerror or error}",
            hint="free some disk space, or see that its folder can be written to; the store is as it was",
        ) from error


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the database library's exceptions into ours, with what to do about them."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:  # the driver's own where it is asked directly
        raise _translate(error, path) from error
    except UnicodeDecodeError as error:  # the driver's own, of a name or a message that is damaged
        raise StoreError(f"{path} is damaged: {error}", hint=DAMAGED) from error


def _translate(error: SQLAlchemyError | sqlite3.Error, path: Path) -> StoreError:
    text = str(getattr(error, "orig", error)).lower()
    if "locked" in text or "busy" in text:
        return StoreLocked(f"{path} is locked by another process", hint="wait for it to finish, then try again")
    if isinstance(error, NoResultFound) or "foreign key" in text:
        return RemovedMeanwhile()
    if "not a database" in text or "file is encrypted" in text:
        return NotAStore(str(path))
    if "readonly" in text or "read-only" in text:
        return StoreUnavailable(
            f"{path} is read-only", hint="change its permissions, or give another file with --store PATH"
        )
    if "full" in text:
        return StoreUnavailable(
            f"no space left while writing {path}",
            hint="free some disk space; everything acknowledged before is kept",
        )
    if "unable to open" in text:
        return StoreUnavailable(
            f"cannot open {path}",
            hint="check the path and its permissions, or give another with --store PATH",
        )
    if "disk i/o" in text:
        return StoreUnavailable(
            f"{path} could not be read or written: {text}",
            hint="check the disk (is it full, or gone?); everything acknowledged before is kept",
        )
    if isinstance(error, (DatabaseError, sqlite3.DatabaseError)) and "malformed" in text:
        return StoreError(f"{path} is damaged: {text}", hint=DAMAGED)
    if isinstance(error, (OperationalError, sqlite3.OperationalError)):
        return StoreUnavailable(f"{path}: {text}", hint="check the path and its permissions")
    return StoreError(f"{path}: {text}")
