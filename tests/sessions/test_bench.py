"""``make bench`` in small, with a tiny model: all on its page is measured, and the page follows from its JSON."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import tiny_llama_folder

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the measurements lie, as for ``python -m benchmarks``

from benchmarks import __main__ as bench
from benchmarks import first_token, page, plot, processes, report, start

ROOT = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "first_token": {"lengths": (1040,), "short": (8, 32), "rounds": 2, "dtypes": ("float32",)},
    "turn": {"prefix": 120, "rounds": 2, "dtypes": ("float32", "bfloat16")},
    "restore": {"tokens": 200, "replies": 4, "rounds": 2, "dtypes": ("float32", "bfloat16")},
    "capture": {"prefix": 64, "tokens": 4, "rounds": 3, "written": 2},
    "decode": {"contexts": (16, 40), "tokens": 5, "rounds": 2},
    "memory": {"prefix": 80, "branches": 3, "tokens": 3},
    "tree": {"prefix": 100, "branches": 2, "exchanges": 2},
    "codec": {"tokens": 64, "dtypes": ("bfloat16",)},
    "fork": {"lengths": (50, 200), "rounds": 4},
    "start": {"rounds": 1, "dtypes": ("float32",)},
}


def in_this_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Starting an interpreter with torch in it takes longer than all that is done in it here."""
    return json.loads(json.dumps(function(**json.loads(json.dumps(arguments)))))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a quick run of everything wrote."""
    model = tiny_llama_folder(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in SMALL.items():
            module = importlib.import_module(f"benchmarks.{name}")
            patch.setattr(module, "QUICK", settings)
            if hasattr(module, "in_new_process"):
                patch.setattr(module, "in_new_process", in_this_process)
        patch.setattr(start, "until_told", lambda command: {"seconds": float(len(command)), "processor": 0.5})
        assert bench.main(["--quick", "--model", str(model), "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / page.RESULTS).read_text())


def test_everything_on_the_page_is_measured_and_shown(out: Path, results: dict[str, Any]):
    assert tuple(results["measured"]) == tuple(SMALL)
    assert (*SMALL, "scale", "long") == bench.ON_PAGE  # the runs in small of these are in test_benchmarks_scale
    text = (out / page.PAGE).read_text()
    for name, each in results["measured"].items():
        assert f"## {page.section_of(name, each['found']).title}\n" in text
        assert f"`python -m benchmarks {name}`" in text
    assert "make bench QUICK=1" in text
    for named in ("processor", "threads", "load", "torch", "SQLite", "transformers"):
        assert named in text


def test_a_command_is_timed_to_its_first_byte_and_one_that_fails_is_not_taken_for_fast():
    found = start.until_told([sys.executable, "-c", "print(1)"])
    assert set(found) == {"seconds", "processor"}
    assert found["processor"] > 0
    for program in ("print(1); raise SystemExit(3)", "raise SystemExit(0)"):
        with pytest.raises(AssertionError):
            start.until_told([sys.executable, "-c", program])


def test_the_page_and_its_plots_follow_from_the_json_alone(out: Path, results: dict[str, Any]):
    made = page.files(copy.deepcopy(results))
    assert {name: (out / name).read_text() for name in made} == made
    assert page.files(results) == made


def test_writing_it_again_takes_old_plots_away(out: Path, tmp_path: Path, results: dict[str, Any]):
    page.write(results, tmp_path)
    (tmp_path / page.RESULTS).write_text(json.dumps(results))
    old = tmp_path / page.PLOTS / "old.svg"
    old.write_text("")
    (tmp_path / page.PAGE).unlink()
    assert bench.main(["--page", "--out", str(tmp_path)]) == 0
    assert not old.exists()
    assert (tmp_path / page.PAGE).read_text() == (out / page.PAGE).read_text()


def test_tables_are_whole_and_plots_are_there(out: Path):
    text = (out / page.PAGE).read_text()
    for plotted in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (out / plotted).exists()
    width = 0
    for line in text.splitlines():
        cells = line.count("|") - line.count("\\|")
        assert not line.startswith("|") or not width or cells == width, line
        width = cells if line.startswith("|") else 0


def test_every_plot_is_xml_with_axes_units_and_a_legend(out: Path):
    drawn = sorted((out / page.PLOTS).glob("*.svg"))
    assert len(drawn) == 6
    for path in drawn:
        texts = [
            node.text for node in ElementTree.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert "prefers-color-scheme:dark" in path.read_text()
        assert {"seconds", "GB/s", "tokens a second", "MB", "milliseconds"} & set(texts), path.name
    legend = (out / page.PLOTS / "first-token-float32.svg").read_text()
    assert all(f">{name}</text>" in legend for name in ("recomputed", "restored, cold", "restored", "in memory"))


def test_what_was_measured_is_what_happened(results: dict[str, Any]):
    found = {name: each["found"] for name, each in results["measured"].items()}
    token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their width, bytes
    assert found["first_token"]["float32"]["1040"]["bytes"] >= 1040 * token
    assert found["restore"]["float32"]["bytes"] == 2 * found["restore"]["bfloat16"]["bytes"] == 200 * token
    assert found["memory"]["row"] == token
    assert found["fork"]["branches_added"] == 2 * 4
    assert found["fork"]["state_added"] == found["fork"]["turns_added"] == 0
    assert found["capture"]["bytes"]["rows"]["min"] > 4 * token
    assert found["capture"]["bytes"]["file"]["min"] >= found["capture"]["bytes"]["rows"]["min"]
    assert found["tree"]["branches"] == 3


def test_break_even_is_the_length_from_which_on_restoring_never_was_slower():
    def each(restored: float, recomputed: float) -> dict[str, Any]:
        return {"first_token": {"median": restored}, "recompute": {"median": recomputed}}

    lengths = {"8": each(1, 2), "16": each(3, 2), "32": each(2, 2), "1024": each(3, 9)}
    assert first_token.break_even(lengths, "first_token") == 32
    assert first_token.break_even({**lengths, "2048": each(9, 3)}, "first_token") is None


def test_a_bar_is_met_on_its_own_side():
    assert report.Bar("", 1.8, 1.8).met
    assert not report.Bar("", 1.81, 1.8).met
    assert report.Bar("", 100, 100, at_least=True).met
    assert not report.Bar("", 99, 100, at_least=True).met
    assert not report.Bar("", None, 1).met


def test_numbers_have_three_digits_that_count():
    assert [report.number(value) for value in (0, 0.012345, 0.5, 1.234, 12.34, 1234.5)] == [
        "0", "0.0123", "0.5", "1.23", "12.3", "1,234",
    ]  # fmt: skip
    assert (report.time(0.01234), report.time(12)) == ("12.3 ms", "12.0 s")
    assert report.ranged({"min": 1, "median": 2, "max": 3}) == "2.00 (1.00 to 3.00)"


def test_ticks_hold_what_is_drawn_between_them():
    for low, high in ((0.003, 0.9), (1, 1), (0.02, 0.02), (7, 5000)):
        ticks = plot._log_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert ticks == sorted(ticks)
    assert plot._ticks(0.9)[-1] >= 0.9
    assert plot._ticks(0) == [0.0, 1.0]


def test_a_name_that_is_no_measurement_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.main(["first_tokens"])
    assert "first_tokens" in capsys.readouterr().err


def test_a_function_runs_in_a_new_process():
    found = processes.in_new_process(report.number, value=1234.5)
    assert found == "1,234"


def test_a_file_that_was_dropped_is_read_again(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5_000_000)
    processes.drop_cached(path)
    processes.read_through(path)
    assert path.read_bytes() == b"x" * 5_000_000


def test_figures_of_the_readme_name_their_command():
    readme = (ROOT / "README.md").read_text()
    figures = readme[readme.index("## Figures") : readme.index("## Limits")]
    for paragraph in figures.split("\n\n"):
        if re.search(r"\d (s|ms|times|tokens a second)\b", paragraph) and not paragraph.startswith("|"):
            assert re.search(r"make bench|benchmarks", paragraph), paragraph


@pytest.mark.parametrize("page_name", ["README.md", "CONTRIBUTING.md", "benchmarks/NOTES.md", "ARCHITECTURE.md"])
def test_measurements_that_documents_name_are_there(page_name: str):
    text = (ROOT / page_name).read_text()
    named = re.findall(r"python -m benchmarks[. ](\w+)|make bench ARGS=\"?(\w+)", text)
    listed = [name for some in re.findall(r"\(bench: ([\w, ]+)\)", text) for name in some.split(", ")]
    for name in {*("".join(pair) for pair in named), *listed} - {"NAME"}:
        assert name in (*bench.ON_PAGE, *bench.BESIDES), f"{page_name} names {name}"


@pytest.mark.parametrize("name", [*bench.ON_PAGE, *bench.BESIDES])
def test_the_arguments_of_a_quick_run_are_those_of_the_measurement(name: str):
    import inspect

    module = importlib.import_module(f"benchmarks.{name}")
    assert set(module.QUICK) <= set(inspect.signature(module.run).parameters)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob(page.RESULTS)))
def test_the_page_beside_the_published_results_is_theirs(path: Path):
    published = json.loads(path.read_text())
    made = page.files(published)
    assert {name: (path.parent / name).read_text() for name in made} == made, "run: python -m benchmarks --page"
    assert not published["quick"]
