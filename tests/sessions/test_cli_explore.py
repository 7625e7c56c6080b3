"""``kvloom explore`` as it is used: begun, resumed, accepted and pruned; what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Command, fails

SEARCH = ("--width", "2", "--keep", "1", "--depth", "2", "--step-tokens", "4", "--seed", "3")


@pytest.fixture
def searched(kvloom: Command) -> Command:
    """A session made by a search that is over."""
    assert kvloom("explore", "puzzle", "--prompt", "what is it", *SEARCH).code == 0
    return kvloom


def test_it_ends_with_the_tree_the_scores_and_the_best_path(kvloom: Command) -> None:
    result = kvloom("explore", "puzzle", "--prompt", "what is it", *SEARCH)
    lines = result.out.splitlines()
    names = [line[2:].split()[0] for line in lines[:4]]
    assert names[0] == "explore/1"
    assert names == sorted(names)
    marked = [line[2:].split()[0] for line in lines[:4] if line.startswith("*")]
    assert len(marked) == 2
    assert marked[1].startswith(marked[0])
    assert f"best: puzzle@{marked[1]}" in result.err
    assert "computed 16" in result.err
    assert result.out.rstrip().endswith(
        kvloom("log", f"puzzle@{marked[1]}", "--json").json["turns"][-1]["text"].strip()
    )


def test_json_has_the_nodes_and_the_path(searched: Command) -> None:
    told = searched("explore", "puzzle", "--resume", "--json").json
    assert told["finished"]
    assert len(told["nodes"]) == 4
    assert told["best"]["branch"] == told["path"][-1]
    assert told["tokens"]["computed"] == 0
    assert all(node["score"] is not None for node in told["nodes"])


def test_accept_moves_the_branch_and_prune_deletes_the_losers(searched: Command) -> None:
    told = searched("explore", "puzzle", "--resume", "--accept", "main", "--prune", "--json").json
    branches = {branch["name"] for branch in searched("branches", "puzzle", "--json").json["branches"]}
    assert branches == {"main", "explore", *told["path"]}
    assert told["accepted"] == "main"
    assert told["deleted"] == told["pruned"]
    assert searched("log", "puzzle", "--json").json["turns"][-1]["role"] == "assistant"


def test_without_a_prompt_it_replies_to_the_last_message(searched: Command) -> None:
    told = searched("explore", "puzzle@explore", *SEARCH, "--name", "again", "--json").json
    assert {node["branch"].partition("/")[0] for node in told["nodes"]} == {"again"}


def test_a_search_is_not_begun_twice(searched: Command) -> None:
    fails(searched("explore", "puzzle", "--prompt", "what is it", *SEARCH), 20, "exists already")


def test_resumed_with_other_settings_it_says_which(searched: Command) -> None:
    result = searched("explore", "puzzle", "--resume", "--width", "3")
    assert result.code != 0
    assert "another width" in result.err
    assert "--name" in result.err


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--score", "best"], "no score"), (["--depth", "0"], "depth"), (["--max-tokens", "3"], "--max-tokens")],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    kvloom: Command, store_path: Path, options: list[str], says: str
) -> None:
    result = kvloom("explore", "puzzle", "--prompt", "what is it", *options)
    assert result.code != 0
    assert says in result.err
    assert not store_path.exists()
