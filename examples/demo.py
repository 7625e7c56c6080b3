"""A conversation about a novel that is killed, resumed by another process, and branched; then what that cost.

    python examples/demo.py [--model NAME] [--characters N] [--folder FOLDER]

Three kinds of processes take part. This one tells the story and never loads a model. A *talking* child has the
conversation through the Python API, and is killed. Whatever comes after it goes through the command line, one
process a command. A *reference* child has the same conversation without interruption, to compare with.
Every figure is measured in this run. Ends with 1 if the resumed reply is not exactly the uninterrupted one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SESSION = "novel"
SYSTEM = "You answer questions about the text you are given, in one or two sentences."
QUESTIONS = (
    "Who are the main characters of this text?",
    "What does Mr. Bennet think of his daughters?",
    "What happens at the ball?",
)
BRANCHES = {
    "jane": "Describe Jane in one sentence.",
    "darcy": "Why do people dislike Mr. Darcy?",
    "letter": "Write the first line of a letter from Mrs. Bennet to her sister.",
}
FORKED_AT = f"{SESSION}@main~{2 * (len(QUESTIONS) - 1)}"  # the reply to the first question
MAX_TOKENS = 40
KILLED_AFTER = 8  # pieces of the last reply

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo, or one of its children."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".demo", help="where the stores are made")
    parser.add_argument("--characters", type=int, default=13_000, help="how much of the novel is talked about")
    parser.add_argument("--child", choices=["talk", "reference"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        (talk if asked.child == "talk" else reference)(asked)
        return 0
    return tell(asked)


def tell(asked: argparse.Namespace) -> int:
    """The story, from the first process to the last."""
    began = time.perf_counter()
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("talk.db*"), *folder.glob("uninterrupted.db*")]:
        old.unlink()
    store = folder / "talk.db"

    say(f"A process talks with {asked.model} about the first chapters of a novel. The store is {store}.")
    have_conversation(asked)

    tip = command(store, "show", SESSION, quiet=True)["turn"]  # whoever opens the store next keeps what was said
    kept = len(tip["states"][0]["tokens"]) if tip["role"] == "assistant" else 0
    say(f"Another process goes on with the reply: {kept} tokens of it were noted before the kill.")
    resumed = command(store, "continue", SESSION, "--max-tokens", str(MAX_TOKENS - kept))
    show(resumed)

    say("Three branches fork at the first reply. A fork is one row: it copies no state and loads no model.")
    for name in BRANCHES:
        command(store, "fork", FORKED_AT, name)
    say("Each branch says something else, each in a process of its own.")
    said = {}
    for name, text in BRANCHES.items():
        ref = f"{SESSION}@{name}"
        said[name] = command(store, "say", ref, text, "--max-tokens", str(MAX_TOKENS))
        show(said[name])

    say("The same conversation now runs in one process that nothing interrupts, to compare with.")
    recomputed = run_reference(asked)

    console.print(f"\n[cyan]$ kvloom tree {SESSION}[/]")
    subprocess.run([*KVLOOM, "tree", SESSION], env=environment(store), check=True)
    console.print()
    console.print(times_table({"main": resumed, **said}, recomputed))
    console.print(bytes_table(command(store, "stats", quiet=True)["bytes"]))

    exact = last_reply(store) == last_reply(folder / "uninterrupted.db")
    count = resumed["tokens"]["generated"]
    if exact:
        console.print(
            f"\n[green]Exact:[/] the reply that was killed, its {count} tokens after the kill, and the model's hidden "
            "state behind them, are those of the run that was never interrupted, bit for bit."
        )
    else:
        console.print("\n[red]Not exact:[/] the resumed reply differs from that of the uninterrupted run.")
    console.print(f"[dim]{time.perf_counter() - began:.0f} s in all. Look around: kvloom --store {store} ls[/]")
    return 0 if exact else 1


# --- the two children -----------------------------------------------------------------------------------


def talk(asked: argparse.Namespace) -> None:
    """Ask all questions, telling how each reply comes along."""
    import kvloom

    with kvloom.open(asked.folder / "talk.db", model=asked.model, progress=loading) as loom:
        converse(loom, asked.characters)


def reference(asked: argparse.Namespace) -> None:
    """The same without a kill; then the same turns again, with nothing reused: what a restart costs elsewhere."""
    import kvloom

    with kvloom.open(asked.folder / "uninterrupted.db", model=asked.model, progress=loading) as loom:
        session = converse(loom, asked.characters)
        for name, text in {"main": QUESTIONS[-1], **BRANCHES}.items():
            at = "main~2" if name == "main" else FORKED_AT.partition("@")[2]
            run = session.fork(f"again-{name}", at).stream(text, reuse=False, max_tokens=1, progress=prefilling)
            tell_parent("recomputed", of=name, **run.reply.to_json())


def converse(loom: Any, characters: int) -> Any:
    """The conversation both children have. Greedy, so it is the same one."""
    session = loom.session(SESSION, system=SYSTEM)
    main = session.branch()
    for question, text in zip(QUESTIONS, (f"{novel(characters)}\n\n{QUESTIONS[0]}", *QUESTIONS[1:]), strict=True):
        tell_parent("asks", text=question)
        run = main.stream(text, max_tokens=MAX_TOKENS, progress=prefilling)
        for piece in run:
            tell_parent("piece", text=piece)
        tell_parent("reply", **run.reply.to_json())
    return session


def novel(characters: int) -> str:
    """The first paragraphs; 13,000 characters are 3,300 tokens of SmolLM2's."""
    text = (HERE / "data" / "pride_and_prejudice.txt").read_text("utf-8")
    return text[:characters].rpartition("\n\n")[0]


def loading(stage: str, fraction: float) -> None:
    tell_parent("working", stage=f"{stage} the model", done=fraction)


def prefilling(done: int, total: int) -> None:
    tell_parent("working", stage=f"running {total:,} tokens", done=done / total)


def tell_parent(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


# --- what this process does with them -------------------------------------------------------------------

KVLOOM = (sys.executable, "-m", "kvloom.cli")


def have_conversation(asked: argparse.Namespace) -> None:
    """Show the talking child's conversation, and kill it in the middle of the last reply."""
    child = start("talk", asked)
    replies = pieces = 0
    for event in events(child):
        if event["event"] == "asks":
            console.print(f"\n[bold]{event['text']}[/]")
        elif event["event"] == "piece":
            console.print(event["text"], end="", markup=False)
            pieces += replies == len(QUESTIONS) - 1
            if pieces == KILLED_AFTER:
                child.send_signal(signal.SIGKILL)
                break
        elif event["event"] == "reply":
            replies += 1
            account(event)
    code = child.wait()
    if code != -signal.SIGKILL:
        fail(f"the talking process ended by itself ({code}) before it could be killed", child)
    console.print(f" [red]… SIGKILL[/] [dim](process {child.pid}, in the middle of a reply)[/]")


def run_reference(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each branch's turn costs if nothing is reused, from the reference child."""
    child = start("reference", asked)
    found = {event["of"]: event for event in events(child) if event["event"] == "recomputed"}
    if child.wait() != 0:
        fail("the uninterrupted run failed", child)
    return found


def start(role: str, asked: argparse.Namespace) -> subprocess.Popen[str]:
    options = {"child": role, "model": asked.model, "characters": asked.characters, "folder": asked.folder}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What a child tells; its work and its thinking are shown in passing, and not handed on."""
    assert child.stdout is not None
    busy = console.status("starting a process", spinner="line")
    busy.start()
    try:
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "working":
                busy.update(f"[dim]{event['stage']}: {event['done']:.0%}[/]")
                busy.start()
            else:
                busy.stop()  # so that pieces of a reply can share a line
                yield event
    finally:
        busy.stop()


def command(store: Path, *arguments: str, quiet: bool = False) -> Any:
    """Run a kvloom command in a process of its own; the object it prints."""
    if not quiet:
        console.print(f"[cyan]$ kvloom {shlex.join(arguments)}[/]", markup=True)
    with console.status("[dim]a new process runs it[/]", spinner="line"):
        done = subprocess.run([*KVLOOM, *arguments, "--json"], env=environment(store), capture_output=True, text=True)
    if done.returncode != 0:
        fail(f"kvloom {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def environment(store: Path) -> dict[str, str]:
    return {**os.environ, "KVLOOM_STORE": str(store), "COLUMNS": str(console.width)}


def fail(message: str, child: subprocess.Popen[str] | None = None) -> NoReturn:
    if child is not None and child.stderr is not None:
        message += "\n" + child.stderr.read().strip()
    console.print(f"[red]{message}[/]", markup=True)
    raise SystemExit(1)


def last_reply(path: Path) -> tuple[Sequence[int], bytes | None]:
    """The tokens of main's last reply, of all its parts, and the model's hidden state at its end, as stored."""
    from kvloom_store import refs, turns
    from kvloom_store.database import Database
    from kvloom_store.names import parse_ref

    database = Database(path, must_exist=True)
    try:
        with database.read() as conn:
            path_down = turns.path_to(conn, refs.resolve(conn, parse_ref(f"{SESSION}@main")).turn)
            reply = list(itertools.takewhile(lambda turn: turn.role == "assistant", reversed(path_down)))
            parts = [turns.states_of(conn, [turn.row])[0] for turn in reversed(reply)]
            return [token for part in parts for token in part.tokens], parts[-1].hidden
    finally:
        database.close()


# --- tables ---------------------------------------------------------------------------------------------


def times_table(restored: dict[str, Any], recomputed: dict[str, Any]) -> Table:
    """For each branch's turn: where its tokens came from, and when the first token of the reply came."""
    caption = "from the moment the model is loaded; recomputed: the same tokens run anew, nothing reused"
    table = Table(title="The turn of each new process", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("branch")
    for title in ("reused", "replayed", "computed", "first token, restored", "recomputed", "sooner"):
        table.add_column(title, justify="right")
    for name, reply in restored.items():
        tokens, first = reply["tokens"], reply["seconds"]["first_token"]
        whole = recomputed[name]["seconds"]["first_token"]
        counts = [f"{tokens[kind]:,}" for kind in ("reused", "replayed", "computed")]
        table.add_row(name, *counts, f"{first * 1000:,.0f} ms", f"{whole * 1000:,.0f} ms", f"{whole / first:,.0f} x")
    return table


def bytes_table(stored: dict[str, int]) -> Table:
    """How large the store is, and how large one snapshot for each reply would be."""
    table = Table(title="What is stored", title_justify="left")
    table.add_column("")
    table.add_column("MB", justify="right")
    table.add_row("the file, text and all", _megabytes(stored["file"]))
    table.add_row("state in it", _megabytes(stored["state_stored"]))
    table.add_row("state of each token once, uncompressed", _megabytes(stored["state_logical"]))
    table.add_row("state, if every reply were a snapshot", _megabytes(stored["state_if_snapshots"]))
    return table


def show(reply: dict[str, Any]) -> None:
    console.print(reply["text"].strip(), markup=False)
    account(reply)


def account(reply: dict[str, Any]) -> None:
    """The line that says what a reply cost."""
    tokens, seconds = reply["tokens"], reply["seconds"]
    first = seconds["first_token"] or seconds["total"]
    console.print(
        f"\n[dim]reused {tokens['reused']:,} · replayed {tokens['replayed']:,} · computed {tokens['computed']:,} · "
        f"first token after {first:.2f} s[/]"
    )


def say(sentence: str) -> None:
    console.print(f"\n[bold]{sentence}[/]\n")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
