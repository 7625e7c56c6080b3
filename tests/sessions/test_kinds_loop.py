"""Your own loop over models that keep more than rows: caches given out, and caches taken back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import GRID, OVERWRITING, SLIDING, ids_of, manifests, opened, tip
from reference.state import new_cache
from tiny import tiny_model
from transformers import DynamicCache
from transformers.cache_utils import BaseQuantizedLayer

import kvloom.passes
from kvloom.bits import to_bits
from kvloom.errors import UnsupportedInput
from kvloom.layers import states_of
from kvloom.overwritten import StateList
from kvloom.reading import Account
from kvloom_proto.records import LayerKind

MIDDLE = "And who said it would be so, had you been there with them to see it?"
KINDS = ("llama", *SLIDING, *OVERWRITING)
GENERATE = ("gemma2", "gemma3_text", "mistral_window", "mamba", "mamba2", "jamba", "falcon_h1", "qwen3_next", "minimax")


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kvloom.passes, "GRID", GRID)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Plain:
    """A model in a loop of its own: plain calls over a cache, one after another."""

    def __init__(self, model: Any, cache: Any, length: int = 0) -> None:
        self.model, self.cache, self.length = model, cache, length
        self.takes = inspect.signature(model.forward).parameters

    def run(self, ids: list[int]) -> torch.Tensor:
        """One pass; the last token's logits."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "use_cache": True}
        if "position_ids" in self.takes:
            inputs["position_ids"] = torch.arange(self.length, self.length + len(ids))[None]
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        name = next(n for n in ("past_key_values", "cache_params", "state") if n in self.takes)
        inputs[name] = self.cache
        with torch.inference_mode():
            output = self.model(**inputs)
        if name == "state":
            self.cache = output.state
        self.length += len(ids)
        return output.logits[0, -1]


def kept(cache: Any) -> list[bytes]:
    """All tensors that a cache shows: rows, rows still seen of windows, and what is overwritten in place."""
    found = []
    for kind, holder in states_of(StateList(cache) if isinstance(cache, list) else cache):
        if kind == LayerKind.KEYFRAME:
            found += [to_bits(tensor.contiguous()).tobytes() for tensor in holder.tensors().values()]
        elif kind in (LayerKind.ROWS, LayerKind.WINDOW):
            seen = holder.sliding_window - 1 if kind == LayerKind.WINDOW else holder.keys.shape[-2]
            for tensor in (holder.keys, holder.values):
                found.append(to_bits(tensor[:, :, max(0, tensor.shape[-2] - seen) :].contiguous()).tobytes())
    return found


def said(path: Path, kind: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A conversation: its tokens whose state is held, and the passes that made it."""
    with opened(path, kind) as loom:
        branch = loom.session("talk").branch()
        branch.say(MIDDLE, max_tokens=9)
        ids, passes = ids_of(loom, branch), []
        states = branch._path()[1]
        for turn in branch._path()[0]:
            passes += list(states[turn.row].schedule.each())
        return ids[: tip(branch).state_end], passes


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_looked_up_goes_on_with_the_bits_of_one_that_never_left(store_path: Path, kind: str) -> None:
    ids, passes = said(store_path, kind)
    plain = Plain(model := tiny_model(kind), new_cache(model))
    for start, end in passes:
        plain.run(ids[start:end])
    with opened(store_path, kind) as loom:
        cache, length = loom.lookup([*ids, 5, 6])
        assert length == plain.length == len(ids)
        assert isinstance(cache, list) == (kind == "rwkv")
        assert kept(cache) == kept(plain.cache)
        mine = Plain(loom.engine.model, cache, length)
        for token in (5, 6, 7):
            assert torch.equal(mine.run([token]), plain.run([token]))


@pytest.mark.parametrize("kind", KINDS)
def test_running_a_cache_that_was_looked_up_changes_nothing_that_is_stored(store_path: Path, kind: str) -> None:
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        cache, length = loom.lookup([*ids, 5])
        before = kept(cache)
        mine = Plain(loom.engine.model, cache, length)
        for token in (5, 6, 7):
            mine.run([token])
        assert kept(loom.lookup([*ids, 5])[0]) == before


@pytest.mark.parametrize("kind", GENERATE)
def test_a_cache_that_generate_went_on_with_is_stored_and_found_again(store_path: Path, kind: str) -> None:
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        prompt = [*ids, 5]
        cache, length = loom.lookup(prompt)
        name = "cache_params" if kind == "mamba" or kind == "mamba2" else "past_key_values"
        out = loom.engine.model.generate(
            torch.tensor([prompt]), **{name: cache}, max_new_tokens=6, do_sample=False, eos_token_id=None
        )[0].tolist()
        assert len(out) == len(prompt) + 6
        held = loom.capture(out, cache) if kind in SLIDING else loom.capture(out[:-1], cache)
        assert held == len(out) - 1
        expected = kept(cache)
        made = manifests(loom)
    # Only what is new was stored.
    assert (made[-1].start, made[-1].end) == (length, held)
    with opened(store_path, kind) as loom:
        again, found = loom.lookup([*out, 7])
        assert (found, kept(again)) == (held, expected)


@pytest.mark.parametrize("kind", SLIDING)
def test_rows_of_a_window_that_were_not_read_are_never_stored_as_if_they_had_been(store_path: Path, kind: str) -> None:
    """A cache that was looked up holds the last rows of its windows; what is stored must hold them all."""
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        cache, length = loom.lookup([*ids, 5])
        expected = {end: kept(loom.lookup(ids[: end + 1])[0]) for end in range(20, length, 7)}
        mine = Plain(loom.engine.model, cache, length)
        mine.run([5])
        loom.capture([*ids, 5], mine.cache)
        loom.flush()
    with opened(store_path, kind) as loom:
        resumer = loom.resumer
        live, _ = resumer.resume([*ids, 5], None, room=1, logits=False)
        last = live.chain[-1].handle.segment
        for end, rows in expected.items():
            resumer.forget()
            fresh = resumer.begin(end + 1)
            # Through the captured segment's own chain, whatever else holds these tokens.
            resumer.load(fresh, last, end, Account())
            assert kept(fresh.cache) == rows


@pytest.mark.parametrize("kind", SLIDING)
def test_a_plain_cache_whose_windows_have_let_go_of_rows_is_refused(store_path: Path, kind: str) -> None:
    with opened(store_path, kind) as loom:
        plain = Plain(loom.engine.model, DynamicCache(config=loom.engine.model.config))
        short = list(range(3, 12))
        plain.run(short)
        assert loom.capture(short, plain.cache) == 9
        ids = short + list(range(30, 60))
        plain.run(ids[9:])
        plain.run([5])
        with pytest.raises(UnsupportedInput, match="behind its window") as error:
            loom.capture([*ids, 5], plain.cache)
        assert "lookup()" in error.value.hint
        assert [m.end for m in manifests(loom)] == [9]


class Rounded(BaseQuantizedLayer):
    """Quantised as the engines' own are: keys and values only in half the bits, whatever the backend."""

    def _quantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float16)

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.to(torch.float32)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.keys = torch.cat([self.keys, key_states], -2) if self.is_initialized else key_states
        self.values = torch.cat([self.values, value_states], -2) if self.is_initialized else value_states
        self.is_initialized = True
        self.keys, self.values = (self._dequantize(self._quantize(t)) for t in (self.keys, self.values))
        self.cumulative_length = self.keys.shape[-2]
        return self.keys, self.values


def test_a_quantised_cache_is_refused_by_name_and_never_stored(store_path: Path) -> None:
    with opened(store_path, "llama") as loom:
        cache = DynamicCache(config=loom.engine.model.config)
        cache.layers = [Rounded() for _ in cache.layers]
        plain = Plain(loom.engine.model, cache)
        plain.run([1, 2, 3])
        with pytest.raises(UnsupportedInput, match="Rounded"):
            loom.capture([1, 2, 3], cache)
        assert manifests(loom) == []


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "jamba"])
def test_state_that_differs_from_what_is_stored_is_kept_beside_it(store_path: Path, kind: str) -> None:
    """Other passes give other bits; a model without rows has nothing but its keyframe to tell them apart."""
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        plain = Plain(loom.engine.model, new_cache(loom.engine.model))
        plain.run(ids)
        before = len(manifests(loom))
        assert kept(plain.cache) != kept(loom.lookup([*ids, 5])[0])
        assert loom.capture(ids, plain.cache) == len(ids)
        assert len(manifests(loom)) == before + 1
        assert loom.capture(ids, plain.cache) == len(ids)
        assert len(manifests(loom)) == before + 1


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral_window"])
def test_a_cache_is_not_cut_back_to_where_its_windows_are_not_there(store_path: Path, kind: str) -> None:
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        cache, length = loom.lookup([*ids, 5])
        mine = Plain(loom.engine.model, cache, length)
        expected = mine.run([5])
        mine.run([6])
        cache.crop(-2)
        assert torch.equal(Plain(loom.engine.model, cache, length).run([5]), expected)
        cache.crop(-1)
        with pytest.raises(UnsupportedInput, match="window"):
            cache.crop(-5)
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("kind", ["falcon_h1", "jamba", "mamba2"])
def test_a_cache_of_state_that_is_overwritten_is_not_cut_back(store_path: Path, kind: str) -> None:
    ids, _ = said(store_path, kind)
    with opened(store_path, kind) as loom:
        cache, _ = loom.lookup([*ids, 5])
        with pytest.raises((UnsupportedInput, RuntimeError)):
            cache.crop(-5)
