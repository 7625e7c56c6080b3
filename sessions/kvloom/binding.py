"""Which model a conversation belongs to: fixed when it begins, or, of text that was imported, when it is first gone on
with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kvloom.errors import ModelMismatch
from kvloom.identity import differences
from kvloom.template import ChatTemplate
from kvloom_store import refs

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom.session import Session


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
    _remember(session, settings_of(session.loom, source, options, session.settings["clock"]))


def check_model(session: Session) -> None:
    """Refuse to go on with a session under a model that is not its own; one that has none yet gets this one.
    Afterwards ``loom.root`` is the model's.

    Raises:
        ModelMismatch: with the first field that differs.
    """
    engine = session.loom.engine
    live = engine.identity()
    if not is_bound(session.settings):
        bind(session)
        return session.loom.follow(live)
    settings = session.settings
    found = differences(settings["model_fields"], live.fields)
    if found:
        # With another dtype the weights differ too; what the user can change is named.
        raise ModelMismatch(*next((row for row in found if row[0] == "dtype"), found[0]))
    if settings["tokenizer"] != live.tokenizer:
        raise ModelMismatch("tokenizer", settings["tokenizer"][:16], live.tokenizer[:16])
    if not settings["model"]:  # it was imported, and where its model lies was nobody's business
        _remember(session, {**settings, "model": engine.name})
    return session.loom.follow(live)


def _remember(session: Session, settings: Mapping[str, Any]) -> None:
    with session.loom.database.write() as conn:
        session.row = refs.change_settings(conn, session.row.row, settings)
