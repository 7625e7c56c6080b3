"""A branch: where one path of a conversation has got to, and what can be done there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from kvloom.binding import check_model
from kvloom.choices import Choice, check_texts
from kvloom.errors import InvalidText, NothingToDo, RefNotFound, ReuseRequired, SessionError
from kvloom.path import merged, path_to, tip_of
from kvloom.plaintext import check_unicode
from kvloom.sampling import SamplingSettings, check_siblings
from kvloom_store import refs, trie, turns
from kvloom_store.names import Ref
from kvloom_store.refs import Branch as BranchRow
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.engine import Progress
    from kvloom.listing import TreeTurn
    from kvloom.loom import KVLoom
    from kvloom.planned import PlannedBranch
    from kvloom.report import Reply
    from kvloom.run import Run, RunOptions
    from kvloom.sample import Sample, SampleRun
    from kvloom.session import Session
    from kvloom.template import Prompt
    from kvloom.why import Why


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
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Say something; iterate over the result for the pieces of the reply, then read its ``reply``.

        ``sampling`` are fields of SamplingSettings (max_tokens, temperature, seed, stop ...), in place of
        ``settings``. ``reuse=False`` loads no stored state. State that was dropped is computed anew, and with
        ``exact=True`` run again just as it was first. ``cancel`` is a threading.Event that ends the
        reply; what was said so far is kept as an interrupted turn. Under the default template, for models that
        bring none, ``stop`` is ``kvloom.template.DEFAULT_STOP`` unless it is given (``stop=()``: nowhere).

        One reply is generated at a time: until it is read to its end, or closed, other threads that say something wait,
        and this one must not.

        Raises:
            InvalidText, ModelMismatch, ContextOverflow, ReuseRequired; nothing is stored then.
            SessionError: another reply of this store is being read in this thread; or the sampling is wrong.
        """
        options = self._options(reuse, require_reuse, cancel, progress, exact=exact)
        parent, tip, prompt, messages, options = self._prompt(text, options)
        return self._run(parent, tip, prompt.ids, prompt.kept, messages[-1], self._chosen(settings, sampling), options)

    def sample(
        self,
        text: str | None = None,
        *,
        n: int = 8,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[Sample]:
        """Several replies to one message, decoded together, each on a new branch; this one stays at the message.

        ``text`` is said first; without it they are other replies to the last message, or go on with a stopped reply.
        ``sampling`` as in ``stream``, with a temperature of 1 unless one is given: siblings of temperature 0 would all
        say the same. Each has a seed of its own, made from the one given.

        Raises:
            SessionError: ``n`` is not between 1 and 256.
            InvalidText, ModelMismatch, ContextOverflow, NothingToDo
        """
        return self.sampling(text, n=n, cancel=cancel, progress=progress, **sampling).finished()

    def sampling(
        self,
        text: str | None = None,
        *,
        n: int = 8,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        told: Callable[[int], None] | None = None,
        **sampling: Any,
    ) -> SampleRun:
        """The run behind ``sample``; ``told`` is called after each step with how many tokens were chosen in it."""
        from kvloom.sample import SampleRun

        check_siblings("n", n)
        settings = self._chosen(None, {"temperature": 1.0, **sampling})
        return self._several(text, settings, self._options(True, False, cancel, progress), partial(SampleRun, n, told))

    def beam(self, text: str | None = None, **options: Any) -> list[Sample]:
        """The likeliest replies, as a beam search finds them, best first, each on a new branch. See ``beaming``.

        They are those of transformers' ``generate(num_beams=width, num_return_sequences=width, do_sample=False)``, with
        its ``length_penalty`` and ``early_stopping``. The branch stays at the message, as in ``sample``.

        Raises:
            SessionError: a setting makes no sense, or the model's paths cannot be decoded together; nothing is stored.
            InvalidText, ModelMismatch, ContextOverflow, NothingToDo
        """
        return self.beaming(text, **options).finished()

    def beaming(
        self,
        text: str | None = None,
        *,
        width: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = True,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        told: Callable[[int], None] | None = None,
        **sampling: Any,
    ) -> SampleRun:
        """The run behind ``beam``. ``text`` and ``told`` are those of ``sampling``, which here is ``max_tokens`` and
        ``stop`` alone: a reply that says one of these texts has ended."""
        from kvloom.beam import BeamRun, BeamSettings

        search = BeamSettings(width, length_penalty, early_stopping)
        if others := sorted(set(sampling) - {"max_tokens", "stop"}):
            raise SessionError(f"a beam search does not sample: {others[0]} has no part in it", hint="leave it out")
        settings = self._chosen(None, sampling)
        search.check_for(self._loom.engine)
        options = self._options(True, False, cancel, progress)
        return self._several(text, settings, options, partial(BeamRun, search, told))

    def choose(
        self,
        text: str,
        choices: Sequence[str],
        *,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Choice:
        """Say something and have the likeliest of ``choices`` for a reply: a ``Choice`` tells how likely each one is.

        Each is scored as the beginning of a reply, nothing is sampled, and their order does not matter.

        Raises:
            InvalidText (a choice that is empty or there twice), ModelMismatch, ContextOverflow; nothing is stored then.
            SessionError: ``cancel`` was set; the message is kept.
        """
        choice = self.choosing(text, choices, cancel=cancel, progress=progress).reply.choice
        if choice is None:
            raise SessionError("interrupted before a choice was made; the message is kept", hint="undo it to ask again")
        return choice

    def choosing(
        self,
        text: str,
        choices: Sequence[str],
        *,
        reuse: bool = True,
        require_reuse: bool = False,
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Run:
        """The run behind ``choose``, as ``stream`` gives one; its ``reply`` has the ``choice``."""
        from kvloom.choosing import ChoiceRun, replies

        check_texts(choices)
        options = self._options(reuse, require_reuse, cancel, progress, exact=exact)
        parent, tip, prompt, messages, options = self._prompt(text, options)
        given = replies(self._loom.engine, self.session.template(), messages, prompt.ids, choices)
        settings = self._chosen(None, {})
        return self._run(
            parent, tip, prompt.ids, prompt.kept, messages[-1], settings, options, run=partial(ChoiceRun, given)
        )

    def score(
        self, texts: Sequence[str], *, cancel: threading.Event | None = None, progress: Progress | None = None
    ) -> Choice:
        """How likely each of some texts is to come next: as a reply to the last message, or as more of a stopped one.

        Nothing is said, and nothing stored.

        Raises:
            InvalidText, ModelMismatch, ContextOverflow
            NothingToDo: the reply is complete, or nothing was said yet.
        """
        from kvloom.choosing import more, replies, score_at

        check_texts(texts)
        path, states, _ = self._written(self._options(True, False, cancel, progress))
        parent, tip = self._unfinished(path, states)
        ids, engine = self._ids_to(tip), self._loom.engine
        if parent.role == "assistant":
            given = more(engine, ids, texts)
        else:
            given = replies(engine, self.session.template(), merged(path, states)[0], ids, texts)
        return score_at(self._loom, ids, tip, given, cancel, progress)

    def continue_reply(
        self,
        settings: SamplingSettings | None = None,
        *,
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Take an interrupted reply (or one that met its limit) up where it stopped; the text is the new part.

        ``exact`` is as in ``stream``.

        Raises:
            NothingToDo: the reply is complete, or nothing was said yet.
        """
        path, states, options = self._written(self._options(True, False, cancel, progress, exact=exact))
        parent, tip = self._unfinished(path, states)
        continues = parent.role == "assistant"
        return self._go_on(parent, tip, self._chosen(settings, sampling), options, continues=continues)

    def regenerate(
        self,
        settings: SamplingSettings | None = None,
        *,
        exact: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Run:
        """Another reply to the last message; the old one stays in the tree. No forward pass before the first token.

        ``exact`` is as in ``stream``.

        Raises:
            NothingToDo: there is no message to reply to.
        """
        path, states, options = self._written(self._options(True, False, cancel, progress, exact=exact))
        while path and path[-1].role == "assistant":
            path.pop()
        parent, tip = tip_of(path, states)
        if parent is None or tip is None or parent.role == "system":
            raise NothingToDo("there is no reply to regenerate", hint="kvloom say SESSION TEXT")
        return self._go_on(parent, tip, self._chosen(settings, sampling), options, continues=False)

    def undo(self) -> None:
        """Move the branch back to before the last message; the turns stay in the tree. Raises NothingToDo."""
        path, _ = self._path()
        while path and path[-1].role == "assistant":
            path.pop()
        if not path or path[-1].role == "system":
            raise NothingToDo("there is nothing to undo")
        self._move(path[-1].parent)

    def move_to(self, at: str, *, keep: bool = False) -> str | None:
        """Let the branch point where a ref of its session does; the turns it leaves stay in the tree.

        ``keep``: where no other name would lead to its old tip, a new branch does; returned is what that is called.

        Raises:
            RefNotFound
        """
        with self._loom.database.write() as conn:
            row = self.session.resolve(conn, Ref(self.session.name, self.name, 0)).branch
            if row is None:
                raise RefNotFound("branch", self.name)
            to = self.session.resolve(conn, self.session.ref(at)).turn
            kept = _keep(conn, row, to) if keep else None
            self._row = refs.move_branch(conn, row.row, row.turn, to)
        return kept

    def fork(self, name: str, back: int = 0) -> Branch:
        """A new branch here, or so many turns back."""
        return self.session.fork(name, f"{self.name}~{back}" if back else self.name)

    def edit(self, text: str, back: int = 0, *, branch: str | None = None, replay_turns: bool = False) -> PlannedBranch:
        """Plan a new branch that says ``text`` so many turns back, in place of what is said there: ``Session.edit``."""
        at = f"{self.name}~{back}" if back else self.name
        return self.session.edit(at, text, branch=branch, replay_turns=replay_turns)

    def why(self, text: str) -> Why:
        """What saying a text here would reuse, and why not more; the model's weights are not loaded.

        Raises:
            InvalidText, SessionError
            ModelNotFound: the model, whose tokenizer is needed, is not here.
        """
        from kvloom import foresee

        return foresee.of_text(self.session, Ref(self.session.name, self.name, 0), text)

    def log(self) -> list[TreeTurn]:
        """The turns from the first one down to this branch."""
        return self.session.log(self.name)

    def _path(self) -> tuple[list[Turn], dict[int, TurnState]]:
        """The turns down to the branch as it stands now, and what this model made of them."""
        self._loom.keep_unfinished()
        self._loom.prefetch(self.session, self.name)
        check_model(self.session)
        root = self._loom.root
        with self._loom.database.read() as conn:
            point = self.session.resolve(conn, Ref(self.session.name, self.name, 0))
            if point.branch is None:
                raise RefNotFound("branch", self.name)
            self._row = point.branch
            return path_to(conn, point.turn, root)

    def _written(self, options: RunOptions) -> tuple[list[Turn], dict[int, TurnState], RunOptions]:
        """The path, whose last turn has tokens and state under this model: where it was imported, or said under another
        one, its turns are run first, which the options then tell of.

        Raises:
            ReuseRequired: that would have to be run, and nothing is to be.
            SessionError: it was stopped; what was computed is kept.
        """
        path, states = self._path()
        if not path or path[-1].role == "system" or path[-1].row in states:
            return path, states, options
        if options.require_reuse:
            held = max((state.state_end for state in states.values()), default=0)
            raise ReuseRequired(held, held + self.session.missing(self.name).cost.to_run)
        before = self.session.warm(self.name, cancel=options.cancel, progress=options.progress)
        if options.cancel is not None and options.cancel.is_set():
            hint = "the same command goes on with it"
            raise SessionError("stopped while the model was reading what had been said; nothing was said", hint=hint)
        return *self._path(), replace(options, before=before)

    def _prompt(
        self, text: str, options: RunOptions
    ) -> tuple[Turn | None, TurnState | None, Prompt, list[dict[str, Any]], RunOptions]:
        """Where a text is said, what the model is to see, and the messages up to it. Raises what ``stream`` does."""
        from kvloom.template import extend

        if not text.strip():
            raise InvalidText("there is nothing to say", hint="give some text")
        check_unicode(text)
        path, states = self._path()
        if (
            len(self.session.models) > 1
        ):  # else a path without state is text that was imported, and is written as a whole
            path, states, options = self._written(options)
        parent, tip = tip_of(path, states)
        history, reply_start = merged(path, states)
        message = {"role": "user", "content": text}
        engine = self._loom.engine
        prompt = extend(
            self.session.template(),
            engine.tokenizer,
            history,
            self._ids_to(tip) if tip else [],
            [message],
            reply_start=reply_start,
            eos_ids=engine.eos_ids,
        )
        engine.check_ids(prompt.ids)
        return parent, tip, prompt, [*history, message], options

    def _unfinished(self, path: Sequence[Turn], states: Mapping[int, TurnState]) -> tuple[Turn, TurnState]:
        """The last turn and its state, if something can follow it that is not a message. Raises NothingToDo."""
        parent, tip = tip_of(path, states)
        if parent is None or tip is None:
            raise NothingToDo("nothing was said on this branch yet", hint="kvloom say SESSION TEXT")
        if self._is_complete(parent, tip):
            raise NothingToDo("the reply is complete", hint="kvloom say goes on, kvloom regenerate tries again")
        return parent, tip

    def _is_complete(self, turn: Turn | None, state: TurnState | None) -> bool:
        """Whether a turn is a reply that has ended."""
        if turn is None or state is None or turn.role != "assistant":
            return False
        ended = bool(state.tokens) and state.tokens[-1] in self._loom.engine.eos_ids
        return ended or self._ended_by_default(turn)

    def _ids_to(self, tip: TurnState) -> list[int]:
        """The tokens of the path that ends with a turn's state."""
        with self._loom.database.read() as conn:
            return trie.tokens_to(conn, tip.position.node, tip.position.offset)

    def _chosen(self, settings: SamplingSettings | None, sampling: Mapping[str, Any]) -> SamplingSettings:
        """What was asked for; under the default template a reply stops where the user would speak next."""
        from kvloom.template import DEFAULT_STOP

        chosen = _settings(settings, sampling)
        given = "stop" in sampling or bool(chosen.stop)
        return chosen if given or not self.session.template().is_default else replace(chosen, stop=DEFAULT_STOP)

    def _ended_by_default(self, reply: Turn) -> bool:
        """Whether a reply ended as those under the default template do, which no token ends."""
        from kvloom.template import DEFAULT_STOP

        stops = tuple(reply.settings.get("stop", ()))
        return reply.finish_reason == "stop" and stops == DEFAULT_STOP and self.session.template().is_default

    def _options(
        self,
        reuse: bool,
        require_reuse: bool,
        cancel: threading.Event | None,
        progress: Progress | None,
        *,
        exact: bool = False,
    ) -> RunOptions:
        from kvloom.run import RunOptions

        return RunOptions(reuse, require_reuse, exact, cancel, progress)

    def _go_on(
        self,
        parent: Turn,
        tip: TurnState,
        settings: SamplingSettings,
        options: RunOptions,
        *,
        continues: bool,
        run: Callable[..., Run] | None = None,
    ) -> Run:
        ids = self._ids_to(tip)
        self._loom.engine.check_ids(ids)
        return self._run(parent, tip, ids, len(ids), None, settings, options, continues=continues, run=run)

    def _several(
        self, text: str | None, settings: SamplingSettings, options: RunOptions, run: Callable[..., SampleRun]
    ) -> SampleRun:
        """A run that ends in several replies: to a text, to the last message, or going on with a stopped reply."""
        from kvloom.sample import SampleRun

        if text is not None:
            parent, tip, prompt, messages, options = self._prompt(text, options)
            made = self._run(parent, tip, prompt.ids, prompt.kept, messages[-1], settings, options, run=run)
        else:
            path, states, options = self._written(options)
            if self._is_complete(*tip_of(path, states)):
                while path and path[-1].role == "assistant":
                    path.pop()
            parent, tip = self._unfinished(path, states)
            made = self._go_on(parent, tip, settings, options, continues=parent.role == "assistant", run=run)
        assert isinstance(made, SampleRun)
        return made

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
        run: Callable[..., Run] | None = None,
    ) -> Run:
        from kvloom.run import Run

        return (run or Run)(
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


def _keep(conn: sa.Connection, branch: BranchRow, to: int | None) -> str | None:
    """Have a new branch lead to a branch's tip, if nothing else will when it has moved; what that one is called."""
    named = {each.turn for each in refs.branches(conn, branch.session) if each.row != branch.row}
    named |= {turn.row for turn in turns.path_to(conn, to)} | set(refs.tags(conn, branch.session).values())
    if branch.turn is None or branch.turn in named:
        return None
    return refs.add_branch(conn, branch.session, refs.free_name(conn, branch.session, branch.name), branch.turn).name


def _settings(settings: SamplingSettings | None, sampling: Mapping[str, Any]) -> SamplingSettings:
    plain = {**(settings.to_plain() if settings else {}), **sampling}
    if isinstance(plain.get("stop"), (list, tuple)):
        plain["stop"] = list(plain["stop"])
    return SamplingSettings.from_plain(plain)
