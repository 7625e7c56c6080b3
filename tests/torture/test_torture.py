"""A small run of ``make torture``, and that docs/torture.md shows one that found nothing wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from exact import harness

from torture import page

PARTS = ("kills", "writes", "flips", "fuzz", "flips_real", "full", "models", "gc", "crowd", "commits")

SMALL = ("kills", "writes", "full", "gc", "crowd", "commits")
"""Those that have no tests of their own."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the small run found. It is a process of its own: it forks, which one with threads must not."""
    out = tmp_path_factory.mktemp("torture") / "found.json"
    only = ["--only", ",".join(SMALL), "--jobs", "1"]
    command = [sys.executable, "-W", "error", "-m", "torture.run", "--small", *only, "--json", str(out)]
    environment = {**harness.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())


def test_killed_at_any_moment_no_acknowledged_turn_is_lost_and_no_bit_is_wrong(found: dict[str, Any]) -> None:
    kills = found["kills"]
    assert kills["wrong"] == []
    assert kills["kills"] == 6
    assert kills["turns"] > 0
    assert kills["elements"] > 0


def test_where_writes_fail_the_error_is_documented_and_nothing_acknowledged_is_lost(found: dict[str, Any]) -> None:
    assert found["writes"]["wrong"] == []
    assert found["writes"]["refused"] > 0
    assert set(found["writes"]["errors"]) <= {"StoreUnavailable"}


def test_on_a_full_disk_nothing_acknowledged_is_lost(found: dict[str, Any]) -> None:
    if "not_run" in found["full"]:
        pytest.skip(found["full"]["not_run"])
    assert found["full"]["wrong"] == []
    assert found["full"]["refused"] > 0


def test_of_many_processes_none_loses_a_turn_or_is_told_of_another_error(found: dict[str, Any]) -> None:
    assert found["crowd"]["wrong"] == []
    assert found["crowd"]["turns"] > 0
    assert found["crowd"]["reads"] > 0


def test_of_state_that_was_dropped_every_branch_goes_on_and_comes_back_with_its_bits(found: dict[str, Any]) -> None:
    assert found["gc"]["wrong"] == []
    for row in found["gc"]["rows"]:
        assert row["branches"] == row["went_on"] == row["same_bits"] == 6
        assert row["foretold_s"] > 0


def test_turns_commit_while_much_state_is_written(found: dict[str, Any]) -> None:
    assert found["commits"]["wrong"] == []
    assert found["commits"]["commits"] > found["commits"]["rounds"]


@pytest.mark.parametrize("name", PARTS)
def test_the_page_shows_a_full_run_in_which_nothing_was_wrong(name: str) -> None:
    shown = page.part(page.PAGE.read_text(), name)
    if not shown.startswith(page.NOT_RUN):
        verdicts = re.findall(r"\| \*\*.*\*\* \| ([\d,]+) \|", shown)
        assert verdicts
        assert set(verdicts) == {"0"}
