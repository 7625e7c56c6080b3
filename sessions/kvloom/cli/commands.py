"""The commands there are, by what they are for: where each is found, and its line in the help.

A command's module is imported when the command is asked for: the help, and each command, wait for no other one.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One command: its name, the module here and the function in it, and what it does in a line."""

    name: str
    module: str
    function: str
    summary: str


SECTIONS: dict[str, tuple[Entry, ...]] = {
    "Talk": (
        Entry("chat", "chat", "chat", "Talk, interactively."),
        Entry("say", "talk", "say", "Say something and get a reply; for scripts."),
        Entry("continue", "talk", "continue_", "Go on with a reply that was stopped."),
        Entry("regenerate", "talk", "regenerate", "Get another reply to the last message."),
    ),
    "Branch": (
        Entry("fork", "manage", "fork", "Begin a new branch at any turn or token."),
        Entry("edit", "edit", "edit", "Say a past turn otherwise, on a new branch."),
        Entry("compact", "compact", "compact", "Go on shorter, on a new branch."),
        Entry("tag", "manage", "tag", "Give a turn a name that stays."),
        Entry("rename", "manage", "rename", "Rename a session."),
        Entry("rm", "manage", "rm", "Delete a session or a branch; with --erase, for good."),
    ),
    "Explore": (
        Entry("sample", "sample", "sample", "Get several replies at once, each on its own branch."),
        Entry("explore", "explore", "explore", "Search continuations: make many, score them, go on with the best."),
    ),
    "State": (
        Entry("warm", "warm", "warm", "Compute state that is missing, ahead of time."),
        Entry("recode", "recode", "recode", "Store a branch's state with another codec."),
        Entry("gc", "room", "gc", "Drop state to make room; what was said stays."),
        Entry("pin", "room", "pin", "Have the state of a turn never dropped."),
        Entry("unpin", "room", "unpin", "Let the state of a turn be dropped again."),
        Entry("quota", "room", "quota", "Show or set how much room state may take."),
        Entry("fsck", "fsck", "fsck", "Check everything in the store, and repair it."),
        Entry("verify", "verify", "verify", "Check the state down to a point, or compute it again and compare."),
    ),
    "Move": (
        Entry("export", "transfer", "export", "Write a conversation to a file."),
        Entry("import", "transfer", "import_", "Read a conversation from a file."),
    ),
    "Look": (
        Entry("browse", "browse", "browse", "Walk about a tree, and talk in it."),
        Entry("ls", "show", "ls", "List the sessions."),
        Entry("branches", "show", "branches", "List the branches of a session."),
        Entry("log", "show", "log", "Show a conversation from its beginning to a point."),
        Entry("tree", "tree", "tree", "Draw a session as a tree."),
        Entry("show", "show", "show", "Show one turn in full, or the tokens around a point."),
        Entry("search", "search", "search", "Find what was said, in all sessions."),
        Entry("diff", "diff", "diff", "Show where two branches part, side by side."),
        Entry("why", "why", "why", "Tell what would be reused, and why not more."),
        Entry("stats", "about", "stats", "Count turns, tokens and bytes."),
        Entry("cost", "cost", "cost", "Count tokens reused and computed, and what that saved."),
    ),
    "Set up": (
        Entry("models", "about", "models", "List the models that can be used, or that a store has state of."),
        Entry("config", "manage", "config", "Show or set the default model, dtype, device and codec."),
        Entry("doctor", "about", "doctor", "Check the installation, the disk and the model."),
        Entry("completion", "about", "completion", "Print the script that completes commands and names in your shell."),
    ),
}

BY_NAME = {entry.name: entry for entries in SECTIONS.values() for entry in entries}
