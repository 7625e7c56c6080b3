"""The examples run, each as a user runs it: in a process of its own. With a tiny model, so that it is quick."""

import re
import signal
from pathlib import Path

import forked
import pytest
from tiny import tiny_llama_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=32768)


def run(name, *arguments):
    return forked.run([EXAMPLES / name, *arguments], strict=False)


def output(name, *arguments):
    done = run(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_every_example_is_described_and_run_here():
    programs = {path.name for path in EXAMPLES.glob("*.py")}

    assert set(re.findall(r"`(\w+\.py)` \|", (EXAMPLES / "README.md").read_text())) == programs
    assert all(f'"{name}"' in Path(__file__).read_text() for name in programs)


def test_branches_share_what_they_have_in_common(model, tmp_path):
    shown = output("branching.py", "--model", model, "--store", tmp_path / "store.db")

    reused = [int(count) for count in re.findall(r"reused (\d+) tokens", shown)]
    assert len(reused) == 3
    assert all(count > 40 for count in reused)
    assert shown.count("<-") == 4


def test_a_conversation_goes_on_after_a_restart_and_after_a_kill(model, tmp_path):
    arguments = ("--model", model, "--store", tmp_path / "store.db")
    killed = run("resume.py", *arguments, "--kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    second = output("resume.py", *arguments)
    assert "Going on after 1 questions, the last of which was: Name a city in Italy." in second
    third = output("resume.py", *arguments)
    assert "Going on after 2 questions" in third
    assert re.search(r"reused [1-9]\d*, replayed 0,", third)


def test_of_eight_replies_the_best_goes_on(model, tmp_path):
    shown = output("best_of.py", "--model", model, "--store", tmp_path / "store.db")

    assert len(re.findall(r"^main-\d .* of 3 words", shown, re.MULTILINE)) == 8
    assert "main goes on with:" in shown


def test_a_tree_of_thought_goes_on_after_a_kill(model, tmp_path):
    whole = output("tree_of_thought.py", "--model", model, "--store", tmp_path / "whole.db")
    killed = run("tree_of_thought.py", "--model", model, "--store", tmp_path / "killed.db", "--kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = output("tree_of_thought.py", "--model", model, "--store", tmp_path / "killed.db")

    nodes = re.compile(r"^[* ] +explore/.*$", re.MULTILINE)
    assert nodes.findall(again) == nodes.findall(whole)
    assert re.search(r"^(not )?right: 7 apples", again, re.MULTILINE)
    assert "going on with" in again


def test_a_model_judges(model, tmp_path):
    shown = output("tree_of_thought.py", "--model", model, "--store", tmp_path / "store.db", "--judge")

    scores = [float(score) for score in re.findall(r"explore/\S+ (\S+)", shown)]
    assert scores
    assert all(1 <= score <= 9 for score in scores)


def test_a_loop_of_ones_own_finds_what_it_gave_back(model, tmp_path):
    lines = output("own_loop.py", "--model", model, "--store", tmp_path / "store.db").splitlines()
    held = [[int(number) for number in re.findall(r"\d+", line)[:3]] for line in lines]

    assert held[0][0] == 0
    assert all(before > 0.9 * prompt for before, prompt, _ in held[1:])
    assert lines[0].partition(":")[2] == lines[2].partition(":")[2]  # the same prompt, the same words


def test_the_demo_resumes_exactly_and_measures_what_it_says(model, tmp_path):
    shown = output("demo.py", "--model", model, "--characters", 3000, "--folder", tmp_path)

    assert "SIGKILL" in shown
    assert "Exact:" in shown
    assert re.search(r"main .*\d+ ms .*\d+ ms", shown)
    assert all(re.search(rf"{name} .*\d+ ms", shown) for name in ("jane", "darcy", "letter"))
    assert "if every reply were a snapshot" in shown
