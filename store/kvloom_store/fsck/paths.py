"""Tokens: the edges of the trie, and what a model made of each turn. Rows that are damaged are left out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import xxhash

from kvloom_proto.errors import FormatError
from kvloom_proto.records import Schedule, read_schedule
from kvloom_proto.scores import read_scores
from kvloom_store import trie
from kvloom_store.checksum import checked
from kvloom_store.errors import CorruptRow
from kvloom_store.fsck.findings import Finding, Kind, Severity
from kvloom_store.fsck.reading import Reader, finding
from kvloom_store.schema import node, root, segment, turn_state
from kvloom_store.trie import TOKEN_BYTES


def tiles(schedule: Schedule, start: int, end: int) -> bool:
    """Whether a schedule's passes cover [start, end), each token once. (That none is left out between was read.)"""
    if schedule.unknown:
        return True
    if not schedule.passes:
        return start == end
    return (schedule.passes[0].start, schedule.passes[-1].end) == (start, end)


def nodes(reader: Reader) -> Iterator[Finding]:
    """Every edge: where it attaches, its tokens, and the digest of the path to its end."""
    edges = _Edges(reader)
    for row in reader.intact(node):
        wrong = _edge(edges, row)
        if wrong is not None:
            words = f"edge {row['id']} of the trie {wrong}: what stands on it cannot be found by its tokens"
            yield finding(Kind.TRIE, Severity.LOST, node, (row["id"],), reader.at_node(row["id"]), words)
    tops = sa.select(root.c.id, sa.func.count(node.c.id)).join(
        node, (node.c.root == root.c.id) & node.c.parent.is_(None), isouter=True
    )
    for top, count in reader.ask(tops.group_by(root.c.id)):
        if count != 1 and not reader.damaged.get("node") and "node" not in reader.torn:
            words = f"the trie of root {top} has {count} topmost edges instead of one"
            yield finding(Kind.TRIE, Severity.LOST, root, (top,), None, words)


def _edge(edges: _Edges, row: dict[str, Any]) -> str | None:
    """What is wrong with an edge; None also where what is above it is damaged, which was told already."""
    if row["parent"] is None:
        return None if (row["length"], row["tokens"], row["start"]) == (0, b"", 0) else "is no beginning of a trie"
    tokens = trie.unpack_tokens(row["tokens"]) if len(row["tokens"]) % TOKEN_BYTES == 0 else []
    if not tokens or len(tokens) != row["length"] or tokens[0] != row["first_token"]:
        return "does not have the tokens it says"
    above = edges.get(row["parent"])
    if above is None:
        return None
    first = 1 if above.row["parent"] is not None else 0
    if above.row["root"] != row["root"] or not first <= row["parent_offset"] <= above.row["length"]:
        return "attaches where there is nothing to attach to"
    if row["start"] != above.row["start"] + row["parent_offset"]:
        return "does not begin where it attaches"
    mine = above.hasher_at(row["parent_offset"])
    mine.update(row["tokens"])
    return None if mine.digest() == row["chain_hash"] else "is not the end of the path its digest is over"


@dataclass
class _Edge:
    """An edge and the running digest of the path to its beginning."""

    row: dict[str, Any]
    before: xxhash.xxh3_128

    def hasher_at(self, offset: int) -> xxhash.xxh3_128:
        """The running digest of the path to some tokens into the edge."""
        mine = self.before.copy()
        mine.update(self.row["tokens"][: offset * TOKEN_BYTES])
        return mine


class _Edges:
    """Edges with their running digests, the last few that were asked for: parents come before their children."""

    KEPT = 1024

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._kept: OrderedDict[int, _Edge] = OrderedDict()

    def get(self, row: int) -> _Edge | None:
        """An edge; None if it, or one above it, cannot be read."""
        way: list[dict[str, Any]] = []
        at: int | None = row
        while at is not None and at not in self._kept:
            found = self._reader.ask(sa.select(node).where(node.c.id == at))
            try:
                values = checked(node, found[0])
            except (CorruptRow, IndexError):
                return None
            if len(way) > 1 and values["start"] > way[-1]["start"]:  # a circle
                return None
            way.append(values)
            at = values["parent"]
        for values in reversed(way):
            above = self._kept[values["parent"]] if values["parent"] is not None else None
            before = above.hasher_at(values["parent_offset"]) if above is not None else xxhash.xxh3_128()
            self._kept[values["id"]] = _Edge(values, before)
        self._kept.move_to_end(row)
        edge = self._kept[row]
        while len(self._kept) > self.KEPT:
            self._kept.popitem(last=False)
        return edge


def states(reader: Reader) -> Iterator[Finding]:
    """Every turn state: its tokens are the last of its path, its schedule tiles its span, its scores are those of its
    tokens, and the segments it names hold its path."""
    for row in reader.intact(turn_state):
        wrong = _state(reader, row)
        if wrong is not None:
            kind, severity, words = wrong
            yield finding(kind, severity, turn_state, (row["id"],), reader.at_turn(row["turn"]), words)


def _state(reader: Reader, row: dict[str, Any]) -> tuple[Kind, Severity, str] | None:
    if not 0 <= row["start"] < row["end"] or not 0 <= row["state_start"] <= row["state_end"] <= row["end"]:
        return Kind.VALUE, Severity.LOST, "the span of this turn's tokens, or of their state, is not one"
    try:
        schedule = read_schedule(row["schedule"])
    except FormatError as error:
        return Kind.VALUE, Severity.LOST, f"the passes of this turn cannot be read ({error}): it cannot be replayed"
    if not tiles(schedule, row["state_start"], row["state_end"]):
        return Kind.VALUE, Severity.LOST, "the passes of this turn do not cover its state: it cannot be replayed"
    if (row["hidden"] is None) != (row["hidden_dtype"] is None):
        return Kind.VALUE, Severity.LOST, "the final hidden state of this turn has no dtype"
    wrong = _tokens(reader, row)
    if wrong is not None:
        return Kind.TRIE, Severity.LOST, wrong
    if row["scores"] is not None:
        try:
            read_scores(row["scores"], trie.unpack_tokens(row["tokens"]))
        except FormatError as error:
            return Kind.VALUE, Severity.LOST, f"what the model thought of this turn's tokens cannot be read: {error}"
    wrong = stands(reader, row, "segment") or stands(reader, row, "base_segment")
    if wrong is not None:
        return Kind.STATE, Severity.HEALS, f"{wrong}: it is computed again from the tokens"
    if row["segment"] is None and row["state_end"] > row["state_start"]:
        words = "was dropped to make room" if row["dropped"] else "was never stored"
        words = f"the state of this turn {words}; it is computed when it is needed (kvloom warm does it now)"
        return Kind.UNWRITTEN, Severity.NOTE, words
    return None


def _tokens(reader: Reader, row: dict[str, Any]) -> str | None:
    """What is wrong with the tokens of a turn; None also where the path is damaged, which was told already."""
    try:
        path = tail(reader, row["node"], row["offset"], row["end"] - row["start"], row["end"])
    except CorruptRow:
        return None
    if path is None:
        return "the tokens of this turn do not end where it says, in the trie"
    return None if path == row["tokens"] else "the tokens of this turn are not those of its path in the trie"


def tail(reader: Reader, node_id: int, offset: int, count: int, end: int) -> bytes | None:
    """The last ``count`` tokens of the path that ends ``offset`` tokens into a node, packed, if that is position
    ``end``; None if it is not. Raises CorruptRow."""
    packed = b""
    at, upto = node_id, offset
    while True:
        found = reader.ask(sa.select(node).where(node.c.id == at))
        if not found:
            raise CorruptRow("node", (at,))
        values = checked(node, found[0])
        if values["start"] + upto != end or not 0 <= upto <= values["length"] or (upto == 0 and values["length"]):
            return None
        packed = values["tokens"][: upto * TOKEN_BYTES] + packed
        if len(packed) >= count * TOKEN_BYTES:
            return bytes(packed[-count * TOKEN_BYTES :])
        if values["parent"] is None:
            return None
        at, upto, end = values["parent"], values["parent_offset"], values["start"]


def stands(reader: Reader, row: Mapping[str, Any], column: str) -> str | None:
    """What is wrong with the segment that a turn's state is in (``segment``), or stands on (``base_segment``)."""
    upto = row["state_end" if column == "segment" else "state_start"]
    if row[column] is None or upto == 0 or reader.is_damaged(segment, row[column]):
        return None
    query = sa.select(segment.c.node, segment.c.end, segment.c.complete).where(segment.c.id == row[column])
    for at, end, complete in reader.ask(query):  # where it is missing or damaged, that is told by itself
        if not complete:
            return f"segment {row[column]}, which {column} names, was given up"
        if end < upto or not same_path(reader, at, row["node"], upto):
            return f"segment {row[column]}, which {column} names, does not hold the path of this turn"
    return None


def same_path(reader: Reader, a: int, b: int, depth: int) -> bool:
    """Whether the paths through two nodes have the same first ``depth`` tokens; True where that cannot be read."""
    try:
        return a == b or trie.just_before(reader.conn, a, depth) == trie.just_before(reader.conn, b, depth)
    except (CorruptRow, sa.exc.DBAPIError):
        return True
