"""What holds of every kind of state: branches do not touch each other, and a run that is stopped loses nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import (
    GRID,
    TAKEN,
    counted,
    digests,
    ids_of,
    layers_of,
    live_digests,
    opened,
    tip,
)
from tiny_configs import ROPES, SHORT

import kvloom.passes
from kvloom.branch import Branch
from kvloom.loom import KVLoom

FIRST = "Who was it?"
ASIDE = "zebras"
LONG = "And when was it that they were all there, and who said it would be so with them, had you been there to see it?"
TEXTS = {"a": [LONG, "What of her?"], "b": ["No.", LONG]}
"""The first message of branch a takes it past the length the ropes were made for; b gets there with its second."""
MIDDLE = "And who said it would be so, had you been there with them to see it?"
UNLIKE = ("mamba", "mamba2", "rwkv", "jamba", "falcon_h1", "zamba2", "qwen3_next", "kimi_linear", "lfm2", "minimax")
"""One of each way to overwrite state in place."""


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short conversation takes several passes; one thread, because decoding rounds otherwise with two."""
    monkeypatch.setattr(kvloom.passes, "GRID", GRID)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Two branches


def begun(loom: KVLoom) -> dict[str, Branch]:
    """A first turn, another branch from it, and two branches yet to be gone on with.

    The other branch has computed what any message begins with, so that both branches find the same state in any store:
    what is shared is the same wherever it was computed first, but where a pass was cut shows in its bits.
    """
    session = loom.session("talk")
    session.branch().say(FIRST, max_tokens=4)
    session.fork("aside", at="main").say(ASIDE, max_tokens=2)
    return {name: session.fork(name, at="main") for name in TEXTS}


def step(loom: KVLoom, branch: Branch, number: int) -> dict[str, Any]:
    """One turn, and all that can be seen of it."""
    branch.say(TEXTS[branch.name][number], max_tokens=5, temperature=1.0, seed=number)
    return {"ids": ids_of(loom, branch), "state": live_digests(loom), "schedule": tip(branch).schedule}


def alone(path: Path, kind: str, dtype: str, name: str) -> list[dict[str, Any]]:
    with opened(path, kind, dtype) as loom:
        branch = begun(loom)[name]
        return [step(loom, branch, number) for number in range(2)]


BOTH = [(kind, "float32") for kind in TAKEN]
BOTH += [(kind, "bfloat16") for kind in (*ROPES, "gemma3_text", "mamba2", "qwen3_next")]


@pytest.mark.parametrize(("kind", "dtype"), BOTH, ids=[f"{kind}-{dtype}" for kind, dtype in BOTH])
def test_two_branches_run_by_turns_have_the_bits_of_each_run_alone(tmp_path: Path, kind: str, dtype: str) -> None:
    expected = {name: alone(tmp_path / f"{name}.db", kind, dtype, name) for name in TEXTS}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TEXTS}
    with opened(tmp_path / "both.db", kind, dtype) as loom:
        branches = begun(loom)
        for name, number in (("a", 0), ("b", 0), ("a", 1), ("b", 1)):
            found[name].append(step(loom, branches[name], number))
    assert found == expected
    lengths = {name: [len(each["ids"]) for each in found[name]] for name in TEXTS}
    assert lengths["b"][0] < SHORT < min(lengths["a"][0], lengths["b"][1])


# Once more


@pytest.mark.parametrize("kind", TAKEN)
def test_a_reply_is_generated_again_without_a_pass_before_its_first_token(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with opened(store_path, kind) as loom:
        branch = loom.session("talk").branch()
        branch.say(LONG, max_tokens=6)
        whole = ids_of(loom, branch)
        with counted(loom, monkeypatch) as passes:
            again = branch.regenerate(max_tokens=6).reply
        assert (passes, again.tokens.replayed) == ([1] * 5, 0)
        assert ids_of(loom, branch) == whole
    with opened(store_path, kind) as loom:
        branch = loom.find("talk").branch()
        with counted(loom, monkeypatch) as passes:
            first = branch.regenerate(max_tokens=1).reply
        assert (passes, first.tokens.replayed, first.tokens.computed) == ([], 0, 0)
        assert ids_of(loom, branch) == whole[:-5]


# Stopping


def talk(loom: KVLoom) -> Branch:
    branch = loom.session("talk").branch()
    branch.say(FIRST, max_tokens=4)
    return branch


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[int], Any]]:
    """By kind, the tokens and the state of a conversation that nobody stopped."""

    @functools.cache
    def run(kind: str) -> tuple[list[int], Any]:
        with opened(tmp_path_factory.mktemp(kind) / "kvloom.db", kind) as loom:
            branch = talk(loom)
            branch.say(MIDDLE, max_tokens=9)
            return ids_of(loom, branch), live_digests(loom)

    return run


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("reopened", [False, True], ids=["at once", "later"])
def test_a_reply_that_was_stopped_goes_on_as_if_it_had_not_been(
    store_path: Path, never_stopped: Callable[[str], tuple[list[int], Any]], kind: str, reopened: bool
) -> None:
    with opened(store_path, kind) as loom:
        run = talk(loom).stream(MIDDLE, max_tokens=9)
        pieces = iter(run)
        for _ in range(3):
            next(pieces)
        pieces.close()
        done = run.reply.tokens.generated
        assert done < 9
        if not reopened:
            go_on(loom, 9 - done, never_stopped(kind))
    if reopened:
        with opened(store_path, kind) as loom:
            go_on(loom, 9 - done, never_stopped(kind))


def go_on(loom: KVLoom, tokens: int, expected: tuple[list[int], Any]) -> None:
    branch = loom.find("talk").branch()
    rest = branch.continue_reply(max_tokens=tokens).reply
    assert rest.tokens.replayed == 0
    assert (ids_of(loom, branch), live_digests(loom)) == expected
    loom.flush()
    assert digests(loom, branch) == expected[1]


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("when", ["in the first pass", "in a later pass", "while decoding"])
def test_ctrl_c_inside_a_pass_puts_the_state_back_that_was_half_overwritten(
    store_path: Path, never_stopped: Callable[[str], tuple[list[int], Any]], kind: str, when: str
) -> None:
    expected = never_stopped(kind)
    with opened(store_path, kind) as loom:
        branch = talk(loom)
        start, prompt = loom.resumer.live.length, len(expected[0]) - 9
        from_on = {"in the first pass": start, "in a later pass": start + 1, "while decoding": prompt + 3}[when]

        def stop(*_: object) -> None:
            if loom.resumer.live.length >= from_on:
                raise KeyboardInterrupt

        # Before the last layer runs, the others have overwritten their state.
        hook = layers_of(loom.engine.model)[-1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            branch.say(MIDDLE, max_tokens=9)
        hook.remove()
        last = branch.log()[-1]
        done = last.tokens if last.role == "assistant" else 0
        assert (done > 0) == (when == "while decoding")
        go_on(loom, 9 - done, expected)
