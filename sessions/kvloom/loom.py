"""An open store with a model: where conversations are made and found."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from kvloom.errors import Closed, EngineError, NothingToDo, RefExists
from kvloom.session import Session
from kvloom_proto.codecs import AUTO, SETTINGS
from kvloom_proto.errors import UnknownCodec
from kvloom_store import journal, names, refs, turns
from kvloom_store.database import Database, default_path

if TYPE_CHECKING:
    from transformers import DynamicCache

    from kvloom.diff import Diff
    from kvloom.engine import TransformersEngine
    from kvloom.identity import ModelIdentity
    from kvloom.known_model import KnownModel
    from kvloom.models import Progress
    from kvloom.prefetch import Prefetch
    from kvloom.resume import Resumer
    from kvloom_store.bundle_in import Imported
    from kvloom_store.erase import Erased
    from kvloom_store.fsck import Report
    from kvloom_store.gc import Collected
    from kvloom_store.journal import Kept
    from kvloom_store.quota import Limits
    from kvloom_store.search import Hits
    from kvloom_store.writer import Writer

DEFAULT_CODEC = AUTO


class KVLoom:
    """An open store. Use it in a ``with`` block: closing it waits until all state is stored.

    The model is loaded when it is first needed, so listing and reading cost nothing.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: str | TransformersEngine | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        codec: str = DEFAULT_CODEC,
        keyframe_spacing: int | None = None,
        must_exist: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Open the store at ``path`` (default: ``KVLOOM_STORE``, else the platform's data folder).

        ``model`` is an alias, a folder, a .gguf file or a hub name, or an engine that holds a model already.
        ``device`` is where a model that is loaded runs: cpu, cuda, mps, or auto (an accelerator if there is one).
        ``codec`` is how new state is stored: raw, lz4, zstd, or auto (whichever is worth it).
        ``keyframe_spacing``: of models that overwrite state in place (recurrent, SSM, convolution), a copy is kept at
        least every so many tokens (default 256): a restore at any token runs at most so many again.

        Raises:
            UnknownCodec
            NotAStore, SchemaTooNew, StoreUnavailable, StoreLocked
        """
        if codec not in SETTINGS:
            raise UnknownCodec(codec)
        self.database = Database(Path(path) if path is not None else default_path(), must_exist=must_exist)
        self._codec = codec
        self._model = model
        self._dtype = dtype
        self._device = device
        self._keyframe_spacing = keyframe_spacing
        self._progress = progress
        self._prefetch: Prefetch | None = None
        self._known: dict[tuple[str, str], KnownModel] = {}
        self._closed = False
        self._root: tuple[bytes, int] | None = None
        self.kept: list[Kept] = []
        """Replies whose processes died while they were generated, kept as interrupted turns since this was opened."""
        self.keep_unfinished()

    def keep_unfinished(self) -> None:
        """Make interrupted turns of replies that dead processes left; what was made is added to ``kept``."""
        self.kept += journal.recover(self.database)

    @cached_property
    def engine(self) -> TransformersEngine:
        """The model, loaded now if it was not before. Raises EngineError and its kinds."""
        if self._closed:
            raise Closed("this store is closed")
        if self._model is None:
            raise EngineError("no model was given", hint='open the store with one: kvloom.open(model="smollm2")')
        if not isinstance(self._model, str):
            return self._model
        return load_engine(
            self._model,
            dtype=self._dtype,
            device=self._device,
            keyframe_spacing=self._keyframe_spacing,
            progress=self._progress,
        )

    @property
    def has_engine(self) -> bool:
        """Whether the model is in memory already."""
        return "engine" in self.__dict__ or not isinstance(self._model, str | None)

    @property
    def has_model(self) -> bool:
        """Whether the store was opened with a model, loaded or not."""
        return self._model is not None

    def known_model(self, settings: Mapping[str, Any]) -> KnownModel:
        """The model, as far as it is known without its weights; of a store opened without one, a session's own.

        Raises ModelNotFound, EngineError and its other kinds.
        """
        from kvloom import binding, known_model

        if not binding.is_bound(settings):
            raise NothingToDo("this session is text alone, and has met no model yet", hint="kvloom say goes on with it")
        if self.has_engine:
            return known_model.of_engine(self.engine)
        name, dtype = (self._model, self._dtype) if self._model is not None else (settings["model"], settings["dtype"])
        assert isinstance(name, str)  # else there is an engine
        if (name, dtype) not in self._known:
            self._known[name, dtype] = known_model.of_name(name, dtype)
        return self._known[name, dtype]

    @cached_property
    def writer(self) -> Writer:
        """What stores state behind the conversation."""
        from kvloom_store.writer import Writer

        return Writer(self.database, codec_name=self._codec)

    @property
    def root(self) -> int:
        """The row of this model's trie, as the model was when ``follow`` last looked."""
        if self._root is None:
            self.follow(self.engine.identity())
        assert self._root is not None
        return self._root[1]

    def follow(self, identity: ModelIdentity) -> None:
        """Take the trie of the model as it is now: adapters may have been switched since the last use."""
        from kvloom_store import roots, segments

        if self._root is not None and self._root[0] == identity.digest:
            return
        with self.database.write() as conn:
            segments.sweep(conn)
            model = roots.add_model(conn, identity.digest, self.engine.name, identity.fields)
            roots.link_digest(conn, "tokenizer", bytes.fromhex(identity.tokenizer), model)
            self._root = identity.digest, roots.root_for(conn, model)
        if "resumer" in self.__dict__:  # what it holds is state of the model that was
            self.resumer.forget()
            self.resumer.root = self._root[1]

    @cached_property
    def resumer(self) -> Resumer:
        """What brings state back."""
        from kvloom.resume import Resumer

        resumer = Resumer(self.engine, self.database, self.writer, self.root)
        if self._prefetch is not None:
            resumer.adopt(self._prefetch)
        return resumer

    def prefetch(self, session: Session, branch: str) -> None:
        """Begin to read a branch's state, if the model is still to be loaded: it is there when the model is."""
        from kvloom.prefetch import Prefetch

        to_load = isinstance(self._model, str) and "engine" not in self.__dict__
        if to_load and self._device == "cpu" and self._prefetch is None:
            digest = bytes.fromhex(session.settings["model_digest"])
            self._prefetch = Prefetch(self.database, session.name, branch, digest)

    def session(
        self,
        name: str,
        *,
        system: str | None = None,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Session:
        """The session of that name, made if there is none (which needs the model).

        ``system`` is the system prompt of a new session; template, its options and its clock are fixed then.
        ``chat_template`` is Jinja text, or the name of one of several templates that the model brings.

        Raises:
            RefExists: the session is there and has another system prompt, or another template or options for it.
            SessionError: the template is not valid Jinja, or larger than 1 MiB.
        """
        from kvloom import binding

        with self.database.read() as conn:
            found = refs.find_session(conn, name)
        if found is None:
            return self._create(name, system, chat_template, template_options)
        session = Session(self, found)
        if system is not None:
            first = next(iter(session.tree()), None)
            if first is None or first.role != "system" or first.text != system:
                raise RefExists("session with another system prompt", name)
        if not binding.is_bound(session.settings):
            if chat_template is not None or template_options is not None:
                binding.bind(session, chat_template, template_options)
        elif self._template_differs(session, chat_template, template_options):
            raise RefExists("session with another chat template", name)
        return session

    def find(self, name: str) -> Session:
        """The session of that name. Raises RefNotFound with the nearest names."""
        with self.database.read() as conn:
            return Session(self, refs.get_session(conn, name))

    def sessions(self) -> list[Session]:
        """Every session, the one used last first."""
        with self.database.read() as conn:
            return [Session(self, row) for row in refs.sessions(conn)]

    def resolve(self, ref: names.Ref) -> refs.Point:
        """What a ref points at. Raises RefNotFound with the nearest names."""
        with self.database.read() as conn:
            return refs.resolve(conn, ref)

    def diff(self, a: str, b: str) -> Diff:
        """Where the paths to two refs part (``"trip@main"``, ``"trip:90"``, of one session or of two), and both sides.

        Raises InvalidName, RefNotFound.
        """
        from kvloom import diff

        return diff.between(self, names.parse_ref(a), names.parse_ref(b))

    def search(
        self,
        text: str,
        *,
        session: str | None = None,
        role: str | None = None,
        limit: int = 20,
        newest: bool = False,
        raw: bool = False,
        rebuild: bool = False,
    ) -> Hits:
        """Turns that hold all words of ``text``, those between quotation marks in this order; the best first, or the
        newest.

        ``raw`` takes it for FTS5's query syntax; ``rebuild`` builds the index anew before. Raises InvalidQuery,
        RefNotFound, StoreUnavailable.
        """
        from kvloom_store import search

        if rebuild:
            search.rebuild(self.database)
        return search.search(self.database, text, session=session, role=role, limit=limit, newest=newest, raw=raw)

    def fsck(self, *, quick: bool = False, progress: Callable[[int, int], None] | None = None) -> Report:
        """Check everything in the store; nothing is changed. ``quick`` does not read stored state.

        ``progress`` is told the bytes of state that were read, and those there are.
        """
        from kvloom_store import fsck

        self.flush()
        return fsck.check(self.database, blobs=not quick, progress=progress)

    def repair(self, *, told: Callable[[str], None] = lambda _: None) -> Report:
        """Repair what a check finds, computing state again with this model; what a check finds then.

        ``told`` hears what was done, a line each. Raises StoreError, EngineError and their kinds.
        """
        from kvloom.repair import repair_all

        return repair_all(self, told=told)

    def import_bundle(
        self,
        file: BinaryIO,
        name: str | None = None,
        *,
        text_only: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Imported:
        """Read a conversation that ``Session.export`` wrote, as session ``name`` (default: its own name).

        What is here already is reused, and a bundle may be read again; whatever goes wrong, nothing has changed.
        ``text_only`` leaves its state out: it is computed again when it is needed. ``progress`` is told the bytes read,
        twice over.

        Raises:
            FormatError: it is not a bundle, or not whole; with the field, and the byte its record begins at.
            AnotherSession: there is a session of that name, and it is another conversation.
        """
        from kvloom import bundles

        return bundles.read(self, file, name, text_only=text_only, progress=progress)

    def import_messages(self, name: str, branches: Mapping[str, Sequence[Mapping[str, Any]]]) -> Imported:
        """Take in text: by branch, a list of messages (OpenAI's form). No model is needed before it is gone on with.

        Messages with which several branches begin are one turn each; what is in session ``name`` already is reused.

        Raises:
            InvalidText: no messages, or some that are not text.
            AnotherSession: there is a session of that name, and it begins otherwise.
        """
        from kvloom import transcripts

        return transcripts.take_in(self, name, branches)

    def remove(self, name: str, *, erase: bool = False) -> Erased:
        """Take a session away, with the state that no other one shares.

        ``erase``: for good. Nothing of its text, tokens and state stays in the file; where another session begins
        alike, its state may have to be computed anew.

        Raises RefNotFound; with ``erase`` StoreLocked, StoreUnavailable: it is taken away, and may be in the file yet.
        """
        from kvloom import removing

        return removing.session(self, name, erase=erase)

    def remove_branch(self, session: str, branch: str, *, erase: bool = False) -> Erased:
        """Take a branch away, with the turns that no other branch and no tag leads to, and all below them.

        ``erase`` is as in ``remove``. Raises RefNotFound, NothingToDo (it is the session's only one), and what
        ``remove`` raises.
        """
        from kvloom import removing

        return removing.branch(self, session, branch, erase=erase)

    def scrub(self) -> None:
        """Write the file anew: nothing is left in it of what was deleted. Raises StoreLocked, StoreUnavailable."""
        from kvloom import removing

        removing.scrub(self)

    def gc(
        self,
        max_bytes: int | None = None,
        *,
        keep_branches: bool = False,
        dry_run: bool = False,
        agree: Callable[[Collected], bool] | None = None,
        cancel: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Collected:
        """Drop state until at most ``max_bytes`` of it are left; what was said stays, and can be gone on with.

        What is worth least goes first: seconds that it saves for each byte, as measured here. None: the store's quota,
        or, if it has none, only what no turn reaches. Pinned state stays; with ``keep_branches`` all that branches and
        tags lead to. ``dry_run`` only tells; ``agree`` is told the same before anything goes, and may say no. Stopped
        by ``cancel``, it has dropped a part. ``progress`` is called with bytes dropped so far, and in all.

        Raises StoreUnavailable, StoreLocked.
        """
        from kvloom_store import gc, quota

        self.flush()
        if max_bytes is None:
            with self.database.read() as conn:
                max_bytes = quota.read(conn).max_state
        return gc.collect(
            self.database,
            max_bytes,
            keep_named=keep_branches,
            dry_run=dry_run,
            agree=agree,
            cancelled=cancel.is_set if cancel is not None else None,
            progress=progress,
        )

    def quota(self) -> Limits:
        """How much room state may take in this store."""
        from kvloom_store import quota

        with self.database.read() as conn:
            return quota.read(conn)

    def set_quota(self, limits: Limits) -> None:
        """Set how much room state may take: it is kept with the store, and looked at whenever state is written."""
        from kvloom_store import quota

        with self.database.write() as conn:
            quota.put(conn, limits)

    def lookup(self, ids: Sequence[int]) -> tuple[DynamicCache, int]:
        """A transformers cache that holds the longest stored prefix of ``ids``, and its length; see ``kvloom.loop``."""
        from kvloom import loop

        return loop.lookup(self, ids)

    def capture(self, ids: Sequence[int], cache: DynamicCache) -> int:
        """Store the state a transformers cache holds for the first tokens of ``ids``; see ``kvloom.loop``."""
        from kvloom import loop

        return loop.capture(self, ids, cache)

    def _create(self, name: str, system: str | None, source: str | None, options: Mapping[str, Any] | None) -> Session:
        from kvloom import binding, template_file
        from kvloom.plaintext import check_unicode

        names.check_name("session", name)
        check_unicode(system or "")
        if source is not None:
            template_file.check(source)  # before the model is loaded, which takes seconds
        settings = binding.settings_of(self, source, options)
        with self.database.write() as conn:
            row = refs.create_session(conn, name, settings)
            if system:
                turn = turns.add_turn(conn, row.row, None, {"role": "system", "content": system})
                main = refs.branches(conn, row.row)[0]
                refs.move_branch(conn, main.row, None, turn.row)
        return Session(self, row)

    def _template_differs(self, session: Session, source: str | None, options: Mapping[str, Any] | None) -> bool:
        from kvloom.template import ChatTemplate

        fixed = session.settings
        if source is None and options is None:
            return False
        if source is not None and "{" not in source:  # no Jinja: the name of one of the model's templates
            source = ChatTemplate.of(self.engine.tokenizer, source=source).source
        given = ChatTemplate(
            fixed["chat_template"] if source is None else source,
            fixed["template_options"] if options is None else options,
            fixed["clock"],
        )
        return given.digest != str(fixed["template_digest"])

    def notices(self) -> list[str]:
        """What the user should be told of what was written behind, and was not told with a reply yet."""
        return self.writer.notices() if "writer" in self.__dict__ else []

    def flush(self) -> None:
        """Wait until all state is stored. Raises StoreError if some could not be; the turns are safe."""
        if "writer" in self.__dict__:
            self.writer.flush()

    def close(self) -> None:
        """Store what is waiting and close the file. Raises what ``flush`` raises."""
        if self._closed:
            return
        self._closed = True
        try:
            if "writer" in self.__dict__:
                self.writer.close()
                self.database.checkpoint()
        finally:
            self.database.close()

    def __enter__(self) -> KVLoom:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_engine(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    keyframe_spacing: int | None = None,
    progress: Progress | None = None,
) -> TransformersEngine:
    """Find a model by alias, folder, .gguf file or hub name, and load it. Raises EngineError and its kinds."""
    from kvloom import models

    source = models.resolve(name)
    loaded = models.load(source, dtype=dtype, device=device, progress=progress)  # type: ignore[arg-type]
    from kvloom.engine import TransformersEngine
    from kvloom.passes import KEYFRAME_SPACING

    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, name=source.name, keyframe_spacing=keyframe_spacing or KEYFRAME_SPACING
    )
    if gc.isenabled():
        gc.collect()  # 0.2 to 0.3 s that are due after loading so much, and would fall into the first reply
    return engine


def open(path: str | Path | None = None, **options: Any) -> KVLoom:
    """Open a store; see ``KVLoom``."""
    return KVLoom(path, **options)
