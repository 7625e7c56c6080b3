"""llama.cpp's own state files as a peer of ``restore``, if llama-cpp-python is installed (``make bench-peers``).

In its best form: flash attention, f16 keys and values, the low-level sequence state (``llama_state_seq_*``: the Python
caches carry 100 MB of scores besides). It reads into a context whose memory exists, and has been written to.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.common import ids, timed
from benchmarks.processes import counted, in_new_process, memory_in_hand

NAME = "llama.cpp (f16)"
ROOM = 1024


def prepare_in(folder: Path, tokens: int) -> dict[str, Path]:
    """Its state file by the name it goes by on the page; nothing where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {}
    path = folder / "llama.state"
    in_new_process(save, path=str(path), tokens=tokens)
    return {NAME: path}


def save(path: str, tokens: int) -> None:
    """Prefill so many tokens of natural text, and save the state."""
    import llama_cpp

    llama = _context(tokens)
    given = _tokens(llama, tokens)
    llama.eval(given)
    array = (llama_cpp.llama_token * len(given))(*given)
    written = llama_cpp.llama_state_seq_save_file(llama.ctx, path.encode(), 0, array, len(given))
    assert written > 0, "llama.cpp could not save its state"


def measure(path: str, tokens: int, again: int) -> dict[str, Any]:
    """In a process of its own: seconds of the first load, and of those after it."""
    import ctypes

    import llama_cpp

    llama = _context(tokens)
    array, count = (llama_cpp.llama_token * tokens)(), ctypes.c_size_t()

    def load() -> None:
        read = llama_cpp.llama_state_seq_load_file(llama.ctx, path.encode(), 0, array, tokens, ctypes.byref(count))
        assert read > 0, "llama.cpp could not load its state"
        assert count.value == tokens

    memory_in_hand(path)
    before = counted("read_bytes")
    first = timed(load)[0]
    from_disk = counted("read_bytes") - before
    return {"first": first, "again": [timed(load)[0] for _ in range(again)], "from_disk": from_disk}


def _context(tokens: int) -> Any:
    import llama_cpp

    from kvloom import models

    source = models.resolve("smollm2")
    return llama_cpp.Llama(str(source.path), n_ctx=tokens + ROOM, n_batch=512, flash_attn=True, verbose=False)


def _tokens(llama: Any, tokens: int) -> list[int]:
    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": llama.tokenize(text.encode())}

    return ids(Tokenizer(), tokens)
