"""The measurements of large stores and of long contexts, in small: that they measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import long, plot, scale


def test_every_operation_is_measured_on_a_small_store_and_a_larger_one():
    found = scale.run(quick=True)
    assert found["nodes"] == [216, 1016]
    assert found["tokens"] == [10_800, 50_800]
    assert set(found["operations"]) == set(scale.ROUNDS)
    shown = scale.show(found)
    for name in (*scale.ROUNDS, *(f"kvloom {command}" for command in scale.COMMANDS)):
        assert any(line.startswith(f"{name} ") for line in shown.splitlines()), name
    section = scale.section(found)
    assert [bar.bar for bar in section.bars] == [scale.MEDIAN_MS, scale.P99_MS, scale.GROWTH]
    assert all(len(row) == len(section.tables[0].columns) for row in section.tables[0].rows)
    assert "milliseconds" in plot.svg(section.plots[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what is resident is told by Linux alone")
def test_long_state_is_restored_from_the_file_its_end_and_its_log():
    found = long.run(**long.QUICK)
    each, size = found["2000"], 2_000 * long.ROW_BYTES
    assert each["state"] == size
    assert each["files"][long.PLAIN]["file"] > size
    assert each["files"][long.FAR]["file"] > 2 * size
    assert each["files"][long.LOG]["file"] < size < each["files"][long.LOG]["log"]
    section = long.section(found)
    assert [bar.bar for bar in section.bars] == [long.MOST_BEYOND] * 3
    assert all(len(row) == len(section.tables[0].columns) for row in section.tables[0].rows)
