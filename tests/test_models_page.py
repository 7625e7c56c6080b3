"""docs/models.md says what the models do: all but the trials is made again, and those say that nothing differed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from tiny import KINDS, OTHERS

ROOT = Path(__file__).parent.parent
RUN = [kind for kind in KINDS if kind not in OTHERS]
SOME = ("deepseek_v32", "gemma3_text", "rwkv", "jamba", "minimax")
"""Default sizes that are computed again, one of each way to take state: all of them take a minute on a busy machine."""


@pytest.fixture(scope="module")
def models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_models", ROOT / "docs" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(models: ModuleType) -> str:
    return models.PAGE.read_text()


def found(kind: str, failures: list[str]) -> dict[str, object]:
    """A row as exact.run writes it."""
    return {"kind": kind, "trials": 8, "restarts": 2, "L0": 1, "L1": 2000, "elements": 3, "failures": failures}


def test_every_kind_is_on_the_page_as_the_engine_finds_it(models: ModuleType, page: str):
    assert models.part(page, "table") == models.table(models.cells_on(page)), "run: make models ARGS=--keep"


def test_nothing_differed_in_any_trial(models: ModuleType, page: str):
    cells = models.cells_on(page)
    assert list(cells) == RUN
    for kind, levels in cells.items():
        assert all(re.fullmatch(r"0 of [1-9][\d,]*", cell) for cell in levels), f"{kind}: {levels}"
    assert re.search(r"at least ([\d,]+) trials a kind over \d+ restarts", models.part(page, "trials"))


def test_what_is_refused_is_refused_in_these_words(models: ModuleType, page: str):
    assert models.part(page, "refused") == models.refused(), "run: make models ARGS=--keep"


def test_sizes_are_those_of_the_default_configs(models: ModuleType, page: str):
    lines = models.part(page, "defaults").splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(models.WITH_DEFAULTS)
    made = models.default_sizes(SOME).splitlines()
    assert made[0] == lines[0]
    assert set(made[2:]) <= set(lines), "run: make models ARGS=--keep"


@pytest.mark.model
def test_sizes_are_those_of_the_real_models(models: ModuleType, page: str):
    assert models.part(page, "real") == models.real_sizes(), "run: make models ARGS=--keep"


def test_a_run_that_found_a_difference_shows(models: ModuleType):
    wrong = {"llama": ["llama-float32 L1 0a1b2c3d what comes next: expected 1, found 2"], "gpt2": ['referee {"ok": 0}']}
    wrong["qwen3"] = ["AssertionError: the process died"]
    cells = models.cells_of({"kinds": [found(kind, wrong.get(kind, [])) for kind in RUN]})
    assert cells["llama"] == ["0 of 1", "**differs**", "0 of 3"]
    assert cells["gpt2"] == ["0 of 1", "0 of 2,000", "**differs**"]
    assert cells["qwen3"] == ["**differs**"] * 3
    assert cells["mamba"] == ["0 of 1", "0 of 2,000", "0 of 3"]


def test_a_run_that_left_kinds_out_is_not_taken(models: ModuleType):
    with pytest.raises(SystemExit, match="mamba2"):
        models.cells_of({"kinds": [found(kind, []) for kind in RUN if kind != "mamba2"]})


def test_the_trials_of_another_run_are_put_on_the_page(
    models: ModuleType, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, run = tmp_path / "models.md", tmp_path / "found.json"
    copy.write_text(page)
    run.write_text(json.dumps({"seed": 5, "versions": {"torch": "9.9"}, "kinds": [found(kind, []) for kind in RUN]}))
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(models, "PAGE", copy)
    for slow in ("default_sizes", "real_sizes", "refused"):
        monkeypatch.setattr(models, slow, lambda: "made")
    assert models.main(["--json", str(run)]) == 0
    written = copy.read_text()
    assert set(map(tuple, models.cells_on(written).values())) == {("0 of 1", "0 of 2,000", "0 of 3")}
    assert "8 trials a kind over 2 restarts" in written
    assert "seed 5, torch 9.9" in written
    assert models.main(["--keep"]) == 0
    assert copy.read_text() == written
