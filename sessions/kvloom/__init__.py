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
    from kvloom.bundles import Exported
    from kvloom.choices import Choice, Option
    from kvloom.diff import Diff
    from kvloom.dropped import Dropped
    from kvloom.engine import TransformersEngine
    from kvloom.errors import KVLoomError
    from kvloom.explore.plan import ExploreSettings
    from kvloom.explore.search import Event, Found, Node, Search
    from kvloom.listing import TreeTurn
    from kvloom.loom import KVLoom, load_engine, open
    from kvloom.planned import PlannedBranch
    from kvloom.report import Added, Cost, Reply, Restored, Seconds, Tokens
    from kvloom.sample import Sample
    from kvloom.sampling import SamplingSettings
    from kvloom.scores import TokenScore
    from kvloom.session import Session
    from kvloom.template import ChatTemplate
    from kvloom.verify import Receipt
    from kvloom.why import Why

__all__ = [
    "Added",
    "Branch",
    "ChatTemplate",
    "Choice",
    "Cost",
    "Diff",
    "Dropped",
    "Event",
    "ExploreSettings",
    "Exported",
    "Found",
    "KVLoom",
    "KVLoomError",
    "Node",
    "Option",
    "PlannedBranch",
    "Receipt",
    "Reply",
    "Restored",
    "Sample",
    "SamplingSettings",
    "Search",
    "Seconds",
    "Session",
    "TokenScore",
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
    "Added": "report",
    "Branch": "branch",
    "ChatTemplate": "template",
    "Choice": "choices",
    "Cost": "report",
    "Diff": "diff",
    "Dropped": "dropped",
    "Event": "explore.search",
    "ExploreSettings": "explore.plan",
    "Exported": "bundles",
    "Found": "explore.search",
    "KVLoom": "loom",
    "KVLoomError": "errors",
    "Node": "explore.search",
    "Option": "choices",
    "PlannedBranch": "planned",
    "Receipt": "verify",
    "Reply": "report",
    "Restored": "report",
    "Sample": "sample",
    "SamplingSettings": "sampling",
    "Search": "explore.search",
    "Seconds": "report",
    "Session": "session",
    "TokenScore": "scores",
    "Tokens": "report",
    "TransformersEngine": "engine",
    "TreeTurn": "listing",
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
