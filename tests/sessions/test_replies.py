"""Many short turns: what bringing them back costs must not grow with their number, and each stands on the right one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from exact.worker import frame_of, rows_of
from tiny import tiny_model, tiny_tokenizer

from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.live import LiveState
from kvloom.loom import KVLoom
from kvloom_store import refs, trie, turns, writer
from kvloom_store.names import parse_ref
from kvloom_store.schema import turn_state
from kvloom_store.turns import TurnState

WORDS = ("When was it?", "Who was there?", "And then?", "What did she say?")


@functools.cache
def engine(kind: str = "llama") -> TransformersEngine:
    return TransformersEngine(tiny_model(kind, "float32"), tiny_tokenizer(), name=f"tiny {kind}")


def talk(loom: KVLoom, exchanges: int) -> Branch:
    branch = loom.session("talk", system="Be brief.").branch()
    for number in range(exchanges):
        branch.say(f"{number}. {WORDS[number % len(WORDS)]}", max_tokens=3)
    return branch


def states(loom: KVLoom) -> dict[int, TurnState]:
    with loom.database.read() as conn:
        rows = conn.execute(sa.select(turn_state.c.id).order_by(turn_state.c.id)).scalars()
        return {row: turns.state(conn, row) for row in rows}


def brought_back(loom: KVLoom, ref: str, more: int = 0) -> LiveState:
    """The state of a turn, as a new process has it that will run so many more tokens."""
    loom.resumer.forget()
    with loom.database.read() as conn:
        row = refs.resolve(conn, parse_ref(ref)).turn
        state = turns.states_of(conn, [row])[0]
        ids = trie.tokens_to(conn, state.position.node, state.position.offset)
    with loom.engine.lock:
        live, account = loom.resumer.resume([*ids, *range(more)], state, room=more + 1, logits=bool(more))
    assert (account.replayed, account.notices) == (0, [])
    assert live.length == state.state_end
    return live


@contextmanager
def queries(loom: KVLoom) -> Iterator[list[str]]:
    """What the store is asked meanwhile."""
    asked: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        asked.append(statement)

    sa.event.listen(loom.database.engine, "before_cursor_execute", note)
    yield asked
    sa.event.remove(loom.database.engine, "before_cursor_execute", note)


def test_bringing_back_many_turns_asks_the_store_no_more_often_than_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FEW_SEGMENTS", 10**9)  # each turn keeps a segment of its own
    counts = {}
    for exchanges in (2, 24):
        with KVLoom(tmp_path / f"{exchanges}.db", model=engine()) as loom:
            talk(loom, exchanges)
            brought_back(loom, "talk", more=5)  # the first time in a process the trie of the model is looked up, too
            with queries(loom) as asked:
                live = brought_back(loom, "talk", more=5)
            assert len({link.handle.segment for link in live.chain}) == 2 * exchanges
        counts[exchanges] = len(asked)
    assert counts[24] == counts[2]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bamba"])
def test_many_turns_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    with KVLoom(tmp_path / "kvloom.db", model=engine(kind)) as loom:
        branch = talk(loom, 8)
        live = loom.resumer.live
        assert live is not None
        was = rows_of(live, live.length), frame_of(live)
    with KVLoom(tmp_path / "kvloom.db", model=engine(kind)) as loom:
        live = brought_back(loom, "talk")
        assert (rows_of(live, live.length), frame_of(live)) == was
        assert branch.log()[-1].role == "assistant"


def test_a_turn_said_further_up_stands_on_the_turn_before_it(tmp_path: Path) -> None:
    with KVLoom(tmp_path / "kvloom.db", model=engine()) as loom:
        branch = talk(loom, 4)
        loom.flush()
        brought_back(loom, "talk")  # one look at the last turn: the others' owners are not looked up
        before = set(states(loom))
        branch.fork("other", back=4).say("Else?", max_tokens=2)
        loom.flush()
        held = states(loom)
        new = min(row for row in held if row not in before)
        base = held[held[new].base_state]
        assert base.state_start < held[new].state_start <= base.state_end
        assert base.segment == held[new].base_segment


def test_what_a_turn_stands_on_is_found_again_when_only_its_segment_is_known(tmp_path: Path) -> None:
    with KVLoom(tmp_path / "kvloom.db", model=engine()) as loom:
        talk(loom, 3)
        loom.flush()
        held = states(loom)
        last = held[max(held)]
        base = held[last.base_state]
        with loom.database.read() as conn:
            assert turns.owner_of(conn, base.segment, last.state_start) == base
            assert turns.owner_of(conn, base.segment, base.state_start) is None
            assert turns.owner_of(conn, base.segment, base.state_end + 1) is None
