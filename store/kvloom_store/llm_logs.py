"""The logs of the ``llm`` tool: a SQLite file of conversations, opened read-only.

Two layouts are read. Since its message store (``messages``, ``parts``, ``threads``) conversations are trees: threads
that were forked from one another are the branches of one. Before, ``responses`` follow one another in
``conversations``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kvloom_proto import limits
from kvloom_proto.errors import FormatError, NotABundle
from kvloom_proto.messages import check_limit
from kvloom_store import sqlite
from kvloom_store.names import MAIN

BUSY_MS = 5_000
MAX_MESSAGES = 1 << 16
"""Messages of one conversation."""

Messages = list[dict[str, Any]]


def read(path: Path) -> dict[str, dict[str, Messages]]:
    """The conversations in a file: by a name made for each, the messages of each of its branches; texts alone.

    Raises:
        NotABundle: there are no such conversations in it.
        FormatError: one goes round in a circle, or is longer than any conversation (LimitExceeded).
        StoreError: it cannot be opened, or is damaged.
    """
    engine = sqlite.make_engine(path, read_only=True, synchronous="NORMAL", busy_ms=BUSY_MS)
    try:
        with sqlite.translated(path), engine.begin() as conn:
            there = {name: _columns(conn, name) for name in sa.inspect(conn).get_table_names()}
            found: dict[str, dict[str, Messages]] = {}
            known: set[str] = set()
            if {"threads", "messages", "parts"} <= there.keys():
                found, known = _threads(conn, there)
            if {"conversations", "responses"} <= there.keys():
                found |= _conversations(conn, there, known)
    finally:
        engine.dispose()
    if not found:
        raise NotABundle(f"{path} holds no conversations of the llm tool", hint="a kvloom store is opened with --store")
    return found


def _columns(conn: sa.Connection, table: str) -> set[str]:
    return {str(column["name"]) for column in sa.inspect(conn).get_columns(table)}


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


def _threads(conn: sa.Connection, there: Mapping[str, set[str]]) -> tuple[dict[str, dict[str, Messages]], set[str]]:
    """Trees of threads, and the ids of all threads."""
    threads = _table("threads", "id", "name", "tip_message_hash", "forked_from")
    rows = {row.id: row for row in conn.execute(sa.select(threads).order_by(threads.c.id))}
    fragments = _fragments(conn, there)
    trees: dict[str, dict[str, Messages]] = {}
    first_with: dict[str, Any] = {}
    for row in rows.values():
        if row.tip_message_hash is None:
            continue
        chain = _chain(conn, row.tip_message_hash, fragments)
        first, seen = row, {row.id}
        while first.forked_from in rows and first.forked_from not in seen:
            first = rows[first.forked_from]
            seen.add(first.id)
        # A fork need not be marked: messages are told apart by all that was said before them, and so is a reply.
        reply = next((number for number, message in chain if message["role"] == "assistant"), row.id)
        first = first_with.setdefault(reply, first)
        if chain:
            branches = trees.setdefault(_called(first.name, first.id), {})
            branches[MAIN if first is row else _called(row.name, row.id)] = [message for _, message in chain]
    return trees, set(rows)


def _chain(conn: sa.Connection, tip: str, fragments: Mapping[int, str]) -> list[tuple[str, dict[str, Any]]]:
    """The messages that end with one, the first one first, each with its hash."""
    table = _table("messages", "hash", "parent_hash", "role")
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    at: str | None = tip
    while at is not None:
        if at in seen:
            raise FormatError("the messages of a conversation go round in a circle", field="messages.parent_hash")
        seen.add(at)
        row = conn.execute(sa.select(table).where(table.c.hash == at)).first()
        if row is None:
            break
        text = _text_of(conn, at, fragments)
        if text or row.role == "assistant":
            chain.append((at, {"role": str(row.role), "content": text}))
        check_limit("messages", len(seen), MAX_MESSAGES)
        at = row.parent_hash
    return chain[::-1]


def _text_of(conn: sa.Connection, message: str, fragments: Mapping[int, str]) -> str:
    """What a message says: its text, and what tools gave back; reasoning and attachments are left out."""
    table = _table("parts", "message_hash", "position", "type", "text", "payload")
    query = sa.select(table).where(table.c.message_hash == message).order_by(table.c.position)
    texts = []
    for row in conn.execute(query):
        if row.type not in ("text", "tool_result"):
            continue
        payload = _json(row.payload)
        pieces = payload.get("text_ref")
        if row.text is not None:
            texts.append(str(row.text))
        elif isinstance(pieces, list):
            texts += [_piece(piece, fragments) for piece in pieces if isinstance(piece, dict)]
        elif isinstance(payload.get("output"), str):
            texts.append(payload["output"])
    return _bounded("".join(texts))


def _piece(piece: Mapping[str, Any], fragments: Mapping[int, str]) -> str:
    return str(piece["literal"]) if "literal" in piece else fragments.get(piece.get("fragment", -1), "")


def _json(text: object) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):  # what cannot be read says nothing
        value = {}
    return value if isinstance(value, dict) else {}


def _conversations(
    conn: sa.Connection, there: Mapping[str, set[str]], known: set[str]
) -> dict[str, dict[str, Messages]]:
    """Conversations of the older layout that are not threads, too; each has one branch."""
    conversations, responses = (
        _table("conversations", "id", "name"),
        _table("responses", "id", "prompt", "system", "response", "conversation_id"),
    )
    fragments = _fragments(conn, there)
    found: dict[str, dict[str, Messages]] = {}
    for row in conn.execute(sa.select(conversations).order_by(conversations.c.id)).all():
        if row.id in known:
            continue
        messages: Messages = []
        query = sa.select(responses).where(responses.c.conversation_id == row.id).order_by(responses.c.id)
        for said in conn.execute(query):
            system = _with_fragments(conn, there, "system_fragments", said.id, said.system, fragments)
            if system and not messages:
                messages.append({"role": "system", "content": system})
            prompt = _with_fragments(conn, there, "prompt_fragments", said.id, said.prompt, fragments)
            messages += [{"role": "user", "content": prompt}] if prompt else []
            messages.append({"role": "assistant", "content": _bounded(str(said.response or ""))})
            check_limit("messages", len(messages), MAX_MESSAGES)
        if messages:
            found[_called(row.name, row.id)] = {MAIN: messages}
    return found


def _with_fragments(
    conn: sa.Connection,
    there: Mapping[str, set[str]],
    name: str,
    response: str,
    text: str | None,
    fragments: Mapping[int, str],
) -> str:
    """A prompt as the model was given it: the fragments first, each on lines of its own."""
    parts: list[str] = []
    if {"response_id", "fragment_id", "order"} <= there.get(name, set()):
        table = _table(name, "response_id", "fragment_id", "order")
        query = sa.select(table.c.fragment_id).where(table.c.response_id == response).order_by(table.c.order)
        parts = [fragments.get(number, "") for number in conn.execute(query).scalars()]
    return _bounded("\n".join(part for part in [*parts, str(text or "")] if part))


def _fragments(conn: sa.Connection, there: Mapping[str, set[str]]) -> dict[int, str]:
    if not {"id", "content"} <= there.get("fragments", set()):
        return {}
    table = _table("fragments", "id", "content")
    return {row.id: _bounded(str(row.content)) for row in conn.execute(sa.select(table))}


def _bounded(text: str) -> str:
    check_limit("message", len(text), limits.MAX_TURN_BYTES)
    return text


def _called(name: object, number: object) -> str:
    """A name for a session or a branch: the first words of its own, and the end of its id."""
    words = "-".join(_words(str(name or "")))[:40].strip("-") or "llm"
    return f"{words}-{''.join(_words(str(number)))[-8:] or 'unknown'}".lower()


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"[^\W_]+", text[:200]))
