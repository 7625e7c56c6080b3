"""Which models a conversation is read by: its own, fixed when it begins (or, of text that was imported, when it is
first gone on with), and others that somebody has asked for by name.

Each is a *binding*: an identity, and the template and the tokenizer that turn messages into its tokens. What a model
makes of a turn stands in that model's own trie, so that bindings never meet there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kvloom.errors import ModelMismatch, RefExists, SessionError
from kvloom.identity import differences
from kvloom.template import ChatTemplate
from kvloom_store import refs

if TYPE_CHECKING:
    from kvloom.identity import ModelIdentity
    from kvloom.loom import KVLoom
    from kvloom.session import Session

OTHERS = "others"
"""The setting of a session that holds its further bindings, in the order in which they came."""

MOST_MODELS = 64
"""Models of one session."""

_DIGITS = 16
"""Hex digits of a tokenizer's digest that are shown."""


def settings_of(
    loom: KVLoom, source: str | None, options: Mapping[str, Any] | None, clock: str | None = None
) -> dict[str, Any]:
    """What a session fixes when it begins under the store's model: the model, the template, its options and clock."""
    identity = loom.engine.identity()
    template = ChatTemplate.of(loom.engine.tokenizer, source=source, options=options, clock=clock)
    return {
        "model": loom.engine.name,
        "model_digest": identity.digest.hex(),
        "model_fields": dict(identity.fields),
        "tokenizer": identity.tokenizer,
        "dtype": loom.engine.dtype,
        "chat_template": template.source,
        "template_digest": template.digest,
        "template_options": dict(template.options),
        "clock": template.clock,
    }


def unbound(clock: str | None = None) -> dict[str, Any]:
    """The settings of a session that is text alone, and has met no model yet."""
    return {
        "model": "",
        "model_digest": "",
        "model_fields": {},
        "tokenizer": "",
        "dtype": "",
        "chat_template": "",
        "template_digest": "",
        "template_options": {},
        "clock": clock or datetime.now().isoformat(timespec="seconds"),
    }


def is_bound(settings: Mapping[str, Any]) -> bool:
    """Whether a session with these settings belongs to a model."""
    return bool(settings["model_digest"])


def bind(session: Session, source: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Let a session that has met no model belong to the store's own from now on. Raises SessionError (the template)."""
    _remember(session, settings_of(session.loom, source, options, session.row.settings["clock"]))


def bindings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bindings of a session with these settings, its own first; of one that has met no model, that alone."""
    own = {name: value for name, value in settings.items() if name != OTHERS}
    return [own, *(dict(each) for each in settings.get(OTHERS, ()))]


def together(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a session with these bindings."""
    own, *others = found
    return {**own, OTHERS: list(others)} if others else dict(own)


def named(settings: Mapping[str, Any], model: str, dtype: str | None = None) -> dict[str, Any] | None:
    """The binding of a model of this name (and in this precision, if one is given), if there is one."""
    wanted = (each for each in bindings(settings) if each["model"] == model)
    return next((each for each in wanted if dtype in (None, "auto", each["dtype"])), None)


def identified(settings: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
    """The binding of the model with this digest (hex), if there is one."""
    return next((each for each in bindings(settings) if each["model_digest"] == digest), None)


def check_model(session: Session) -> None:
    """Let a session be used under the store's model, which must be one of its own; one that has none yet gets this one.
    Afterwards ``loom.root`` is the model's, and the session's ``settings`` are its binding.

    Raises:
        ModelMismatch: with the fields that differ.
    """
    engine = session.loom.engine
    live = engine.identity()
    if not is_bound(session.row.settings):
        bind(session)
        return session.loom.follow(live)
    found = [(each, _differing(each, live)) for each in bindings(session.row.settings)]
    mine, differing = min(found, key=lambda pair: len(pair[1]))
    if differing:
        raise ModelMismatch(*differing[0], also=[name for name, _, _ in differing[1:]])
    if not mine["model"]:  # it was imported, and where its model lies was nobody's business
        mine["model"] = engine.name
        _remember(session, together([each for each, _ in found]))
    session.use(mine)
    return session.loom.follow(live)


def add_model(session: Session, source: str | None = None) -> list[str]:
    """Let a session be gone on with under the store's model, too: the fields in which it is another one than those it
    has ([] where it is one of them, and nothing was to be done).

    A model with the tokenizer of the session's own is shown what that was shown: the same template, options and clock.
    Any other has its own template, or ``source``.

    Raises:
        ModelMismatch: it is one of the session's models with another tokenizer: two sets of tokens for one text
            would stand in one trie.
        RefExists: the session has another template than ``source`` for it.
        SessionError: the template is no valid one; there are as many models as there may be.
    """
    loom, settings = session.loom, session.row.settings
    live = loom.engine.identity()
    if not is_bound(settings):
        bind(session, source)
        return []
    there = identified(settings, live.digest.hex())
    if there is not None:
        if there["tokenizer"] != live.tokenizer:
            raise ModelMismatch("tokenizer", there["tokenizer"][:_DIGITS], live.tokenizer[:_DIGITS])
        if (
            source is not None
            and ChatTemplate.of(loom.engine.tokenizer, source=source).source != there["chat_template"]
        ):
            raise RefExists("session with another chat template", session.name)
        if there["model"] != loom.engine.name:  # it lies somewhere else now, and is found there from now on
            known = bindings(settings)
            moved = [{**each, "model": loom.engine.name} if each == there else each for each in known]
            _remember(session, together(moved))
        return []
    if len(bindings(settings)) == MOST_MODELS:
        raise SessionError(f"{session.name} has {MOST_MODELS} models already", hint="export it, and go on in a copy")
    own = bindings(settings)[0]
    same = own["tokenizer"] == live.tokenizer and source is None
    made = settings_of(loom, own["chat_template"] if same else source, own["template_options"], own["clock"])
    _remember(session, together([*bindings(settings), made]))
    return [name for name, _, _ in _differing(own, live)]


def _differing(binding: Mapping[str, Any], live: ModelIdentity) -> list[tuple[str, str, str]]:
    """(field, stored, live) of all in which a model is not that of a binding; what a user can change comes first."""
    found = differences(binding["model_fields"], live.fields)
    if binding["tokenizer"] != live.tokenizer:
        found.append(("tokenizer", binding["tokenizer"][:_DIGITS], live.tokenizer[:_DIGITS]))
    return sorted(found, key=lambda row: row[0] != "dtype")  # with another dtype the weights differ, too


def _remember(session: Session, settings: Mapping[str, Any]) -> None:
    with session.loom.database.write() as conn:
        if refs.session_of(conn, session.row.row).settings != session.row.settings:
            raise SessionError(f"{session.name} was changed by another process", hint="open the session, and try again")
        session.row = refs.change_settings(conn, session.row.row, settings)
