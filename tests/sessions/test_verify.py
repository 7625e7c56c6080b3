"""Receipts: what is stored is what was written, and what the recorded passes give, or where it is not."""

from __future__ import annotations

import functools
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import CorruptRow, ModelMismatch
from kvloom_proto.records import pack, read_manifest
from kvloom_store import schema
from kvloom_store.checksum import digest, row_checksum

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def engine(kind: str = "llama", seed: int = 0) -> kvloom.TransformersEngine:
    return kvloom.TransformersEngine(tiny_model(kind, seed=seed), tiny_tokenizer(), name="tiny", keyframe_spacing=16)


def talk(path: Path, kind: str = "llama") -> None:
    with kvloom.open(path, model=engine(kind), codec="raw") as loom:
        main = loom.session("talk", system="Be brief.").branch()
        main.say("hello, and what was it that they said to her when she was there?", max_tokens=8)
        main.fork("other", back=2).say("hello, and what was it that he said?", max_tokens=6)
        main.session.fork("cut", "main:30")
        main.say("and when was that?", max_tokens=8)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mamba", "jamba", "qwen3_next"])
@pytest.mark.parametrize("at", ["main", "other", "cut", "main~1", "main:41"])
def test_state_of_every_point_is_what_was_written_and_what_is_computed_again(
    store_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, at: str
) -> None:
    path = _talked(tmp_path_factory.getbasetemp(), kind)
    with kvloom.open(path, model=engine(kind)) as loom:
        receipt = loom.find("talk").verify(at, replay=True)
    assert receipt.ok
    assert (receipt.difference, receipt.damaged) == (None, ())
    assert receipt.replayed == receipt.held == receipt.tokens - receipt.pending
    assert receipt.bytes > 0


@functools.cache
def _talked(folder: Path, kind: str) -> Path:
    path = folder / f"verify-{kind}.db"
    talk(path, kind)
    return path


@pytest.fixture
def path(store_path: Path) -> Path:
    store_path.parent.mkdir()
    talk(store_path)
    return store_path


def test_siblings_that_were_decoded_together_are_computed_again_so(store_path: Path) -> None:
    with kvloom.open(store_path, model=engine()) as loom:
        branch = loom.session("talk").branch()
        branch.say("hello", max_tokens=3)
        branch.sample("so it was", n=3, max_tokens=6, seed=1)
        for each in branch.session.branches():
            assert branch.session.verify(each.name, replay=True).ok


def test_a_receipt_names_model_and_provenance_and_needs_no_model(path: Path) -> None:
    with kvloom.open(path, must_exist=True) as loom:
        receipt = loom.find("talk").verify()
    assert receipt.ok
    assert (receipt.model, receipt.dtype) == ("tiny", "float32")
    assert {each.torch for each in receipt.provenances} == {torch.__version__}
    assert receipt.replayed is None
    assert receipt.to_json()["ok"] is True


def test_a_damaged_chunk_is_on_the_receipt_of_every_path_over_it_and_of_no_other(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("UPDATE chunk SET blob = x'00' WHERE segment = (SELECT max(segment) FROM chunk)")
    raw.commit()
    raw.close()
    with kvloom.open(path, model=engine()) as loom:
        receipt = loom.find("talk").verify("main", replay=True)
        assert not receipt.ok
        assert len(receipt.damaged) == 1
        assert receipt.replayed is None, "there is nothing to compare with"
        assert loom.find("talk").verify("other").ok


def test_state_that_was_never_written_is_not_well(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.row_factory = sqlite3.Row
    values = dict(raw.execute("SELECT * FROM turn_state ORDER BY id DESC").fetchone())
    values["segment"] = None
    del values["checksum"]
    raw.execute(
        "UPDATE turn_state SET segment = NULL, checksum = ? WHERE id = ?",
        (row_checksum(schema.turn_state, values), values["id"]),
    )
    raw.commit()
    raw.close()
    with kvloom.open(path, model=engine()) as loom:
        receipt = loom.find("talk").verify(replay=True)
    assert not receipt.ok
    assert receipt.unwritten == values["state_end"] - values["state_start"]
    assert receipt.replayed == receipt.held == values["state_start"]


def test_state_that_another_machine_would_compute_is_told_to_the_token(path: Path) -> None:
    """One number of one row, sealed with fitting checksums: as another processor might have rounded it."""
    with kvloom.open(path, model=engine()) as loom:
        last = loom.find("talk").verify()
    token, layer = _round_otherwise(path)
    with kvloom.open(path, model=engine()) as loom:
        assert loom.find("talk").verify().ok
        receipt = loom.find("talk").verify(replay=True)
    assert not receipt.ok
    assert receipt.difference is not None
    assert (receipt.difference.token, receipt.difference.layer) == (token, layer)
    assert (receipt.difference.tensor, receipt.difference.tokens) == ("values", 1)
    assert 0 < receipt.difference.largest < 1e-3
    assert receipt.bytes == last.bytes


def _round_otherwise(path: Path) -> tuple[int, int]:
    """Change the last bit of a value of layer 1 in the middle of the last segment."""
    raw = sqlite3.connect(path)
    raw.row_factory = sqlite3.Row
    segment = dict(raw.execute("SELECT * FROM segment ORDER BY id DESC").fetchone())
    piece = dict(raw.execute("SELECT * FROM chunk WHERE segment = ?", (segment["id"],)).fetchone())
    manifest = read_manifest(segment["manifest"])
    [named] = manifest.chunks
    heads, size = manifest.layers[0].tensors[0].shape
    array = np.frombuffer(bytearray(piece["blob"]), "<u4").reshape(named.layers, 2, heads, named.tokens, size)
    array[1, 1, 0, 3, 2] ^= 1
    blob = array.tobytes()
    named = replace(named, raw_digest=digest(blob), stored_digest=digest(blob))
    segment["manifest"] = pack(replace(manifest, chunks=(named,)))
    _seal(raw, "segment", segment, "id = ?", (segment["id"],))
    piece["blob"] = blob
    _seal(raw, "chunk", piece, "segment = ?", (segment["id"],))
    raw.commit()
    raw.close()
    return named.position + 3, 1


def _seal(raw: sqlite3.Connection, table: str, values: dict[str, object], where: str, key: tuple[int]) -> None:
    covered = {name: cell for name, cell in values.items() if name != "checksum"}
    if table == "chunk":
        covered["blob"] = digest(values["blob"])
    values["checksum"] = row_checksum(schema.metadata.tables[table], covered)
    raw.execute(f"UPDATE {table} SET {', '.join(f'{n} = ?' for n in values)} WHERE {where}", (*values.values(), *key))


def test_another_model_is_refused(path: Path) -> None:
    with kvloom.open(path, model=engine(seed=1)) as loom:
        assert loom.find("talk").verify().ok
        with pytest.raises(ModelMismatch):
            loom.find("talk").verify(replay=True)


def test_damaged_tokens_are_an_error(path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("UPDATE node SET tokens = x'00000000' WHERE id = 2")
    raw.commit()
    raw.close()
    with kvloom.open(path, must_exist=True) as loom, pytest.raises(CorruptRow):
        loom.find("talk").verify()


def test_a_session_in_which_nothing_was_said_is_well(store_path: Path) -> None:
    with kvloom.open(store_path, model=engine()) as loom:
        receipt = loom.session("empty").verify(replay=True)
    assert receipt.ok
    assert (receipt.tokens, receipt.turn, receipt.model) == (0, None, None)
