"""What a model's cache is like, found out by running a few tokens: its states, and how it may be appended to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvloom import support
from kvloom.errors import UnsupportedModel
from kvloom.layers import layer_specs, states_of
from kvloom.overwritten import StateList
from kvloom_proto.records import LayerKind, LayerSpec, expand

Forward = Callable[[Any, list[int], int], Any]
"""Runs the model: a cache, the tokens, and how many tokens the cache has seen; what the model returns."""

Check = Callable[[Any], None]
"""Is shown what the model returned for the first tokens, right after that pass. Raises UnsupportedModel."""

FIRST, MORE = 5, 3
"""Tokens of the first pass, and of the one that follows it."""


class Probe:
    """The shape of a model's state.

    ``layers`` are its states, ``new_cache`` makes an empty cache of the model's own kind (and shows one that has seen
    tokens). ``one_by_one``: a pass of several tokens over a warm cache forgets
    some of the state (Mamba-1 kinds begin their recurrent state anew, without a word), so they are fed singly.
    """

    def __init__(self, model: PreTrainedModel, forward: Forward, check: Check) -> None:
        """Run a few tokens.

        Raises:
            UnsupportedModel: it keeps state where it cannot be captured, or of a kind that is not known.
        """
        self._model, self._forward = model, forward
        self._vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        before = support.tensors_in_modules(model)
        self._like = self._first_cache()
        support.check_kinds(model, self._like)
        check(forward(self._like, self._ids(0, FIRST), 0))
        self._refuse_state_in_modules(before)
        support.check_cache(model, self._like, FIRST)
        self.layers: tuple[LayerSpec, ...] = layer_specs(self._like)
        self.has_keyframes = any(spec.kind == LayerKind.KEYFRAME for spec in self.layers)
        self.one_by_one = self.has_keyframes and self._forgets_in_longer_passes()
        self._check_shape_stays()

    def new_cache(self) -> tuple[Any, Any]:
        """An empty cache of the model's own kind, and one like it that has seen tokens."""
        if isinstance(self._like, StateList):
            return StateList(), self._like
        if type(self._like) is DynamicCache:
            return DynamicCache(config=self._model.config), self._like
        return type(self._like)(), self._like

    def _first_cache(self) -> Any:
        """What the model itself takes: the cache of its config, or the one it makes when it is given none."""
        if support.cache_argument(self._model) == "state":
            return StateList()
        if getattr(self._model, "_supports_default_dynamic_cache", lambda: True)():
            cache = DynamicCache(config=self._model.config)
            if cache.layers:
                return cache
        output = self._forward(None, self._ids(0, 1), 0)
        made = getattr(output, "past_key_values", None)
        if made is None:
            raise UnsupportedModel(type(self._model).__name__, "it does not return its cache")
        return type(made)()

    def _ids(self, start: int, end: int) -> list[int]:
        return [(7 * position + 3) % self._vocabulary for position in range(start, end)]

    def _refuse_state_in_modules(self, before: dict[str, torch.Tensor]) -> None:
        for name, tensor in support.tensors_in_modules(self._model).items():
            if before.get(name) is not tensor:
                raise UnsupportedModel(
                    type(self._model).__name__, f"it keeps state inside its modules ({name}), where no cache has it"
                )

    def _forgets_in_longer_passes(self) -> bool:
        """Whether a pass of several tokens over a warm cache looks away from some of the state.

        Each kind of tensor in turn is changed; if the logits do not change, it was not looked at.
        """
        ids = self._ids(FIRST, FIRST + MORE)
        plain = self._forward(copy.deepcopy(self._like), ids, FIRST).logits[0, -1]
        names = {
            name.partition(".")[0]
            for kind, holder in states_of(self._like)
            if kind == LayerKind.KEYFRAME and holder.every_token
            for name in holder.tensors()
        }
        return any(torch.equal(plain, self._logits_with_other(name, ids)) for name in sorted(names))

    def _logits_with_other(self, name: str, ids: list[int]) -> torch.Tensor:
        cache = copy.deepcopy(self._like)
        for kind, holder in states_of(cache):
            if kind == LayerKind.KEYFRAME:
                tensors = holder.tensors()
                with torch.inference_mode():
                    others = {n: t + 1 if n.partition(".")[0] == name else t for n, t in tensors.items()}
                holder.put(others, FIRST)
        logits: torch.Tensor = self._forward(cache, ids, FIRST).logits[0, -1]
        return logits

    def _check_shape_stays(self) -> None:
        """State that is overwritten in place must not grow: a keyframe has one size."""
        if not self.has_keyframes:
            return
        cache = copy.deepcopy(self._like)
        self._forward(cache, self._ids(FIRST, FIRST + 1), FIRST)
        if expand(layer_specs(cache)) != expand(self.layers):
            raise UnsupportedModel(type(self._model).__name__, "its state changes its shape from token to token")
