"""Stores as older versions of kvloom wrote them, made from those of this one."""

from __future__ import annotations

from pathlib import Path

import msgpack
import sqlalchemy as sa

from kvloom_store import sqlite
from kvloom_store.checksum import digest
from kvloom_store.schema import segment

SCHEMA_1_SEGMENT = """
CREATE TABLE segment (
	id INTEGER NOT NULL, 
	node INTEGER NOT NULL, 
	start BIGINT NOT NULL, 
	"end" BIGINT NOT NULL, 
	base_segment INTEGER, 
	digest BLOB NOT NULL, 
	schedule BLOB NOT NULL, 
	provenance INTEGER NOT NULL, 
	manifest BLOB NOT NULL, 
	raw_bytes BIGINT NOT NULL, 
	stored_bytes BIGINT NOT NULL, 
	complete BIGINT NOT NULL, 
	created BIGINT NOT NULL, 
	lossy BIGINT NOT NULL, 
	checksum BLOB NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(node) REFERENCES node (id), 
	FOREIGN KEY(base_segment) REFERENCES segment (id), 
	FOREIGN KEY(provenance) REFERENCES provenance (id)
)
"""  # noqa: W291  (as it is in the files of that version)

SCHEMA_1_INDEXES = (
    "CREATE INDEX ix_segment_node ON segment (node)",
    "CREATE INDEX ix_segment_base_segment ON segment (base_segment)",
    "CREATE INDEX segment_incomplete ON segment (created) WHERE complete = 0",
)


def make_schema_1(path: Path) -> None:
    """Turn a closed store of this version into one of schema 1, in one transaction: its segments do not say how much of
    them was merged."""
    engine = sqlite.make_engine(path, read_only=False, synchronous="NORMAL", busy_ms=30_000)
    with sqlite.in_any_order(engine) as conn:
        rows = [dict(row._mapping) for row in conn.execute(sa.select(segment))]
        aside = sqlite.put_aside(conn, segment)
        for statement in (SCHEMA_1_SEGMENT, *SCHEMA_1_INDEXES):
            conn.exec_driver_sql(statement)
        for row in rows:
            del row["merged"], row["checksum"]
            row["checksum"] = digest(msgpack.packb(["segment", *row.values()]))
            names = ", ".join(f'"{name}"' for name in row)
            marks = ", ".join("?" * len(row))
            conn.exec_driver_sql(f"INSERT INTO segment ({names}) VALUES ({marks})", tuple(row.values()))
        conn.exec_driver_sql(f"DROP TABLE {aside}")
        sqlite.mark(conn, 1)
    engine.dispose()
