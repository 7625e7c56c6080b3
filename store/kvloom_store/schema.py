"""Schema version 2. SCHEMA.md says what each table is for and which invariants hold between them.

Text and tokens (session, branch, tag, turn, turn_state, node) are the truth; state (segment, chunk) is a
cache of it. Row ids never leave the store: users see names and turn ids.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_VERSION = 2

metadata = MetaData()


def _table(name: str, *columns: Column[object] | Index | UniqueConstraint) -> Table:
    return Table(name, metadata, *columns, Column("checksum", LargeBinary(16), nullable=False))


def _id() -> Column[object]:
    return Column("id", Integer, primary_key=True, autoincrement=False)


def _ref(name: str, target: str, *, nullable: bool = False, index: bool = False) -> Column[object]:
    return Column(name, Integer, ForeignKey(f"{target}.id"), nullable=nullable, index=index)


def _int(name: str, *, nullable: bool = False, **options: Any) -> Column[object]:
    return Column(name, BigInteger, nullable=nullable, **options)


def _text(name: str, *, nullable: bool = False, **options: Any) -> Column[object]:
    return Column(name, Text, nullable=nullable, **options)


def _bytes(name: str, *, nullable: bool = False, **options: Any) -> Column[object]:
    return Column(name, LargeBinary, nullable=nullable, **options)


meta = _table("meta", _text("key", primary_key=True), _bytes("value"))
"""Facts about the file: when and by what it was made, its settings (MessagePack values)."""

sequence = _table("sequence", _text("name", primary_key=True), _int("next"))
"""The next row id of each table. Ids are never used twice, so a stale one finds nothing."""

model = _table("model", _id(), _bytes("digest", unique=True), _text("name"), _bytes("fields"), _int("created"))
"""A model identity: what defines the function, with the fields it was made of kept readable."""

model_digest = _table(
    "model_digest",
    _text("kind", primary_key=True),
    _bytes("digest", primary_key=True),
    _ref("model", "model"),
    _int("created"),
)
"""Another digest of the same model (kind: files, tensors, tokenizer, chat_template), linked when seen together."""

root = _table(
    "root",
    _id(),
    _ref("model", "model"),
    _bytes("extra"),
    _bytes("salt"),
    _int("created"),
    UniqueConstraint("model", "extra", "salt"),
)
"""One trie: a model, a digest of the inputs that are not tokens (empty: none), and a salt (empty: shared)."""

node = _table(
    "node",
    _id(),
    _ref("root", "root"),
    _ref("parent", "node", nullable=True),
    _int("parent_offset"),
    _int("first_token"),
    _int("start"),
    _int("length"),
    _bytes("tokens"),
    _bytes("chain_hash"),
    # The parent first: when a node is removed, what hangs below it is looked for by that alone.
    UniqueConstraint("parent", "root", "parent_offset", "first_token", name="trie_step"),
)
"""One immutable edge of a trie. The topmost node of a root has no parent, no tokens and length 0."""

provenance = _table("provenance", _id(), _bytes("digest", unique=True), _bytes("record"))
"""What changes only the rounding (protobuf), one row per distinct record."""

segment = _table(
    "segment",
    _id(),
    _ref("node", "node", index=True),
    _int("start"),
    _int("end"),
    _ref("base_segment", "segment", nullable=True, index=True),
    _bytes("digest"),
    _bytes("schedule"),
    _ref("provenance", "provenance"),
    _bytes("manifest"),
    _int("raw_bytes"),
    _int("stored_bytes"),
    _int("complete"),
    _int("created"),
    _int("lossy"),
    _int("merged"),
    # Of incomplete ones alone: every program that opens a store looks for those, and there are next to none.
    # To name another database's dialect here would import it: 30 ms of every command.
    Index("segment_incomplete", "created", sqlite_where=text("complete = 0")),
)
"""State of positions [start, end), computed on top of base_segment's rows [0, start). Its last token is in node.
lossy: 0, or the sum of 1 (its rows are stored with loss; digest is that of the exact ones) and 2 (it was computed on
rows that were not exact). merged: bytes of it that were stored before, in the small segments it was made from."""

PLACE = "inline"
"""Where the bytes of a chunk are: in its row."""

chunk = _table(
    "chunk",
    Column("segment", Integer, ForeignKey("segment.id"), primary_key=True, autoincrement=False),
    Column("kind", Integer, primary_key=True, autoincrement=False),
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    _text("place"),
    _int("length"),
    _bytes("blob", nullable=True),
)
"""One stored blob of a segment: of a run of layers the rows within one chunk of tokens, or a keyframe."""

session = _table("session", _id(), _text("name", unique=True), _bytes("settings"), _int("created"), _int("updated"))
"""One conversation tree; its settings (MessagePack) fix the chat template, its options and its clock."""

turn = _table(
    "turn",
    _id(),
    _bytes("public_id", unique=True),
    _ref("session", "session", index=True),
    _ref("parent", "turn", nullable=True, index=True),
    _text("role"),
    _int("continues"),
    _bytes("message"),
    _text("finish_reason", nullable=True),
    _bytes("settings"),
    _bytes("timings"),
    _bytes("digest", index=True),
    _int("created"),
)
"""One message, as the chat template was given it (MessagePack); the digest is chained over the parent's."""

turn_state = _table(
    "turn_state",
    _id(),
    _ref("turn", "turn", index=True),
    _ref("root", "root"),
    _int("start"),
    _int("end"),
    _bytes("tokens"),
    _ref("node", "node", index=True),
    _int("offset"),
    _int("state_start"),
    _int("state_end"),
    _ref("base_state", "turn_state", nullable=True, index=True),
    _ref("base_segment", "segment", nullable=True, index=True),
    _ref("segment", "segment", nullable=True, index=True),
    _bytes("schedule"),
    _ref("provenance", "provenance"),
    _bytes("hidden", nullable=True),
    _text("hidden_dtype", nullable=True),
    _int("variant"),
    _int("dropped"),
    _int("created"),
    _bytes("scores", nullable=True),
)
"""What one model made of a turn: the exact token ids, where they stand in the trie, how their state was computed."""

branch = _table(
    "branch",
    _id(),
    _ref("session", "session"),
    _text("name"),
    _ref("turn", "turn", nullable=True, index=True),
    _int("created"),
    _int("updated"),
    UniqueConstraint("session", "name", name="branch_name"),
)
"""A named, movable pointer to a turn; null before the first one."""

journal = _table(
    "journal",
    _bytes("run", primary_key=True),
    _text("owner"),
    _int("turn"),
    _int("tip"),
    _int("root"),
    _int("branch"),
    _text("name"),
    _bytes("tokens"),
    _text("text"),
    _int("continues"),
    _bytes("settings"),
    _bytes("timings"),
    _bytes("scores", nullable=True),
    _int("state_start"),
    _int("state_end"),
    _int("base_state", nullable=True),
    _int("base_segment", nullable=True),
    _bytes("schedule"),
    _int("provenance"),
    _int("variant"),
    _int("updated"),
)
"""A reply that is being generated: what there is of it, and whose it is. The rows it names may be gone meanwhile."""

exploration = _table(
    "exploration",
    _id(),
    _ref("session", "session"),
    _text("name"),
    _ref("turn", "turn", index=True),
    _bytes("settings"),
    _int("created"),
    UniqueConstraint("session", "name", name="exploration_name"),
)
"""One search over continuations of a turn; its settings (MessagePack) are all that decides what it will do."""

candidate = _table(
    "candidate",
    _id(),
    _ref("exploration", "exploration", index=True),
    _ref("parent", "candidate", nullable=True, index=True),
    _int("number"),
    _ref("turn", "turn", index=True),
    _text("status"),
    _bytes("score", nullable=True),
    _bytes("found"),
    UniqueConstraint("exploration", "parent", "number", name="candidate_number"),
)
"""One continuation that a search made: child ``number`` of its parent, ending with a turn. Numbers are MessagePack."""

tag = _table(
    "tag",
    _id(),
    _ref("session", "session"),
    _text("name"),
    _ref("turn", "turn", index=True),
    _int("created"),
    UniqueConstraint("session", "name", name="tag_name"),
)
"""A name that does not move."""

pin = _table("pin", _id(), _ref("turn", "turn"), _int("created"), UniqueConstraint("turn", name="pin_turn"))
"""A turn whose state is never dropped, nor that of the turns before it."""
quarantine = _table("quarantine", _id(), _text("of"), _bytes("cells"), _bytes("why"), _int("created"))
"""Rows that a repair took out of use, as they were found: the table they were of, their cells and why (MessagePack)."""
