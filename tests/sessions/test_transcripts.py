"""Text from elsewhere, and text for others: OpenAI's messages, Markdown, the logs of the llm tool."""

from __future__ import annotations

import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from kinds import engine, ids_of, opened
from tiny import CHAT_TEMPLATE

import kvloom
from kvloom import KVLoom
from kvloom.errors import (
    AnotherSession,
    FormatError,
    InvalidText,
    LimitExceeded,
    ModelMismatch,
    NotABundle,
    NothingToDo,
    StoreError,
)
from kvloom.transcripts import of_openai
from kvloom_store import llm_logs

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Who was it?"},
    {"role": "assistant", "content": "It was the one."},
    {"role": "user", "content": "And who else?"},
]


def messages_of(session: kvloom.Session, at: str | None = None) -> list[dict[str, Any]]:
    file = io.BytesIO()
    session.export_transcript(file, at)
    return json.loads(file.getvalue())["messages"]


def test_messages_come_in_without_a_model_and_go_out_as_they_came(store_path: Path) -> None:
    with kvloom.open(store_path) as loom:
        done = loom.import_messages("chat", {"main": TALK})
        assert (done.created, done.turns, done.new_turns) == (True, 4, 4)
        session = loom.find("chat")
        assert messages_of(session) == TALK
        assert messages_of(session, "main~1") == TALK[:3]
        assert session.settings["model"] == ""
        assert session.missing("main").unwritten == 3
        page = io.BytesIO()
        session.export_transcript(page, format="markdown")
        assert page.getvalue().decode() == (
            "# chat\n\n## System\n\nbe brief\n\n## User\n\nWho was it?\n\n"
            "## Assistant\n\nIt was the one.\n\n## User\n\nAnd who else?\n"
        )
        for needs_one in (lambda: session.why(TALK), lambda: session.branch().why("x")):
            with pytest.raises(NothingToDo, match="no model yet"):
                needs_one()


def test_a_conversation_goes_on_under_the_model_it_meets_first(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as loom, opened(tmp_path / "b" / "b.db", "llama") as plain:
        loom.import_messages("chat", {"main": TALK[:3]})
        said = plain.session("chat", system="be brief")
        reply = loom.find("chat").branch().say("And who else?", max_tokens=4)
        session = loom.find("chat")
        assert session.settings["model"] == "tiny llama"
        assert session.settings["chat_template"] == CHAT_TEMPLATE
        assert reply.tokens.computed > 10
        assert session.branch().say("more", max_tokens=3).tokens.reused > 0
        # The tokens are those that a template writes of these messages.
        assert said.template().source == session.template().source
        path = ids_of(loom, session.branch())
        assert loom.engine.tokenizer.decode(path).startswith(
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nWho"
        )
    other = kvloom.TransformersEngine(engine("llama").model, engine("llama").tokenizer, name="same")
    with KVLoom(tmp_path / "a" / "a.db", model=other) as loom:
        assert loom.find("chat").branch().say("again", max_tokens=2).tokens.reused > 0
    with opened(tmp_path / "a" / "a.db", "qwen3") as loom, pytest.raises(ModelMismatch):
        loom.find("chat").branch().say("again", max_tokens=2)


def test_a_template_can_be_given_when_it_meets_its_model(store_path: Path) -> None:
    with opened(store_path, "llama") as loom:
        loom.import_messages("chat", {"main": TALK[:1]})
        template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        session = loom.session("chat", system="be brief", chat_template=template)
        assert session.branch().say("hello", max_tokens=2).tokens.generated == 2
        assert loom.engine.tokenizer.decode(ids_of(loom, session.branch())).startswith("system: be brief\nuser: hello")


@pytest.mark.parametrize("how", ["regenerate", "continue_reply", "sample"])
def test_a_last_message_is_written_and_run_before_it_is_replied_to(how: str, store_path: Path) -> None:
    with opened(store_path, "llama") as loom:
        loom.import_messages("chat", {"main": TALK})
        branch = loom.find("chat").branch()
        if how == "sample":
            assert len(branch.sample(n=2, max_tokens=3)) == 2
        else:
            assert getattr(branch, how)(max_tokens=3).reply.tokens.generated == 3
        assert not loom.find("chat").missing("main~0" if how == "sample" else "main~1")
        states = [turn.tokens for turn in loom.find("chat").log("main")]
        assert all(states[1:])


def test_importing_again_adds_what_is_new_and_another_talk_is_refused(store_path: Path) -> None:
    with kvloom.open(store_path) as loom:
        loom.import_messages("chat", {"main": TALK[:3]})
        assert loom.import_messages("chat", {"main": TALK[:3]}).new_turns == 0
        done = loom.import_messages("chat", {"main": TALK})
        assert (done.new_turns, done.names) == (1, {"main": "main-2"})
        assert loom.import_messages("chat", {"main": TALK}).names == {"main": "main-2"}
        assert len(loom.find("chat").tree()) == 4
        with pytest.raises(AnotherSession, match="begins otherwise"):
            loom.import_messages("chat", {"main": TALK[1:]})
        other = [*TALK[:2], {"role": "assistant", "content": "Nobody."}]
        done = loom.import_messages("tree", {"main": TALK, "other": other})
        assert (done.turns, done.new_turns) == (7, 5)
        assert messages_of(loom.find("tree"), "other") == other


def test_text_goes_through_a_bundle_and_merges(tmp_path: Path) -> None:
    with kvloom.open(tmp_path / "a" / "a.db") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        here.import_messages("chat", {"main": TALK})
        file = io.BytesIO()
        here.find("chat").export(file)
        there.import_bundle(io.BytesIO(file.getvalue()))
        assert messages_of(there.find("chat")) == TALK
        there.find("chat").branch().regenerate(max_tokens=2).reply  # noqa: B018
        done = there.import_bundle(io.BytesIO(file.getvalue()))
        assert (done.new_turns, done.names) == (0, {"main": "main-2"})


@pytest.mark.parametrize(
    "message",
    [
        "text",
        {"role": 1, "content": "a"},
        {"role": "user", "content": 1},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": "\ud800"},
        {"content": "a"},
    ],
)
def test_what_is_no_message_of_text_is_refused_and_nothing_is_kept(message: object, store_path: Path) -> None:
    with kvloom.open(store_path) as loom:
        with pytest.raises(InvalidText):
            loom.import_messages("chat", {"main": [*TALK, message]})
        assert loom.sessions() == []


def test_json_that_holds_no_messages_is_refused() -> None:
    for data in (b"{", b"{}", b"3", b'{"messages": 3}', b"[" * 100_000, b"\xff"):
        with pytest.raises(InvalidText):
            of_openai(data)
    with pytest.raises(LimitExceeded):
        of_openai(b" " * ((64 << 20) + 1))
    assert of_openai(b'{"messages": [{"role": "user"}], "model": "x"}') == [{"role": "user"}]


# The logs of llm

OLD = """
CREATE TABLE conversations (id TEXT PRIMARY KEY, name TEXT, model TEXT);
CREATE TABLE responses (id TEXT PRIMARY KEY, model TEXT, prompt TEXT, system TEXT, response TEXT, conversation_id TEXT);
CREATE TABLE fragments (id INTEGER PRIMARY KEY, hash TEXT, content TEXT);
CREATE TABLE prompt_fragments (response_id TEXT, fragment_id INTEGER, "order" INTEGER);
"""
NEW = """
CREATE TABLE threads (id TEXT PRIMARY KEY, name TEXT, tip_message_hash TEXT, forked_from TEXT);
CREATE TABLE messages (hash TEXT PRIMARY KEY, parent_hash TEXT, role TEXT);
CREATE TABLE parts (id INTEGER PRIMARY KEY, message_hash TEXT, position INT, type TEXT, text TEXT, payload TEXT);
CREATE TABLE fragments (id INTEGER PRIMARY KEY, hash TEXT, content TEXT);
"""


def logs(path: Path, schema: str, rows: dict[str, list[tuple[object, ...]]]) -> Path:
    with sqlite3.connect(path) as conn:
        conn.executescript(schema)
        for table, values in rows.items():
            conn.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(values[0]))})", values)
    conn.close()
    return path


def test_the_older_logs_of_llm_are_conversations_of_one_branch(tmp_path: Path) -> None:
    path = logs(
        tmp_path / "logs.db",
        OLD,
        {
            "conversations": [("01hx2abcdef", "Cities in Italy?", "m"), ("01hx2abczzz", None, "m")],
            "responses": [
                ("r1", "m", "Name one.", "be brief", "Rome.", "01hx2abcdef"),
                ("r2", "m", "Another?", "be brief", "Milan.", "01hx2abcdef"),
                ("r3", "m", "Hello", None, "Hi.", "01hx2abczzz"),
            ],
            "fragments": [(1, "h", "A long text.")],
            "prompt_fragments": [("r3", 1, 0)],
        },
    )
    before = path.read_bytes()
    found = llm_logs.read(path)
    assert list(found) == ["cities-in-italy-x2abcdef", "llm-x2abczzz"]
    assert [m["content"] for m in found["cities-in-italy-x2abcdef"]["main"]] == [
        *("be brief", "Name one.", "Rome.", "Another?", "Milan.")
    ]
    assert found["llm-x2abczzz"]["main"][0] == {"role": "user", "content": "A long text.\nHello"}
    assert path.read_bytes() == before


@pytest.mark.parametrize("marked", ["01aaaaaaaa", None])
def test_threads_of_llm_that_were_forked_are_branches(tmp_path: Path, store_path: Path, marked: str | None) -> None:
    path = logs(
        tmp_path / "logs.db",
        NEW,
        {
            "threads": [("01aaaaaaaa", "Trip", "m3", None), ("01bbbbbbbb", "In Spain", "m5", marked)],
            "messages": [
                *(("m1", None, "user"), ("m2", "m1", "assistant"), ("m3", "m2", "user")),
                *(("m4", "m2", "user"), ("m5", "m4", "assistant")),
            ],
            "parts": [
                (1, "m1", 0, "text", "Where to?", None),
                (2, "m2", 0, "reasoning", "Hm.", None),
                (3, "m2", 1, "text", "Rome.", None),
                (4, "m3", 0, "text", None, json.dumps({"text_ref": [{"literal": "Why "}, {"fragment": 1}]})),
                (5, "m4", 0, "text", "And in Spain?", None),
                (6, "m5", 0, "text", "Madrid.", None),
            ],
            "fragments": [(1, "h", "there?")],
        },
    )
    found = llm_logs.read(path)
    with kvloom.open(store_path) as loom:
        for name, branches in found.items():
            loom.import_messages(name, branches)
        session = loom.find("trip-aaaaaaaa")
        assert [turn.text for turn in session.log()] == ["Where to?", "Rome.", "Why there?"]
        assert [turn.text for turn in session.log("in-spain-bbbbbbbb")] == [
            *("Where to?", "Rome.", "And in Spain?", "Madrid.")
        ]
        assert len(session.tree()) == 5


def test_other_databases_and_damaged_ones_are_refused(tmp_path: Path, store_path: Path) -> None:
    with kvloom.open(store_path) as loom:
        loom.import_messages("chat", {"main": TALK})
    with pytest.raises(NotABundle, match="no conversations"):
        llm_logs.read(store_path)
    path = logs(tmp_path / "half.db", "CREATE TABLE conversations (id); CREATE TABLE responses (id);", {})
    with pytest.raises(StoreError):
        llm_logs.read(path)
    data = bytearray(path.read_bytes())
    data[100:] = b"\xaa" * (len(data) - 100)
    (tmp_path / "damaged.db").write_bytes(data)
    with pytest.raises(StoreError):
        llm_logs.read(tmp_path / "damaged.db")
    loops = {"threads": [("a", "n", "m1", "b"), ("b", "n", "m1", "a")], "messages": [("m1", "m1", "user")]}
    with pytest.raises(FormatError, match="circle"):
        llm_logs.read(logs(tmp_path / "loop.db", NEW, {**loops, "parts": [(1, "m1", 0, "text", "x", None)]}))
