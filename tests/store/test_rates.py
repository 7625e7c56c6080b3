"""How fast a model was: what its turns say of it."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom_store import rates
from kvloom_store.turns import Turn


def said(reused: int, computed: int, prefill: float, **more: Any) -> Turn:
    timings = {"tokens": {"reused": reused, "computed": computed, **more.pop("tokens", {})}, "prefill": prefill, **more}
    return Turn(1, "", 1, None, "user", False, {}, None, {}, timings, b"", 0)


def test_a_path_takes_its_beginning_and_its_tokens():
    pace = rates.pace([said(10, tokens, 0.02 + 0.001 * tokens) for tokens in (10, 40, 400)])
    assert pace is not None
    assert pace.prefill(100) == pytest.approx(rates.BESIDE + 0.02 + 0.1)
    assert pace.prefill(0) == 0


def test_prefills_that_went_on_from_state_count_where_there_are_any():
    """Some models read a message in one pass only where nothing was before it."""
    alone = [said(10, tokens, 0.005 * tokens) for tokens in (10, 40, 100)]
    assert rates.pace([said(0, 500, 0.02), *alone]) == rates.pace(alone)
    only = rates.pace([said(0, 500, 0.5)])
    assert only is not None
    assert only.token == pytest.approx(0.001)


def test_running_passes_again_takes_what_replies_took_and_a_beginning_for_each_path():
    reply = said(10, 20, 0.02, first_token=0.1, total=1.1, tokens={"generated": 101})
    pace = rates.pace([reply])
    assert pace is not None
    assert pace.single == pytest.approx(0.01)
    assert pace.exact(300, 200, paths=3) == pytest.approx(3 * pace.begin + 100 * pace.token + 2.0)
    assert pace.exact(0, 0, paths=3) == 0


def test_without_timings_nothing_is_said():
    assert rates.pace([]) is None
    assert rates.prefill([]) == rates.Speed()
