"""Stores of any size, made quickly: the rows that saying all that would have written, thousands in a statement.

A token has one byte of state. Every row is sealed and every chunk can be restored, as if a model had made it.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import sqlalchemy as sa
import xxhash

from kvloom_proto import limits
from kvloom_proto.records import LayerKind, LayerSpec, Manifest, Pass, Provenance, Schedule, TensorSpec, pack
from kvloom_store import checksum, refs, roots, schema, search, segments, trie
from kvloom_store.database import Database, now_us
from kvloom_store.trie import TOKEN_BYTES, Position
from kvloom_store.turns import chained_digest

TOKENS = 50
"""Tokens of a turn: those of a node."""

SHARED = 10
"""A reply that was made anew begins with so many tokens of the old one: its node hangs off the middle of that one's."""

OPENINGS = 16
"""Different system prompts, of TOKENS each; a session begins with one of them."""

DRAWN = range(100, 30_000)
"""Tokens are drawn from these; others are used where one must differ from all that stand beside it."""

LAYERS = (LayerSpec(0, 1, LayerKind.ROWS, (TensorSpec("keys", "uint8", (1,), 0),)),)

CONVERSATION = (None, *range(25), *range(25, 37), 25, *range(38, 50))
"""Whose answer each turn is: a system prompt, 25 turns, and then two branches of 12 and 13. Each but the first adds a
node."""

RARE, COMMON = "zyzzyva", "baba"
"""A word that is in few turns, and one that is in most."""

RARE_TURNS = 5

SETTINGS: dict[str, Any] = {
    "model": "synthetic",
    "model_digest": "00" * 16,
    "model_fields": {f"field {number}": "0123456789abcdef" * 2 for number in range(12)},
    "tokenizer": "00" * 16,
    "dtype": "float32",
    "chat_template": "{% for message in messages %}"
    + "{{ message.role }}: {{ message.content }}\n" * 10
    + "{% endfor %}",
    "template_digest": "00" * 16,
    "template_options": {},
    "clock": "2025-01-01T00:00:00",
}
"""What sessions begin with, as long as it is with a real model."""

BATCH = 5_000
"""Turns written in one transaction."""


@dataclass(frozen=True, slots=True)
class _End:
    """Where a path ends: the tokens that were added last, the digest of all, and the segment that holds their state."""

    position: Position
    packed: bytes
    digest: xxhash.xxh3_128
    segment: int | None


@dataclass(frozen=True, slots=True)
class _Said:
    """A turn that was written, and its state (None: its tokens come with the next one)."""

    turn: int
    digest: bytes
    end: _End
    state: int | None


@dataclass(slots=True)
class Synthetic:
    """A store that was made, and where in its trie the turns of each session end (those with tokens)."""

    path: Path
    root: int
    ends: dict[str, list[Position]] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Edges of the trie, without its top."""
        return sum(map(len, self.ends.values())) + OPENINGS

    @property
    def tokens(self) -> int:
        """Tokens of all edges."""
        return OPENINGS * TOKENS + sum(end.offset for ends in self.ends.values() for end in ends)

    def some_path(self, conn: sa.Connection, draw: random.Random) -> list[int]:
        """The first tokens of a random path, any number of them."""
        end = draw.choice(self.ends[draw.choice(list(self.ends))])
        ids = trie.tokens_to(conn, end.node, end.offset)
        return ids[: draw.randint(1, len(ids))]


def conversations(path: Path, sessions: int, *, seed: int = 0) -> Synthetic:
    """A store of so many sessions of 50 turns; a node, a segment and 50 tokens each."""
    builder = Builder(path, seed=seed)
    for number in range(sessions):
        builder.session(f"session-{number}")
    return builder.finish()


class Builder:
    """Writes sessions into a new store. Call ``finish`` at the end."""

    def __init__(self, path: Path, *, seed: int = 0) -> None:
        self._database = Database(path)
        self._draw = random.Random(seed)
        self._words = [word for word, count in _vocabulary(self._draw) for _ in range(count)]
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._now = now_us()
        with self._database.write() as conn:
            root = roots.root_for(conn, roots.add_model(conn, b"s" * 16, "synthetic", {}))
            top = trie.top(conn, root)
            self._provenance = segments.add_provenance(conn, Provenance(1, "", "", "cpu", "", "", "synthetic"))
            self._next = {row.name: row.next for row in conn.execute(sa.select(schema.sequence))}
        self._made = Synthetic(path, root)
        start = _End(top, b"", xxhash.xxh3_128(), None)
        self._openings = [self._edge(start, top, self._drawn(nth)) for nth in range(OPENINGS)]

    def session(self, name: str, parents: Sequence[int | None] = CONVERSATION, *, tokens: int = TOKENS) -> None:
        """A session whose turns answer those that ``parents`` says; every leaf is a branch."""
        number = len(self._made.ends)
        dates = {"created": self._now, "updated": self._now + number}
        row = self._add(schema.session, name=name, settings=msgpack.packb(SETTINGS), **dates)
        said: list[_Said] = []
        answer: dict[int, int] = {}
        for nth, parent in enumerate(parents):
            text = f"{self._text()} {RARE}" if nth == 7 and number < RARE_TURNS else self._text()
            if parent is None:
                said.append(self._turn(row, None, self._openings[number % OPENINGS], text))
                continue
            above, first = said[parent].end, answer.setdefault(parent, nth)
            if first == nth:  # the first answers to a system prompt each begin with a token of their own
                drawn = self._drawn(DRAWN.stop + number if parent == 0 else 0, tokens)
                end = self._edge(above, above.position, drawn)
            else:
                old = said[first].end
                at = Position(old.position.node, SHARED, old.position.start)
                end = self._edge(above, at, self._drawn(DRAWN.stop + nth, tokens), old.packed[: SHARED * TOKEN_BYTES])
            said.append(self._turn(row, said[parent], end, text))
        leaves = [each for each in range(len(parents)) if each not in set(parents)]
        for nth, leaf in enumerate(leaves):
            branch = f"branch-{nth}" if nth else refs.MAIN
            self._add(schema.branch, session=row, name=branch, turn=said[leaf].turn, **dates)
        self._made.ends[name] = [each.end.position for each in said[1:]]
        if len(self._rows["turn"]) >= BATCH:
            self._write()

    def finish(self) -> Synthetic:
        """Write what is waiting, and the index over what was said."""
        self._write()
        search.rebuild(self._database)
        self._database.checkpoint()
        self._database.close()
        return self._made

    def _text(self) -> str:
        return " ".join(self._draw.choices(self._words, k=35))

    def _drawn(self, first: int, tokens: int = TOKENS) -> bytes:
        return array("I", [first, *self._draw.choices(DRAWN, k=tokens - 1)]).tobytes()

    def _edge(self, above: _End, at: Position, packed: bytes, shared: bytes = b"") -> _End:
        """A node at a point of the trie, and the state of ``shared`` and its own tokens on top of what is above."""
        path = above.digest.copy()
        path.update(shared + packed)
        length = len(packed) // TOKEN_BYTES
        node = self._add(
            schema.node,
            root=self._made.root,
            parent=at.node,
            parent_offset=at.offset,
            first_token=trie.unpack_tokens(packed[:TOKEN_BYTES])[0],
            start=at.depth,
            length=length,
            tokens=packed,
            chain_hash=path.digest(),
        )
        position = Position(node, length, at.depth)
        return _End(position, shared + packed, path, self._segment(above, position))

    def _segment(self, above: _End, end: Position) -> int:
        start, schedule = above.position.depth, _schedule(above.position.depth, end.depth)
        draft = segments.Draft(end.node, start, end.depth, above.segment, LAYERS, schedule, self._provenance)
        chunks, blobs = [], []
        for spec in segments.cut(LAYERS, start, end.depth):
            blob = self._draw.randbytes(spec.raw_length)
            found = checksum.digest(blob)
            chunks.append(replace(spec, raw_digest=found, stored_digest=found))
            blobs.append(blob)
        manifest = Manifest(start, end.depth, limits.CHUNK_TOKENS, LAYERS, tuple(chunks))
        row = self._add(
            schema.segment,
            node=draft.node,
            start=start,
            end=end.depth,
            base_segment=draft.base_segment,
            digest=segments.content_digest(draft, chunks),
            schedule=pack(draft.schedule),
            provenance=self._provenance,
            manifest=pack(manifest),
            raw_bytes=manifest.raw_bytes,
            stored_bytes=manifest.stored_bytes,
            complete=1,
            created=self._now,
            lossy=0,
            merged=0,
        )
        waiting = self._rows.setdefault(schema.chunk.name, [])
        waiting += [segments.chunk_row(row, spec, blob) for spec, blob in zip(chunks, blobs, strict=True)]
        return row

    def _turn(self, session: int, parent: _Said | None, end: _End, text: str) -> _Said:
        role = "system" if parent is None else "user" if parent.state is None else "assistant"
        message = {"role": role, "content": text}
        digest = chained_digest(parent.digest if parent else b"", message)
        turn = self._add(
            schema.turn,
            public_id=self._draw.randbytes(16),
            session=session,
            parent=parent.turn if parent else None,
            role=role,
            continues=0,
            message=msgpack.packb(message),
            finish_reason="stop" if role == "assistant" else None,
            settings=msgpack.packb({"temperature": 0.7, "max_tokens": 512, "seed": 1} if role == "assistant" else {}),
            timings=msgpack.packb({"first_token": 0.25, "total": 2.5, "tokens": {"reused": 100, "computed": 50}}),
            digest=digest,
            created=self._now,
        )
        if parent is None:
            return _Said(turn, digest, end, None)
        above = parent.end.position.depth
        before = (
            b"" if parent.state is not None else parent.end.packed
        )  # a system prompt's tokens come with the next turn
        state = self._add(
            schema.turn_state,
            turn=turn,
            root=self._made.root,
            start=above - len(before) // TOKEN_BYTES,
            end=end.position.depth,
            tokens=before + end.packed,
            node=end.position.node,
            offset=end.position.offset,
            state_start=above,
            state_end=end.position.depth,
            base_state=parent.state,
            base_segment=parent.end.segment,
            segment=end.segment,
            schedule=pack(_schedule(above, end.position.depth)),
            provenance=self._provenance,
            hidden=None,
            hidden_dtype=None,
            variant=0,
            dropped=0,
            created=self._now,
            scores=None,
        )
        return _Said(turn, digest, end, state)

    def _add(self, table: sa.Table, **values: Any) -> int:
        row = self._next[table.name]
        self._next[table.name] = row + 1
        self._rows.setdefault(table.name, []).append(checksum.sealed(table, {"id": row, **values}))
        return row

    def _write(self) -> None:
        """Everything that waits, those first that others refer to, and the row ids that were taken."""
        with self._database.write() as conn:
            for table in schema.metadata.sorted_tables:
                if rows := self._rows.pop(table.name, None):
                    conn.execute(table.insert(), rows)
            for row in conn.execute(sa.select(schema.sequence)).all():
                values = checksum.checked(schema.sequence, row)
                if values["next"] != self._next[row.name]:
                    checksum.update(conn, schema.sequence, values, next=self._next[row.name])


def _schedule(start: int, end: int) -> Schedule:
    return Schedule((Pass(start, end - start),))


def _vocabulary(draw: random.Random) -> Iterator[tuple[str, int]]:
    """Words, and how often each is drawn: the second half as often as the first, as in a language."""
    for number in range(4_000):
        word = "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2 + number % 3))
        yield (COMMON if number == 0 else word), max(1, 2_000 // (number + 1))
