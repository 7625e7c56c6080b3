"""Conversations as text for others: OpenAI's list of messages and Markdown out, such messages in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from kvloom.binding import unbound
from kvloom.bundles import Exported
from kvloom.errors import InvalidText, LimitExceeded, SessionError
from kvloom.path import said
from kvloom.plaintext import check_unicode
from kvloom.why import content_of
from kvloom_proto.limits import MAX_TURN_BYTES
from kvloom_store import refs, turns
from kvloom_store.bundle_in import Imported
from kvloom_store.errors import AnotherSession
from kvloom_store.names import MAIN, check_name

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.loom import KVLoom
    from kvloom.session import Session
    from kvloom_store.turns import Turn

EXAMPLE = 'for example [{"role": "user", "content": "Hello"}]'


def messages_at(session: Session, at: str | None) -> list[dict[str, Any]]:
    """The messages down to a ref (None: main), as the chat template is given them. Raises RefNotFound."""
    with session.loom.database.read() as conn:
        point = refs.resolve(conn, session.ref(at))
        return [each.message for each in said(turns.path_to(conn, point.turn))]


def to_openai(messages: Sequence[Mapping[str, Any]]) -> str:
    """JSON as OpenAI's clients send it: {"messages": [...]}."""
    return json.dumps({"messages": [dict(each) for each in messages]}, ensure_ascii=False, indent=1) + "\n"


def to_markdown(title: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """A page to read: a heading for who speaks, and what they say as it is."""
    parts = [f"# {title}", *(f"## {each['role'].capitalize()}\n\n{content_of(each)}" for each in messages)]
    return "\n\n".join(parts) + "\n"


def write(session: Session, file: BinaryIO, at: str | None, kind: str) -> Exported:
    """Write the messages down to a ref; see ``Session.export_transcript``."""
    if kind not in ("openai", "markdown"):
        raise SessionError(f"there is no format {kind!r}", hint="use openai or markdown")
    messages = messages_at(session, at)
    title = str(session.ref(at))
    data = (to_openai(messages) if kind == "openai" else to_markdown(title, messages)).encode()
    file.write(data)
    return Exported(session.name, len(messages), (), (), 0, len(data))


def of_openai(data: bytes) -> list[dict[str, Any]]:
    """The messages of a list, or of {"messages": [...]}.

    Raises:
        InvalidText: it is neither.
        LimitExceeded: it has more than 64 MiB.
    """
    if len(data) > MAX_TURN_BYTES:
        raise LimitExceeded("the messages", len(data), MAX_TURN_BYTES)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"the messages are not valid JSON: {error}", hint=EXAMPLE) from error
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list):
        raise InvalidText("the messages are no list", hint=EXAMPLE)
    return found


def checked(message: object) -> dict[str, Any]:
    """A message of text, as it is stored. Raises InvalidText."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not isinstance(content, str | list | None)
    ):
        raise InvalidText(f"not a message: {str(message)[:80]}", hint='a message is {"role": "user", "content": "..."}')
    if any(not isinstance(part, Mapping) or not isinstance(part.get("text"), str) for part in parts):
        raise InvalidText("a message holds what is not text", hint="kvloom keeps conversations of text only")
    kept = {key: value for key, value in message.items() if value not in (None, [], {})} | {"content": content or ""}
    try:
        check_unicode(json.dumps(kept, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidText("a message holds what is not plain data") from error
    return kept


def take_in(loom: KVLoom, name: str, branches: Mapping[str, Sequence[object]]) -> Imported:
    """Add lists of messages to a session, by branch; see ``KVLoom.import_messages``."""
    check_name("session", name)
    lines = {branch: [checked(each) for each in messages] for branch, messages in branches.items()}
    if not any(lines.values()):
        raise InvalidText("there are no messages", hint=EXAMPLE)
    with loom.database.write() as conn:
        session = refs.find_session(conn, name)
        done = Imported(name, created=session is None, text_only=True)
        if session is None:
            session = refs.create_session(conn, name, unbound())
        elif not any(_begins(conn, session.row, line) for line in lines.values()):
            raise AnotherSession(name, "it begins otherwise")
        for branch, messages in lines.items():
            tip = _add(conn, session.row, messages, done)
            called = refs.place_branch(conn, session.row, branch, tip.row if tip else None, begin=done.created)
            done.names[branch] = called
        main = next(each for each in refs.branches(conn, session.row))
        if done.created and main.turn is None and main.name == MAIN and MAIN not in lines:
            first = refs.branches(conn, session.row)[1]
            refs.move_branch(conn, main.row, None, first.turn)
            done.made_main = True
    return done


def _begins(conn: sa.Connection, session: int, line: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a session has a conversation that begins with the same message."""
    return bool(line) and bool(turns.alike(conn, session, None, turns.chained_digest(b"", line[0])))


def _add(conn: sa.Connection, session: int, messages: Sequence[Mapping[str, Any]], done: Imported) -> Turn | None:
    """Have a session say some messages, one below the other; the last turn. What says the same already is that turn."""
    tip: Turn | None = None
    for message in messages:
        digest = turns.chained_digest(tip.digest if tip else b"", message)
        there = turns.alike(conn, session, tip.row if tip else None, digest)
        done.turns += 1
        if there:
            tip = there[0]
            continue
        reason = "stop" if message["role"] == "assistant" else None
        tip = turns.add_turn(conn, session, tip, message, finish_reason=reason)
        done.new_turns += 1
    return tip
