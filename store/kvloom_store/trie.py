"""The prefix trie: a radix tree over token ids whose edges are rows that never change.

A child attaches at an *offset inside* its parent (1 <= offset <= parent's length; 0 only at the topmost node,
which has no tokens), so nothing is ever split or rewritten. (root, parent, parent_offset, first_token) is
unique and is the step: at each point of the tree at most one edge goes on with a given token, so inserting is
walking again inside the write transaction and adding only the remainder, and writers of [5,6,7], [5,6,8]
and [5,6] agree whatever their order. Token ids decide a match, never a hash.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.errors import LimitExceeded
from kvloom_store import sqlite
from kvloom_store.checksum import checked, digest, insert
from kvloom_store.database import allocate
from kvloom_store.errors import CorruptRow
from kvloom_store.schema import node

TOKEN_BYTES = 4

# Built once: to build a statement takes longer than to run it, and every lookup runs these.
_TOP = sa.select(node).where(node.c.root == sa.bindparam("of"), node.c.parent.is_(None))
_STEP = sa.select(node.c.id).where(
    node.c.root == sa.bindparam("of"),
    node.c.parent == sa.bindparam("above"),
    node.c.parent_offset == sa.bindparam("at"),
    node.c.first_token == sa.bindparam("token"),
)


@dataclass(frozen=True, slots=True)
class Position:
    """A point of the trie: after ``offset`` tokens of a node; ``start`` tokens of the path come before it."""

    node: int
    offset: int
    start: int

    @property
    def depth(self) -> int:
        """Tokens from the root to here."""
        return self.start + self.offset


@dataclass(frozen=True, slots=True)
class Match:
    """The longest stored prefix of some tokens: where it ends, and the nodes on the way with what of them matched."""

    position: Position
    path: tuple[Position, ...]

    @property
    def known(self) -> int:
        """Tokens that are known."""
        return self.position.depth


def pack_tokens(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit unsigned integers.

    Raises:
        LimitExceeded: an id that does not fit, or too many of them.
    """
    if len(ids) > limits.MAX_TOKENS:
        raise LimitExceeded("tokens", len(ids), limits.MAX_TOKENS)
    try:
        values = array("I", ids)
    except (OverflowError, TypeError) as error:
        raise LimitExceeded("token id", max(ids, key=abs), limits.MAX_VOCABULARY) from error
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The token ids of ``pack_tokens``."""
    values = array("I", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading tokens two packed runs share."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    while low + 1 < high:  # the first `low` tokens agree, the first `high` do not
        middle = (low + high) // 2
        if a[low * TOKEN_BYTES : middle * TOKEN_BYTES] == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low


def create_top(conn: sa.Connection, root: int) -> None:
    """Make the topmost node of a new root."""
    _insert_node(conn, root, None, 0, -1, 0, b"", b"")


def top(conn: sa.Connection, root: int) -> Position:
    """The topmost point of a root's trie."""
    return Position(checked(node, conn.execute(_TOP, {"of": root}).one())["id"], 0, 0)


def match(conn: sa.Connection, root: int, ids: Sequence[int], *, start_at: Position | None = None) -> Match:
    """The longest stored prefix of ``ids``; ``start_at`` is a point already known to lie on it."""
    return _walk(conn, root, pack_tokens(ids), start_at)


def _walk(conn: sa.Connection, root: int, packed: bytes, start_at: Position | None) -> Match:
    path: list[Position] = []
    at: int | None = (start_at or top(conn, root)).node
    while at is not None:
        values = {"first": at, "packed": packed, "count": len(packed) // TOKEN_BYTES}
        run = [checked(node, row) for row in conn.execute(_run_of_edges(), values)]
        if not run:
            raise CorruptRow("node", (at,))
        for each in run:
            here = Position(each["id"], _matched(each, packed), each["start"])
            if each["root"] != root or (path and not _follows(path[-1], each, here)):
                raise CorruptRow("node", (each["id"],))
            path.append(here)
        # What goes on where the last edge ends was looked for; where the tokens leave it, a child may go on with them.
        at = _child(conn, root, path[-1], packed) if path[-1].offset < run[-1]["length"] else None
    return Match(path[-1], tuple(path))


def _follows(above: Position, values: Mapping[str, Any], here: Position) -> bool:
    """Whether a node is what was looked up behind a point: the index that led to it may be damaged."""
    return (values["parent"], values["parent_offset"]) == (above.node, above.offset) and here.offset > 0


@functools.cache
def _run_of_edges() -> sa.Select[Any]:
    """The node ``first`` and those that follow it on the path ``packed`` of ``count`` tokens, each where the one before
    ends, and all but the last one on the path to their end. One query for all: they are as many as turns were said.
    """
    packed, count = sa.bindparam("packed", type_=sa.LargeBinary), sa.bindparam("count", type_=sa.Integer)
    c = node.c
    whole = (c.tokens == sa.func.substr(packed, 1 + TOKEN_BYTES * c.start, TOKEN_BYTES * c.length)).label("whole")
    down = sa.select(node, whole).where(c.id == sa.bindparam("first")).cte("down", recursive=True)
    end = down.c.start + down.c.length
    next_edge = (
        c.root == down.c.root,
        c.parent == down.c.id,
        c.parent_offset == down.c.length,
        c.first_token == sqlite.uint32_at(packed, TOKEN_BYTES * end),
    )
    down = down.union_all(sa.select(node, whole).where(down.c.whole, end < count, *next_edge))
    return sa.select(down).order_by(down.c.start + down.c.length)


def _child(conn: sa.Connection, root: int, here: Position, packed: bytes) -> int | None:
    """The node that goes on from a point with the path's next token."""
    rest = packed[here.depth * TOKEN_BYTES : (here.depth + 1) * TOKEN_BYTES]
    if not rest:
        return None
    values = {"of": root, "above": here.node, "at": here.offset, "token": unpack_tokens(rest)[0]}
    return conn.execute(_STEP, values).scalar_one_or_none()


def _matched(values: Mapping[str, Any], packed: bytes) -> int:
    """How many tokens of a node agree with the path being looked for."""
    start = values["start"] * TOKEN_BYTES
    return common_prefix(values["tokens"], packed[start : start + len(values["tokens"])])


def extend(conn: sa.Connection, root: int, ids: Sequence[int], *, start_at: Position | None = None) -> Position:
    """Insert a path (inside a write transaction): the point after its last token.

    ``start_at`` is a point already known to lie on the path; walking begins there.
    """
    packed = pack_tokens(ids)
    found = _walk(conn, root, packed, start_at)
    if found.known == len(ids):
        return found.position
    rest = packed[found.known * TOKEN_BYTES :]
    new = _insert_node(
        conn,
        root,
        found.position.node,
        found.position.offset,
        found.known,
        len(ids) - found.known,
        rest,
        packed,
    )
    return Position(new, len(ids) - found.known, found.known)


def _insert_node(
    conn: sa.Connection,
    root: int,
    parent: int | None,
    parent_offset: int,
    start: int,
    length: int,
    tokens: bytes,
    path: bytes,
) -> int:
    new = allocate(conn, node)
    insert(
        conn,
        node,
        {
            "id": new,
            "root": root,
            "parent": parent,
            "parent_offset": parent_offset,
            "first_token": unpack_tokens(tokens[:TOKEN_BYTES])[0] if tokens else -1,
            "start": max(start, 0),
            "length": length,
            "tokens": tokens,
            # Digest of all token ids from the root to the node's end: what a store elsewhere can be compared by.
            "chain_hash": digest(path),
        },
    )
    return new


def _node(conn: sa.Connection, node_id: int) -> dict[str, Any]:
    row = conn.execute(sa.select(node).where(node.c.id == node_id)).one_or_none()
    if row is None:
        raise CorruptRow("node", (node_id,))
    return checked(node, row)


def position_at(conn: sa.Connection, position: Position, depth: int) -> Position:
    """The point after the first ``depth`` tokens of the path to a position, in one query.

    It is in the node that holds the last of these tokens, as if the path had ended there.
    """
    if not 0 <= depth <= position.depth:
        raise ValueError(f"a path of {position.depth} tokens has no point after {depth}")
    chain = ancestors(conn, position.node)
    values = next(each for each in reversed(chain) if each["start"] < depth or each["parent"] is None)
    return Position(values["id"], depth - values["start"], values["start"])


def just_before(conn: sa.Connection, node_id: int, depth: int) -> Position:
    """The point after the first ``depth`` tokens of a path that ends in a node: in that one, or in one above it."""
    values = _node(conn, node_id)
    while values["start"] >= depth and values["parent"] is not None:
        values = _node(conn, values["parent"])
    return Position(int(values["id"]), depth - values["start"], values["start"])


def ancestors(conn: sa.Connection, node_id: int) -> list[dict[str, Any]]:
    """The nodes from the topmost one down to this one, in one query."""
    up = sa.select(node.c.id, node.c.parent).where(node.c.id == node_id).cte("up", recursive=True)
    up = up.union(sa.select(node.c.id, node.c.parent).where(node.c.id == up.c.parent))
    rows = conn.execute(sa.select(node).join(up, up.c.id == node.c.id).order_by(node.c.start, node.c.id))
    nodes = {values["id"]: values for values in (checked(node, row) for row in rows)}
    chain: list[dict[str, Any]] = []
    at: int | None = node_id
    while at is not None:  # ordered by following parents: start alone does not tell an empty top from its child
        if at not in nodes:
            raise CorruptRow("node", (at,))
        chain.append(nodes.pop(at))
        at = chain[-1]["parent"]
    return chain[::-1]


def tokens_before(conn: sa.Connection, node_id: int, depth: int) -> list[int]:
    """The first ``depth`` token ids of the path that leads through a node. Raises CorruptRow."""
    return tokens_to(conn, node_id, depth - _node(conn, node_id)["start"])


def tokens_to(conn: sa.Connection, node_id: int, offset: int) -> list[int]:
    """All token ids from the root to ``offset`` tokens into a node, in one query.

    Raises:
        CorruptRow: a node on the way is damaged.
    """
    chain = ancestors(conn, node_id)
    packed = bytearray()
    for values, below in zip(chain, [*chain[1:], None], strict=True):
        take = offset if below is None else below["parent_offset"]
        if values["start"] * TOKEN_BYTES != len(packed) or take > values["length"]:
            raise CorruptRow("node", (values["id"],))
        packed += values["tokens"][: take * TOKEN_BYTES]
    return unpack_tokens(bytes(packed))
