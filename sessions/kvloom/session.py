"""Conversations: a session is a tree of turns, a branch is where one of its paths has got to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvloom.errors import InvalidText, ModelMismatch, NothingToDo, RefNotFound
from kvloom.sampling import SamplingSettings
from kvloom_store import refs, trie, turns
from kvloom_store.names import MAIN, Ref, parse_ref
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.refs import SessionRow
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    from kvloom.engine import Progress
    from kvloom.loom import KVLoom
    from kvloom.run import Run
    from kvloom.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class TreeTurn:
    """A turn as ``log`` and ``tree`` show it; ``branches`` and ``tags`` are the names that point at it."""

    id: str
    parent: str | None
    role: str
    text: str
    finish_reason: str | None
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    tokens: int
    score: float | None
    continues: bool
    created: int

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


class Session:
    """One conversation tree. Made by ``KVLoom.session``."""

    def __init__(self, loom: KVLoom, row: SessionRow) -> None:
        self._loom = loom
        self._row = row

    @property
    def name(self) -> str:
        """The session's name."""
        return self._row.name

    @property
    def row(self) -> SessionRow:
        """The session as the store has it."""
        return self._row

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was fixed when the session began: model, dtype, chat template, its options and clock."""
        return self._row.settings

    def branch(self, name: str = MAIN) -> Branch:
        """A branch by name. Raises RefNotFound."""
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, Ref(self.name, name, 0))
        if point.branch is None:
            raise RefNotFound("branch", name, [b.name for b in self.branches()])
        return Branch(self._loom, self, point.branch)

    def branches(self) -> list[Branch]:
        """Every branch, oldest first."""
        with self._loom.database.read() as conn:
            return [Branch(self._loom, self, row) for row in refs.branches(conn, self._row.row)]

    def fork(self, name: str, at: str | None = None) -> Branch:
        """A new branch at a ref (``"main~2"``, a turn id, a tag; None: main): one row, and no state.

        Raises:
            RefExists, RefNotFound, InvalidName
        """
        ref = self._ref(at)
        with self._loom.database.write() as conn:
            row = refs.add_branch(conn, self._row.row, name, refs.resolve(conn, ref).turn)
        return Branch(self._loom, self, row)

    def checkout(self, at: str) -> Branch:
        """The branch at a ref; a new one, named after main, where the ref is not a branch."""
        point = self._resolve(at)
        if point.branch is not None:
            return Branch(self._loom, self, point.branch)
        with self._loom.database.write() as conn:
            name = refs.free_name(conn, self._row.row, MAIN)
            return Branch(self._loom, self, refs.add_branch(conn, self._row.row, name, point.turn))

    def tag(self, name: str, at: str | None = None) -> None:
        """A name that stays at a turn. Raises RefExists, RefNotFound, NothingToDo."""
        point = self._resolve(at)
        if point.turn is None:
            raise NothingToDo("there is no turn to tag yet")
        with self._loom.database.write() as conn:
            refs.add_tag(conn, self._row.row, name, point.turn)

    def tree(self) -> list[TreeTurn]:
        """Every turn, oldest first: parents come before their children."""
        with self._loom.database.read() as conn:
            return self._described(conn, turns.of_session(conn, self._row.row))

    def log(self, at: str | None = None) -> list[TreeTurn]:
        """The turns from the first one down to a ref."""
        point = self._resolve(at)
        with self._loom.database.read() as conn:
            return self._described(conn, turns.path_to(conn, point.turn))

    def rename(self, name: str) -> None:
        """Give the session another name. Raises RefExists, InvalidName."""
        with self._loom.database.write() as conn:
            self._row = refs.rename_session(conn, self.name, name)

    def _ref(self, at: str | None) -> Ref:
        return parse_ref(f"{self.name}@{at}" if at else self.name)

    def _resolve(self, at: str | None) -> refs.Point:
        ref = self._ref(at)
        with self._loom.database.read() as conn:
            return refs.resolve(conn, ref)

    def _described(self, conn: Any, shown: Sequence[Turn]) -> list[TreeTurn]:
        ids = {turn.row: turn.id for turn in shown}
        lengths: dict[int, int] = {}
        for row, start, end in turns.token_counts(conn, self._row.row):
            lengths.setdefault(row, end - start)
        pointing: dict[int, list[str]] = {}
        for branch in refs.branches(conn, self._row.row):
            if branch.turn is not None:
                pointing.setdefault(branch.turn, []).append(branch.name)
        tagged: dict[int, list[str]] = {}
        for name, at in refs.tags(conn, self._row.row).items():
            tagged.setdefault(at, []).append(name)
        return [
            TreeTurn(
                id=turn.id,
                parent=ids.get(turn.parent) if turn.parent is not None else None,
                role=turn.role,
                text=turn.text,
                finish_reason=turn.finish_reason,
                branches=tuple(pointing.get(turn.row, ())),
                tags=tuple(tagged.get(turn.row, ())),
                tokens=lengths.get(turn.row, 0),
                score=None,
                continues=turn.continues,
                created=turn.created,
            )
            for turn in shown
        ]


class Branch:
    """Where one path of a session has got to; saying something on it moves it on."""

    def __init__(self, loom: KVLoom, session: Session, row: BranchRow) -> None:
        self._loom = loom
        self._row = row
        self.session = session

    @property
    def name(self) -> str:
        """The branch's name."""
        return self._row.name

    @property
    def row(self) -> BranchRow:
        """The branch as the store had it when this object last looked."""
        return self._row

    def say(self, text: str, **options: Any) -> Any:
        """Say something and wait for the whole reply: a ``Reply``. Takes what ``stream`` takes."""
        return self.stream(text, **options).reply

    def stream(
        self,
        text: str,
        settings: SamplingSettings | None = None,
        *,
        reuse: bool = True,
        require_reuse: bool = False,
        cancel: Any = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Say something; iterate over the result for the pieces of the reply, then read its ``reply``.

        ``sampling`` are fields of SamplingSettings (max_tokens, temperature, seed, stop ...), in place of
        ``settings``. ``reuse=False`` loads no stored state. ``cancel`` is a threading.Event that ends the
        reply; what was said so far is kept as an interrupted turn.

        Raises:
            InvalidText, ModelMismatch, ContextOverflow, ReuseRequired; nothing is stored then.
        """
        from kvloom.template import extend

        if not text.strip():
            raise InvalidText("there is nothing to say", hint="give some text")
        check_unicode(text)
        path, states = self._path()
        template = self.session_template()
        parent, tip = _tip(path, states)
        history, reply_start = merged(path, states)
        message = {"role": "user", "content": text}
        with self._loom.database.read() as conn:
            parent_ids = trie.tokens_to(conn, tip.position.node, tip.position.offset) if tip else []
        prompt = extend(
            template,
            self._loom.engine.tokenizer,
            history,
            parent_ids,
            [message],
            reply_start=reply_start,
            eos_ids=self._loom.engine.eos_ids,
        )
        self._loom.engine.check_ids(prompt.ids)
        options = self._options(reuse, require_reuse, cancel, progress)
        return self._run(parent, tip, prompt.ids, prompt.kept, message, _settings(settings, sampling), options)

    def continue_reply(
        self,
        settings: SamplingSettings | None = None,
        *,
        cancel: Any = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Take an interrupted reply (or one that met its limit) up where it stopped; the text is the new part.

        Raises:
            NothingToDo: the reply is complete, or nothing was said yet.
        """
        path, states = self._path()
        parent, tip = _tip(path, states)
        if parent is None or tip is None:
            raise NothingToDo("nothing was said on this branch yet", hint="kvloom say SESSION TEXT")
        if tip.tokens and tip.tokens[-1] in self._loom.engine.eos_ids and parent.role == "assistant":
            raise NothingToDo("the reply is complete", hint="kvloom say goes on, kvloom regenerate tries again")
        options = self._options(True, False, cancel, progress)
        continues = parent.role == "assistant"
        return self._go_on(parent, tip, _settings(settings, sampling), options, continues=continues)

    def regenerate(
        self,
        settings: SamplingSettings | None = None,
        *,
        cancel: Any = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Another reply to the last message; the old one stays in the tree. No forward pass before the first token.

        Raises:
            NothingToDo: there is no message to reply to.
        """
        path, states = self._path()
        while path and path[-1].role == "assistant":
            path.pop()
        parent, tip = _tip(path, states)
        if parent is None or tip is None or parent.role == "system":
            raise NothingToDo("there is no reply to regenerate", hint="kvloom say SESSION TEXT")
        return self._go_on(
            parent, tip, _settings(settings, sampling), self._options(True, False, cancel, progress), continues=False
        )

    def undo(self) -> None:
        """Move the branch back to before the last message; the turns stay in the tree. Raises NothingToDo."""
        path, _ = self._path()
        while path and path[-1].role == "assistant":
            path.pop()
        if not path or path[-1].role == "system":
            raise NothingToDo("there is nothing to undo")
        self._move(path[-1].parent)

    def fork(self, name: str, back: int = 0) -> Branch:
        """A new branch here, or so many turns back."""
        return self.session.fork(name, f"{self.name}~{back}" if back else self.name)

    def log(self) -> list[TreeTurn]:
        """The turns from the first one down to this branch."""
        return self.session.log(self.name)

    def session_template(self) -> ChatTemplate:
        """The session's own chat template, with the options and the clock it began with."""
        from kvloom.template import ChatTemplate

        settings = self.session.settings
        return ChatTemplate(settings["chat_template"], settings["template_options"], settings["clock"])

    def _path(self) -> tuple[list[Turn], dict[int, TurnState]]:
        """The turns down to the branch as it stands now, and what this model made of them."""
        self._loom.prefetch(self.session.name, self.name)
        check_model(self.session.settings, self._loom)
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, Ref(self.session.name, self.name, 0))
            if point.branch is None:
                raise RefNotFound("branch", self.name)
            self._row = point.branch
            path = turns.path_to(conn, point.turn)
            states: dict[int, list[TurnState]] = {}
            for state in turns.states_of(conn, [turn.row for turn in path]):
                states.setdefault(state.turn, []).append(state)
        best = {row: turns.best_state(some, self._loom.root) for row, some in states.items()}
        return path, {row: state for row, state in best.items() if state is not None}

    def _options(self, reuse: bool, require_reuse: bool, cancel: Any, progress: Progress | None) -> Any:
        from kvloom.run import RunOptions

        return RunOptions(reuse, require_reuse, cancel, progress)

    def _go_on(self, parent: Turn, tip: TurnState, settings: SamplingSettings, options: Any, *, continues: bool) -> Run:
        with self._loom.database.read() as conn:
            ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
        self._loom.engine.check_ids(ids)
        return self._run(parent, tip, ids, len(ids), None, settings, options, continues=continues)

    def _run(
        self,
        parent: Turn | None,
        tip: TurnState | None,
        ids: Sequence[int],
        kept: int,
        message: Mapping[str, Any] | None,
        settings: SamplingSettings,
        options: Any,
        *,
        continues: bool = False,
    ) -> Run:
        from kvloom.run import Run

        return Run(
            self._loom,
            self._row,
            self.session.name,
            parent,
            tip,
            ids,
            kept,
            message,
            settings,
            options,
            continues=continues,
        )

    def _move(self, to: int | None) -> None:
        with self._loom.database.write() as conn:
            self._row = refs.move_branch(conn, self._row.row, self._row.turn, to)


def merged(path: Sequence[Turn], states: Mapping[int, TurnState]) -> tuple[list[dict[str, Any]], int | None]:
    """The messages of a path as the template is given them, and where the tokens of the last reply begin.

    A reply that was continued is one message, though it is several turns.
    """
    messages: list[dict[str, Any]] = []
    reply_start: int | None = None
    for turn in path:
        state = states.get(turn.row)
        if turn.continues and messages and messages[-1]["role"] == "assistant":
            # A reply stopped within a character ended in a stand-in for it, which the continuation replaces.
            earlier = messages[-1]["content"].removesuffix(turn.settings.get("reopened", ""))
            messages[-1] = {**messages[-1], "content": earlier + turn.text}
            continue
        messages.append(dict(turn.message))
        reply_start = state.start if state is not None and turn.role == "assistant" else None
    return messages, reply_start


def check_model(settings: Mapping[str, Any], loom: KVLoom) -> None:
    """Refuse to go on with a session under a model that is not its own.

    Raises:
        ModelMismatch: with the first field that differs.
    """
    from kvloom.identity import differences

    live = loom.engine.identity()
    found = differences(settings["model_fields"], live.fields)
    if found:
        # With another dtype the weights differ too; what the user can change is named.
        raise ModelMismatch(*next((row for row in found if row[0] == "dtype"), found[0]))
    if settings["tokenizer"] != live.tokenizer:
        raise ModelMismatch("tokenizer", settings["tokenizer"][:16], live.tokenizer[:16])


def check_unicode(text: str) -> None:
    """Refuse text that cannot be written as UTF-8 (lone surrogates from undecodable input). Raises InvalidText."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidText("the text is not valid UTF-8", hint="convert it first: iconv -t UTF-8") from error


def _tip(path: Sequence[Turn], states: Mapping[int, TurnState]) -> tuple[Turn | None, TurnState | None]:
    """The last turn, and the state to go on from: its own (a system turn has none: its tokens come with the next)."""
    return (path[-1], states.get(path[-1].row)) if path else (None, None)


def _settings(settings: SamplingSettings | None, sampling: Mapping[str, Any]) -> SamplingSettings:
    plain = {**(settings.to_plain() if settings else {}), **sampling}
    if isinstance(plain.get("stop"), (list, tuple)):
        plain["stop"] = list(plain["stop"])
    return SamplingSettings.from_plain(plain)
