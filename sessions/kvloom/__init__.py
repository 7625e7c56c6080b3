"""kvloom keeps LLM conversations as trees, every branch of which resumes exactly, without recomputing its prefix.

    import kvloom

    with kvloom.open("talks.db", model="smollm2") as loom:
        main = loom.session("trip", system="You are brief.").branch()
        print(main.say("Name a city in Italy.").text)
        other = main.fork("other", back=2)

Everything a user may rely on is reachable from here, and imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvloom._version import __version__

if TYPE_CHECKING:
    from kvloom.branch import Branch
    from kvloom.diff import Diff
    from kvloom.engine import TransformersEngine
    from kvloom.errors import KVLoomError
    from kvloom.loom import KVLoom, load_engine, open
    from kvloom.report import Reply, Restored, Seconds, Tokens
    from kvloom.sampling import SamplingSettings
    from kvloom.session import Session, TreeTurn
    from kvloom.template import ChatTemplate
    from kvloom.why import Why

__all__ = [
    "Branch",
    "ChatTemplate",
    "Diff",
    "KVLoom",
    "KVLoomError",
    "Reply",
    "Restored",
    "SamplingSettings",
    "Seconds",
    "Session",
    "Tokens",
    "TransformersEngine",
    "TreeTurn",
    "Why",
    "__version__",
    "errors",
    "load_engine",
    "open",
]

_HOME = {
    "Branch": "branch",
    "ChatTemplate": "template",
    "Diff": "diff",
    "KVLoom": "loom",
    "KVLoomError": "errors",
    "Reply": "report",
    "Restored": "report",
    "SamplingSettings": "sampling",
    "Seconds": "report",
    "Session": "session",
    "Tokens": "report",
    "TransformersEngine": "engine",
    "TreeTurn": "session",
    "Why": "why",
    "load_engine": "loom",
    "open": "loom",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("kvloom.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvloom.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
