"""What the trials and the referee would miss is worth nothing: kvloom, broken in each of these ways, must fail them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvloom.passes
from exact import harness, trials, worker
from kvloom.live import LiveState
from kvloom.row_layers import WindowLayer
from kvloom_proto.records import STORED_BY_ROW, expand
from kvloom_store import loading, restore
from kvloom_store.database import Database
from kvloom_store.rows import Captured

Loaded = Callable[[list[int], Any, int], None]
"""Does something to the memory rows were loaded into: the layers that have rows, the memory, where the rows end."""


def _row_shifted(layers: list[int], buffer: Any, end: int) -> None:
    for number in layers:
        keys = buffer.tensors[number][0]
        keys[:, :end] = np.roll(keys[:, :end], 1, axis=1)


def _last_row_missing(layers: list[int], buffer: Any, end: int) -> None:
    for number in layers:
        buffer.tensors[number][0][:, end - 1] = 0


def _layers_swapped(layers: list[int], buffer: Any, end: int) -> None:
    kinds = [buffer._specs[number].kind for number in layers]
    other = next(n for n, kind in zip(layers[1:], kinds[1:], strict=True) if kind == kinds[0])
    first, second = buffer.tensors[layers[0]][0], buffer.tensors[other][0]
    first[:], second[:] = second.copy(), first.copy()


WINDOW_MASK = WindowLayer.get_mask_sizes

ROWS: dict[str, Loaded] = {
    "row shifted": _row_shifted,
    "last row missing": _last_row_missing,
    "layers swapped": _layers_swapped,
}


@pytest.fixture(autouse=True)
def _grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvloom.passes, "GRID", trials.GRID)


def conversation(folder: Path, kind: str) -> dict[str, Any]:
    """Something said in a store of its own; the scenario."""
    scenario = {**trials.tiny_scenario(kind, "float32", 0), "name": "s"}
    before = worker.Scenario(folder, scenario)
    before.talk(random.Random(3), None)
    before.loom.close()
    return scenario


def restored(folder: Path, scenario: dict[str, Any]) -> set[str]:
    """The levels at which bringing the last turn back fails."""
    after = worker.Scenario(folder, scenario)
    after.restore(list(after.journal)[-1])
    after.loom.close()
    return {text.split()[1] for text in after.failures}


@pytest.mark.parametrize("mutant", ROWS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v32", "falcon_h1"])
def test_rows_loaded_wrongly_fail_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mutant: str
) -> None:
    scenario = conversation(tmp_path, kind)
    assert restored(tmp_path, scenario) == set()
    load = loading.load

    def wrong(conn: Any, links: Any, rows: Any, windows: Any, sink: Any) -> int:
        read = load(conn, links, rows, windows, sink)
        specs = expand(links[0].manifest.layers)
        layers = [number for number, spec in enumerate(specs) if spec.kind in STORED_BY_ROW]
        ROWS[mutant](layers, sink, max(each.end for each in (*rows, *windows)))
        return read

    monkeypatch.setattr(loading, "load", wrong)
    assert restored(tmp_path, scenario) == {"L0", "L1"}


@pytest.mark.parametrize("kind", ["gemma2", "mistral_window", "llama4_text"])
def test_a_window_that_counts_one_token_too_many_fails_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scenario = conversation(tmp_path, kind)
    assert restored(tmp_path, scenario) == set()

    def counted(layer: WindowLayer, query_length: int) -> tuple[int, int]:
        size, first = WINDOW_MASK(layer, query_length)
        return size, first + (first > 0)

    monkeypatch.setattr(WindowLayer, "get_mask_sizes", counted)
    assert "L1" in restored(tmp_path, scenario)


@pytest.mark.parametrize("kind", ["mamba2", "jamba", "minimax"])
def test_keyframes_whose_layers_are_swapped_fail_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scenario = conversation(tmp_path, kind)
    assert restored(tmp_path, scenario) == set()
    load = restore.load_keyframe

    def swapped(conn: Any, links: Any, keyframe: Any) -> Any:
        frame, size = load(conn, links, keyframe)
        one, other, *rest = frame
        return {one: frame[other], other: frame[one], **{number: frame[number] for number in rest}}, size

    monkeypatch.setattr(restore, "load_keyframe", swapped)
    assert restored(tmp_path, scenario) == {"L0", "L1"}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_h1", "minimax", "rwkv"])
def test_a_keyframe_one_token_late_fails_the_trials_and_the_referee(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stored under the position before the one it was taken at."""

    sound = LiveState.take_captured

    def late(live: LiveState) -> Captured:
        start, captured = live.captured, sound(live)
        return Captured(captured.rows, {max(at - 1, start): frame for at, frame in captured.frames.items()})

    with monkeypatch.context() as broken:
        broken.setattr(LiveState, "take_captured", late)
        scenario = conversation(tmp_path, kind)
    assert "L0" in restored(tmp_path, scenario)
    database = Database(tmp_path / "s.db")
    states = harness.leaves(database)
    job = harness.export(database, states[-1]["id"], tmp_path / "job", {"tiny": kind}, "float32")
    database.close()
    status, (verdict,) = harness.referee([job])
    assert (status, verdict["ok"]) == (1, False)
