"""A branch: where one path of a conversation has got to, and what can be done there."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvloom.errors import InvalidText, ModelMismatch, NothingToDo, RefNotFound
from kvloom.path import merged, path_to, tip_of
from kvloom.sampling import SamplingSettings
from kvloom_store import refs, trie
from kvloom_store.names import Ref
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    from kvloom.engine import Progress
    from kvloom.loom import KVLoom
    from kvloom.planned import PlannedBranch
    from kvloom.report import Reply
    from kvloom.run import Run, RunOptions
    from kvloom.session import Session, TreeTurn
    from kvloom.template import ChatTemplate


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

    def say(self, text: str, **options: Any) -> Reply:
        """Say something and wait for the whole reply: a ``Reply``. Takes what ``stream`` takes."""
        return self.stream(text, **options).reply

    def stream(
        self,
        text: str,
        settings: SamplingSettings | None = None,
        *,
        reuse: bool = True,
        require_reuse: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Say something; iterate over the result for the pieces of the reply, then read its ``reply``.

        ``sampling`` are fields of SamplingSettings (max_tokens, temperature, seed, stop ...), in place of
        ``settings``. ``reuse=False`` loads no stored state. ``cancel`` is a threading.Event that ends the
        reply; what was said so far is kept as an interrupted turn. Under the default template, for models that
        bring none, ``stop`` is ``kvloom.template.DEFAULT_STOP`` unless it is given (``stop=()``: nowhere).

        Raises:
            InvalidText, ModelMismatch, ContextOverflow, ReuseRequired; nothing is stored then.
        """
        from kvloom.template import extend

        if not text.strip():
            raise InvalidText("there is nothing to say", hint="give some text")
        check_unicode(text)
        path, states = self._path()
        template = self.session_template()
        parent, tip = tip_of(path, states)
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
        return self._run(parent, tip, prompt.ids, prompt.kept, message, self._chosen(settings, sampling), options)

    def continue_reply(
        self,
        settings: SamplingSettings | None = None,
        *,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Take an interrupted reply (or one that met its limit) up where it stopped; the text is the new part.

        Raises:
            NothingToDo: the reply is complete, or nothing was said yet.
        """
        path, states = self._path()
        parent, tip = tip_of(path, states)
        if parent is None or tip is None:
            raise NothingToDo("nothing was said on this branch yet", hint="kvloom say SESSION TEXT")
        ended = bool(tip.tokens) and tip.tokens[-1] in self._loom.engine.eos_ids
        if parent.role == "assistant" and (ended or self._ended_by_default(parent)):
            raise NothingToDo("the reply is complete", hint="kvloom say goes on, kvloom regenerate tries again")
        options = self._options(True, False, cancel, progress)
        continues = parent.role == "assistant"
        return self._go_on(parent, tip, self._chosen(settings, sampling), options, continues=continues)

    def regenerate(
        self,
        settings: SamplingSettings | None = None,
        *,
        cancel: threading.Event | None = None,
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
        parent, tip = tip_of(path, states)
        if parent is None or tip is None or parent.role == "system":
            raise NothingToDo("there is no reply to regenerate", hint="kvloom say SESSION TEXT")
        return self._go_on(
            parent, tip, self._chosen(settings, sampling), self._options(True, False, cancel, progress), continues=False
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

    def edit(self, text: str, back: int = 0, *, branch: str | None = None, replay_turns: bool = False) -> PlannedBranch:
        """Plan a new branch that says ``text`` so many turns back, in place of what is said there: ``Session.edit``."""
        at = f"{self.name}~{back}" if back else self.name
        return self.session.edit(at, text, branch=branch, replay_turns=replay_turns)

    def log(self) -> list[TreeTurn]:
        """The turns from the first one down to this branch."""
        return self.session.log(self.name)

    def session_template(self) -> ChatTemplate:
        """The session's own chat template, with the options and the clock it began with."""
        return self.session.template()

    def _path(self) -> tuple[list[Turn], dict[int, TurnState]]:
        """The turns down to the branch as it stands now, and what this model made of them."""
        self._loom.prefetch(self.session.name, self.name)
        check_model(self.session.settings, self._loom)
        root = self._loom.root
        with self._loom.database.read() as conn:
            point = refs.resolve(conn, Ref(self.session.name, self.name, 0))
            if point.branch is None:
                raise RefNotFound("branch", self.name)
            self._row = point.branch
            return path_to(conn, point.turn, root)

    def _chosen(self, settings: SamplingSettings | None, sampling: Mapping[str, Any]) -> SamplingSettings:
        """What was asked for; under the default template a reply stops where the user would speak next."""
        from kvloom.template import DEFAULT_STOP

        chosen = _settings(settings, sampling)
        given = "stop" in sampling or bool(chosen.stop)
        return chosen if given or not self.session_template().is_default else replace(chosen, stop=DEFAULT_STOP)

    def _ended_by_default(self, reply: Turn) -> bool:
        """Whether a reply ended as those under the default template do, which no token ends."""
        from kvloom.template import DEFAULT_STOP

        stops = tuple(reply.settings.get("stop", ()))
        return reply.finish_reason == "stop" and stops == DEFAULT_STOP and self.session_template().is_default

    def _options(
        self, reuse: bool, require_reuse: bool, cancel: threading.Event | None, progress: Progress | None
    ) -> RunOptions:
        from kvloom.run import RunOptions

        return RunOptions(reuse, require_reuse, cancel, progress)

    def _go_on(
        self, parent: Turn, tip: TurnState, settings: SamplingSettings, options: RunOptions, *, continues: bool
    ) -> Run:
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
        options: RunOptions,
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


def _settings(settings: SamplingSettings | None, sampling: Mapping[str, Any]) -> SamplingSettings:
    plain = {**(settings.to_plain() if settings else {}), **sampling}
    if isinstance(plain.get("stop"), (list, tuple)):
        plain["stop"] = list(plain["stop"])
    return SamplingSettings.from_plain(plain)
