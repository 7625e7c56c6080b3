"""Commands about the set-up: stats, models, doctor, completion."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.terminal import columns, print_json, size, warn
from kvloom.shown import clean

PROBE_BYTES = 64 << 20
"""What doctor writes and reads back to see how fast the store's disk is."""

_VERSIONED = ("torch", "transformers", "sqlalchemy", "numpy", "safetensors", "protobuf", "lz4", "zstandard", "xxhash")


@click.command()
@shared
@ref_argument("session", metavar="[SESSION]", required=False)
def stats(options: Options, session: str | None) -> None:
    """Count the turns, tokens and bytes of the store, or of SESSION alone.

    "stored" is what the state takes; "logical" its size uncompressed, each token counted once; "snapshots"
    what one full snapshot for each reply would take.

    \b
    Example:
      kvloom stats
      kvloom stats trip --json
    """
    from kvloom_store.stats import stats as count

    if session is None and not options.path.exists():
        found: dict[str, Any] = {"sessions": 0, "turns": 0, "tokens": 0}
        found["bytes"] = dict.fromkeys(
            ("file", "state_stored", "state_lossy", "state_logical", "state_if_snapshots"), 0
        )
    else:
        with reading(options) as reader:
            row = reader.find(parse(session)[0].session).row.row if session else None
            found = count(reader.database, row)
    return print_json(found) if options.json else print_stats(found)


def print_stats(found: dict[str, Any]) -> None:
    """Counts, for people."""
    sizes = found["bytes"]
    lossy = f" ({size(sizes['state_lossy'])} of it lossy)" if sizes["state_lossy"] else ""
    facts = {name: f"{value:,}" for name, value in found.items() if isinstance(value, int)}
    facts |= {
        "file": size(sizes["file"]),
        "state": f"{size(sizes['state_stored'])} stored{lossy}, {size(sizes['state_logical'])} logical",
        "snapshots": f"{size(sizes['state_if_snapshots'])} if each reply were one",
    }
    _print_facts(facts)


@click.command()
@shared
@click.option("--stored", is_flag=True, help="List the models that the store holds state of.")
def models(options: Options, stored: bool) -> None:
    """List the models that are here, and how to get those that are not.

    A folder with config.json and safetensors, a .gguf file or a hub name (owner/name) can be given to
    --model as well.

    With --stored, list what a store holds of each model: a session can be read by several ("kvloom say SESSION TEXT
    --model OTHER"), each of which keeps state of its own. Another precision, another adapter and edited weights make
    another model; --json has the fields that tell them apart.

    \b
    Example:
      kvloom models
      kvloom models --stored
      kvloom config model smollm2
    """
    if stored:
        return _stored_models(options)
    from kvloom import config
    from kvloom.models import available

    choices = available()
    default = config.load().model
    if options.json:
        listed = [
            {"name": c.name, "kind": c.kind, "ready": c.ready, "path": c.path, "bytes": c.size, "how": c.how}
            for c in choices
        ]
        return print_json({"models": listed, "default": default})
    rows = [
        [
            clean(choice.name) + (" (default)" if choice.name == default else ""),
            choice.kind,
            size(choice.size) if choice.ready else "not here",
        ]
        for choice in choices
    ]
    columns(rows, ["model", "kind", "size"])
    for choice in choices:
        if not choice.ready:  # not in the table, whose edge a terminal would cut
            click.echo(f"get {choice.name}: {choice.how}")
    if default not in {choice.name for choice in choices}:
        click.echo(f"default: {clean(default)}")
    return None


def _stored_models(options: Options) -> None:
    """What the store holds of each model."""
    from kvloom_store.stats import by_model

    found: list[dict[str, Any]] = []
    if options.path.exists():
        with reading(options) as reader:
            found = by_model(reader.database)
    if options.json:
        return print_json({"models": found})
    if not found:
        return click.echo("the store holds no model's state")
    rows = [
        [
            clean(each["name"]),
            str(each["dtype"]),
            each["digest"][:8],
            f"{each['sessions']:,}",
            f"{each['turns']:,}",
            f"{each['tokens']:,}",
            size(each["bytes"]),
        ]
        for each in found
    ]
    return columns(rows, ["model", "dtype", "identity", "sessions", "turns", "tokens", "state"])


@click.command()
@shared
@click.option("--full", is_flag=True, help="Load the default model too.")
def doctor(options: Options, full: bool) -> None:
    """Tell what is installed, what this machine can do, where files are and how fast the disk is.

    \b
    Example:
      kvloom doctor
      kvloom doctor --full --json
    """
    from kvloom import config

    chosen = config.load()
    found: dict[str, Any] = {
        "versions": _versions(),
        "cpu": _cpu(),
        "files": _files(options),
        "model": _model(chosen.model),
        "disk": _disk(options.path),
    }
    if full:
        found["loaded"] = _loaded(chosen.model, chosen.dtype)
    if options.json:
        return print_json(found)
    for title, facts in found.items():
        click.echo(click.style(title, bold=True))
        _print_facts({f"  {_spelled(name)}": _told(name, each) for name, each in facts.items() if each is not None})
    return None


def _spelled(name: str) -> str:
    return name.removesuffix("_bytes_per_second").replace("_", " ")


def _told(name: str, value: Any) -> str:
    return f"{size(value)}/s" if name.endswith("_per_second") else str(value)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from kvloom import __version__

    found = {"python": sys.version.split()[0], "kvloom": __version__}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing: pip install kvloom"
    return found


def _cpu() -> dict[str, Any]:
    """What this build of torch can do on this machine: the one part of a check-up that must import it."""
    try:
        import torch

        from kvloom.models import pick_dtype
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype_auto": pick_dtype("auto"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _files(options: Options) -> dict[str, Any]:
    from kvloom import config
    from kvloom.models import cache_root

    store = options.path
    bytes_of = f" ({size(store.stat().st_size)})" if store.is_file() else " (not there yet)"
    return {
        "store": f"{store}{bytes_of}",
        "models": str(cache_root() / "models"),
        "config": f"{config.path()}{'' if config.path().exists() else ' (not there yet)'}",
    }


def _model(name: str) -> dict[str, Any]:
    from kvloom.errors import KVLoomError
    from kvloom.models import resolve

    try:
        source = resolve(name)
    except KVLoomError as error:
        return {"name": name, "found": f"no; {error.hint}"}
    where = f"yes, {source.path}" if source.path else "a hub name: downloaded when it is first used"
    return {"name": name, "found": where, "kind": source.kind}


def _loaded(name: str, dtype: str) -> dict[str, Any]:
    from kvloom.cli.progress import Bars
    from kvloom.errors import KVLoomError
    from kvloom.loom import load_engine

    bars = Bars()
    began = time.perf_counter()
    try:
        engine = load_engine(name, dtype=dtype, progress=bars.stage)
    except KVLoomError as error:
        return {"error": f"{error}; {error.hint}"}
    finally:
        bars.stop()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "context": engine.context_limit,
        "state": engine.dtype,
    }


def _disk(store: Path) -> dict[str, Any]:
    from kvloom_store.sqlite import network_filesystem

    folder = next((each for each in store.absolute().parents if each.is_dir()), Path.cwd())
    kind = network_filesystem(store)
    if kind:
        warn(f"the store lies on a network drive ({kind}), where SQLite can lose data; use --store with a local path")
    try:
        cold, warm = read_bandwidth(folder)
    except OSError as error:
        return {"folder": str(folder), "network": kind, "error": f"cannot be measured: {error.strerror}"}
    return {"folder": str(folder), "network": kind, "read_bytes_per_second": cold, "cached_bytes_per_second": warm}


def read_bandwidth(folder: Path) -> tuple[int, int]:
    """Bytes a second of a file in a folder, read first from the disk, then from the system's cache."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        into = bytearray(PROBE_BYTES)
        rates = []
        for _ in range(2):
            file.seek(0)
            began = time.perf_counter()
            done = 0
            while count := file.readinto(memoryview(into)[done:]):
                done += count
            rates.append(int(done / max(time.perf_counter() - began, 1e-9)))
    return rates[0], rates[1]


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        click.echo(f"{click.style(f'{name:<20}', dim=True)}{clean(str(value))}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for SHELL that completes commands, options and the names of sessions and branches.

    \b
    Example:
      kvloom completion bash >> ~/.bashrc
      kvloom completion zsh >> ~/.zshrc
      kvloom completion fish > ~/.config/fish/completions/kvloom.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    if found is None:  # the choice names those that click has
        raise click.UsageError(f"no completion for {shell}")
    click.echo(found(root, {}, "kvloom", "_KVLOOM_COMPLETE").source())
