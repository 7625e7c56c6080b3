"""Reading a bundle into a store, in one transaction: whatever goes wrong, a kill among it, nothing has changed.

The whole file is checked once before the transaction begins, so that other writers wait for the writing alone, and
once more, record by record, while it is written: what is read twice need not be the same twice.

What is there is reused, by content: models and provenances by digest, edges by their tokens, turns by id (or by what
they say, where a copy of the session has ids of its own), segments by the digest of their rows. So a bundle can be
imported again, and one that says more than the last adds what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sqlalchemy as sa

from kvloom_proto.bundle import (
    BranchRecord,
    ChunkRecord,
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
from kvloom_proto.errors import FormatError
from kvloom_proto.frames import Reader
from kvloom_proto.records import ChunkSpec, Schedule
from kvloom_store import quota, refs, roots, segments, trie, turns
from kvloom_store.bundle_check import CheckedSegment, CheckedTurn, Contents, Rules
from kvloom_store.checksum import checked, update
from kvloom_store.database import Database
from kvloom_store.errors import AnotherSession, NoRoom
from kvloom_store.names import MAIN
from kvloom_store.schema import turn_state
from kvloom_store.trie import TOKEN_BYTES, Position, unpack_tokens
from kvloom_store.turns import Turn


class Seekable(Protocol):
    """A file that can be read twice."""

    def read(self, count: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Sessions:
    """How whoever keeps conversations takes in a session: ``adopted`` gives the settings it is stored with (told the
    names under which this store knows models), ``differs`` the setting that makes it another one than that of its name
    (None: it is the same conversation), ``names`` the names of the models in some settings, by their digests, and
    ``merged`` the settings of a session that is here with what only the bundle says.
    """

    adopted: Callable[[Mapping[str, Any], Mapping[str, str]], Mapping[str, Any]]
    differs: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]
    names: Callable[[Mapping[str, Any]], Mapping[str, str]]
    merged: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


@dataclass(slots=True)
class Imported:
    """What an import did. ``names`` are the branches and tags that are in the bundle, and what they are called here."""

    session: str = ""
    created: bool = False
    turns: int = 0
    new_turns: int = 0
    states: int = 0
    new_states: int = 0
    segments: int = 0
    new_segments: int = 0
    bytes: int = 0
    text_only: bool = False
    names: dict[str, str] = field(default_factory=dict)
    made_main: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


def import_bundle(
    database: Database,
    file: Seekable,
    rules: Rules,
    sessions: Sessions,
    *,
    name: str | None = None,
    text_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Read a bundle into the store, as session ``name`` (default: its own); ``text_only``: without its state.

    ``progress`` is told how many bytes were read, twice over.

    Raises:
        FormatError and its kinds: the file is not what FORMAT.md says; with offset and field.
        AnotherSession: there is a session of that name, and it is another conversation.
        NoRoom: its state would take more than the store's quota, and not enough may be dropped; nothing has changed.
        StoreError: it could not be written.
    """
    size = 0
    reader = Reader(file)
    for _ in Contents(rules).read(reader):
        size = reader.position
        if progress is not None:
            progress(size)

    def take_in() -> Imported:
        file.seek(0)
        reader = Reader(file)
        with database.write(background=True) as conn:
            contents = Contents(rules)
            taking = _Import(conn, contents, sessions, name, text_only)
            for record, parsed in contents.read(reader):
                taking.take(record, parsed)
                if progress is not None:
                    progress(size + reader.position)
            done = taking.finish()
            added.append(done.bytes)
            if done.bytes:
                quota.check(conn, database.path)
            return done

    added: list[int] = []
    try:
        return take_in()
    except NoRoom:  # only now it is known how much of it is new
        quota.Room(database).make(added[0], None)
        return take_in()


class _Import:
    """One import: the row here of each record, by its number."""

    def __init__(
        self, conn: sa.Connection, contents: Contents, sessions: Sessions, name: str | None, text_only: bool
    ) -> None:
        self._conn = conn
        self._contents = contents
        self._sessions = sessions
        self._name = name
        self._result = Imported()
        self._roots: list[int] = []
        self._provenances: list[int] = []
        self._nodes: list[Position] = []
        self._turns: list[int] = []
        self._segments: list[int] = []
        self._writes = False
        self._text_only = text_only
        self._pending: set[int] = set()
        self._states: list[int] = []
        self._session: refs.SessionRow | None = None
        self._first: int | None = None

    def take(self, record: Record, parsed: Any) -> None:
        """Do what one record says."""
        match record:
            case Head():
                self._result.text_only = self._text_only or record.text_only
            case Model():
                self._model(record, parsed)
            case ProvenanceRecord():
                self._provenances.append(segments.add_provenance(self._conn, parsed))
            case SessionRecord():
                self._take_session(record, parsed)
            case NodeRecord():
                self._node(record)
            case TurnRecord():
                self._turn(record, parsed)
            case SegmentRecord() | ChunkRecord() if self._text_only:
                pass
            case SegmentRecord():
                self._segment(record, parsed)
            case ChunkRecord():
                self._chunk(record, parsed)
            case StateRecord():
                self._state(record, parsed)
            case BranchRecord():
                self._branch(record)
            case TagRecord():
                self._tag(record)

    def finish(self) -> Imported:
        """What was done; a new session without a branch main begins one where its first name points."""
        session = self._here
        main = next((each for each in refs.branches(self._conn, session.row) if each.name == MAIN), None)
        if self._result.created and main is not None and main.turn is None and self._first is not None:
            refs.move_branch(self._conn, main.row, None, self._first)
            self._result.made_main = True
        return self._result

    @property
    def _here(self) -> refs.SessionRow:
        if self._session is None:
            raise FormatError("a bundle has a session", field="session")
        return self._session

    def _model(self, record: Model, fields: Mapping[str, str]) -> None:
        # Named as it is known here, if it is: a name of elsewhere may be a place there.
        row = roots.add_model(self._conn, record.digest, record.name, fields)
        self._roots.append(roots.root_for(self._conn, row, extra=record.extra, salt=record.salt))

    def _take_session(self, record: SessionRecord, settings: Mapping[str, Any]) -> None:
        name = self._name or record.name
        adopted = self._sessions.adopted(settings, self._known_models())
        found = refs.find_session(self._conn, name)
        if found is None:
            found = refs.create_session(self._conn, name, adopted)
            self._result.created = True
        else:
            difference = self._sessions.differs(found.settings, settings)
            if difference is not None:
                raise AnotherSession(name, difference)
            merged = self._sessions.merged(found.settings, adopted)
            if merged != found.settings:
                found = refs.change_settings(self._conn, found.row, merged)
        self._session = found
        self._result.session = name

    def _known_models(self) -> dict[str, str]:
        """The names under which sessions of this store have models, by their digests."""
        found: dict[str, str] = {}
        for each in refs.sessions(self._conn):
            found = {**self._sessions.names(each.settings), **found}
        return found

    def _node(self, record: NodeRecord) -> None:
        root = self._roots[record.model]
        here = self._contents.nodes[-1]
        path = self._contents.path(len(self._contents.nodes) - 1, here.end)
        start = None if record.parent is None else self._at(record.parent, here.start)
        self._nodes.append(trie.extend(self._conn, root, unpack_tokens(path), start_at=start))

    def _turn(self, record: TurnRecord, parsed: CheckedTurn) -> None:
        self._result.turns += 1
        parent = None if record.parent is None else turns.get(self._conn, self._turns[record.parent])
        found = self._same_turn(record, parent, parsed)
        if found is not None:
            self._turns.append(found.row)
            return
        taken = turns.by_id(self._conn, record.public_id) is not None
        made = turns.add_turn(
            self._conn,
            self._here.row,
            parent,
            parsed.message,
            continues=record.continues,
            finish_reason=record.finish_reason,
            settings=parsed.settings,
            timings=parsed.timings,
            public_id=None if taken else record.public_id,
            created=record.created,
        )
        self._turns.append(made.row)
        self._result.new_turns += 1

    def _same_turn(self, record: TurnRecord, parent: Turn | None, parsed: CheckedTurn) -> Turn | None:
        """The turn that is here already, by its id, or, of a copy of the session, by what it says and when."""
        session, above = self._here.row, parent.row if parent else None
        found = turns.by_id(self._conn, record.public_id)
        if found is not None and found.session == session:
            if (found.digest, found.parent) != (record.digest, above):
                raise AnotherSession(self._here.name, f"turn {found.id[:8]} says something else there")
            return found
        for each in turns.alike(self._conn, session, above, record.digest):
            same = (each.created, each.continues, each.finish_reason, each.settings)
            wanted = (record.created, record.continues, record.finish_reason, parsed.settings)
            if same == wanted and each.row not in self._turns:
                return each
        return None

    def _segment(self, record: SegmentRecord, parsed: CheckedSegment) -> None:
        manifest = parsed.manifest
        position = self._at(record.node, manifest.end)
        draft = segments.Draft(
            position.node,
            manifest.start,
            manifest.end,
            None if record.base is None else self._segments[record.base],
            manifest.layers,
            parsed.schedule,
            self._provenances[record.provenance],
        )
        row, self._writes = segments.adopt(self._conn, draft, manifest)
        self._segments.append(row)
        self._result.segments += 1
        self._result.new_segments += self._writes

    def _chunk(self, record: ChunkRecord, spec: ChunkSpec) -> None:
        if self._writes:
            segments.add_chunk(self._conn, self._segments[-1], spec, record.blob)
            self._result.bytes += len(record.blob)

    def _state(self, record: StateRecord, schedule: Schedule) -> None:
        self._result.states += 1
        if self._text_only:
            record, schedule = self._without_state(record, schedule)
        turn = self._turns[record.turn]
        root, tokens = self._roots[record.model], unpack_tokens(record.tokens)
        position = self._position(record, root)
        segment = None if record.segment is None else self._segments[record.segment]
        base_segment = None if record.base_segment is None else self._segments[record.base_segment]
        provenance = self._provenances[record.provenance]
        for each in turns.states_of(self._conn, [turn]):
            same = (each.root, each.start, each.tokens, each.position, each.state_start, each.state_end)
            how = (each.schedule, each.provenance, each.variant)
            if same == (root, record.start, tokens, position, record.state_start, record.state_end) and how == (
                schedule,
                provenance,
                record.variant,
            ):
                self._states.append(each.row)
                self._complete(each, segment, base_segment, record)
                return
        base = None if record.base_state is None else self._states[record.base_state]
        made = turns.add_state(
            self._conn,
            turn,
            root,
            tokens,
            record.start,
            position,
            state_start=record.state_start,
            state_end=record.state_end,
            base_state=base,
            base_segment=base_segment,
            segment=segment,
            schedule=schedule,
            provenance=provenance,
            hidden=record.hidden,
            hidden_dtype=record.hidden_dtype,
            variant=record.variant,
            scores=record.scores,
        )
        self._states.append(made.row)
        self._result.new_states += 1

    def _without_state(self, record: StateRecord, schedule: Schedule) -> tuple[StateRecord, Schedule]:
        """A turn's tokens alone; where nothing says how what it stands on was computed, all are still to be run."""
        record = replace(record, segment=None, base_segment=None, hidden=None, hidden_dtype=None)
        if not record.state_start or record.base_state not in (None, *self._pending):
            return record, schedule
        self._pending.add(len(self._states))
        return replace(record, base_state=None, state_start=0, state_end=0), Schedule()

    def _complete(
        self, here: turns.TurnState, segment: int | None, base_segment: int | None, record: StateRecord
    ) -> None:
        """Give a state that was imported without it (as text alone) what this bundle has of it."""
        row = checked(turn_state, self._conn.execute(sa.select(turn_state).where(turn_state.c.id == here.row)).one())
        changes: dict[str, Any] = {}
        if here.segment is None and segment is not None:
            changes |= {"segment": segment, "base_segment": base_segment, "dropped": 0}
        if here.hidden is None and record.hidden is not None:
            changes |= {"hidden": record.hidden, "hidden_dtype": record.hidden_dtype}
        if changes:
            update(self._conn, turn_state, row, **changes)
            self._result.new_states += 1

    def _position(self, record: StateRecord, root: int) -> Position:
        if record.node is None:
            return trie.top(self._conn, root)
        return self._at(record.node, record.start + len(record.tokens) // TOKEN_BYTES)

    def _at(self, node: int, depth: int) -> Position:
        """The point here after so many tokens of the path to a node's end."""
        end = self._nodes[node]
        return end if end.depth == depth else trie.position_at(self._conn, end, depth)

    def _branch(self, record: BranchRecord) -> None:
        turn = None if record.turn is None else self._turns[record.turn]
        self._first = self._first or turn
        begin = self._result.created  # then the branch main was made with it
        self._result.names[record.name] = refs.place_branch(self._conn, self._here.row, record.name, turn, begin=begin)

    def _tag(self, record: TagRecord) -> None:
        turn = self._turns[record.turn]
        self._first = self._first or turn
        self._result.names[record.name] = refs.place_tag(self._conn, self._here.row, record.name, turn)
