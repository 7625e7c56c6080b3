"""Beam search: transformers' own hypotheses and scores, each exact to go on with, and recorded so that it can run again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import digests, engine, ids_of, tip
from tiny import tiny_model, tiny_tokenizer

from kvloom.beam import Beams, BeamSettings
from kvloom.engine import TransformersEngine
from kvloom.errors import NothingToDo, SessionError
from kvloom.growing import Growing
from kvloom.loom import KVLoom
from kvloom.sampling import SamplingSettings
from kvloom.textstream import TextStream
from kvloom_store import turns

SAID = "tell me of the one who would have been there"
KINDS = ("llama", "gemma3_text")


def ending(kind: str, dtype: str = "float32", also: tuple[int, ...] = ()) -> TransformersEngine:
    """A model that does end its replies: where another token is likely, one that ends them is about as likely."""
    model, tokenizer = tiny_model(kind, dtype), tiny_tokenizer()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for number, token in enumerate((tokenizer.eos_token_id, *also)):
            head[token] = 1.1 * head[31 + 9 * number] + 0.7 * head[77 + number]
    if also:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *also]
    return TransformersEngine(model, tokenizer, name=f"tiny {kind}")


@pytest.fixture(scope="module")
def engines() -> dict[str, TransformersEngine]:
    made = {kind: ending(kind) for kind in KINDS}
    return {**made, "two ends": ending("llama", also=(40,)), "endless": engine("llama"), "jamba": engine("jamba")}


def by_transformers(
    model: TransformersEngine, ids: list[int], search: BeamSettings, tokens: int, stop: tuple[str, ...] = ()
) -> tuple[list[list[int]], list[float]]:
    """The tokens of each hypothesis, and its score."""
    ends = sorted(model.eos_ids)
    found = model.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        num_beams=search.width,
        num_return_sequences=search.width,
        do_sample=False,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **({"stop_strings": list(stop), "tokenizer": model.tokenizer} if stop else {}),
    )
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    said = [row[len(ids) : len(ids) + n].tolist() for row, n in zip(found.sequences, lengths, strict=True)]
    return said, found.sequences_scores.tolist()


def searched(
    model: TransformersEngine, ids: list[int], search: BeamSettings, tokens: int, stop: tuple[str, ...] = ()
) -> tuple[list[list[int]], list[float]]:
    live = model.new_state(len(ids))
    logits = model.prefill(live, ids)
    stream = TextStream(model.tokenizer, stop=stop, skip_ids=model.eos_ids)
    root = Growing(list(ids), SamplingSettings(), 0, tokens, stream, model.eos_ids, hidden=live.hidden)
    beams = Beams(model, live, root, search)
    beams.search(logits[None])
    assert all(path.ids == ids + path.tokens for path in beams.found)
    return [path.tokens for path in beams.found], [beams.score(path) for path in beams.found]


def parted(model: TransformersEngine, a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether two searches differ by more than rounding: by other hypotheses, or by scores."""
    if a[0] != b[0]:
        return True
    return a[1] != pytest.approx(b[1], abs=2e-4)


widths = st.integers(2, 6)
penalties = st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])
stopping = st.sampled_from([True, False, "never"])
PROPERTY = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(
    st.sampled_from([*KINDS, "two ends", "endless"]), widths, penalties, stopping, st.integers(1, 24), st.integers(0, 99)
)
def test_the_hypotheses_and_scores_are_those_of_transformers(
    engines: Any, kind: str, width: int, penalty: float, early: Any, tokens: int, seed: int
) -> None:
    search = BeamSettings(width, penalty, early)
    ids = [(11 * at * at + 3 * at + 17 * seed) % 300 for at in range(8 + seed)]
    expected = by_transformers(engines[kind], ids, search, tokens)
    assert not parted(engines[kind], searched(engines[kind], ids, search, tokens), expected)
