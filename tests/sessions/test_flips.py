"""Single bits of a store's file that flip, anywhere: found where they matter, mended where they can be, never served.

``make torture`` flips 1,000 of a tiny model's store and 40 of SmolLM2's; ``KVLOOM_FLIPS`` says how many it is here.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torture import flips

import kvloom
from kvloom.errors import StoreError
from kvloom_store import roots, schema

FLIPS = int(os.environ.get("KVLOOM_FLIPS", "120"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_an_index_that_hides_a_model_and_its_trie_hides_no_state(
    store_path: Path, engine: kvloom.TransformersEngine
) -> None:
    with kvloom.open(store_path, model=engine) as loom:
        known = loom.root
    raw = sqlite3.connect(store_path)
    raw.execute("PRAGMA writable_schema=ON")
    for table in (schema.model, schema.root):  # the indexes now point at pages that are empty
        raw.execute(
            "UPDATE sqlite_master SET rootpage ="
            " (SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_tag_1')"
            " WHERE type = 'index' AND tbl_name = ?",
            (table.name,),
        )
    raw.commit()
    raw.close()
    with kvloom.open(store_path, model=engine) as loom:
        digest = engine.identity().digest
        with loom.database.read() as conn:
            assert roots.find_model(conn, digest) is not None
        assert loom.root == known
