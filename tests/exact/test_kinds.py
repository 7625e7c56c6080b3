"""Contract 1 for every kind of state: eight trials a kind, over three processes, and the referee on what they left.

``make exact`` does the same with two hundred trials over nine processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import FULL_ATTENTION, KINDS, OTHERS, tiny_model, tiny_tokenizer
from tiny_configs import COMPRESSED, HYBRID, RECURRENT, ROPES

from exact import harness, trials
from exact.run import main
from kvloom.engine import TransformersEngine
from kvloom.errors import UnsupportedModel

SEED = 20250301
TRIALS, PROCESSES = 8, 3
DTYPES = ("float32", "bfloat16")
# Full attention has a test file of its own.
STATEFUL = [kind for kind in KINDS if kind not in OTHERS and kind not in FULL_ATTENTION]
SCENARIOS = {
    kind: trials.tiny_scenario(kind, DTYPES[number % len(DTYPES)], number)
    | (trials.FEW_STEPS if kind in {**ROPES, **RECURRENT, **HYBRID} else {})
    for number, kind in enumerate(STATEFUL)
}


class Found:
    """What the processes saw, and what the referee says, by kind."""

    def __init__(self, results: trials.Results, verdicts: list[dict[str, Any]]) -> None:
        self.results = results
        self.verdicts = verdicts

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The verdicts on a kind's jobs."""
        return [each for each in self.verdicts if each["job"].rsplit("-", 1)[0] == SCENARIOS[kind]["name"]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All kinds in the same processes: one costs seconds before it does anything."""
    folder = tmp_path_factory.mktemp("kinds")
    scenarios = list(SCENARIOS.values())
    results = trials.converse(folder, scenarios, trials.spread(TRIALS, PROCESSES), seed=SEED)
    jobs = [job for scenario in scenarios for job in trials.jobs_of(folder, scenario, 3)]
    return Found(results, harness.referee(jobs)[1])


@pytest.mark.parametrize("kind", STATEFUL)
def test_restores_at_any_token_are_what_was_captured_and_go_on_alike(found: Found, kind: str) -> None:
    name = SCENARIOS[kind]["name"]
    assert trials.failures(found.results, name) == []
    assert trials.total(found.results, "trials", name) >= TRIALS
    assert trials.total(found.results, "L0", name) >= 5
    assert trials.total(found.results, "L1", name) >= 20
    assert trials.total(found.results, "points", name) >= 5


@pytest.mark.parametrize("kind", STATEFUL)
def test_plain_transformers_computes_the_stored_bits(found: Found, kind: str) -> None:
    verdicts = found.of(kind)
    assert verdicts
    assert [verdict for verdict in verdicts if not verdict["ok"]] == []
    assert all(verdict["compared"] > 0 and verdict["never_compared"] == [] for verdict in verdicts)


def test_points_were_met_again_and_compared_with_the_run_that_never_stopped(found: Found) -> None:
    assert trials.total(found.results, "points again") >= len(STATEFUL)
    assert trials.total(found.results, "points seen live") >= len(STATEFUL)
    assert trials.total(found.results, "replayed") > 0


def test_keyframes_were_judged_where_there_are_any(found: Found) -> None:
    judged = {kind for kind in STATEFUL if any(verdict["frames"] for verdict in found.of(kind))}
    assert judged == {*COMPRESSED, *RECURRENT, *HYBRID}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_captured_is_refused_by_name(kind: str) -> None:
    model = tiny_model(kind)
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        TransformersEngine(model, tiny_tokenizer())


def test_the_command_line_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    options = ["--kinds", "llama", "--dtypes", "float32", "--trials", "2", "--processes", "1", "--json", str(out)]
    assert main(options) == 0
    assert "llama: exact" in capsys.readouterr().out
    assert main([*options, "--kinds", "no-such-kind"]) == 1
