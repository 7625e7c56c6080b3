"""Your own loop: the longest stored prefix as a transformers cache, and a cache captured back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

import kvloom
from kvloom.errors import ContextOverflow, UnsupportedInput
from kvloom_store.stats import stats


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine, codec="raw") as opened:
        yield opened


def run(loom: kvloom.KVLoom, ids: list[int]) -> DynamicCache:
    """Plain transformers' own cache after one pass over some tokens."""
    cache = DynamicCache(config=loom.engine.model.config)
    with torch.inference_mode():
        loom.engine.model(torch.tensor([ids]), past_key_values=cache, position_ids=torch.arange(len(ids))[None])
    return cache


def assert_same_rows(a: DynamicCache, b: DynamicCache, length: int) -> None:
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :length], theirs.keys[:, :, :length])
        assert torch.equal(mine.values[:, :, :length], theirs.values[:, :, :length])


def test_what_was_captured_comes_back_bit_for_bit(loom: kvloom.KVLoom):
    ids = list(range(3, 303))
    cache = run(loom, ids)
    assert loom.capture(ids, cache) == 300
    loom.flush()
    found, length = loom.lookup([*ids, 5, 6])
    assert length == 300
    assert_same_rows(found, cache, 300)


def test_one_token_is_always_left_to_run(loom: kvloom.KVLoom):
    ids = list(range(40))
    loom.capture(ids, run(loom, ids))
    loom.flush()
    assert loom.lookup(ids)[1] == 39
    assert loom.lookup(ids[:10])[1] == 9
    assert loom.lookup([*ids[:20], 99])[1] == 20
    assert loom.lookup([99])[1] == 0


def test_generate_goes_on_from_a_cache_as_if_it_had_never_stopped(loom: kvloom.KVLoom):
    model, ids = loom.engine.model, list(range(30, 90))
    own = DynamicCache(config=model.config)
    expected = model.generate(torch.tensor([ids]), past_key_values=own, max_new_tokens=12, do_sample=False)
    loom.capture(ids[:-1], run(loom, ids[:-1]))
    loom.flush()
    cache, _ = loom.lookup(ids)
    got = model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, expected)
    assert loom.capture(got[0].tolist(), cache) == len(ids) + 11


def test_running_a_cache_changes_nothing_that_is_stored(loom: kvloom.KVLoom):
    ids = list(range(50))
    before = run(loom, ids)
    loom.capture(ids, before)
    loom.flush()
    one, _ = loom.lookup([*ids, 1])
    loom.engine.model.generate(torch.tensor([[*ids, 1]]), past_key_values=one, max_new_tokens=5, do_sample=False)
    one.crop(-20)
    two, length = loom.lookup([*ids, 2])
    assert length == 50
    assert_same_rows(two, before, 50)


def test_only_new_rows_are_stored(loom: kvloom.KVLoom):
    ids = list(range(60))
    cache = run(loom, ids)
    loom.capture(ids, cache)
    loom.flush()
    once = stats(loom.database)["bytes"]["state_stored"]
    loom.capture(ids, cache)
    loom.flush()
    assert stats(loom.database)["bytes"]["state_stored"] == once
    again, _ = loom.lookup([*ids, 7])
    with torch.inference_mode():
        loom.engine.model(torch.tensor([[7]]), past_key_values=again, position_ids=torch.tensor([[60]]))
    loom.capture([*ids, 7], again)
    loom.flush()
    assert stats(loom.database)["bytes"]["state_logical"] == once // 60 * 61


def test_a_cache_that_differs_from_what_is_stored_is_kept_beside_it(loom: kvloom.KVLoom):
    ids = list(range(20))
    cache = run(loom, ids)
    loom.capture(ids, cache)
    cache.layers[1].keys = cache.layers[1].keys.clone()
    cache.layers[1].keys[0, 0, 12, 0] += 1
    loom.capture(ids, cache)
    loom.flush()
    sizes = stats(loom.database)["bytes"]
    assert sizes["state_stored"] == sizes["state_logical"] // 20 * (20 + 8)  # rows 12 to 19 twice


def test_an_unknown_schedule_is_never_replayed_as_if_it_were_known(loom: kvloom.KVLoom):
    from kvloom_proto.records import read_schedule
    from kvloom_store.schema import segment

    loom.capture([1, 2, 3], run(loom, [1, 2, 3]))
    loom.flush()
    with loom.database.read() as conn:
        row = conn.execute(segment.select()).one()
    assert read_schedule(row.schedule).unknown


def test_what_cannot_be_captured_is_refused(loom: kvloom.KVLoom):
    ids = list(range(9))
    with pytest.raises(UnsupportedInput, match="8 ids"):
        loom.capture(ids[:8], run(loom, ids))
    batch = DynamicCache(config=loom.engine.model.config)
    with torch.inference_mode():
        loom.engine.model(torch.tensor([ids, ids]), past_key_values=batch)
    with pytest.raises(UnsupportedInput):
        loom.capture(ids, batch)
    half = run(loom, ids)
    half.layers[0].keys = half.layers[0].keys.to(torch.bfloat16)
    with pytest.raises(UnsupportedInput, match="bfloat16"):
        loom.capture(ids, half)
    short = run(loom, ids)
    short.layers.pop()
    with pytest.raises(UnsupportedInput, match="layer states"):
        loom.capture(ids, short)
    with pytest.raises(UnsupportedInput):
        loom.lookup([-1])
    with pytest.raises(ContextOverflow):
        loom.lookup([1] * 5000)
