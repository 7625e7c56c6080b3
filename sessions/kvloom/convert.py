"""Convert a GGUF file once, to a float32 safetensors folder in the user's cache.

    convert(source)  ->  Path     made the first time, found by the file's content afterwards

A folder is written beside its final place and renamed when it is whole, so a process that dies leaves nothing
that could be taken for a model, and of two that race one wins. A file that is shipped in parts is put together in
there too, and only for as long as it is read. Importing this module costs no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import platformdirs
import xxhash

from kvloom.errors import EngineError
from kvloom.quiet import Progress, explained, gc_paused, patching, quiet, refuse_missing, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOTE = "kvloom.json"  # written last into a converted folder: with it the folder is whole
_CONVERSION = 1  # raised when conversion here changes, so that older folders are left alone
_TEMPORARY = ".converting-"
_FIRST_PART = ".part00"  # what follows the name of a file that is shipped in parts


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is. ``name`` is what the user typed; ``path`` is None for a hub name.

    A GGUF file may be shipped in parts: ``path`` is the first then, ``rest`` are the others in their order, and
    ``content`` is the XXH3-128 of the whole, by which parts that don't belong together are noticed.
    """

    name: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path | None
    rest: tuple[Path, ...] = ()
    content: str | None = None


def cache_root() -> Path:
    """The folder for what can be made again: ``KVLOOM_CACHE``, or the system's place for caches."""
    chosen = os.environ.get("KVLOOM_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("kvloom")


def convert(source: ModelSource, progress: Progress | None = None) -> Path:
    """Return the safetensors folder of a GGUF file, making it the first time (SmolLM2: about 9 s, Gemma 3 270M: 30).

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
    report = progress or silent
    root = cache_root() / "models"
    with explained(source.name, gguf=True):
        files = (source.path, *source.rest)
        before = _stamps(files)
        digest = _content_digest(files, report)
        if source.content not in (None, digest):
            raise EngineError(
                f"the parts of {source.name} do not make the file they should",
                hint="one is cut short or of another version: install them again with pip install --force-reinstall",
            )
        file = source.path.name.removesuffix(_FIRST_PART)
        folder = _named(file, digest)
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
                with _in_one_piece(files, work / file, report) as gguf:
                    _convert_into(work, source.name, gguf, report)
                gc.collect()  # a model's modules name one another: the one that was converted would stay in memory
                if _stamps(files) != before:
                    raise EngineError(f"{file} changed while it was read", hint="try again")
                _seal(work, file, sum(size for size, _ in before), digest)
                _publish(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def weights_kept(folder: Path, dtype: str) -> str | None:
    """The variant of a converted model whose weights are in a dtype other than float32, if ``keep_weights`` made it."""
    return dtype if _note(folder) is not None and (folder / weights_file(dtype)).is_file() else None


def keep_weights(folder: Path, model: PreTrainedModel, dtype: str) -> None:
    """Keep a converted model's weights as they were loaded, too: mapped and not converted, they are there at once.

    SmolLM2 in bfloat16: 0.15 s instead of 0.6, for 269 MB. Left for another time while somebody else converts, or where
    there is no room: it is only quicker.
    """
    if _note(folder) is None:
        return
    from safetensors import SafetensorError  # what it makes of a disk that is full

    with contextlib.suppress(OSError, SafetensorError), _one_converter(folder.parent, silent, wait=False):
        work = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
        try:
            with quiet(silent):
                model.save_pretrained(work, variant=dtype, max_shard_size="1TB")
            (work / weights_file(dtype)).chmod(0o600)
            _sync(work / weights_file(dtype))
            os.replace(work / weights_file(dtype), folder / weights_file(dtype))
            _sync(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def weights_file(dtype: str) -> str:
    """What the file of such weights is called: as transformers calls a variant."""
    return f"model.{dtype}.safetensors"


def found(source: ModelSource) -> Path | None:
    """The folder of a GGUF file, if it was converted before; nothing is made. Raises OSError."""
    assert source.path is not None
    file = source.path.name.removesuffix(_FIRST_PART)
    folder = _named(file, source.content or _content_digest((source.path, *source.rest), silent))
    return folder if _is_whole(folder) else None


def _named(file: str, digest: str) -> Path:
    stem = re.sub(r"[^\w.-]+", "-", Path(file).stem)[:80].lstrip(".")
    return cache_root() / "models" / f"{stem}-v{_CONVERSION}-{digest[:16]}"


def converted() -> list[tuple[Path, int]]:
    """The folders of the cache that say they are whole, and how many bytes they hold."""
    whole = [folder for folder in sorted((cache_root() / "models").glob("[!.]*")) if _is_whole(folder)]
    return [(folder, sum(path.stat().st_size for path in folder.iterdir())) for folder in whole]


def _content_digest(files: Sequence[Path], report: Progress) -> str:
    """XXH3-128 of a file, in hex; of several, as if they were one."""
    digest = xxhash.xxh3_128()
    for block in _blocks(files, "reading", report):
        digest.update(block)
    return digest.hexdigest()


def _blocks(files: Sequence[Path], stage: str, report: Progress) -> Iterator[bytes]:
    """The bytes of some files, one after the other."""
    size, done = sum(size for size, _ in _stamps(files)), 0
    report(stage, 0.0)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                yield block
                done += len(block)
                report(stage, min(1.0, done / max(size, 1)))


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Sizes and times: equal before and after means that nobody wrote meanwhile."""
    return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in files)]


@contextlib.contextmanager
def _in_one_piece(files: Sequence[Path], whole: Path, report: Progress) -> Iterator[Path]:
    """A GGUF file as readers want it: parts are put together at ``whole``, which is gone again afterwards.

    That lies in the folder being made, so whatever ends the conversion takes it away, too.
    """
    if len(files) == 1:
        yield files[0]
        return
    try:
        with whole.open("wb") as file:
            for block in _blocks(files, "assembling", report):
                file.write(block)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _note(folder: Path) -> dict[str, Any] | None:
    """What a converted folder says of itself; None if it isn't one, or the note is damaged."""
    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        files = note["files"]
        if note["conversion"] == _CONVERSION and all(isinstance(size, int) for size in files.values()):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
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
def _one_converter(root: Path, report: Progress, *, wait: bool = True) -> Iterator[bool]:
    """Let one process convert at a time: two would need twice the memory, often for the same file.

    Yields False where the file system has no locks; then the rename in ``_publish`` still decides. Raises
    BlockingIOError if there is another one, and it is not to ``wait``.
    """
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            report("waiting", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)  # which unlocks, as does the death of the process


def _convert_into(work: Path, name: str, gguf: Path, report: Progress) -> None:
    report("parsing", 0.0)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with gc_paused(), quiet(report), _gguf_parsed_once():
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
        refuse_missing(name, info)
        report("tokenizer", 0.0)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        report("tokenizer", 1.0)
        report("writing", 0.0)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        report("writing", 1.0)


def _seal(work: Path, gguf: str, size: int, digest: str) -> None:
    """Make the folder private and durable, and write the note that says it is whole."""
    import transformers

    note = {
        "conversion": _CONVERSION,
        "source": gguf,
        "source_size": size,
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
    with patching:
        gguf.GGUFReader = functools.cache(Reader)
        gguf.get_tensor_name_map = functools.cache(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
