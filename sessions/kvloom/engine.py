"""The engine: tokens in, tokens and state out. The only module that runs the model.

Prefill is cut into the passes that ``passes`` plans; decoding feeds one token a pass. Every pass is in the schedule
that is stored with the turn, and running that schedule again gives the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvloom import models, passes, siblings, support
from kvloom._version import __version__
from kvloom.errors import ContextOverflow, EngineError, UnsupportedInput, UnsupportedModel
from kvloom.filters import float32
from kvloom.identity import ModelIdentity, identity_of
from kvloom.layers import dtype_name
from kvloom.live import LiveState
from kvloom.overwritten import StateList
from kvloom.probe import Probe
from kvloom.rope import LengthDependentRope
from kvloom.sampling import SamplingSettings, choose
from kvloom.scores import TokenScore, score
from kvloom_proto.records import LayerSpec, Provenance, Schedule
from kvloom_store.rows import RowBuffer

Progress = Callable[[int, int], None]
"""Called before each pass of a prefill with the tokens done and the tokens there are to do."""


class Cancelled(Exception):
    """The run was asked to stop; what was computed before is in the live state."""


class TransformersEngine:
    """A Hugging Face model and its tokenizer, on whatever device they are.

    Safe to use from several threads: whoever runs the model holds ``lock``. Thread counts and other global
    settings are left alone, but for the moment of an exact replay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        keyframe_spacing: int = passes.KEYFRAME_SPACING,
    ) -> None:
        """Take a model the caller holds; it is checked with a few passes over a few tokens.

        ``keyframe_spacing``: state that is overwritten in place is copied at least every so many tokens, which is
        what a restore at any token may have to run again.

        Raises:
            UnsupportedModel: it keeps state that this version cannot capture exactly.
        """
        if not 16 <= keyframe_spacing <= 1 << 20:
            raise EngineError(f"a keyframe spacing of {keyframe_spacing} tokens makes no sense", hint="try 256")
        support.check_model(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.lock = threading.RLock()
        self.device = model.device
        self.config = model.config.get_text_config(decoder=True)
        self.context_limit = support.context_limit(self.config)
        self.vocab_size = int(self.config.vocab_size)
        self.eos_ids = models.eos_ids(
            getattr(getattr(model, "generation_config", None), "eos_token_id", None),
            model.config.eos_token_id,
            tokenizer.eos_token_id,
        )
        self.keyframe_spacing = keyframe_spacing
        self._cache_argument = support.cache_argument(model) or ""
        self._takes_position_ids = support.takes(model, "position_ids")
        self._takes_logits_to_keep = support.takes(model, "logits_to_keep")
        self._base: Any = getattr(model, model.base_model_prefix, None) or getattr(model, "model", model)
        self._last_hidden: torch.Tensor | None = None
        self._output_class: Any = BaseModelOutputWithPast  # the decoder's own, once it has run
        self._base.register_forward_hook(self._keep_hidden)
        self._rope = LengthDependentRope(model)
        self._probe = Probe(model, self._forward, self._check_hidden)
        self.layers: tuple[LayerSpec, ...] = self._probe.layers
        # The tokenizer's digest costs 30 ms; it is made again only if tokens were added to it.
        self._tokenizer_length: int = len(tokenizer)
        self._named: ModelIdentity = identity_of(model, tokenizer)

    def identity(self) -> ModelIdentity:
        """What defines the function, now: adapters may have been switched since the last call."""
        if len(self.tokenizer) != self._tokenizer_length:
            self._named = identity_of(self.model, self.tokenizer)
            self._tokenizer_length = len(self.tokenizer)
        now = identity_of(self.model)
        return replace(now, tokenizer=self._named.tokenizer, chat_template=self._named.chat_template)

    @functools.cached_property
    def apart(self) -> str | None:
        """Why paths must be decoded one after another; None if they can be decoded together (``siblings``)."""
        with self.lock:
            return siblings.reason_against(self)

    def provenance(self) -> Provenance:
        """What changes only the rounding, now."""
        return Provenance(
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            device=support.device_name(self.device),
            cpu_capability=support.cpu_capability(),
            attention=str(self.config._attn_implementation),
            engine=f"kvloom {__version__}",
        )

    def new_state(self, capacity: int, buffer: RowBuffer | None = None) -> LiveState:
        """An empty state with room for ``capacity`` tokens, or over a buffer."""
        return LiveState(self.layers, self._probe.new_cache, min(capacity, self.context_limit), self.device, buffer)

    def passes(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The passes in which tokens [start, end) are run (``passes.grid_passes``)."""
        keyframes = self.keyframe_spacing if self._probe.has_keyframes else 0
        return passes.grid_passes(start, end, keyframes=keyframes, one_by_one=self._probe.one_by_one)

    def check_ids(self, ids: Sequence[int], *, room: int = 1) -> None:
        """Refuse ids the model does not have, or more of them (and ``room`` more) than its context holds.

        Raises:
            UnsupportedInput, ContextOverflow
        """
        if any(not isinstance(token, int) or not 0 <= token < self.vocab_size for token in ids):
            raise UnsupportedInput(
                f"token ids must be integers from 0 to {self.vocab_size - 1}",
                hint="kvloom takes text or token ids; images and embeddings are not supported yet",
            )
        if len(ids) + room > self.context_limit:
            raise ContextOverflow(len(ids) + room, self.context_limit)

    def run_pass(self, live: LiveState, ids: Sequence[int]) -> torch.Tensor:
        """One forward pass over the tokens that follow what ``live`` holds; the logits ``[vocab]`` after the last.

        ``live.hidden`` is set to the final hidden state ``[1, 1, hidden_size]`` of the last token.
        """
        return self._pass(live, ids, 1)[-1]

    def run_scored(self, live: LiveState, ids: Sequence[int]) -> torch.Tensor:
        """The same, but the logits ``[tokens, vocab]`` after each of the tokens."""
        return self._pass(live, ids, len(ids))

    def _pass(self, live: LiveState, ids: Sequence[int], last: int) -> torch.Tensor:
        """One forward pass; the logits after the ``last`` tokens, or after more of them."""
        start = live.length
        if not live.ready:
            raise EngineError("the state is not there that this pass would go on from")
        live.reserve(start + len(ids))
        live.remember()
        self._rope.reset()
        try:
            output = self._forward(live.cache, ids, start, last)
            live.advance(len(ids))
            if live.length % self.keyframe_spacing == 0:
                live.keep_frame()
            live.hidden = self._last_hidden
        except BaseException:
            live.truncate(start)
            live.recall()
            raise
        logits: torch.Tensor = output.logits[0]
        return logits

    def run_batch(
        self, cache: Any, tokens: Sequence[int], positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token of each of several paths; logits ``[paths, vocab]``, hidden states ``[paths, 1, hidden_size]``."""
        self._rope.reset()
        inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens, device=self.device)[:, None]}
        if self._takes_position_ids:
            inputs["position_ids"] = torch.tensor(positions, device=self.device)[:, None]
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        inputs[self._cache_argument] = cache
        with torch.inference_mode():
            output = self.model(**inputs, use_cache=True)
        assert self._last_hidden is not None
        return output.logits[:, -1], self._last_hidden

    def _forward(self, cache: Any, ids: Sequence[int], start: int, last: int = 1) -> Any:
        """The model's own forward over tokens that follow ``start`` others whose state a cache holds."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self.device)}
        if self._takes_position_ids:  # always given: some models count from 0 without them
            inputs["position_ids"] = torch.arange(start, start + len(ids), device=self.device)[None]
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = last
        listed = isinstance(cache, StateList)
        inputs[self._cache_argument] = cache.state if listed else cache
        with torch.inference_mode():
            output = self.model(**inputs, use_cache=True)
        if listed:
            cache.state = output.state
        return output

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits ``[vocab]`` that follow from a final hidden state ``[1, 1, hidden_size]``."""
        return self.logits_of_all(hidden)[0]

    def logits_of_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits ``[paths, vocab]`` that follow from final hidden states ``[paths, 1, hidden_size]``.

        Only the output head runs: the model's own forward, with the decoder stood in for by the hidden state, so
        that whatever a model does behind its decoder (scaling, soft-capping) is done here too.
        """
        decoder = self._base.forward
        try:
            self._base.forward = lambda *_, **__: self._output_class(last_hidden_state=hidden)
            with torch.inference_mode():
                ids = torch.zeros((len(hidden), 1), dtype=torch.long, device=self.device)
                output = self.model(input_ids=ids)
        finally:
            if "forward" in vars(self._base):
                del self._base.forward
            if self._base.forward != decoder:  # somebody else had put one there
                self._base.forward = decoder
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def prefill(
        self,
        live: LiveState,
        ids: Sequence[int],
        *,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Run the tokens behind what ``live`` holds, in passes on the grid; the logits after the last one.

        Raises:
            Cancelled: between two passes; what was run stays.
        """
        logits = None
        first, last = live.length, live.length + len(ids)
        for start, end in self.passes(first, last):
            if cancel is not None and cancel.is_set():
                raise Cancelled
            if progress is not None:
                progress(start - first, len(ids))
            logits = self.run_pass(live, ids[start - first : end - first])
        if logits is None:
            raise EngineError("there is nothing to run")
        return logits

    def generate(
        self,
        live: LiveState,
        logits: torch.Tensor,
        settings: SamplingSettings,
        *,
        seen: Sequence[int],
        seed: int,
        cancel: threading.Event | None = None,
        scores: list[TokenScore] | None = None,
    ) -> Generator[int, None, None]:
        """Tokens one after another, for as long as the caller asks; the one yielded last is pending.

        ``seen`` are the ids so far, for the repetition penalty. The token at position p is drawn with
        ``uniform(seed, p)``, so a reply can be taken up again anywhere. What the model thinks of each token is added to
        ``scores`` before it is yielded.
        """
        ids = list(seen)
        while not (cancel is not None and cancel.is_set()):
            logits = float32(logits)
            token = choose(logits, settings, seen=ids, seed=seed, position=len(ids))
            ids.append(token)
            if scores is not None:
                scores.append(score(logits, token))
            yield token
            logits = self.run_pass(live, [token])

    def replay(
        self,
        live: LiveState,
        ids: Sequence[int],
        schedule: Schedule,
        recorded: Provenance,
        *,
        keep: Collection[int] = (),
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Run recorded passes again, exactly: with the recorded thread count, which is put back afterwards.

        ``ids`` are the tokens of the whole path. At positions in ``keep`` a keyframe is kept.

        Raises:
            EngineError: the schedule does not go on where ``live`` ends.
            Cancelled: between two passes.
        """
        first = live.length
        with _threads(recorded.threads):
            for entry in schedule.passes:
                if entry.start != live.length:
                    raise EngineError("the recorded passes do not follow what is held")
                if entry.is_sibling:
                    siblings.replay(self, live, ids, entry)
                    continue
                for start, end in entry.each():
                    if cancel is not None and cancel.is_set():
                        raise Cancelled
                    if progress is not None:
                        progress(start - first, len(ids) - first)
                    self.run_pass(live, ids[start:end])
                    if end in keep:
                        live.keep_frame()

    def bring_forward(
        self,
        live: LiveState,
        ids: Sequence[int],
        steps: Sequence[tuple[int, int, int]],
        *,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Bring state that is overwritten in place from where it stands to where ``live``'s rows end.

        ``ids`` are the tokens of the whole path, ``steps`` the passes to run: start, end, threads. The rows that these
        passes compute besides are thrown away: those that were there stay, bit for bit.

        Raises:
            Cancelled: between two passes; the live state is not ready then.
        """
        first, end = steps[0][0], live.length
        frames, stored = dict(live.frames), set(live.stored)
        put_back = live.put_aside(first, end)
        live.show(first)
        try:
            for start, stop, threads in steps:
                if cancel is not None and cancel.is_set():
                    raise Cancelled
                if progress is not None:
                    progress(start - first, end - first)
                with _threads(threads):
                    for begin, last in self._cuts(start, stop):
                        self.run_pass(live, ids[begin:last])
        except BaseException:
            live.frame_at = None
            raise
        finally:
            put_back()
            live.frames, live.stored, live.hidden = frames, stored, None

    def _cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """One pass as it is recorded, or tokens one by one where the model can take them in no other way."""
        if self._probe.one_by_one and start:
            yield from ((at, at + 1) for at in range(start, end))
        else:
            yield start, end

    def _check_hidden(self, output: Any) -> None:
        """A reply is taken up from the final hidden state alone: the logits of a pass must follow from it."""
        if self._last_hidden is None or not torch.equal(self.logits_of(self._last_hidden), output.logits[0, -1]):
            raise UnsupportedModel(type(self.model).__name__, "its logits do not follow from its last hidden state")

    def _keep_hidden(self, _module: object, _inputs: object, output: Any) -> None:
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedModel(type(self.model).__name__, "its decoder does not return a last hidden state")
        self._last_hidden = output.last_hidden_state[:, -1:]
        self._output_class = type(output)

    @property
    def dtype(self) -> str:
        """The name of the dtype that the model computes in."""
        return dtype_name(self.model.dtype)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
