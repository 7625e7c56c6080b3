"""The measurements that count, in small: bytes and tokens are the same on every machine, so they can be asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import codec, keyframes, lossy, shared_prompts, windows
from benchmarks.small import random_engine


def test_a_restore_of_windows_reads_nearly_as_few_bytes_as_it_can() -> None:
    found = windows.run(lengths=(1500,))["1500"]
    for name in ("one", "many", "one@left"):
        assert found[name]["of_limit"]["min"] > 0.9, name
        assert found[name]["times_fewer"]["min"] > 1.8, name


def test_a_restore_at_any_token_replays_no_more_than_the_spacing() -> None:
    for kind, found in keyframes.run(exchanges=4, points=12).items():
        if kind in ("hybrid", "recurrent"):
            assert found["replayed_at_every_token"]["max"] < found["spacing"]
            assert found["replayed_at_turn_starts"]["max"] == 0
            assert found["conversation_end"]["times"] > 5


def test_every_prompt_reuses_what_it_shares_but_for_the_spacing(tmp_path: Path) -> None:
    engine = random_engine("hybrid", spacing=64)
    told = shared_prompts.say(tmp_path / "kvloom.db", engine, prompts=6, shared=300, own=90)
    assert all(tokens.reused >= 300 - 64 for tokens in told[1:])
    assert {tokens.reused + tokens.replayed for tokens in told[1:]} == {300}
    assert {tokens.reused for tokens in told[:1]} == {0}


def test_states_at_ends_are_counted_from_the_last_one_that_fits() -> None:
    assert keyframes.recomputed([10, 20], [5, 10, 19, 25]) == 5 + 0 + 9 + 5
    assert keyframes.last_that_fit([10, 20, 30], budget=65, keyframe_bytes=5, row_bytes=1) == [20, 30]
    assert keyframes.last_that_fit([10, 20, 30], budget=10, keyframe_bytes=5, row_bytes=0) == [20, 30]
    assert keyframes.best_spacing(1 << 20, 1e-9, 1e-3, 1, path=4096) == (2 * 1e-9 * 2**20 * 4096 / 1e-3) ** 0.5


def test_a_codec_is_measured_by_the_bytes_it_leaves() -> None:
    rng = np.random.default_rng(1)
    exponents = rng.integers(0, 4, 50_000, np.uint8)  # two bits each
    chunk = codec.Chunk(np.stack([rng.integers(0, 256, 50_000, np.uint8), exponents], 1).tobytes(), 2)
    raw, zstd = (codec.measure([chunk], name, rounds=1) for name in ("raw", "zstd"))
    assert (raw["times_smaller"], raw["bits"]) == (1, 16)
    assert zstd["bits"] == pytest.approx(10, abs=0.1)
    assert zstd["times_smaller"] == pytest.approx(16 / zstd["bits"])
    rows = codec.section({"tokens": 1, "bfloat16": {"raw": raw, "zstd": zstd}}).tables[0].rows
    assert [row[:3] for row in rows] == [["bfloat16", "raw", "1.000"], ["bfloat16", "zstd", f"{16 / zstd['bits']:.3f}"]]


def test_what_loss_costs_is_counted_from_distributions() -> None:
    exact = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    other = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    following = torch.tensor([0, 1])
    same, found = lossy.compare(exact, exact, following), lossy.compare(exact, other, following)
    assert same == {"perplexity": pytest.approx(2), "top1_agreement": 1, "kl_mean": 0, "kl_max": 0}
    assert found["perplexity"] == pytest.approx(8**0.5)
    assert found["top1_agreement"] == 0.5
    assert found["kl_max"] == pytest.approx(0.25 * np.log(2)) == 2 * found["kl_mean"]
