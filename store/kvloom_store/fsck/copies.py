"""What other rows still say of a damaged one: its checksum says whether that is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import sqlalchemy as sa

from kvloom_store import trie
from kvloom_store.checksum import checked, digest, unpacked
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.reading import is_intact
from kvloom_store.schema import model, node, provenance, root, session, turn_state
from kvloom_store.trie import TOKEN_BYTES


def told_elsewhere(conn: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row as it was written, if what is damaged of it stands in other rows too; None otherwise.

    Tokens stand in the trie and with their turns; what defines a model stands in the settings of its sessions.
    """
    for cells in _COPIES[table](conn, values) if table in _COPIES else ():
        was = {**values, **cells}
        if is_intact(table, was):
            return was
    return None


def _of_node(conn: sa.Connection, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens of an edge, from the turns that end in it."""
    for row in conn.execute(sa.select(turn_state).where(turn_state.c.node == values["id"])):
        try:
            state = checked(turn_state, row)
        except CorruptRow:
            continue
        start = state["end"] - state["offset"]
        packed = state["tokens"][max(start - state["start"], 0) * TOKEN_BYTES :]
        if state["start"] <= start:
            tokens = trie.unpack_tokens(packed)
            yield {"tokens": packed}
            yield {"tokens": packed, "first_token": tokens[0], "length": len(tokens), "start": start}


def _of_state(conn: sa.Connection, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens of a turn, from its path in the trie."""
    numbers = (values["node"], values["offset"], values["start"])
    if all(isinstance(number, int) for number in numbers):
        try:
            ids = trie.tokens_to(conn, values["node"], values["offset"])
        except CorruptRow:
            return
        yield {"tokens": trie.pack_tokens(ids[values["start"] :])}


def _of_model(conn: sa.Connection, _values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What defines a model, from the sessions that it reads."""
    for row in conn.execute(sa.select(session)):
        try:
            settings = unpacked(checked(session, row)["settings"], "session", row.id)
            for each in (settings, *settings.get("others", ())):
                fields = msgpack.packb(dict(each["model_fields"]))
                yield {"digest": bytes.fromhex(each["model_digest"]), "name": each["model"], "fields": fields}
        except (CorruptRow, KeyError, TypeError, ValueError):
            continue


def _of_root(_conn: sa.Connection, _values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"extra": b"", "salt": b""}


def _of_provenance(_conn: sa.Connection, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(values["record"], bytes):
        yield {"digest": digest(values["record"])}


_COPIES = {node: _of_node, turn_state: _of_state, model: _of_model, root: _of_root, provenance: _of_provenance}
