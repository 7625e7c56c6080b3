"""Checking a store and repairing it: a test for each way of being broken, made from a sound store by a small change."""

from __future__ import annotations

import functools
import random
import sqlite3
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from exact.worker import rows_of
from tiny import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks.synthetic import OPENINGS, Builder

import kvloom
from kvloom.errors import CorruptRow, RefNotFound
from kvloom_proto.records import Pass, Schedule, pack
from kvloom_store import fsck, scan, schema
from kvloom_store.checksum import row_checksum
from kvloom_store.database import Database
from kvloom_store.fsck import Finding, Kind, Report, Severity
from kvloom_store.fsck import repair as repairs
from kvloom_store.fsck.mending import mended
from kvloom_store.fsck.repair import Action

pytestmark = pytest.mark.usefixtures("one_thread")

NEXT = "And who else was there?"


@functools.cache
def engine(kind: str = "llama") -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model(kind), tiny_tokenizer(), name="tiny")


@functools.cache
def sound_store(folder: Path, kind: str = "llama") -> bytes:
    """A closed store: two branches, a tag, a turn cut at a token, three siblings, a search, a second session."""
    path = folder / f"{kind}.db"
    with kvloom.open(path, model=engine(kind)) as loom:
        main = loom.session("talk", system="Be brief.").branch()
        main.say("hello, and what was it?", max_tokens=8)
        main.say("and when was that?", max_tokens=8)
        main.fork("other", back=2).say("who was there?", max_tokens=6, temperature=1.0, seed=3)
        main.session.fork("cut", "main:30")
        main.session.tag("here")
        main.sample("so it was", n=3, max_tokens=4, seed=1)
        search = main.session.explore(prompt="which?", width=2, depth=2, step_tokens=3, keep=1, seed=1)
        list(search)
        loom.session("second").branch().say("hello, and what was it?", max_tokens=4)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sound")


@pytest.fixture
def path(store_path: Path, folder: Path) -> Path:
    """A copy of the sound store."""
    store_path.parent.mkdir()
    store_path.write_bytes(sound_store(folder))
    return store_path


def change(path: Path, *statements: str) -> None:
    """Change a closed store behind its back."""
    raw = sqlite3.connect(path)
    for each in statements:
        assert raw.execute(each).rowcount > 0, each
    raw.commit()
    raw.close()


def resealed(path: Path, within: str, row: int, **cells: Any) -> None:
    """Change a row as a program with a mistake would: with a checksum that fits."""
    table = schema.metadata.tables[within]
    raw = sqlite3.connect(path)
    raw.row_factory = sqlite3.Row
    values = {**dict(raw.execute(f"SELECT * FROM {within} WHERE id = ?", (row,)).fetchone()), **cells}
    values["checksum"] = row_checksum(table, {k: v for k, v in values.items() if k != "checksum"})
    raw.execute(f"UPDATE {within} SET {', '.join(f'{k} = ?' for k in values)} WHERE id = ?", (*values.values(), row))
    raw.commit()
    raw.close()


def checked(path: Path, **options: Any) -> Report:
    database = Database(path)
    try:
        return fsck.check(database, **options)
    finally:
        database.close()


def repaired(path: Path) -> tuple[Report, list[str]]:
    """What is found after a repair, and what it said it did."""
    done: list[str] = []
    with kvloom.open(path, model=engine()) as loom:
        return loom.repair(told=done.append), done


def going_on(path: Path, branch: str = "main") -> tuple[str, list[str], tuple[str, ...]]:
    """What the model replies to the same words, the bits of the state it ends in, and the notices."""
    with kvloom.open(path, model=engine()) as loom:
        reply = loom.find("talk").branch(branch).say(NEXT, max_tokens=5)
        live = loom.resumer.live
        return reply.text, rows_of(live, live.captured), reply.notices


@functools.cache
def as_ever(folder: Path) -> tuple[str, list[str], tuple[str, ...]]:
    """The same of the sound store."""
    path = folder / "as-ever.db"
    path.write_bytes(sound_store(folder))
    return going_on(path)


def bit_of(path: Path, table: str, row: int, column: str, bit: int) -> None:
    raw = sqlite3.connect(path)
    value = raw.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()[0]
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    new = bytes(data) if isinstance(value, bytes) else data.decode("latin-1")
    raw.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
    raw.commit()
    raw.close()


def kinds(report: Report) -> set[tuple[str, str]]:
    return {(each.kind.value, each.table) for each in report.findings if each.severity != Severity.NOTE}


def find(report: Report, kind: Kind, table: str) -> Finding:
    return next(each for each in report.findings if (each.kind, each.table) == (kind, table))


# Checking


def test_a_sound_store_has_no_findings(path: Path) -> None:
    report = checked(path)
    assert [each.words for each in report.findings] == []
    assert report.sound
    assert report.rows > 100
    assert report.bytes > 50_000


@pytest.mark.parametrize("kind", ["gemma3_text", "mamba", "jamba"])
def test_a_sound_store_of_windows_and_keyframes_has_no_findings(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kvloom.db"
    with kvloom.open(path, model=engine(kind)) as loom:
        branch = loom.session("talk", system="Be brief.").branch()
        branch.say("hello, and what was it?", max_tokens=5)
        branch.fork("other", back=2).say("who was there?", max_tokens=3)
    assert [each.words for each in checked(path).findings] == []


def test_checking_changes_no_byte(path: Path) -> None:
    bit_of(path, "chunk", 2, "blob", 999)
    before = path.read_bytes()
    checked(path)
    assert path.read_bytes() == before


def test_a_check_does_not_stop_at_the_first_finding(path: Path) -> None:
    change(path, "UPDATE turn SET role = 'nobody' WHERE id = 2", "DELETE FROM chunk WHERE segment = 2")
    change(path, "UPDATE tag SET name = 'else', created = 5", "DELETE FROM turn_text_docsize WHERE id = 3")
    assert {("row", "turn"), ("state", "segment"), ("row", "tag")} <= kinds(checked(path))


def test_progress_tells_the_bytes_that_were_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom_store.fsck.rows.PROGRESS_BYTES", 10_000)
    seen: list[tuple[int, int]] = []
    report = checked(path, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {report.bytes}


@pytest.mark.parametrize(
    ("statement", "kind", "table", "severity"),
    [
        ("UPDATE turn SET message = x'81' WHERE id = 4", Kind.ROW, "turn", Severity.LOST),
        ("UPDATE session SET settings = x'80', created = 1 WHERE id = 1", Kind.ROW, "session", Severity.LOST),
        ("UPDATE branch SET turn = 3, created = 1 WHERE id = 1", Kind.ROW, "branch", Severity.LOST),
        ("UPDATE tag SET name = 'else', created = 1", Kind.ROW, "tag", Severity.LOST),
        ("UPDATE exploration SET settings = x'80'", Kind.ROW, "exploration", Severity.LOST),
        ("UPDATE candidate SET score = NULL, found = x'80' WHERE id = 1", Kind.ROW, "candidate", Severity.LOST),
        ("UPDATE turn_state SET schedule = x'00', created = 1 WHERE id = 2", Kind.ROW, "turn_state", Severity.LOST),
        ("UPDATE turn_state SET tokens = x'00000000' WHERE id = 2", Kind.BIT, "turn_state", Severity.HEALS),
        ("UPDATE node SET tokens = x'0000000000000000' WHERE id = 3", Kind.BIT, "node", Severity.HEALS),
        ("UPDATE node SET chain_hash = x'00' WHERE id = 3", Kind.ROW, "node", Severity.LOST),
        ("UPDATE model SET fields = x'80'", Kind.BIT, "model", Severity.HEALS),
        ("UPDATE root SET extra = x'0102'", Kind.BIT, "root", Severity.HEALS),
        ("UPDATE provenance SET record = x'00' WHERE id = 1", Kind.ROW, "provenance", Severity.HEALS),
        ("UPDATE model_digest SET created = 1", Kind.ROW, "model_digest", Severity.HEALS),
        ("UPDATE meta SET value = x'0000'", Kind.ROW, "meta", Severity.HEALS),
        ("UPDATE sequence SET next = 12345 WHERE name = 'turn'", Kind.ROW, "sequence", Severity.HEALS),
        ("UPDATE segment SET manifest = x'00' WHERE id = 2", Kind.ROW, "segment", Severity.HEALS),
        ("UPDATE chunk SET blob = x'00' WHERE segment = 2", Kind.CHUNK, "chunk", Severity.HEALS),
        ("UPDATE chunk SET place = 'elsewhere' WHERE segment = 2", Kind.CHUNK, "chunk", Severity.HEALS),
        ("DELETE FROM chunk WHERE segment = 2", Kind.STATE, "segment", Severity.HEALS),
        ("DELETE FROM segment WHERE id = 2", Kind.POINTER, "turn_state", Severity.HEALS),
        ("DELETE FROM turn WHERE id = 4", Kind.POINTER, "turn", Severity.LOST),
        ("DELETE FROM node WHERE id = 3", Kind.POINTER, "turn_state", Severity.LOST),
        ("DELETE FROM turn_text_docsize WHERE id = 3", Kind.INDEX, "turn_text", Severity.HEALS),
        ("DELETE FROM turn_text_data WHERE id > 100", Kind.INDEX, "turn_text", Severity.HEALS),
        ("UPDATE turn_text_idx SET pgno = 0", Kind.INDEX, "turn_text", Severity.HEALS),
        ("UPDATE turn_text_idx SET pgno = 130", Kind.INDEX, "turn_text", Severity.HEALS),
    ],
)
def test_each_kind_of_damage_is_found_and_repaired(
    path: Path, folder: Path, statement: str, kind: Kind, table: str, severity: Severity
) -> None:
    change(path, statement)
    found = find(checked(path), kind, table)
    assert found.severity == severity
    assert found.words

    report, done = repaired(path)
    assert [each.words for each in report.findings if each.severity != Severity.NOTE] == []
    assert done
    assert bool(report.of(Kind.SET_ASIDE)) == (severity == Severity.LOST), "only what is lost is set aside"
    if severity == Severity.HEALS:
        text, bits, notices = going_on(path)
        assert (text, bits) == as_ever(folder)[:2]
        assert notices == ()
    assert checked(path).sound


@pytest.mark.parametrize("table", ["tag", "pin", "model_digest"])
def test_a_table_that_the_file_has_lost_is_made_anew(path: Path, table: str) -> None:
    raw = sqlite3.connect(path)
    raw.execute(f"DROP TABLE {table}")
    raw.close()
    assert find(checked(path), Kind.PAGE, table).severity == Severity.LOST
    report, done = repaired(path)
    assert [each.words for each in report.findings if each.severity != Severity.NOTE] == []
    assert done
    assert checked(path).sound


def test_digests_of_a_model_that_is_gone_go_with_it(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.row_factory = sqlite3.Row
    values = {**dict(raw.execute("SELECT * FROM model_digest").fetchone()), "model": 12345}
    values["checksum"] = row_checksum(schema.model_digest, {k: v for k, v in values.items() if k != "checksum"})
    with raw:
        raw.execute("UPDATE model_digest SET model = :model, checksum = :checksum WHERE digest = :digest", values)
    raw.close()
    assert find(checked(path), Kind.POINTER, "model_digest").severity == Severity.HEALS
    report, _ = repaired(path)
    assert [each.words for each in report.findings if each.severity != Severity.NOTE] == []
    assert checked(path).sound


@pytest.mark.parametrize(
    ("table", "row", "cells", "kind"),
    [
        ("turn", 3, {"digest": b"0" * 16}, Kind.VALUE),
        ("turn", 3, {"role": "user"}, Kind.VALUE),
        ("turn", 3, {"parent": 5}, Kind.POINTER),
        ("branch", 1, {"session": 2, "name": "stray"}, Kind.POINTER),
        ("tag", 1, {"session": 2}, Kind.POINTER),
        ("candidate", 2, {"turn": 2}, Kind.POINTER),
        ("node", 3, {"parent_offset": 2}, Kind.TRIE),
        ("node", 3, {"first_token": 3}, Kind.TRIE),
        ("node", 3, {"chain_hash": b"0" * 16}, Kind.TRIE),
        ("turn_state", 2, {"tokens": b"\0" * 28}, Kind.TRIE),
        ("turn_state", 2, {"offset": 1}, Kind.TRIE),
        ("turn_state", 2, {"state_start": 0}, Kind.VALUE),
        ("turn_state", 2, {"hidden_dtype": None}, Kind.VALUE),
        ("turn_state", 2, {"scores": b"\xff"}, Kind.VALUE),
        ("turn_state", 2, {"segment": 1}, Kind.STATE),
        ("segment", 2, {"start": 30}, Kind.STATE),
        ("segment", 2, {"base_segment": None}, Kind.STATE),
        ("segment", 2, {"base_segment": 3}, Kind.STATE),
        ("segment", 2, {"schedule": pack(Schedule((Pass(31, 2),)))}, Kind.STATE),
        ("segment", 2, {"stored_bytes": 1}, Kind.STATE),
        ("segment", 2, {"node": 2}, Kind.STATE),
        ("provenance", 1, {"record": b"\xff"}, Kind.VALUE),
    ],
)
def test_a_row_that_was_written_wrong_is_found_though_its_checksum_fits(
    path: Path, table: str, row: int, cells: dict[str, Any], kind: Kind
) -> None:
    resealed(path, table, row, **cells)
    assert find(checked(path), kind, table).row == (row,)
    report, _ = repaired(path)
    assert [each.words for each in report.findings if each.severity != Severity.NOTE] == []


def test_a_finding_names_the_turn_it_concerns(path: Path) -> None:
    with kvloom.open(path, must_exist=True) as loom:
        turn = loom.find("talk").log()[2].id
    change(path, "DELETE FROM chunk WHERE segment = 2")
    assert find(checked(path), Kind.STATE, "segment").at == f"talk@{turn[:8]}"


def test_state_that_was_never_written_is_a_note(path: Path) -> None:
    resealed(path, "turn_state", 2, segment=None)
    report = checked(path)
    assert report.sound
    assert [each.kind for each in report.findings if each.table == "turn_state"] == [Kind.UNWRITTEN]


def test_what_nothing_refers_to_is_a_note_and_is_removed(path: Path) -> None:
    database = Database(path)
    with database.write() as conn:
        from kvloom_proto.records import Provenance
        from kvloom_store import segments, trie

        segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "y", "z"))
        for length in (2, 4, 6):
            trie.extend(conn, 1, [7] * length)
    database.close()
    report = checked(path)
    assert report.sound
    assert {each.table for each in report.of(Kind.ORPHAN)} == {"node", "provenance"}
    report, _ = repaired(path)
    assert report.findings == ()


def test_a_quick_check_reads_no_state_and_still_sees_that_a_row_is_another(path: Path) -> None:
    bit_of(path, "chunk", 2, "blob", 999)
    assert checked(path, blobs=False).sound
    change(path, "UPDATE chunk SET length = 1 WHERE segment = 3", "DELETE FROM chunk WHERE segment = 4")
    report = checked(path, blobs=False)
    assert kinds(report) == {("chunk", "chunk"), ("state", "segment")}
    assert report.bytes == 0


def test_a_store_of_another_loop_is_sound(path: Path) -> None:
    with kvloom.open(path, model=engine()) as loom:
        ids = list(range(40, 60))
        cache, _ = loom.lookup(ids)
        engine().model(input_ids=torch.tensor([ids]), past_key_values=cache)
        loom.capture(ids, cache)
    report = checked(path)
    assert report.sound
    assert [each.table for each in report.findings] == ["segment"]


# Mending bits


EMPTY = ("chunk", "quarantine", "journal", "pin")
"""Tables whose rows are not mended so, or that have none here."""


@pytest.mark.parametrize("table", [name for name in schema.metadata.tables if name not in EMPTY])
def test_the_checksum_tells_any_bit_of_a_row_that_changed(path: Path, table: str) -> None:
    database = Database(path)
    with database.read() as conn:
        *_, (_, values) = scan.scan(conn, schema.metadata.tables[table])
    database.close()
    rng = random.Random(7)
    for name, cell in values.items():
        for _ in range(6):
            if isinstance(cell, int):
                other: Any = cell ^ 1 << rng.randrange(62)
            elif cell:
                data = bytearray(cell.encode() if isinstance(cell, str) else cell)
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                other = _as_read(bytes(data)) if isinstance(cell, str) else bytes(data)
            else:
                continue
            assert mended(schema.metadata.tables[table], {**values, name: other}) == values, name


def _as_read(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


@pytest.mark.parametrize(
    ("table", "column", "row"),
    [("turn", "message", 4), ("session", "settings", 1), ("branch", "name", 1), ("segment", "manifest", 2)],
)
def test_a_row_with_one_bit_changed_is_put_right(path: Path, folder: Path, table: str, column: str, row: int) -> None:
    before = _dump(path, table)
    bit_of(path, table, row, column, 17)
    assert kinds(checked(path)) >= {("bit", table)}
    report, done = repaired(path)
    assert report.findings == ()
    assert any("put right" in line for line in done)
    assert _dump(path, table) == before
    assert going_on(path) == as_ever(folder)


def _dump(path: Path, table: str) -> list[Any]:
    raw = sqlite3.connect(path)
    rows = raw.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()
    raw.close()
    return rows


def test_two_bits_are_not_guessed_at(path: Path) -> None:
    for bit in (100, 203):
        bit_of(path, "turn", 4, "message", bit)
    assert find(checked(path), Kind.ROW, "turn").severity == Severity.LOST


# Setting aside


def test_damaged_text_is_kept_aside_and_never_served(path: Path) -> None:
    with kvloom.open(path, must_exist=True) as loom:
        log = loom.find("talk").log()
    change(path, "UPDATE turn SET message = x'81' WHERE id = 4")
    with kvloom.open(path, must_exist=True) as loom, pytest.raises(CorruptRow):
        loom.find("talk").tree()
    repaired(path)
    with kvloom.open(path, model=engine()) as loom:
        session = loom.find("talk")
        assert [each.id for each in session.log()] == [each.id for each in log[:3]], "main ends above it"
        assert len(session.tree()) > 3
        assert session.branch("other").log()[-1].role == "assistant"
        with pytest.raises(RefNotFound):
            session.log(log[3].id)
        assert loom.find("second").branch().say(NEXT, max_tokens=2).notices == ()
    rows = {name: msgpack.unpackb(cells) for _, name, cells, *_ in _dump(path, "quarantine")}
    assert rows["turn"]["id"] >= 4


def test_a_damaged_session_leaves_the_others_usable(path: Path) -> None:
    change(path, "UPDATE session SET name = 'zz', created = 1 WHERE name = 'talk'")
    with kvloom.open(path, must_exist=True) as loom, pytest.raises(CorruptRow):
        loom.sessions()
    repaired(path)
    with kvloom.open(path, model=engine()) as loom:
        assert [each.name for each in loom.sessions()] == ["second"]
        assert loom.find("second").branch().say(NEXT, max_tokens=2).tokens.reused > 0


@pytest.mark.parametrize(("name", "then"), [("main", "main"), ("other", "recovered")])
def test_what_a_damaged_branch_pointed_at_has_a_branch_again(path: Path, name: str, then: str) -> None:
    with kvloom.open(path, must_exist=True) as loom:
        tip = loom.find("talk").log(name)[-1].id
    change(path, f"UPDATE branch SET created = 1, name = 'zz' WHERE name = '{name}' AND session = 1")
    repaired(path)
    with kvloom.open(path, must_exist=True) as loom:
        session = loom.find("talk")
        assert session.log(then)[-1].id == tip
        assert then in [each.name for each in session.branches()]


def test_a_conversation_that_is_longer_than_the_stack_is_deep_can_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "kvloom.db"
    builder = Builder(path)
    builder.session("long", (None, *range(599)), tokens=1)
    builder.finish()
    change(path, "UPDATE turn SET message = x'8182838485' WHERE id = 1")
    done: list[str] = []
    database = Database(path)
    repairs.execute(database, repairs.plan(fsck.check(database)), told=done.append)
    assert done[0] == "row 1 of turn was set aside, with 1198 that stood on it"  # 599 turns, and a state of each
    kept = [msgpack.unpackb(cells)["id"] for _, of, cells, *_ in _dump(path, "quarantine") if of == "turn"]
    assert kept == list(range(600, 0, -1)), "the tips first"
    repairs.forget_state(database, OPENINGS + 1)  # of the first answer: that of all others stands on it
    assert len(_dump(path, "segment")) == OPENINGS
    assert [each.words for each in fsck.check(database).findings if each.severity != Severity.NOTE] == []
    database.close()


# Recomputing


@pytest.mark.parametrize("row", [1, 2, 3])
def test_a_damaged_chunk_comes_back_with_the_same_checksums(path: Path, row: int) -> None:
    before = _dump(path, "chunk"), _dump(path, "segment")
    bit_of(path, "chunk", row, "blob", 4321)
    repaired(path)
    assert (sorted(_dump(path, "chunk")), _dump(path, "segment")) == (sorted(before[0]), before[1])


def test_every_chunk_of_a_store_can_be_computed_again(path: Path) -> None:
    before = _dump(path, "chunk")
    change(path, "DELETE FROM chunk")
    report, done = repaired(path)
    assert report.findings == ()
    assert sum("bit for bit" in line for line in done) == len({row[0] for row in before})
    assert sorted(_dump(path, "chunk")) == sorted(before)


@pytest.mark.parametrize("kind", ["gemma3_text", "mamba", "jamba"])
def test_windows_and_keyframes_come_back_with_the_same_checksums(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kvloom.db"
    with kvloom.open(path, model=engine(kind)) as loom:
        branch = loom.session("talk", system="Be brief.").branch()
        branch.say("hello, and what was it?", max_tokens=5)
        branch.fork("other", back=2).say("who was there?", max_tokens=3)
    before = _dump(path, "chunk")
    change(path, "UPDATE chunk SET blob = x'00' WHERE rowid % 2 = 0")
    with kvloom.open(path, model=engine(kind)) as loom:
        assert not loom.fsck().sound
        assert loom.repair().findings == ()
    assert sorted(_dump(path, "chunk")) == sorted(before)


def test_state_with_other_bits_is_replaced_by_a_fresh_variant_and_said_to_be_one(path: Path) -> None:
    """What was stored was computed elsewhere: here its passes give other bits."""
    resealed(path, "segment", 2, digest=b"1" * 16, manifest=_other_digests(path, 2))
    change(path, "DELETE FROM chunk WHERE segment = 2")
    report, done = repaired(path)
    assert report.sound
    assert any("fresh variant" in line for line in done)
    _, _, notices = going_on(path)
    assert notices == ()


def _other_digests(path: Path, row: int) -> bytes:
    from dataclasses import replace

    from kvloom_proto.records import read_manifest

    raw = sqlite3.connect(path)
    manifest = read_manifest(raw.execute("SELECT manifest FROM segment WHERE id = ?", (row,)).fetchone()[0])
    raw.close()
    chunks = tuple(replace(each, raw_digest=b"2" * 16, stored_digest=b"2" * 16) for each in manifest.chunks)
    return pack(replace(manifest, chunks=chunks))


def test_without_the_model_everything_else_is_repaired(path: Path) -> None:
    change(path, "DELETE FROM chunk WHERE segment = 2", "DELETE FROM turn_text_docsize WHERE id = 3")
    bit_of(path, "turn", 4, "message", 100)
    with kvloom.open(path) as loom:
        report = loom.repair()
    assert kinds(report) == {("state", "segment")}
    report, _ = repaired(path)
    assert report.findings == ()


def test_a_plan_changes_nothing_and_names_the_segments(path: Path) -> None:
    change(path, "DELETE FROM chunk WHERE segment = 2", "UPDATE tag SET name = 'else', created = 1")
    before = path.read_bytes()
    planned = repairs.plan(checked(path))
    assert [step.action for step in planned.steps] == [Action.SET_ASIDE, Action.RECOMPUTE]
    assert planned.segments == [2]
    assert path.read_bytes() == before


@pytest.mark.parametrize("cell", ["''", "x'0003'"])
def test_a_chunk_that_names_no_segment_is_removed_and_the_one_it_was_of_computed_again(
    path: Path, folder: Path, cell: str
) -> None:
    change(path, f"UPDATE chunk SET segment = {cell} WHERE segment = 2")
    assert repairs.plan(checked(path)).segments == [2], "what the cell holds now is no segment's number"
    report, _ = repaired(path)
    assert report.findings == ()
    assert going_on(path) == as_ever(folder)


# Pages


def test_a_table_page_that_cannot_be_read_costs_only_what_is_on_it(path: Path, folder: Path) -> None:
    raw = sqlite3.connect(path)
    page = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'chunk'").fetchone()[0]
    raw.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 16384)
        file.write(b"\xff" * 8)
    report = checked(path)
    assert find(report, Kind.PAGE, "chunk")
    assert not report.of(Kind.ROW)
    report, done = repaired(path)
    assert [each.words for each in report.findings if each.severity != Severity.NOTE] == []
    [kept] = path.parent.glob("*.damaged")
    assert any(str(kept) in line for line in done)
    assert going_on(path)[:2] == as_ever(folder)[:2]


def test_a_damaged_index_of_sqlites_own_is_made_anew(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA writable_schema=ON")
    sql = raw.execute("SELECT sql FROM sqlite_master WHERE name = 'ix_turn_session'").fetchone()[0]
    raw.execute(
        "UPDATE sqlite_master SET sql = ? WHERE name = 'ix_turn_session'", (sql.replace("session)", "parent)"),)
    )
    raw.commit()
    raw.close()
    raw = sqlite3.connect(path)
    raw.execute("REINDEX ix_turn_session")
    raw.execute("PRAGMA writable_schema=ON")
    raw.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'ix_turn_session'", (sql,))
    raw.commit()
    raw.close()
    assert checked(path).of(Kind.SQL_INDEX)
    report, _ = repaired(path)
    assert report.findings == ()


def test_an_index_that_sqlite_takes_for_sound_and_cannot_read_is_made_anew(path: Path) -> None:
    raw = sqlite3.connect(path)
    [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_turn_session'")
    [(size,)] = raw.execute("PRAGMA page_size")
    raw.close()
    data = bytearray(path.read_bytes())
    entry = bytes([3, 3, 9, 9])  # a header of three bytes: session 1 and turn 1, both constants
    assert data[page * size - len(entry) : page * size] == entry
    data[page * size - len(entry) + 1] = 2  # of two bytes: so there is no turn in it
    path.write_bytes(data)
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    raw.close()
    assert "ix_turn_session" in checked(path).of(Kind.SQL_INDEX)[0].words
    report, _ = repaired(path)
    assert report.findings == ()
