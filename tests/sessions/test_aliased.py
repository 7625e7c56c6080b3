"""Values that are the very keys: kept once, and only while they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

from kvloom.engine import TransformersEngine
from kvloom.errors import EngineError, UnsupportedInput
from kvloom.loom import KVLoom


def test_values_that_are_the_very_keys_are_kept_once_and_never_where_they_are_not(tmp_path: Path) -> None:
    """GPT-2 has no rope: with equal weights its values are its keys."""
    model = tiny_model("gpt2")
    for block in model.transformer.h:
        size = block.attn.c_attn.nf // 3
        for parameter in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            parameter.data[..., 2 * size :] = parameter.data[..., size : 2 * size]
    engine = TransformersEngine(model, tiny_tokenizer())
    assert [[tensor.name for tensor in spec.tensors] for spec in engine.layers] == [["keys"]]
    plain = DynamicCache(config=model.config)
    ids = list(range(40, 60))
    with torch.inference_mode():
        model(torch.tensor([ids]), position_ids=torch.arange(20)[None], past_key_values=plain)
    with KVLoom(tmp_path / "s.db", model=engine) as loom:
        assert loom.capture(ids, plain) == 20
        loom.flush()
        cache, length = loom.lookup([*ids, 1])
        assert length == 20
        assert all(torch.equal(a.values, b.values) for a, b in zip(cache.layers, plain.layers, strict=True))
        plain.layers[1].values = plain.layers[1].values + 1
        with pytest.raises(UnsupportedInput, match="values"):
            loom.capture(ids, plain)
        model.transformer.h[0].attn.c_attn.bias.data[-1] += 1
        with pytest.raises(EngineError, match="values"):
            engine.run_pass(engine.new_state(1), [3])


def test_a_cache_whose_values_happen_to_be_its_keys_is_taken_whole(tmp_path: Path) -> None:
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer())
    cache = DynamicCache(config=engine.model.config)
    for layer in range(3):
        rows = torch.full((1, 2, 9, 16), float(layer + 1))
        cache.update(rows, rows.clone(), layer)
    with KVLoom(tmp_path / "s.db", model=engine) as loom:
        loom.capture(list(range(9)), cache)
        loom.flush()
        back, length = loom.lookup(list(range(10)))
        assert length == 9
        assert [float(layer.values.mean()) for layer in back.layers] == [1.0, 2.0, 3.0]
