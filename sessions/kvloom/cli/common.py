"""What the commands share: the options each of them takes, and the two ways to open a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from kvloom.cli.terminal import warn

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom_store.names import Ref

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Options:
    """The options that stand before the command or after it, and the device a model is to run on."""

    store: str | None = None
    json: bool = False
    device: str | None = None

    @property
    def path(self) -> Path:
        """The store's file: ``--store``, else ``KVLOOM_STORE``, else the platform's data folder."""
        from kvloom.errors import StoreUnavailable
        from kvloom_store.database import default_path

        try:
            path = Path(self.store).expanduser() if self.store else default_path()
            path.exists()
        except (OSError, RuntimeError) as error:  # a folder one may not look into, a name too long, ~nobody
            reason = getattr(error, "strerror", None) or error
            raise StoreUnavailable(
                f"cannot use the store {self.store or 'of KVLOOM_STORE'}: {reason}",
                hint="give another place with --store PATH (or KVLOOM_STORE)",
            ) from error
        return path


pass_options = click.make_pass_decorator(Options, ensure=True)


def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and param.name:
        setattr(ctx.ensure_object(Options), param.name, value)


def store_option(command: F) -> F:
    """``--store PATH``."""
    return click.option(
        "--store",
        metavar="PATH",
        expose_value=False,
        callback=remember,
        help="The store's file (env KVLOOM_STORE; default: kvloom.db in your data folder).",
    )(command)


def json_option(command: F) -> F:
    """``--json``."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Print one JSON object on stdout; everything else goes to stderr.",
    )(command)


def shared(command: F) -> F:
    """The options of every command that looks into a store; hands the command an ``Options`` first."""
    return store_option(json_option(cast(F, pass_options(command))))


@contextmanager
def reading(options: Options) -> Iterator[KVLoom]:
    """The store, to look at and to move names; no model is loaded. Raises StoreUnavailable where there is none."""
    from kvloom.loom import KVLoom

    with KVLoom(options.path, must_exist=True) as loom:
        tell_kept(loom)
        yield loom


def tell_kept(loom: KVLoom) -> None:
    """One line on stderr for each reply that was cut off because its process died."""
    for each in loom.kept:
        at = f"{each.session}@{each.branch}"
        warn(f"the process that replied on {at} died; {each.tokens} tokens are kept (kvloom continue {at} goes on)")


def parse(text: str) -> tuple[Ref, str | None]:
    """A ref, and its part after the session as ``Session.log`` and ``checkout`` take it."""
    from kvloom_store.names import parse_ref

    ref = parse_ref(text)
    return ref, ref.at


def warn_of_network_drive(path: Path) -> None:
    """One line on stderr if the store lies where its write-ahead log is not safe."""
    from kvloom_store.sqlite import network_filesystem

    kind = network_filesystem(path)
    if kind:
        warn(f"{path} lies on a network drive ({kind}), where SQLite can lose data; use --store with a local path")


def complete_ref(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of sessions, and after an @ those of the session's branches and tags; no model needed."""
    from kvloom.errors import KVLoomError
    from kvloom_store import refs

    try:
        with reading(ctx.ensure_object(Options)) as reader, reader.database.read() as conn:
            name, at, _ = incomplete.partition("@")
            if not at:
                found = [row.name for row in refs.sessions(conn)]
            else:
                row = refs.get_session(conn, name).row
                points = [branch.name for branch in refs.branches(conn, row)] + list(refs.tags(conn, row))
                found = [f"{name}@{point}" for point in points]
    except (KVLoomError, OSError):
        return []
    return [each for each in found if each.startswith(incomplete)]


def ref_argument(name: str = "ref", *, metavar: str = "SESSION[@REF]", required: bool = True) -> Callable[[F], F]:
    """An argument that names a session or a point in it, completed from the store."""
    return click.argument(name, metavar=metavar, required=required, shell_complete=complete_ref)
