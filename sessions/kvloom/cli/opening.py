"""A store opened with the right model, at the right branch, and closed so that nothing is lost."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from kvloom.cli.common import F, Options, parse, reading, remember, warn_of_network_drive
from kvloom.cli.progress import Bars
from kvloom.cli.terminal import dim, warn
from kvloom.shown import clean

if TYPE_CHECKING:
    from kvloom.branch import Branch
    from kvloom.loom import KVLoom
    from kvloom.quiet import Progress
    from kvloom.session import Session
    from kvloom_store.names import Ref

PLAIN = (
    "this model brings no chat template: a plain User:/Assistant: format is used; --chat-template FILE gives another"
)


def model_options(command: F) -> F:
    """Which model runs, in what precision, and where."""
    devices, dtypes = click.Choice(["auto", "cpu", "cuda", "mps"]), click.Choice(["auto", "float32", "bfloat16"])
    command = click.option(
        "--device",
        type=devices,
        expose_value=False,
        callback=remember,
        help="Where it runs (default: your config).",
    )(command)
    command = click.option("--dtype", type=dtypes, help="Precision (default: the session's own, else your config).")(
        command
    )
    return click.option(
        "--model",
        metavar="NAME",
        help="An alias, a folder, a .gguf file or a hub name (default: the session's own, else your config).",
    )(command)


def new_session_options(command: F) -> F:
    """What a session is begun with, and keeps."""
    command = click.option(
        "--chat-template",
        metavar="FILE",
        help="The Jinja chat template of a new session (default: the model's own, else plain User:/Assistant: lines).",
    )(command)
    return click.option("--system", metavar="TEXT", help="The system prompt of a new session.")(command)


@dataclass
class Talk:
    """A conversation that is open, and where in it things are said.

    ``template`` says where the chat template of a session that was made here is from: the model, a file, or, as
    there is none, kvloom's default. "" for a session that was there.
    """

    loom: KVLoom
    session: Session
    branch: Branch
    progress: Bars
    note: str = ""
    template: Literal["", "model", "file", "default"] = ""


@contextmanager
def talking(
    options: Options,
    text: str,
    *,
    system: str | None = None,
    chat_template: str | None = None,
    create: bool = False,
    model: str | None = None,
    dtype: str | None = None,
) -> Iterator[Talk]:
    """Open the conversation a ref names, with the model it was made with.

    If it fails before anything was said, a session or branch that was made for it is taken away again.
    """
    ref, at = parse(text)
    known = _settings_of(options, ref, create=create)
    source = template_of(chat_template)
    warn_of_network_drive(options.path)
    bars = Bars()
    loom = open_loom(options, known, model, dtype, bars.stage, must_exist=not create, check=True)
    made: list[Branch | Session] = []
    try:
        _check_writable(loom)
        other = known is not None and model is not None
        if known is None or system or (source is not None and not other):
            session = loom.session(ref.session, system=system, chat_template=source)
        else:
            session = loom.find(ref.session)
        if known is None:
            made.append(session)
        use(session, model, dtype)
        branch, note = session.checkout(at) if at else session.branch(), ""
        if at and branch.name != at:
            made.append(branch)
            note = f"{text} is not a branch: this goes on as {session.name}@{branch.name}"
        if binding_of(known, model, dtype):
            loom.prefetch(session, branch.name)
        _load(loom, bars)
        if other:
            _add_model(session, source)
        talk = Talk(loom, session, branch, bars, note)
        if known is None:
            default = branch.session.template().is_default
            talk.template = "file" if source is not None else "default" if default else "model"
        if talk.template == "default" and not options.json:
            dim(PLAIN)
        yield talk
    except BaseException:
        bars.stop()
        _undo(loom, made)
        raise
    finally:
        bars.stop()
        close(loom)


@contextmanager
def with_model(
    options: Options, session: str, *, model: str | None = None, dtype: str | None = None, add: bool = True
) -> Iterator[tuple[Session, Bars]]:
    """A session that is there, opened with the model it was made with, or with the one that was asked for, which is
    ``add``ed to those that read it; on no branch."""
    known = _settings_of(options, parse(session)[0], create=False)
    warn_of_network_drive(options.path)
    bars = Bars()
    loom = open_loom(options, known, model, dtype, bars.stage, must_exist=True, check=True)
    try:
        _check_writable(loom)
        found = loom.find(session)
        use(found, model, dtype)
        _load(loom, bars)
        if model is not None and add:
            _add_model(found)
        yield found, bars
    finally:
        bars.stop()
        close(loom)


def use(session: Session, model: str | None, dtype: str | None) -> None:
    """Read a session as the model that was asked for does, if it has one of that name. Raises ModelMismatch."""
    found = binding_of(session.row.settings, model, dtype)
    if found:
        session.use(found)


def _add_model(session: Session, source: str | None = None) -> None:
    """Let a session be gone on with under the model that was asked for, and say so if it is a new one."""
    differing = session.add_model(source)
    if differing:
        name = session.loom.engine.name
        dim(
            f"{clean(session.name)} goes on under {clean(name)}, too ({', '.join(differing)}: not as of its own model):"
            " the state of what it reads is computed once, and kept beside the other"
        )


def _check_writable(loom: KVLoom) -> None:
    """Say now that the store cannot be written to, not after the model was loaded. Raises StoreUnavailable."""
    if loom.database.read_only:
        with loom.database.write():
            pass


def _load(loom: KVLoom, bars: Bars) -> None:
    _ = loom.engine
    # What was loaded need never be looked through, not even once (0.2 to 0.3 s): a command is short-lived.
    gc.freeze()
    gc.enable()
    bars.stop()


def template_of(file: str | None) -> str | None:
    """The chat template in a file, checked. Raises SessionError and its kinds."""
    if file is None:
        return None
    from kvloom import template_file

    try:
        path = Path(file).expanduser()
    except RuntimeError:  # ~nobody
        path = Path(file)
    return template_file.read(path)


def _settings_of(options: Options, ref: Ref, *, create: bool) -> dict[str, Any] | None:
    """What the session fixed when it began; None for one that is to be made. Raises RefNotFound for others."""
    from kvloom.errors import RefNotFound

    may_be_new = create and ref.point is None and not ref.back and ref.token is None
    if may_be_new and not options.path.exists():
        return None
    with reading(options) as reader:
        try:
            settings = dict(reader.find(ref.session).settings)
        except RefNotFound:
            if may_be_new:
                return None
            raise
        reader.resolve(ref)
        return settings


def open_loom(
    options: Options,
    known: Mapping[str, Any] | None,
    model: str | None,
    dtype: str | None,
    progress: Progress,
    *,
    must_exist: bool,
    check: bool = False,
) -> KVLoom:
    """The store, open with the model of a session's settings (``known``), which is loaded when it is first needed.

    ``check``: refuse now if the model is not here, before a store is made; one should leave nothing behind then.
    """
    from kvloom import config
    from kvloom.loom import KVLoom
    from kvloom.models import resolve

    chosen = config.load()
    settings = binding_of(known, model, dtype)
    own = settings.get("dtype")
    name = absolute(model or settings.get("model") or chosen.model)
    if check:
        resolve(name)
    return KVLoom(
        options.path,
        model=name,
        dtype=own or dtype or (known or {}).get("dtype") or chosen.dtype,
        device=options.device or chosen.device,
        codec=chosen.codec,
        keyframe_spacing=int(chosen.keyframe_spacing),
        must_exist=must_exist,
        progress=progress,
    )


def binding_of(known: Mapping[str, Any] | None, model: str | None, dtype: str | None) -> Mapping[str, Any]:
    """What a session with the settings ``known`` fixed of the model that was asked for, or of its own; {}: it has not
    met that one.

    Raises ModelMismatch: another dtype alone was asked for, which no model of the session has.
    """
    from kvloom import binding
    from kvloom.errors import ModelMismatch

    if not known:
        return {}
    name = absolute(model) if model else str(known["model"])
    found = binding.named(known, name, dtype)
    if found is None and model is None and known["dtype"]:
        hint = f"say --model {name}, too, to go on under it in another precision, and keep the state of both"
        error = ModelMismatch("dtype", str(known["dtype"]), str(dtype))
        error.hint = f"use the session's own, or {hint}"
        raise error
    return found or {}


def absolute(name: str) -> str:
    """A model that is a path, as one that is found from every folder: a session remembers it."""
    from kvloom.models import ALIASES

    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if name not in ALIASES and path.exists() else name
    except (OSError, RuntimeError):  # a name no file system takes, or ~nobody
        return name


def _undo(loom: KVLoom, made: list[Branch | Session]) -> None:
    """Take away what was made for a turn that never came."""
    from kvloom.errors import KVLoomError
    from kvloom.session import Session

    try:
        for each in reversed(made):
            if isinstance(each, Session):
                if all(turn.role == "system" for turn in each.tree()):
                    loom.remove(each.name)
                continue
            each.session.discard(each)
    except KVLoomError as error:
        warn(f"could not tidy up: {error}")


def close(loom: KVLoom) -> None:
    """Close a store; state that cannot be stored is worth a warning, no more."""
    from kvloom.errors import KVLoomError

    try:
        loom.close()
        for notice in loom.notices():
            warn(notice)
    except KVLoomError as error:
        warn(f"some state could not be stored ({error}); what was said is safe, and is computed again when needed")
