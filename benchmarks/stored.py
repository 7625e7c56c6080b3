"""State that is stored, and brought back: what a measurement of restoring begins with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom import KVLoom
    from kvloom.live import LiveState
    from kvloom.reading import Account
    from kvloom_store.turns import TurnState

SESSION = "novel"


def tell(loom: KVLoom, session: str, ids: Sequence[int], turns: int = 1) -> None:
    """Store a conversation of exactly these tokens, cut into so many turns: their state is computed, none generated."""
    from kvloom.append import Append
    from kvloom.commit import Commits
    from kvloom.steps import NewTurn, Step

    cuts = [len(ids) * number // turns for number in range(turns + 1)]
    steps = []
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        message = {"role": ("user", "assistant")[number % 2], "content": loom.engine.tokenizer.decode(ids[start:end])}
        steps.append(Step(NewTurn(message), start, tuple(ids[start:end])))
    branch = loom.session(session).branch()
    Append(loom, Commits(loom, branch.row), None, None, []).run(session, steps)
    loom.flush()


@dataclass(frozen=True, slots=True)
class Path:
    """A branch's tokens whose state is held (the last one sampled is pending), and the state of its last turn."""

    ids: list[int]
    tip: TurnState


def path_of(loom: KVLoom, session: str, branch: str = "main") -> Path:
    """A branch as the store has it."""
    from kvloom_store import names, refs, trie, turns

    with loom.database.read() as conn:
        turn = refs.resolve(conn, names.parse_ref(f"{session}@{branch}")).turn
        assert turn is not None
        state = turns.states_of(conn, [turn])[0]
        return Path(trie.tokens_to(conn, state.position.node, state.position.offset)[: state.state_end], state)


def bring_back(loom: KVLoom, path: Path, at: int, room: int = 1) -> tuple[LiveState, Account]:
    """The state at a token of a path, and what it cost to bring it back, with nothing of it in memory before."""
    loom.resumer.forget()
    with loom.engine.lock:
        live, account = loom.resumer.resume(path.ids[:at], path.tip, room=room, logits=False)
    assert live.length == at, f"only {live.length} of {at} tokens are held"
    return live, account
