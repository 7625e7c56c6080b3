"""What can be typed in a chat besides text: commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from kvloom.cli.terminal import dim
from kvloom.shown import clean, preview, short_ids

if TYPE_CHECKING:
    from kvloom.cli.chat import Chat


def handle(chat: Chat, line: str) -> bool:
    """Do what a line asks for: a command, or text to say ("//" says a slash). False to leave."""
    if not line.startswith("/") or line.startswith("//"):
        text = line[1:] if line.startswith("//") else line
        chat.run(lambda **options: chat.branch.stream(text, **options))
        return True
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        dim(f"no command /{name}; /help lists them, // begins text with a slash")
        return True
    COMMANDS[name][1](chat, rest.strip())
    return name != "quit"


def _help(chat: Chat, _rest: str) -> None:
    """List the commands."""
    for name, (arguments, command) in COMMANDS.items():
        about = (command.__doc__ or "").strip().splitlines()[0]
        click.echo(f"  /{f'{name} {arguments}':<16} {click.style(about, dim=True)}")
    dim("  Enter sends, Alt-Enter begins a line, Ctrl-C stops a reply, Ctrl-D leaves")


def _fork(chat: Chat, rest: str) -> None:
    """Begin a branch here or at REF, and go on with it."""
    name, _, at = rest.partition(" ")
    if not name:
        return dim("say how to call it: /fork NAME, or /fork NAME BRANCH~2")
    chat.branch = chat.session.fork(name, _ref(chat, at) if at.strip() else chat.branch.name)
    chat.moved = True
    return _where(chat)


def _undo(chat: Chat, _rest: str) -> None:
    """Go back to before the last message; it stays in the tree."""
    chat.branch.undo()
    chat.moved = True
    _where(chat)


def _regenerate(chat: Chat, _rest: str) -> None:
    """Get another reply to the last message."""
    chat.run(chat.branch.regenerate)


def _continue(chat: Chat, _rest: str) -> None:
    """Go on with a reply that was stopped."""
    chat.run(chat.branch.continue_reply)


def _compact(chat: Chat, rest: str) -> None:
    """Go on with a summary of it all, on a new branch; or with the last N exchanges."""
    from kvloom.cli.asking import told
    from kvloom.cli.compact import make
    from kvloom.cli.talk import interruptible

    if rest and (not rest.isdecimal() or not int(rest)):
        return dim("say how many exchanges to keep: /compact 4; or /compact for a summary")
    plan = chat.session.compact(chat.branch.name, keep=int(rest) if rest else None, summary=not rest)
    dim(told(plan.cost))
    with interruptible() as stopped:
        _, added = make(plan, chat.progress, stopped, quiet=chat.quiet)
    if added is None:
        return None
    chat.branch, chat.moved = chat.session.branch(added.branch), True
    return _where(chat)


def _tree(chat: Chat, _rest: str) -> None:
    """Draw the session; the branch you are on is marked."""
    from kvloom.cli.tree import print_tree

    turns = chat.session.tree()
    tips = {name for turn in turns for name in turn.branches}
    empty = [branch.name for branch in chat.session.branches() if branch.name not in tips]
    with chat.loom.database.read() as conn:
        short = short_ids(conn, chat.session.row.row)
    print_tree(chat.session.name, turns, short, empty, current=chat.branch.name)


def _checkout(chat: Chat, rest: str) -> None:
    """Go to a branch; or on a new one to a turn, tag, BRANCH~N, BRANCH:TOKEN."""
    if not rest:
        return dim("say where to: /checkout BRANCH, BRANCH~2, BRANCH:90, TAG or a turn id of /tree")
    chat.branch = chat.session.checkout(_ref(chat, rest))
    chat.moved = True
    return _where(chat)


def _tag(chat: Chat, rest: str) -> None:
    """Give this turn a name that stays."""
    if not rest:
        return dim("say how to call it: /tag NAME")
    chat.session.tag(rest, chat.branch.name)
    return dim(f"tagged #{rest}")


def _log(chat: Chat, _rest: str) -> None:
    """Show what was said so far."""
    from kvloom.cli.show import print_turns

    turns = chat.branch.log()
    with chat.loom.database.read() as conn:
        print_turns(turns, short_ids(conn, chat.session.row.row))


def _stats(chat: Chat, _rest: str) -> None:
    """Count this session's turns, tokens and bytes."""
    from kvloom.cli.about import print_stats
    from kvloom_store.stats import stats

    chat.loom.flush()
    print_stats(stats(chat.loom.database, chat.session.row.row))


def _quit(_chat: Chat, _rest: str) -> None:
    """Leave; so does Ctrl-D."""


def _ref(chat: Chat, text: str) -> str:
    """A ref as it is typed in a chat: the session may be left out, and before ~2 or :90 the branch."""
    at = text.strip().removeprefix(f"{chat.session.name}@")
    return f"{chat.branch.name}{at}" if at.startswith(("~", ":")) else at


def _where(chat: Chat) -> None:
    turns = chat.branch.log()
    said = f", last said: {preview(turns[-1].text, 50)}" if turns else ""
    dim(f"on {clean(chat.session.name)}@{clean(chat.branch.name)}, {len(turns)} turns{said}")


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "continue": ("", _continue),
    "regenerate": ("", _regenerate),
    "undo": ("", _undo),
    "compact": ("[N]", _compact),
    "fork": ("NAME [REF]", _fork),
    "checkout": ("REF", _checkout),
    "tag": ("NAME", _tag),
    "tree": ("", _tree),
    "log": ("", _log),
    "stats": ("", _stats),
    "help": ("", _help),
    "quit": ("", _quit),
}
