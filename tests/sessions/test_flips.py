"""Single bits of a store's file that flip, anywhere: found where they matter, mended where they can be, never served.

``make torture`` flips 1,000 of a tiny model's store and 40 of SmolLM2's; ``KVLOOM_FLIPS`` says how many it is here.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer
from torture import flips

import kvloom
import kvloom.journal
from kvloom.errors import CorruptRow, RefExists, StoreError
from kvloom_store import refs, roots

pytestmark = pytest.mark.usefixtures("one_thread")

FLIPS = int(os.environ.get("KVLOOM_FLIPS", "120"))


def _empty(path: Path, indexes: str) -> None:
    """Let some indexes point at a page that holds nothing."""
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA writable_schema=ON")
    raw.execute(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_tag_1')"
        f" WHERE type = 'index' AND {indexes}"
    )
    raw.commit()
    raw.close()


@pytest.fixture(scope="module")
def engine() -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def test_no_flipped_bit_is_served_and_every_one_that_matters_is_found(
    tmp_path: Path, engine: kvloom.TransformersEngine
) -> None:
    found = flips.torture(tmp_path, engine, 20, flips=FLIPS)
    assert found.wrong == []
    assert found.flips == FLIPS
    assert flips.STATE in found.outcomes
    assert found.live > 0.2 * FLIPS


def test_a_damaged_name_in_the_list_of_tables_is_told_as_damage(store_path: Path) -> None:
    with kvloom.open(store_path):
        pass
    data = bytearray(store_path.read_bytes())
    data[data.index(b"CREATE TABLE branch") + 15] = 0xD2
    flips.put(store_path, bytes(data))
    with pytest.raises(StoreError, match="damaged"):
        kvloom.open(store_path)


def _run(path: Path, statement: str, *values: object) -> None:
    raw = sqlite3.connect(path)
    raw.execute(statement, values)
    raw.commit()
    raw.close()


def test_a_name_that_is_no_text_any_more_is_told_and_keeps_nobody_from_going_on(store_path: Path) -> None:
    with kvloom.open(store_path) as loom, loom.database.write() as conn:
        refs.create_session(conn, "trip", {})
    _run(store_path, "UPDATE session SET name = CAST(? AS TEXT)", b"\xf4rip locked")
    with kvloom.open(store_path) as loom:
        with loom.database.write() as conn:
            refs.create_session(conn, "work", {})
        with pytest.raises(CorruptRow, match="session"):
            loom.sessions()
        assert [each.table for each in loom.fsck().findings] == ["session"]


@pytest.mark.parametrize(("column", "value"), [("owner", b"\xff 1 2"), ("updated", b"x"), ("run", None)])
def test_a_damaged_note_of_a_reply_keeps_no_store_from_being_opened(
    store_path: Path, engine: kvloom.TransformersEngine, column: str, value: bytes | None
) -> None:
    with kvloom.open(store_path, model=engine) as loom:
        reply = iter(loom.session("talk").branch().stream("who was there?", max_tokens=30))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvloom.journal, "SHARE", float("inf"))
            patch.setattr(kvloom.journal.Journal, "ended", lambda *_: None)  # as if it had been killed
            list(reply)
    _run(store_path, "UPDATE journal SET owner = 'elsewhere 1 2'")
    if value is None:  # a page that cannot be read
        raw = sqlite3.connect(store_path)
        [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'journal'")
        [(size,)] = raw.execute("PRAGMA page_size")
        raw.close()
        data = bytearray(store_path.read_bytes())
        data[(page - 1) * size : (page - 1) * size + 8] = b"\xff" * 8
        flips.put(store_path, bytes(data))
    else:
        _run(store_path, f"UPDATE journal SET {column} = CAST(? AS TEXT)", value)
    with kvloom.open(store_path, model=engine) as loom:
        assert loom.kept == []
        assert loom.find("talk").branch().log()[-1].role == "assistant"
        assert loom.fsck().findings


def test_what_goes_wrong_in_the_thread_that_writes_is_told_and_nobody_waits_for_ever(
    store_path: Path, engine: kvloom.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvloom.open(store_path, model=engine) as loom:
        branch = loom.session("talk").branch()

        def broken(*_: object) -> None:
            raise TypeError("a mistake")

        with monkeypatch.context() as patch:
            patch.setattr(loom.writer, "_store", broken)
            branch.say("hello there", max_tokens=3)
            with pytest.raises(StoreError, match="TypeError: a mistake"):
                loom.flush()
        loom.resumer.forget()
        assert branch.say("and who?", max_tokens=3).tokens.replayed > 0


def test_an_index_that_hides_a_model_and_its_trie_hides_no_state(
    store_path: Path, engine: kvloom.TransformersEngine
) -> None:
    with kvloom.open(store_path, model=engine) as loom:
        known = loom.root
    _empty(store_path, "tbl_name IN ('model', 'root')")
    with kvloom.open(store_path, model=engine) as loom:
        digest = engine.identity().digest
        with loom.database.read() as conn:
            assert roots.find_model(conn, digest) is not None
        assert loom.root == known


def test_state_that_an_index_hides_is_not_computed_anew_without_a_word(
    store_path: Path, engine: kvloom.TransformersEngine
) -> None:
    sound = flips.made(store_path, engine)
    expected = flips.going_on(store_path, engine)
    flips.put(store_path, sound)
    _empty(store_path, "name = 'ix_turn_state_turn'")
    damaged = store_path.read_bytes()
    with kvloom.open(store_path, model=engine) as loom, pytest.raises(CorruptRow, match="turn_state"):
        loom.find("talk").branch().say(flips.NEXT)
    flips.put(store_path, damaged)
    with kvloom.open(store_path, model=engine) as loom:
        loom.repair()
    assert flips.going_on(store_path, engine) == expected


def test_a_session_that_an_index_hides_is_found_and_none_is_begun_in_its_place(store_path: Path) -> None:
    with kvloom.open(store_path) as loom, loom.database.write() as conn:
        refs.create_session(conn, "trip", {})
    _empty(store_path, "name = 'sqlite_autoindex_session_1'")
    with kvloom.open(store_path) as loom:
        with loom.database.read() as conn:
            assert refs.get_session(conn, "trip").name == "trip"
        with pytest.raises(RefExists), loom.database.write() as conn:
            refs.create_session(conn, "trip", {})


def test_an_index_that_leads_to_another_session_is_told_as_damage(store_path: Path) -> None:
    with kvloom.open(store_path) as loom, loom.database.write() as conn:
        rows = {name: refs.create_session(conn, name, {}).row for name in ("first", "trip", "work")}
    raw = sqlite3.connect(store_path)
    [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_session_1'")
    [(size,)] = raw.execute("PRAGMA page_size")
    raw.close()
    data = bytearray(store_path.read_bytes())
    old, new = (b"trip" + bytes([rows[name]]) for name in ("trip", "work"))
    at = data.index(old, (page - 1) * size)
    assert at < page * size
    data[at : at + len(new)] = new
    flips.put(store_path, bytes(data))
    with kvloom.open(store_path) as loom, loom.database.read() as conn, pytest.raises(CorruptRow, match="session"):
        refs.get_session(conn, "trip")
