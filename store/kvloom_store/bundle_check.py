"""What the records of a bundle must say, checked one after another, before anything is done about them.

A bundle comes from anywhere. All that can be checked without a store is checked here: that numbers point back at what
was there, that tokens, digests, manifests and schedules fit one another, and that every chunk is what its manifest
says. Memory: the tokens of the bundle, a few numbers a record, and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from kvloom_proto import limits
from kvloom_proto.bundle import (
    NAMES,
    BranchRecord,
    ChunkRecord,
    End,
    Head,
    Model,
    NodeRecord,
    ProvenanceRecord,
    Record,
    SegmentRecord,
    SessionRecord,
    StateRecord,
    TagRecord,
    TurnRecord,
)
from kvloom_proto.codecs import RAW
from kvloom_proto.errors import ChecksumMismatch, FormatError
from kvloom_proto.frames import Reader
from kvloom_proto.messages import check_limit
from kvloom_proto.records import (
    ITEM_BYTES,
    ChunkSpec,
    Layers,
    LayerSpec,
    Manifest,
    Schedule,
    expand,
    read_manifest,
    read_provenance,
    read_schedule,
)
from kvloom_proto.scores import read_scores
from kvloom_store import codec, segments
from kvloom_store.checksum import digest
from kvloom_store.errors import InvalidName
from kvloom_store.names import check_name
from kvloom_store.trie import TOKEN_BYTES, unpack_tokens
from kvloom_store.turns import chained_digest

FAR, KEPT_PATHS, KEPT_BYTES = 16, 32, 64 << 20
"""From how many nodes a path is worth keeping, and how many and how much are kept."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What whoever keeps conversations asks of their contents: each raises FormatError.

    ``settings`` is given a session's settings, ``turn`` a turn's message, settings and timings.
    """

    settings: Callable[[Mapping[str, Any]], None]
    turn: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class CheckedTurn:
    """A turn's MessagePack cells, read."""

    message: dict[str, Any]
    settings: dict[str, Any]
    timings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CheckedSegment:
    """A segment's records, read, and the chunks that follow it, in their order."""

    manifest: Manifest
    schedule: Schedule
    chunks: tuple[ChunkSpec, ...]


@dataclass(frozen=True, slots=True)
class _Node:
    model: int
    parent: int | None
    start: int
    tokens: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.tokens) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class _Segment:
    node: int
    start: int
    end: int
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class _State:
    turn: int
    model: int
    node: int | None
    end: int
    state_end: int


@dataclass(slots=True)
class Contents:
    """What a bundle has said so far."""

    rules: Rules
    counts: dict[type[Any], int] = field(default_factory=dict)
    nodes: list[_Node] = field(default_factory=list)
    turns: list[bytes] = field(default_factory=list)
    segments: list[_Segment] = field(default_factory=list)
    states: list[_State] = field(default_factory=list)
    tokens: int = 0
    names: set[str] = field(default_factory=set)
    _paths: dict[int, bytes] = field(default_factory=dict)
    _awaited: list[ChunkSpec] = field(default_factory=list)
    _layers: Layers = field(default_factory=Layers)

    def read(self, reader: Reader) -> Iterator[tuple[Record, Any]]:
        """Every record of a bundle with what was read of it: a CheckedTurn, a CheckedSegment, a ChunkSpec, a mapping.

        Raises:
            FormatError and its kinds, with the offset of the record.
        """
        for record in reader:
            try:
                parsed = self._check(record)
            except FormatError as error:
                raise error.at(reader.offset) from error.__cause__
            self.counts[type(record)] = self._number(type(record)) + 1
            yield record, parsed

    def path(self, node: int | None, depth: int) -> bytes:
        """The packed first ``depth`` tokens of the path that leads to a node's end."""
        parts: list[bytes] = []
        at, upto = node, depth
        while at is not None:
            known = self._paths.get(at)
            if known is not None:
                parts.append(known[: upto * TOKEN_BYTES])
                break
            here = self.nodes[at]
            if upto > here.start:
                parts.append(here.tokens[: (upto - here.start) * TOKEN_BYTES])
                upto = here.start
            at = here.parent
        path = b"".join(reversed(parts))
        if node is not None and len(parts) > FAR and depth == self.nodes[node].end:
            self._remember(node, path)
        return path

    def _remember(self, node: int, path: bytes) -> None:
        """Keep some paths: those of a long conversation are asked for one after another."""
        self._paths[node] = path
        while len(self._paths) > 1 and sum(map(len, self._paths.values())) > KEPT_BYTES:
            del self._paths[next(iter(self._paths))]
        if len(self._paths) > KEPT_PATHS:
            del self._paths[next(iter(self._paths))]

    def _number(self, kind: type[Any]) -> int:
        return self.counts.get(kind, 0)

    def _check(self, record: Record) -> Any:
        if self._awaited and not isinstance(record, ChunkRecord):
            raise FormatError(f"{len(self._awaited)} chunks of the segment are missing", field="segment.manifest")
        if not isinstance(record, ChunkRecord):
            check_limit(NAMES[type(record)], self._number(type(record)) + 1, limits.MAX_BUNDLE_RECORDS)
        match record:
            case Head():
                return _text("head.writer", record.writer)
            case Model():
                return self._model(record)
            case ProvenanceRecord():
                return read_provenance(record.record)
            case SessionRecord():
                return self._session(record)
            case NodeRecord():
                return self._node(record)
            case TurnRecord():
                return self._turn(record)
            case SegmentRecord():
                return self._segment(record)
            case ChunkRecord():
                return self._chunk(record)
            case StateRecord():
                return self._state(record)
            case BranchRecord() | TagRecord():
                return self._name(record)
            case End():
                return None

    def _model(self, record: Model) -> dict[str, Any]:
        check_limit("model.digest", len(record.digest), 64)
        check_limit("model.extra", len(record.extra), 64)
        check_limit("model.salt", len(record.salt), 64)
        _text("model.name", record.name)
        if not record.digest:
            raise FormatError("a model has a digest", field="model.digest")
        fields = plain_map(record.fields, "model.fields")
        if not all(isinstance(value, str) for value in fields.values()):
            raise FormatError("the fields of a model are texts", field="model.fields")
        return fields

    def _session(self, record: SessionRecord) -> dict[str, Any]:
        _name("session", record.name)
        settings = plain_map(record.settings, "session.settings")
        self.rules.settings(settings)
        return settings

    def _node(self, record: NodeRecord) -> None:
        self._known("node.model", record.model, Model)
        start, parent = 0, record.parent
        if parent is not None:
            self._known("node.parent", parent, NodeRecord)
            above = self.nodes[parent]
            if above.model != record.model or not 1 <= record.parent_offset <= above.end - above.start:
                raise FormatError("a node begins within its parent, of the same model", field="node.parent_offset")
            start = above.start + record.parent_offset
        elif record.parent_offset:
            raise FormatError("there is nothing before the first token", field="node.parent_offset")
        tokens = self._tokens("node.tokens", record.tokens)
        if not tokens:
            raise FormatError("a node has at least one token", field="node.tokens")
        self.tokens += len(tokens)
        check_limit("node.tokens", self.tokens, limits.MAX_BUNDLE_TOKENS)
        check_limit("node.tokens", start + len(tokens), limits.MAX_TOKENS)
        path = self.path(parent, start) + record.tokens
        if digest(path) != record.chain_hash:
            raise ChecksumMismatch("node.chain_hash", record.chain_hash, digest(path))
        self.nodes.append(_Node(record.model, parent, start, record.tokens))

    def _turn(self, record: TurnRecord) -> CheckedTurn:
        before = b""
        if record.parent is not None:
            self._known("turn.parent", record.parent, TurnRecord)
            before = self.turns[record.parent]
        if len(record.public_id) != 16:
            raise FormatError("a turn's id has 16 bytes", field="turn.public_id")
        check_limit("turn.message", len(record.message), limits.MAX_TURN_BYTES)
        _text("turn.role", record.role)
        _text("turn.finish_reason", record.finish_reason or "")
        message = plain_map(record.message, "turn.message")
        settings = plain_map(record.settings, "turn.settings")
        timings = plain_map(record.timings, "turn.timings")
        if message.get("role") != record.role:
            raise FormatError("the role is not that of the message", field="turn.role")
        if msgpack.packb(message) != record.message:  # what is stored is what its digest is of
            raise FormatError("the message is not in its canonical form", field="turn.message")
        chained = chained_digest(before, message)
        if chained != record.digest:
            raise ChecksumMismatch("turn.digest", record.digest, chained)
        self.rules.turn(message, settings, timings)
        self.turns.append(record.digest)
        return CheckedTurn(message, settings, timings)

    def _segment(self, record: SegmentRecord) -> CheckedSegment:
        self._known("segment.node", record.node, NodeRecord)
        self._known("segment.provenance", record.provenance, ProvenanceRecord)
        manifest, schedule = read_manifest(record.manifest), read_schedule(record.schedule)
        node = self.nodes[record.node]
        if not node.start < manifest.end <= node.end:
            raise FormatError("a segment ends within its node", field="segment.node")
        if record.base is not None:
            self._known("segment.base", record.base, SegmentRecord)
            base = self.segments[record.base]
            if base.layers != manifest.layers:
                raise FormatError("a segment stands on state of the same layers", field="segment.base")
            if not base.start < manifest.start <= base.end:
                raise FormatError("a segment begins within its base or at its end", field="segment.base")
            self._same_path("segment.base", record.node, base.node, manifest.start)
        elif manifest.start:
            raise FormatError("a segment that begins later stands on another one", field="segment.base")
        self.segments.append(_Segment(record.node, manifest.start, manifest.end, manifest.layers))
        chunks = tuple(sorted(manifest.chunks, key=lambda spec: (spec.kind, spec.layer, spec.position)))
        self._awaited, self._layers = list(reversed(chunks)), expand(manifest.layers)
        return CheckedSegment(manifest, schedule, chunks)

    def _chunk(self, record: ChunkRecord) -> ChunkSpec:
        if not self._awaited:
            raise FormatError("a chunk that no manifest names", field="chunk")
        spec = self._awaited.pop()
        if len(record.blob) != spec.stored_length:
            raise FormatError("a chunk's length is not that in its manifest", field="chunk.blob")
        found = digest(record.blob)
        if found != spec.stored_digest:
            raise ChecksumMismatch("chunk.blob", spec.stored_digest, found)
        raw = codec.decode(record.blob, segments.item_bytes(self._layers, spec), spec.raw_length, spec.codec)
        if spec.codec != RAW and digest(raw) != spec.raw_digest:
            raise ChecksumMismatch("chunk.blob", spec.raw_digest, digest(raw))
        return spec

    def _state(self, record: StateRecord) -> Schedule:
        self._known("state.turn", record.turn, TurnRecord)
        self._known("state.model", record.model, Model)
        self._known("state.provenance", record.provenance, ProvenanceRecord)
        tokens = self._tokens("state.tokens", record.tokens)
        end = self._depth(record)
        if record.start + len(tokens) != end:
            raise FormatError("the tokens do not end where the state does", field="state.start")
        if self.path(record.node, end)[record.start * TOKEN_BYTES :] != record.tokens:
            raise FormatError("the tokens are not those of the path", field="state.tokens")
        if not record.state_start <= record.state_end <= end:
            raise FormatError("state begins before it ends, and ends with its tokens at most", field="state.state_end")
        schedule = read_schedule(record.schedule)
        self._check_hidden(record)
        if record.scores is not None:
            read_scores(record.scores, tokens)
        self._check_standing(record)
        self.states.append(_State(record.turn, record.model, record.node, end, record.state_end))
        return schedule

    def _depth(self, record: StateRecord) -> int:
        """How many tokens the path to a state's end has."""
        if record.node is None:
            if record.offset:
                raise FormatError("there is nothing before the first token", field="state.offset")
            return 0
        self._known("state.node", record.node, NodeRecord)
        node = self.nodes[record.node]
        if node.model != record.model or not 1 <= record.offset <= node.end - node.start:
            raise FormatError("a state ends within its node, of the same model", field="state.offset")
        return node.start + record.offset

    def _check_standing(self, record: StateRecord) -> None:
        """What a state stands on, and the segment that holds it, are of the same model and the same tokens."""
        if record.base_state is not None:
            self._known("state.base_state", record.base_state, StateRecord)
            base = self.states[record.base_state]
            if base.model != record.model or base.state_end < record.state_start:
                raise FormatError("a state stands on one that reaches to its beginning", field="state.base_state")
            self._same_path("state.base_state", record.node, base.node, record.state_start)
        elif record.base_segment is None and record.state_start:
            raise FormatError("state that begins later stands on other state", field="state.state_start")
        named = [("state.base_segment", record.base_segment, record.state_start)]
        named.append(("state.segment", record.segment, record.state_end))
        for name, number, upto in named:
            if number is None:
                continue
            self._known(name, number, SegmentRecord)
            segment = self.segments[number]
            if self.nodes[segment.node].model != record.model or upto > segment.end:
                raise FormatError("the segment does not hold the state", field=name)
            self._same_path(name, record.node, segment.node, upto)
        if record.segment is not None and self.segments[record.segment].start > record.state_start:
            raise FormatError("the segment does not hold the state", field="state.segment")

    def _check_hidden(self, record: StateRecord) -> None:
        if (record.hidden is None) != (record.hidden_dtype is None):
            raise FormatError("a hidden state has a dtype, and nothing else has", field="state.hidden_dtype")
        if record.hidden is None or record.hidden_dtype is None:
            return
        check_limit("state.hidden", len(record.hidden), limits.MAX_HIDDEN_BYTES)
        size = ITEM_BYTES.get(record.hidden_dtype, 0) if "float" in record.hidden_dtype else 0
        if not size or not record.hidden or len(record.hidden) % size:
            raise FormatError("a hidden state is a row of floating-point numbers", field="state.hidden")

    def _name(self, record: BranchRecord | TagRecord) -> None:
        kind = NAMES[type(record)]
        if record.turn is not None:
            self._known(f"{kind}.turn", record.turn, TurnRecord)
        _name(kind, record.name)
        if record.name in self.names:
            raise FormatError(f"the name {record.name!r} is there twice", field=f"{kind}.name")
        self.names.add(record.name)

    def _known(self, name: str, number: int, kind: type[Any]) -> None:
        if number >= self._number(kind):
            raise FormatError(f"there is no {NAMES[kind]} {number} before this", field=name)

    def _same_path(self, name: str, a: int | None, b: int | None, depth: int) -> None:
        if a != b and self.path(a, depth) != self.path(b, depth):
            raise FormatError("what it stands on has other tokens", field=name)
        if a is None and depth:
            raise FormatError("there are no tokens there", field=name)

    def _tokens(self, name: str, packed: bytes) -> list[int]:
        if len(packed) % TOKEN_BYTES:
            raise FormatError("a token has four bytes", field=name)
        check_limit(name, len(packed) // TOKEN_BYTES, limits.MAX_TOKENS)
        tokens = unpack_tokens(packed)
        check_limit(f"{name}: a token", max(tokens, default=0), limits.MAX_VOCABULARY - 1)
        return tokens


def plain_map(packed: bytes, name: str) -> dict[str, Any]:
    """A MessagePack map of texts to plain values (text, bytes, numbers, lists, maps). Raises FormatError."""
    check_limit(name, len(packed), max(limits.MAX_SETTINGS_BYTES, limits.MAX_TURN_BYTES * (name == "turn.message")))
    try:
        value = msgpack.unpackb(packed, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"{name} is not MessagePack: {error}", field=name) from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} is not a map", field=name)
    _check_plain(value, name, limits.MAX_DEPTH)
    return value


def _check_plain(value: Any, name: str, depth: int) -> None:
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise FormatError(f"{name} is nested too deep", field=name)
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise FormatError(f"{name} has a key that is no text", field=name)
        for each in value.values() if isinstance(value, dict) else value:
            _check_plain(each, name, depth - 1)
    elif not isinstance(value, (str, bytes, int, float, bool, type(None))):
        raise FormatError(f"{name} holds something else than plain data", field=name)


def _text(name: str, text: str) -> None:
    check_limit(name, len(text), limits.MAX_NAME_BYTES)


def _name(what: str, name: str) -> None:
    try:
        check_name(what, name)
    except InvalidName as error:
        raise FormatError(str(error), field=f"{what}.name") from error
