"""The referee, before anybody relies on it: for every kind of state it accepts what plain transformers did, and nothing
that is wrong.

Jobs are recorded here, by code that shares nothing with the referee but the models, and judged in another process.
Mutants are either restored wrongly, so that what follows was computed from other state, or stored wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.record import FAULTS, Recorder, faults_of, frames, record
from tiny import KINDS, OTHERS, tiny_model

from exact import harness

DTYPES = ("float32", "bfloat16")
JUDGED = [kind for kind in KINDS if kind not in OTHERS]
Expectations = dict[str, torch.Tensor]


def late_frames(expect: Expectations) -> Expectations:
    """Every frame replaced by the one of a token later, where there is one."""
    moved = {}
    for name in expect:
        if name.startswith("frame."):
            _, at, tensor = name.split(".", 2)
            later = f"frame.{int(at) + 1}.{tensor}"
            moved[name] = expect.get(later, expect[name]).clone()
    return {**expect, **moved}


def shifted_rows(expect: Expectations) -> Expectations:
    """The rows of one part, one place too far."""
    name = next(name for name in expect if name.startswith("keys."))
    return {**expect, name: torch.roll(expect[name], 1, dims=-2)}


def flipped_bit(expect: Expectations) -> Expectations:
    """One bit of a window's row, a frame or whatever else comes first."""
    name = min(expect)
    other = expect[name].clone()
    other.view(-1)[other.numel() // 2] ^= 1
    return {**expect, name: other}


STORED: dict[str, tuple[str, Callable[[Expectations], Expectations]]] = {
    "stored one token late": ("frame.", late_frames),
    "stored one row further": ("keys.", shifted_rows),
    "one flipped bit": ("", flipped_bit),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The referee's verdicts on a sound job of every kind in both dtypes, and on their mutants."""
    folder = tmp_path_factory.mktemp("recorded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jobs = []
    try:
        for number, kind in enumerate(JUDGED):
            for dtype in DTYPES:
                jobs.append(record(kind, dtype, folder / f"{kind} {dtype}"))
            # Mutants take turns with the dtype: what they break does not depend on it.
            dtype = DTYPES[number % 2]
            for name in faults_of(kind):
                jobs.append(record(kind, dtype, folder / f"{kind} {name}", fault=FAULTS[name]))
            sound = folder / f"{kind} {dtype}"
            expect = harness.load_job(sound)[1]
            for name, (needs, change) in STORED.items():
                if any(each.startswith(needs) for each in expect):
                    jobs.append(harness.tampered(sound, folder / f"{kind} {name}", expect=change(expect)))
    finally:
        torch.set_num_threads(threads)
    status, judged = harness.referee(jobs)  # in one process: each would import and build every model
    assert status == 1
    return {verdict["job"]: verdict for verdict in judged}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", JUDGED)
def test_a_sound_job_of_every_kind_passes(verdicts: dict[str, dict[str, Any]], kind: str, dtype: str) -> None:
    verdict = verdicts[f"{kind} {dtype}"]
    assert (verdict["ok"], verdict["differences"], verdict["never_compared"]) == (True, [], [])
    assert verdict["compared"] > 10_000


@pytest.mark.parametrize("kind", JUDGED)
def test_every_mutant_of_every_kind_is_noticed(verdicts: dict[str, dict[str, Any]], kind: str) -> None:
    tried = {name: verdict for name, verdict in verdicts.items() if name.split()[0] == kind}
    missed = [name for name, verdict in tried.items() if verdict["ok"] and name.split()[1] not in DTYPES]
    assert missed == []
    assert len(tried) >= 2 + 3


def test_each_kind_of_mutant_was_tried(verdicts: dict[str, dict[str, Any]]) -> None:
    tried = [name.split(" ", 1)[1] for name in verdicts]
    for name in (*FAULTS, *STORED):
        assert tried.count(name) >= 6


def test_a_frame_stored_a_token_late_is_named(verdicts: dict[str, dict[str, Any]]) -> None:
    names = {difference["name"] for difference in verdicts["mamba2 stored one token late"]["differences"]}
    assert names
    assert all(name.startswith("frame.") for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", JUDGED)
def test_tiny_models_are_finite_and_remember(kind: str, dtype: str) -> None:
    """State that stops to matter, or that overflows, proves nothing."""
    model = tiny_model(kind, dtype)
    beginnings = [list(range(40)), [7, *range(1, 40)]]
    ends = []
    for tokens in beginnings:
        run = Recorder(model)
        run.step(tokens)
        for token in (5, 6, 7):
            run.step([token])
        ends.append((run.out[43][1], frames(run.state)))
    (one, held), (other, _) = ends
    assert torch.isfinite(one.float()).all()
    assert all(torch.isfinite(tensor.float()).all() for tensor in held.values())
    assert not torch.equal(one, other)
