"""Conversations as bundles: out of a store into a file, and into another one. FORMAT.md ("Bundles") has the format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from kvloom._version import __version__
from kvloom.binding import MOST_MODELS, OTHERS, bindings, identified, is_bound, together
from kvloom.errors import FormatError, NothingToDo, SessionError
from kvloom.models import ALIASES
from kvloom.template import ChatTemplate
from kvloom.template_file import MAX_TEMPLATE_BYTES
from kvloom_proto.bundle import Encoding
from kvloom_proto.frames import Writer
from kvloom_store import bundle_in, bundle_out, bundle_plan, refs
from kvloom_store.bundle_check import Rules
from kvloom_store.names import MAIN, Ref

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom.session import Session
    from kvloom_store.bundle_in import Imported

ENCODINGS = {"protobuf": Encoding.PROTOBUF, "msgpack": Encoding.MSGPACK}
"""How a bundle may be written, by name."""

_SPOOLED_BYTES = 8 << 20
_COPIED_BYTES = 1 << 20

_SETTINGS: Mapping[str, type[Any]] = {
    **dict.fromkeys(("model", "model_digest", "tokenizer", "dtype", "chat_template", "template_digest", "clock"), str),
    **dict.fromkeys(("model_fields", "template_options"), dict),
}
"""What a session fixes when it begins, and of what type each is."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: turns, branches and tags by name, segments of state, and bytes in all."""

    session: str
    turns: int
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    segments: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


def write(
    session: Session,
    file: BinaryIO,
    at: str | None,
    *,
    encoding: str = "protobuf",
    text_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a session, or the path to a ref in it; see ``Session.export``."""
    if encoding not in ENCODINGS:
        raise SessionError(f"there is no encoding {encoding!r}", hint=f"use {' or '.join(ENCODINGS)}")
    session.loom.flush()
    ref = session.ref(at)
    with session.loom.database.read() as conn:
        if at is None:
            chosen = bundle_out.whole_session(conn, session.row.row)
        else:
            chosen = bundle_out.one_path(conn, _point(conn, ref), ref.point or MAIN)
        plan = bundle_plan.plan(conn, chosen, text_only=text_only)
        settings = together([{**each, "model": bundle_out.shown_name(each["model"])} for each in session.models])
        made = Writer(file, ENCODINGS[encoding])
        for record in bundle_out.records(conn, plan, settings, writer=f"kvloom {__version__}", text_only=text_only):
            made.add(record)
            if progress is not None:
                progress(made.written, max(made.written, plan.stored_bytes))
        made.finish()
    names = tuple(name for name, _ in chosen.branches), tuple(name for name, _ in chosen.tags)
    return Exported(session.name, len(chosen.turns), *names, len(plan.segments), made.written)


def _point(conn: Any, ref: Ref) -> refs.Point:
    point = refs.resolve(conn, ref)
    if point.token is not None:
        raise NothingToDo(
            f"{ref} is inside a turn, and a bundle ends with one",
            hint=f"kvloom fork {ref} NAME, then export {ref.session}@NAME",
        )
    return point


def read(
    loom: KVLoom,
    file: BinaryIO,
    name: str | None,
    *,
    text_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Read a bundle into a store; see ``KVLoom.import_bundle``."""
    rules = Rules(check_settings, check_turn)
    sessions = bundle_in.Sessions(_adopted, _difference, _names, _merged)
    if file.seekable() and file.tell() == 0:
        return bundle_in.import_bundle(
            loom.database, file, rules, sessions, name=name, text_only=text_only, progress=progress
        )
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spooled:  # it is read twice
        while part := file.read(_COPIED_BYTES):
            spooled.write(part)
        spooled.seek(0)
        return bundle_in.import_bundle(
            loom.database, spooled, rules, sessions, name=name, text_only=text_only, progress=progress
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Whether these are a session's settings, as ``binding`` makes them. Raises FormatError."""
    others = settings.get(OTHERS, [])
    if not isinstance(others, list) or not all(isinstance(each, Mapping) for each in others):
        raise FormatError("a session's other models are maps", field=f"session.settings.{OTHERS}")
    if len(others) >= MOST_MODELS:
        raise FormatError(f"a session has at most {MOST_MODELS} models", field=f"session.settings.{OTHERS}")
    _check_binding(settings, "session.settings")
    for number, each in enumerate(others):
        _check_binding(each, f"session.settings.{OTHERS}[{number}]")
        if not (is_bound(settings) and is_bound(each)):
            raise FormatError("a session that has other models has one of its own", field=f"session.settings.{OTHERS}")
    if len({each["model_digest"] for each in (settings, *others)}) <= len(others):
        raise FormatError("a session has each model once", field=f"session.settings.{OTHERS}")


def _check_binding(settings: Mapping[str, Any], at: str) -> None:
    for key, kind in _SETTINGS.items():
        if not isinstance(settings.get(key), kind):
            raise FormatError(f"the session's {key} is no {kind.__name__}", field=f"{at}.{key}")
    if not all(isinstance(value, str) for value in settings["model_fields"].values()):
        raise FormatError("the fields of a model are texts", field=f"{at}.model_fields")
    try:
        bytes.fromhex(settings["model_digest"])
        template = ChatTemplate(settings["chat_template"], settings["template_options"], settings["clock"])
        known = template.checked_digest()
    except (ValueError, SessionError) as error:
        raise FormatError(f"the session's settings make no sense: {error}", field=at) from error
    if len(settings["chat_template"]) > MAX_TEMPLATE_BYTES:
        raise FormatError("the chat template is too large", field=f"{at}.chat_template")
    if is_bound(settings) and known != settings["template_digest"]:
        raise FormatError("the digest is not that of the template", field=f"{at}.template_digest")


def check_turn(message: Mapping[str, Any], settings: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
    """Whether this is what is kept of a turn: text, and facts of the types they are read as. Raises FormatError."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None):
        raise FormatError("a message holds text", field="turn.message.content")
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise FormatError("the parts of a message are texts", field="turn.message.content")
    for key in ("cut_from", "dropped", "reopened"):
        if not isinstance(settings.get(key, ""), str):
            raise FormatError(f"the turn's {key} is no text", field=f"turn.settings.{key}")
    stop = settings.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(each, str) for each in stop):
        raise FormatError("stop is a list of texts", field="turn.settings.stop")
    for key, value in timings.items():
        counts = value.values() if isinstance(value, Mapping) and key == "tokens" else [value]
        if not all(isinstance(each, int | float) for each in counts):
            raise FormatError(f"the timing {key} is no number", field="turn.timings")


def _adopted(settings: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """The settings with models that can be had here: what a bundle says of where they lie is never used."""
    return together(
        [
            {
                **{name: each[name] for name in _SETTINGS},
                "model": known.get(each["model_digest"]) or (each["model"] if each["model"] in ALIASES else ""),
            }
            for each in bindings(settings)
        ]
    )


def _difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    if not (is_bound(here) and is_bound(there)):
        return None if here["clock"] == there["clock"] else "it began at another time"
    keys = [key for key in _SETTINGS if key != "model" and here[key] != there[key]]
    return f"its {keys[0].replace('_', ' ')} differs" if keys else None


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The names under which a session of this store knows models, by their digests."""
    return {each["model_digest"]: each["model"] for each in bindings(settings) if each["model"]}


def _merged(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a session that is here with those of its models that only the bundle has."""
    new = [each for each in bindings(there) if is_bound(each) and identified(here, each["model_digest"]) is None]
    return together([*bindings(here), *new]) if is_bound(here) and new else dict(here)
