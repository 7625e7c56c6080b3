"""Where the turns of a tree stand: one row each, and a step to the right only where the tree branches.

The longest way down from a turn stays in its column; the others hang off it, one column to the right. A branch
drawn aside holds at most half of the turns below its turn, so a tree of n turns is at most log2(n) columns wide.
What hangs below a turn follows it at once, so that the rows of a subtree are a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Node(Protocol):
    """Anything with an id and its parent's (None at the top)."""

    @property
    def id(self) -> str: ...

    @property
    def parent(self) -> str | None: ...


N = TypeVar("N", bound=Node)


@dataclass(frozen=True, slots=True)
class Place(Generic[N]):
    """A node in its row.

    ``above`` is the row of its parent (None at the top), ``below`` how many rows hang below it: those that follow.
    ``aside``: it hangs off its parent's column, one step to the right.
    """

    node: N
    column: int
    aside: bool
    above: int | None
    below: int


def layout(nodes: Sequence[N]) -> list[Place[N]]:
    """The nodes (parents before their children) in the order of their rows, in time that grows with their number."""
    children: dict[str | None, list[N]] = {}
    size: dict[str, int] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    for node in reversed(nodes):
        size[node.id] = 1 + sum(size[child.id] for child in children.get(node.id, ()))
    places: list[Place[N]] = []
    waiting = _stacked(children.get(None, []), size, 0, None)
    while waiting:
        node, column, aside, above = waiting.pop()
        places.append(Place(node, column, aside, above, size[node.id] - 1))
        waiting += _stacked(children.get(node.id, []), size, column, len(places) - 1)
    return places


def _stacked(
    siblings: list[N], size: dict[str, int], column: int, above: int | None
) -> list[tuple[N, int, bool, int | None]]:
    """Siblings as a stack: those aside are taken off it first, the one that stays in the column last."""
    if not siblings:
        return []
    trunk = max(siblings, key=lambda node: size[node.id])
    aside = [(node, column + 1, True, above) for node in reversed(siblings) if node is not trunk]
    return [(trunk, column, False, above), *aside]
