"""State that is stored, and brought back: what a measurement of restoring begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom import KVLoom
    from kvloom.live import LiveState
    from kvloom.resume import Account
    from kvloom_store.turns import TurnState

SESSION = "novel"


def tell(loom: KVLoom, branch: str, texts: Sequence[str]) -> None:
    """Store a branch of turns that say these texts, the user's and the replies by turns: computed, none generated."""
    from kvloom.planned import PlannedBranch
    from kvloom.steps import Given

    roles = ("user", "assistant")
    given = [Given({"role": roles[number % 2], "content": text}) for number, text in enumerate(texts)]
    PlannedBranch(loom.session(SESSION), None, given, branch, branch).run()
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
