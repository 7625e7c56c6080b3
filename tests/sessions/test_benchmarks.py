"""The measurements that count, in small: bytes and tokens are the same on every machine, so they can be asserted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import keyframes, shared_prompts, windows
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
