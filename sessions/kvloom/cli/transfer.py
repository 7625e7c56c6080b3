"""``kvloom export`` and ``kvloom import``: conversations as files. Neither loads a model."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.progress import Bars
from kvloom.cli.terminal import dim, print_json, size, stdout_is_terminal, warn
from kvloom.shown import clean

if TYPE_CHECKING:
    from kvloom.loom import KVLoom
    from kvloom_store.bundle_in import Imported

BUNDLES = ("protobuf", "msgpack")
TRANSCRIPTS = ("markdown", "openai")


@click.command()
@shared
@ref_argument()
@click.option("-o", "--output", metavar="FILE", required=True, help='Where to ("-": stdout).')
@click.option(
    "--format",
    "kind",
    type=click.Choice(BUNDLES + TRANSCRIPTS),
    default="protobuf",
    help="A bundle as protobuf (default) or MessagePack; or the text alone, as Markdown or OpenAI's JSON.",
)
@click.option("--text-only", is_flag=True, help="A bundle without state: text and tokens, some thousand times smaller.")
def export(options: Options, ref: str, output: str, kind: str, text_only: bool) -> None:
    """Write the conversation that REF names to FILE: text, tokens and state, so that "kvloom import" brings it back
    elsewhere and goes on at once, with the same bits.

    SESSION alone is the whole tree with its branches and tags; SESSION@BRANCH, @TAG or @TURN is the one path there, and
    nothing of what others said behind it. Searches stay here; their turns and branches go. The file is only readable by
    you, and appears when it is whole.

    With --format markdown or openai it is a transcript, of one path (default: the branch main).

    \b
    Example:
      kvloom export trip -o trip.kvb
      kvloom export trip@spain -o spain.kvb --text-only
      kvloom export trip --format markdown -o trip.md
      kvloom export trip -o - | ssh there kvloom import -
    """
    transcript = kind in TRANSCRIPTS
    if transcript and text_only:
        raise click.UsageError("--text-only is for bundles; a transcript has no state")
    if output == "-" and options.json:
        raise click.UsageError("the conversation and --json each need a place of their own")
    if output == "-" and not transcript and stdout_is_terminal():
        raise click.UsageError("a bundle is no text for a terminal; redirect it, or give -o FILE")
    at, point = parse(ref)
    bars = Bars()
    with reading(options) as reader:
        session = reader.find(at.session)
        file = sys.stdout.buffer if output == "-" else Path(output)
        try:
            if transcript:
                done = session.export_transcript(file, point, format=kind)
            else:
                done = session.export(file, point, format=kind, text_only=text_only, progress=_told(bars, "writing"))
        finally:
            bars.stop()
    if options.json:
        return print_json({"file": output, "format": kind, **done.to_json()})
    state = "" if transcript or text_only else f", {done.segments} segments of state"
    return dim(f"{'stdout' if output == '-' else output}: {done.turns} turns{state}, {size(done.bytes)}")


@click.command("import")
@shared
@click.argument("file", metavar="FILE|-")
@click.option("--as", "name", metavar="NAME", help="The session to make, or to add to (default: its own name).")
@click.option("--text-only", is_flag=True, help="Of a bundle, leave the state out: it is computed again when needed.")
def import_(options: Options, file: str, name: str | None, text_only: bool) -> None:
    """Read what "kvloom export" wrote, a JSON list of messages (OpenAI's form), or the logs of the "llm" tool, with
    their branches. No model is needed before the conversation goes on.

    What is there already is reused, so a file can be imported again, and one that says more adds the rest. No branch
    is moved: one that points elsewhere here comes in under a name with a number. If anything is wrong with the file,
    nothing has changed.

    The state in a bundle is taken on trust, as a program from elsewhere is: state of a model you have would be used in
    your own conversations where they begin alike. --text-only takes the words, and computes the rest.

    \b
    Example:
      kvloom import trip.kvb
      kvloom import trip.kvb --as trip-of-ann
      kvloom import chat.json --as chat
      kvloom import ~/.config/io.datasette.llm/logs.db
    """
    from kvloom.files import opened
    from kvloom.loom import KVLoom

    bars = Bars()
    with opened(file) as source, KVLoom(options.path) as loom:
        begin, stream = _peeked(source)
        try:
            if begin.startswith(b"SQLite format 3\0"):
                done = _import_logs(loom, file, name)
            elif begin.lstrip()[:1] in (b"[", b"{"):
                done = [_import_messages(loom, file, stream, name)]
            else:
                total = None if file == "-" else Path(file).stat().st_size
                told = _told(bars, "reading")

                def progress(read: int) -> None:
                    if total:
                        told(read, 2 * total)

                done = [loom.import_bundle(stream, name, text_only=text_only, progress=progress)]
        finally:
            bars.stop()
    if options.json:
        return print_json({"file": file, "sessions": [each.to_json() for each in done]})
    for each in done:
        _tell(each)
    return None


def _tell(done: Imported) -> None:
    new = "is new" if done.created else "was there"
    parts = [f"{done.turns} turns, {done.new_turns} of them new"]
    if not done.text_only:
        parts.append(f"{done.new_segments} segments of state, {size(done.bytes)}")
    click.echo(f"{clean(done.session)} {new}: {'; '.join(parts)}")
    for name, called in done.names.items():
        if name != called:
            warn(f"{name!r} points elsewhere here already: what was imported is {done.session}@{called}")
    if done.made_main:
        dim("the branch main begins at its tip")


def _told(bars: Bars, doing: str) -> Callable[[int, int], None]:
    return lambda done, total: bars.stage(f"{doing} {size(total)}", done / max(total, 1))


def _peeked(source: BinaryIO) -> tuple[bytes, BinaryIO]:
    """How a file begins, and the file, from its beginning."""
    if source.seekable():
        begin = source.read(16)
        source.seek(0)
        return begin, source
    buffered = io.BufferedReader(cast(io.RawIOBase, source)) if not hasattr(source, "peek") else source
    return cast(io.BufferedReader, buffered).peek(16)[:16], buffered


def _import_messages(loom: KVLoom, file: str, source: BinaryIO, name: str | None) -> Imported:
    from kvloom.transcripts import of_openai
    from kvloom_proto.limits import MAX_TURN_BYTES
    from kvloom_store.names import MAIN

    messages = of_openai(source.read(MAX_TURN_BYTES + 1))
    return loom.import_messages(name or _named_after(file), {MAIN: messages})


def _named_after(file: str) -> str:
    from kvloom.errors import InvalidName
    from kvloom_store.names import check_name

    stem = "" if file == "-" else Path(file).stem
    try:
        return check_name("session", stem)
    except InvalidName as error:
        raise click.UsageError("give the session a name: --as NAME") from error


def _import_logs(loom: KVLoom, file: str, name: str | None) -> list[Imported]:
    from kvloom_store import llm_logs

    if file == "-":
        raise click.UsageError("the logs of llm are a database, and cannot be read from stdin: give the file")
    conversations: Mapping[str, Mapping[str, list[dict[str, Any]]]] = llm_logs.read(Path(file))
    if name is not None and len(conversations) != 1:
        raise click.UsageError(f"--as names one session, and there are {len(conversations)} conversations")
    return [loom.import_messages(name or own, branches) for own, branches in conversations.items()]
