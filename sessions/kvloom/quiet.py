"""Call transformers quietly: its bars become progress reports, what it raises becomes errors that say what to do.

Loading and converting a model both go through here. Importing this module costs no torch.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from kvloom.errors import EngineError, KVLoomError, UnsupportedModel

Progress = Callable[[str, float], None]
"""Told the stage and how much of that stage is done, 0.0 to 1.0. Converting: reading, (waiting, assembling,)
parsing, de-quantising, loading, tokenizer, writing; then loading. A hub model: downloading, loading."""

patching = threading.RLock()
"""Held while settings of the process are changed: one thread at a time does that."""


def silent(stage: str, fraction: float) -> None:
    """The progress of those who don't ask."""


@contextlib.contextmanager
def quiet(report: Progress) -> Iterator[None]:
    """Turn transformers' bars and warnings into reports, and put its settings back afterwards.

    They are settings of the process, so one thread at a time changes them.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    def steps(*args: Any, **kwargs: Any) -> _Steps:
        items = args[0] if args else kwargs.get("iterable") or ()
        title = str(kwargs.get("desc", "")).lower()
        stage = "de-quantising" if "quantiz" in title else "writing" if "writ" in title else "loading"
        return _Steps(items, stage, report)

    with patching:
        verbosity = logging.get_verbosity()
        hook = logging.set_tqdm_hook(lambda factory, args, kwargs: steps(*args, **kwargs))
        bar = gguf_loader.tqdm  # this module uses tqdm itself, past the hook
        gguf_loader.tqdm = steps
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            logging.set_tqdm_hook(hook)
            gguf_loader.tqdm = bar


class _Steps:
    """Stands in for a tqdm bar: draws nothing, reports a stage."""

    def __init__(self, items: Iterable[Any], stage: str, report: Progress) -> None:
        self._items = items
        self._stage = stage
        self._report = report

    def __iter__(self) -> Iterator[Any]:
        total = len(self._items) if isinstance(self._items, Sized) else 0
        for number, item in enumerate(self._items, 1):
            yield item
            self._report(self._stage, min(1.0, number / max(total, number)))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@contextlib.contextmanager
def explained(name: str, *, gguf: bool) -> Iterator[None]:
    """Turn what torch, transformers, safetensors and the system raise into errors that say what to do.

    Any Exception: a damaged file makes their parsers raise whatever line they happen to be on.
    """
    try:
        yield
    except KVLoomError:
        raise
    except Exception as error:
        raise _explain(name, gguf, error) from error


def _explain(name: str, gguf: bool, error: Exception) -> KVLoomError:
    reason = first_line(error)
    if isinstance(error, ImportError):
        return EngineError(f"{name} needs a package that is missing: {reason}", hint="install it")
    if isinstance(error, MemoryError):
        return EngineError(f"{name} does not fit into memory", hint="use a smaller model or bfloat16")
    if "tokenizer" in reason.lower():
        return EngineError(f"{name} has no tokenizer", hint="put tokenizer.json into its folder")
    # No GGUF file that is whole makes its parsers stumble, except over an architecture they don't know.
    cut = gguf and not isinstance(error, OSError) and "not supported" not in reason
    if cut or type(error).__name__ == "SafetensorError":
        return EngineError(f"{name} is damaged or cut short: {reason}", hint="get the file again")
    if isinstance(error, (ValueError, KeyError, NotImplementedError)):
        return UnsupportedModel(name, reason)
    if isinstance(error, OSError) and error.errno is not None:
        hint = "check the path and the free space; KVLOOM_CACHE chooses another folder for converted models"
        return EngineError(f"{name}: {reason}", hint=hint)
    return EngineError(
        f"{name} could not be loaded: {reason}",
        hint="a model folder needs config.json, safetensors weights and a tokenizer",
    )


def first_line(error: Exception) -> str:
    """A third-party message in one line: theirs run to paragraphs."""
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else "") or type(error).__name__


def refuse_missing(name: str, info: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers and goes on; here that is an error."""
    missing = sorted(info.get("missing_keys") or ()) + sorted(map(str, info.get("mismatched_keys") or ()))
    if missing:
        raise UnsupportedModel(name, f"{len(missing)} weights are missing or of another shape ({missing[0]})")


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Importing torch and transformers makes a million objects and no garbage: not looking saves a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
