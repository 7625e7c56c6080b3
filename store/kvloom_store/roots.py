"""Models and the tries that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store import trie
from kvloom_store.checksum import checked, insert, unpacked
from kvloom_store.database import allocate, now_us
from kvloom_store.schema import model, model_digest, root


def add_model(conn: sa.Connection, digest: bytes, name: str, fields: Mapping[str, str]) -> int:
    """The row of a model identity, added if it is new. ``fields`` are what the digest was made of."""
    found = find_model(conn, digest)
    if found is not None:
        return found
    new = allocate(conn, model)
    insert(
        conn,
        model,
        {
            "id": new,
            "digest": digest,
            "name": name,
            "fields": msgpack.packb(dict(fields)),
            "created": now_us(),
        },
    )
    return new


def find_model(conn: sa.Connection, digest: bytes) -> int | None:
    """The row of a model identity, if it was seen before.

    A damaged index would hide it, and everything be computed anew without a word: what it does not find, here and of
    tries, is looked for among all rows. There are few.
    """
    row = conn.execute(sa.select(model).where(model.c.digest == digest)).one_or_none()
    if row is None:
        row = next((each for each in conn.execute(sa.select(model)) if each.digest == digest), None)
    return None if row is None else int(checked(model, row, digest=digest)["id"])


def link_digest(conn: sa.Connection, kind: str, digest: bytes, model_id: int) -> None:
    """Note that this digest (of the model's files, its tokenizer, its template) was seen with the model."""
    where = (model_digest.c.kind == kind) & (model_digest.c.digest == digest)
    if conn.execute(sa.select(model_digest).where(where)).one_or_none() is None:
        insert(conn, model_digest, {"kind": kind, "digest": digest, "model": model_id, "created": now_us()})


def models(conn: sa.Connection) -> list[dict[str, Any]]:
    """Every model the store holds something of, with its fields unpacked."""
    rows = [checked(model, row) for row in conn.execute(sa.select(model).order_by(model.c.id))]
    return [{**row, "fields": unpacked(row["fields"], "model", row["id"])} for row in rows]


def root_for(conn: sa.Connection, model_id: int, *, extra: bytes = b"", salt: bytes = b"") -> int:
    """The trie of a model (inside a write transaction), made if there is none."""
    found = find_root(conn, model_id, extra=extra, salt=salt)
    if found is not None:
        return found
    new = allocate(conn, root)
    insert(conn, root, {"id": new, "model": model_id, "extra": extra, "salt": salt, "created": now_us()})
    trie.create_top(conn, new)
    return new


def find_root(conn: sa.Connection, model_id: int, *, extra: bytes = b"", salt: bytes = b"") -> int | None:
    """The trie of a model, if there is one."""
    where = (root.c.model == model_id) & (root.c.extra == extra) & (root.c.salt == salt)
    row = conn.execute(sa.select(root).where(where)).one_or_none()
    if row is None:
        wanted = model_id, extra, salt
        row = next(
            (each for each in conn.execute(sa.select(root)) if (each.model, each.extra, each.salt) == wanted), None
        )
    return None if row is None else int(checked(root, row, model=model_id, extra=extra, salt=salt)["id"])


def model_of_root(conn: sa.Connection, root_id: int) -> dict[str, Any]:
    """The model a trie belongs to, with its fields unpacked."""
    row = conn.execute(sa.select(model).join(root, root.c.model == model.c.id).where(root.c.id == root_id)).one()
    values = checked(model, row)
    return {**values, "fields": unpacked(values["fields"], "model", values["id"])}
