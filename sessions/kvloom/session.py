"""A session: one conversation tree, its branches, tags and turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kvloom.binding import bindings, identified
from kvloom.branch import Branch
from kvloom.errors import NothingToDo, RefNotFound, RemovedMeanwhile
from kvloom.listing import TreeTurn, listed
from kvloom_proto.codecs import AUTO
from kvloom_proto.scores import TokenScore, read_scores
from kvloom_store import cut, pins, refs, roots, turns
from kvloom_store.names import MAIN, Ref, parse_ref
from kvloom_store.refs import SessionRow

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.bundles import Exported
    from kvloom.compact import Compaction
    from kvloom.cost import Prices, SessionCost
    from kvloom.dropped import Dropped
    from kvloom.engine import Progress
    from kvloom.explore.search import Search
    from kvloom.loom import KVLoom
    from kvloom.planned import PlannedBranch
    from kvloom.recode import Recoding
    from kvloom.report import Added
    from kvloom.template import ChatTemplate
    from kvloom.tokens import Decoder
    from kvloom.verify import Receipt
    from kvloom.warm import Missing
    from kvloom.why import Why
    from kvloom_store.recode import Survey


class Session:
    """One conversation tree. Made by ``KVLoom.session``."""

    def __init__(self, loom: KVLoom, row: SessionRow) -> None:
        self._loom = loom
        self._row = row
        self._used: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The session's name."""
        return self._row.name

    @property
    def row(self) -> SessionRow:
        """The session as the store has it."""
        return self._row

    @row.setter
    def row(self, row: SessionRow) -> None:
        self._row = row

    @property
    def loom(self) -> KVLoom:
        """The store it is in."""
        return self._loom

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is fixed of the model in use, at first the session's own: its name, dtype, chat template, the template's
        options and clock; of text that was imported and has met no model yet, empty texts."""
        return self._used if self._used is not None else bindings(self._row.settings)[0]

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """The same of every model that the session is read by, its own first."""
        return list(bindings(self._row.settings))

    def use(self, settings: Mapping[str, Any]) -> None:
        """Read the session as one of its ``models`` does from now on."""
        self._used = settings
        self.__dict__.pop("tokenizer", None)

    def add_model(self, chat_template: str | None = None) -> list[str]:
        """Let the session be gone on with under the store's model, too: in which fields that differs from its own.

        [] if it is one of the session's models already. Nothing is run before it is used: then this model's state of a
        path is computed, once, and kept beside that of the others. ``chat_template`` is Jinja text; without it, a model
        with the same tokenizer has the session's own, and another one the template that it brings.

        Raises:
            ModelMismatch: it differs from one of the session's models in its tokenizer alone.
            RefExists, SessionError: the session has another template for it; it is none.
        """
        from kvloom import binding

        return binding.add_model(self, chat_template)

    def template(self) -> ChatTemplate:
        """The session's own chat template, with the options and the clock it began with."""
        from kvloom import binding
        from kvloom.template import ChatTemplate

        if not binding.is_bound(self.settings):
            binding.check_model(self)
        fixed = self.settings
        return ChatTemplate(fixed["chat_template"], fixed["template_options"], fixed["clock"])

    def branch(self, name: str = MAIN) -> Branch:
        """A branch by name. Raises RefNotFound."""
        with self._loom.database.read() as conn:
            point = self.resolve(conn, Ref(self.name, name, 0))
        if point.branch is None:
            raise RefNotFound("branch", name, [b.name for b in self.branches()])
        return Branch(self._loom, self, point.branch)

    def branches(self) -> list[Branch]:
        """Every branch, oldest first."""
        with self._loom.database.read() as conn:
            return [Branch(self._loom, self, row) for row in refs.branches(conn, self._row.row)]

    def fork(self, name: str, at: str | None = None) -> Branch:
        """A new branch at a ref (``"main~2"``, a turn id, a tag; None: main): one row, and no state.

        At a token (``"main:1234"``) inside a turn the branch begins with that turn cut there, which is one row more
        and stands on the same state.

        Raises:
            RefExists, RefNotFound, InvalidName
            EngineError, ModelMismatch: a turn would have to be cut, and its tokenizer is not here.
        """
        ref = self.ref(at)
        with self._settled(ref) as (conn, turn):
            row = refs.add_branch(conn, self._row.row, name, turn)
        return Branch(self._loom, self, row)

    def checkout(self, at: str) -> Branch:
        """The branch at a ref; a new one, named after main, where the ref is not a branch."""
        ref = self.ref(at)
        point = self.point(ref)
        if point.branch is not None:
            return Branch(self._loom, self, point.branch)
        with self._settled(ref) as (conn, turn):
            name = refs.free_name(conn, self._row.row, MAIN)
            return Branch(self._loom, self, refs.add_branch(conn, self._row.row, name, turn))

    def edit(
        self, at: str | None, text: str, *, branch: str | None = None, replay_turns: bool = False
    ) -> PlannedBranch:
        """Plan a new branch that says ``text`` at a ref in place of what is said there; the old branch stays.

        Read ``cost`` from the plan, then ``run`` it: nothing is run or written before. What was said later is left
        out, or, with ``replay_turns``, appended again as it was: computed, not generated. The branch is called
        ``branch``, else as the one edited with a number. A reply to an edited message: ``plan.branch.regenerate()``.

        Raises:
            InvalidText, NothingToDo (the text is unchanged), RefNotFound, RefExists, ModelMismatch, ContextOverflow
        """
        from kvloom import edit

        return edit.plan(self, self.ref(at), text, branch=branch, replay_turns=replay_turns)

    def explore(
        self,
        at: str | None = None,
        *,
        prompt: str | None = None,
        name: str = "explore",
        resume: bool = False,
        cancel: threading.Event | None = None,
        told: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Search:
        """Search continuations of a point: iterate over the result for its events, then read its ``result``.

        ``prompt`` is said at ``at`` first, on a branch of the search's ``name``; without it the candidates are replies
        to the last message, or go on with a stopped reply. ``settings`` are fields of ``ExploreSettings`` and of
        ``SamplingSettings``. Every candidate is a branch: ``explore/1``, its children ``explore/1.1`` ... ``resume``
        goes on with the search of that name, if there is one; settings that are given must be its own.

        Raises:
            SessionError: settings that make no sense, or other ones than those of the search that is resumed.
            RefExists: there is a search, or a branch, of that name.
            NothingToDo, RefNotFound, InvalidText, ModelMismatch, ContextOverflow
        """
        from kvloom.explore.search import Search

        return Search(self, at, prompt, name, settings, resume=resume, cancel=cancel, told=told)

    def compact(
        self,
        at: str | None = None,
        *,
        keep: int | None = None,
        summary: bool = False,
        branch: str | None = None,
        max_tokens: int | None = None,
    ) -> Compaction:
        """Plan a shorter branch that goes on from a ref with the system prompt and the last ``keep`` exchanges (4).

        With ``summary`` it begins with one that the model writes, of at most ``max_tokens`` (400), and keeps no
        exchanges unless it is said how many. Read ``cost`` from the plan, then ``summarise``, if there is to be one,
        and ``run``.

        Raises:
            NothingToDo, RefNotFound, RefExists, ModelMismatch, ContextOverflow
        """
        from kvloom.compact import KEEP, SUMMARY_TOKENS, Compaction

        kept = keep if keep is not None else 0 if summary else KEEP
        limit = max_tokens or SUMMARY_TOKENS
        return Compaction(self, self.ref(at), keep=kept, summary=summary, branch=branch, max_tokens=limit)

    def missing(self, at: str | None = None, *, verify: bool = False, exact: bool = False) -> Missing:
        """What of the state down to a ref is missing, and ``warm`` would compute; ``verify`` reads what is stored.

        ``exact``: state that was stored with loss, or follows from such state, counts as missing, and what was dropped
        is to be run again as it was.
        """
        from kvloom.warm import missing

        return missing(self, self.point(self.ref(at)).turn, verify=verify, exact=exact)

    def warm(
        self,
        at: str | None = None,
        *,
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Added:
        """Compute what is missing of the state down to a ref, and store it; what is there is read, and so checked.

        What was dropped is computed anew. ``exact``: it is run again just as it was first, and so is what was stored
        with loss, or follows from such state. Stopped by ``cancel``, it keeps what was done. Raises ModelMismatch,
        EngineError, StoreError.
        """
        from kvloom.warm import warm

        ref = self.ref(at)
        turn, name = self.point(ref).turn, ref.point or MAIN
        return warm(self, turn, name, exact=exact, cancel=cancel, progress=progress)

    def survey(self, at: str | None = None) -> Survey:
        """What the state down to a ref takes in the file, by codec, and with which branches it is shared."""
        from kvloom import recode

        return recode.survey(self, self.ref(at))

    def recode(
        self,
        at: str | None = None,
        *,
        codec: str = AUTO,
        shared: bool = False,
        cancel: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Recoding:
        """Put the state down to a ref down again with a codec (raw, lz4, zstd, auto): the same bits in other bytes.

        q8_0 and q4_0 store rows with loss. They leave state alone that other branches stand on, unless it is to be
        ``shared`` so, and every reply from lossy state says so; ``warm(exact=True)`` brings the exact rows back.

        ``progress`` is called with the bytes of state done and in all. Stopped by ``cancel``, it keeps what was done.

        Raises:
            UnknownCodec, NothingToDo (no state is stored), RefNotFound, StoreError
        """
        from kvloom import recode

        return recode.recode(self, self.ref(at), codec, shared=shared, cancel=cancel, progress=progress)

    def verify(
        self,
        at: str | None = None,
        *,
        replay: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Receipt:
        """Read all stored state down to a ref back and check it; with ``replay``, compute it again and compare.

        Without ``replay`` no model is needed. Raises CorruptRow where text or tokens are damaged, RefNotFound,
        ModelMismatch, EngineError.
        """
        from kvloom.verify import verify

        return verify(self, self.ref(at), replay=replay, cancel=cancel, progress=progress)

    def export(
        self,
        file: str | Path | BinaryIO,
        at: str | None = None,
        *,
        format: str = "protobuf",
        text_only: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Exported:
        """Write the whole tree, or the path to a ref, to a file as a bundle: text, tokens and state.

        ``format`` is protobuf or msgpack; ``text_only`` leaves the state out. A path is written whole or not at all,
        readable by its owner only; an open binary file is written to. ``progress`` is told bytes, and of how many.
        ``KVLoom.import_bundle`` reads it.

        Raises:
            RefNotFound, NothingToDo (the ref is inside a turn), SessionError (it cannot be written)
            StateDamaged, CorruptRow: what is stored is damaged.
        """
        from kvloom import bundles

        with _file(file) as opened:
            return bundles.write(self, opened, at, encoding=format, text_only=text_only, progress=progress)

    def export_transcript(
        self, file: str | Path | BinaryIO, at: str | None = None, *, format: str = "openai"
    ) -> Exported:
        """Write the messages down to a ref (None: main) as text: ``format`` is openai (JSON) or markdown.

        Raises RefNotFound, SessionError.
        """
        from kvloom import transcripts

        with _file(file) as opened:
            return transcripts.write(self, opened, at, format)

    def cost(self, prices: Prices | None = None) -> SessionCost:
        """Tokens reused and computed so far, seconds saved, and what a hosted model would have charged."""
        from kvloom.cost import cost

        return cost(self, prices)

    def tag(self, name: str, at: str | None = None) -> None:
        """A name that stays at a turn. Raises RefExists, RefNotFound, NothingToDo."""
        with self._settled(self.ref(at)) as (conn, turn):
            if turn is None:
                raise NothingToDo("there is no turn to tag yet")
            refs.add_tag(conn, self._row.row, name, turn)

    def pin(self, at: str | None = None) -> bool:
        """Have the state of the turn at a ref, and of those before it, never dropped; False if that was so already.

        Raises RefNotFound, NothingToDo.
        """
        with self._settled(self.ref(at)) as (conn, turn):
            if turn is None:
                raise NothingToDo("there is no turn to pin yet")
            return pins.add(conn, turn)

    def unpin(self, at: str | None = None) -> bool:
        """Take the pin of the turn at a ref away; False if it had none. Raises RefNotFound."""
        ref = self.ref(at)
        with self._loom.database.write() as conn:
            turn = self.resolve(conn, ref).turn
            return turn is not None and pins.remove(conn, turn)

    def dropped(self, at: str | None = None) -> Dropped:
        """What of the state down to a ref was dropped, and what bringing it back takes; no model is needed."""
        from kvloom.dropped import dropped

        return dropped(self, self.point(self.ref(at)).turn)

    def tree(self) -> list[TreeTurn]:
        """Every turn, oldest first: parents come before their children."""
        with self._loom.database.read() as conn:
            return listed(conn, self._row.row, turns.of_session(conn, self._row.row))

    def why(
        self,
        messages: Sequence[Mapping[str, Any]],
        at: str | None = None,
        *,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        clock: str | None = None,
    ) -> Why:
        """What asking for a whole list of messages (OpenAI's form) would reuse, and why not more.

        They are rendered and tokenised from the first one on, as a client does that keeps messages and no tokens, and
        compared with the session's turns; of paths that agree equally far, with the one to ``at`` (None: main).
        Template (Jinja text), options and clock (ISO time) are the session's own unless given. The model's weights
        are not loaded.

        Raises:
            InvalidText: no messages, or some that are not text.
            RefNotFound, SessionError
            ModelNotFound: the model, whose tokenizer is needed, is not here.
        """
        from kvloom import foresee

        return foresee.of_messages(
            self,
            messages,
            self.ref(at),
            chat_template=chat_template,
            template_options=template_options,
            clock=clock,
        )

    def log(self, at: str | None = None) -> list[TreeTurn]:
        """The turns from the first one down to a ref; the last one ends at its token, if it names one.

        Where that turn's tokenizer is not here (``tokenizer`` is None), its text is told whole.
        """
        from kvloom.partial import partial_of, span_of

        ref = self.ref(at)
        with self._loom.database.read() as conn:
            point = self.resolve(conn, ref)
            shown = listed(conn, self._row.row, turns.path_to(conn, point.turn))
            if point.token is None:
                return shown
            span = span_of(conn, point)
            decoder = self.decoder(conn, span.state.root)
            text = shown[-1].text if decoder is None else partial_of(conn, decoder, span, point.token).text
        tokens, reason = point.token - span.state.start, cut.CUT if span.turn.role == "assistant" else None
        last = replace(
            shown[-1], text=text, tokens=tokens, finish_reason=reason, branches=(), tags=(), cut=True, score=None
        )
        return [*shown[:-1], last]

    def token_scores(self, at: TreeTurn | str | None = None) -> tuple[TokenScore, ...]:
        """What the model thought of each token of the turn at a ref (None: main), up to its token, if it names one.

        Read now; listing turns reads none. () of a turn that no model generated here.
        """
        ref = self.ref(at.id if isinstance(at, TreeTurn) else at)
        with self._loom.database.read() as conn:
            point = self.resolve(conn, ref)
            states = turns.states_of(conn, [point.turn]) if point.turn is not None else []
        state = next((each for each in states if each.scores is not None), None)
        if state is None or state.scores is None:
            return ()
        kept = at.tokens if isinstance(at, TreeTurn) else (point.token or state.end) - state.start
        return read_scores(state.scores, state.tokens)[:kept]

    @cached_property
    def tokenizer(self) -> Decoder | None:
        """What turns this session's token ids into text; None if it cannot be had without loading the model."""
        from kvloom.tokens import tokenizer_of

        return tokenizer_of(self._loom, self.settings)

    def discard(self, branch: Branch) -> bool:
        """Take a branch away, if it is still where it was when ``branch`` was read; whether it was. Turns stay."""
        with self._loom.database.write() as conn:
            point = self.resolve(conn, Ref(self.name, branch.name, 0))
            if point.branch is None or point.branch != branch.row:
                return False
            refs.remove_branch(conn, point.branch.row)
            if point.turn is not None:
                cut.discard(conn, point.turn)
            return True

    def only_on(self, branch: str) -> int:
        """How many turns go with a branch if it is removed: no other branch and no tag leads to them. Raises
        RefNotFound."""
        from kvloom_store import removal

        row = self.branch(branch).row
        with self._loom.database.read() as conn:
            return len(conn.execute(removal.only_of_branch(conn, row)).all())

    def rename(self, name: str) -> None:
        """Give the session another name. Raises RefExists, InvalidName."""
        with self._loom.database.write() as conn:
            self._row = refs.rename_session(conn, self.name, name)

    def ref(self, at: str | None) -> Ref:
        """What a ref within this session names, taken apart (None: main). Raises InvalidName."""
        return parse_ref(f"{self.name}@{at}" if at else self.name)

    def resolve(self, conn: sa.Connection, ref: Ref) -> refs.Point:
        """What a ref of this session points at.

        Raises:
            RemovedMeanwhile: its name is another session's by now: this one was renamed, or removed, elsewhere.
        """
        point = refs.resolve(conn, ref)
        if point.session.row != self._row.row:
            raise RemovedMeanwhile
        return point

    def point(self, ref: Ref) -> refs.Point:
        """The same, in a snapshot of its own."""
        with self._loom.database.read() as conn:
            return self.resolve(conn, ref)

    @contextmanager
    def _settled(self, ref: Ref) -> Iterator[tuple[sa.Connection, int | None]]:
        """A write transaction, and the turn a ref points at, made now if it names a token inside another turn."""
        with self._loom.database.read() as conn:
            point = self.resolve(conn, ref)
        if point.token is None:
            with self._loom.database.write() as conn:
                yield conn, self.resolve(conn, ref).turn
            return
        from kvloom.partial import partial_of, span_of
        from kvloom.tokens import needed_tokenizer

        with self._loom.database.read() as conn:
            span = span_of(conn, point)
            decoder = self.decoder(conn, span.state.root) or needed_tokenizer(
                self._loom, self._read_by(conn, span.state.root)
            )
            said = partial_of(conn, decoder, span, point.token)
        with self._loom.database.write() as conn:
            yield conn, cut.add(conn, span.turn, span.state, point.token, said.text, said.settings).row

    def decoder(self, conn: sa.Connection, root: int) -> Decoder | None:
        """What turns the tokens of a state of this session into text, by the trie it is in; as ``tokenizer``."""
        from kvloom.tokens import tokenizer_of

        settings = self._read_by(conn, root)
        same = settings["tokenizer"] == self.settings["tokenizer"]
        return self.tokenizer if same else tokenizer_of(self._loom, settings)

    def _read_by(self, conn: sa.Connection, root: int) -> Mapping[str, Any]:
        """The settings of the model that a trie is of, if it is one of the session's."""
        digest = roots.model_of_root(conn, root)["digest"].hex()
        return identified(self._row.settings, digest) or self.settings


def _file(file: str | Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A file to write a conversation to, whole or not at all; one that is open already as it is."""
    from kvloom.files import written_whole

    return written_whole(Path(file)) if isinstance(file, str | Path) else nullcontext(file)
