"""Points at tokens: which turn a token belongs to, where it is in the trie, and turns that are cut there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from kvloom_proto.records import Pass, Provenance, Schedule
from kvloom_store import cut, refs, removal, roots, schema, segments, spans, trie, turns
from kvloom_store.checksum import digest
from kvloom_store.database import Database
from kvloom_store.errors import RefNotFound
from kvloom_store.names import parse_ref
from kvloom_store.turns import Turn


@dataclass
class Grown:
    """A turn, and the tokens of the path to it, each with the turn it came with."""

    turn: Turn
    tokens: list[int]
    owners: list[int]


@dataclass
class Tree:
    """A session without a model, whose turns have the tokens a test wants."""

    database: Database
    name: str = "trip"
    turns: list[Grown] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self.database.write() as conn:
            self.session = refs.create_session(conn, self.name, {"model": "none"}).row
            model = roots.add_model(conn, digest(self.name.encode()), "none", {})
            self.root = roots.root_for(conn, model)
            self.provenance = segments.add_provenance(conn, Provenance(1, "t", "t", "cpu", "x", "sdpa", "test"))

    def add(self, parent: Grown | None, tokens: list[int], *, back: int = 0, role: str = "user") -> Grown:
        """Say something below a turn; the template rewrites its last ``back`` tokens. Without tokens, no state."""
        above, owners = (parent.tokens, parent.owners) if parent else ([], [])
        start = max(0, len(above) - back) if tokens else len(above)
        path = above[:start] + tokens
        with self.database.write() as conn:
            message = {"role": role, "content": "x" * len(tokens)}
            turn = turns.add_turn(conn, self.session, parent.turn if parent else None, message)
            if tokens:
                turns.add_state(
                    conn,
                    turn.row,
                    self.root,
                    tokens,
                    start,
                    trie.extend(conn, self.root, path),
                    state_start=start,
                    state_end=len(path) - 1,
                    base_state=None,
                    base_segment=None,
                    schedule=Schedule((Pass(start, len(tokens) - 1),)) if len(tokens) > 1 else Schedule(),
                    provenance=self.provenance,
                    hidden=None,
                    hidden_dtype=None,
                )
            refs.add_branch(conn, self.session, f"b{len(self.turns)}", turn.row)
        grown = Grown(turn, path, owners[:start] + [turn.row] * len(tokens))
        self.turns.append(grown)
        return grown

    def counts(self) -> dict[str, int]:
        """How many rows each table has, but for those that only give out ids."""
        with self.database.read() as conn:
            return {
                table.name: conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in schema.metadata.tables.values()
                if table.name != "sequence"
            }


@pytest.fixture
def tree(store_path: Path) -> Iterator[Tree]:
    database = Database(store_path)
    yield Tree(database)
    database.close()


GROWTH = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 7)),  # the parent, None for a beginning
        st.lists(st.integers(0, 2), max_size=5),
        st.sampled_from([0, 0, 0, 1, 2, 7]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One for all trees, which have sessions of their own: it takes longer to make than a tree."""
    database = Database(tmp_path_factory.mktemp("cut") / "s.db")
    yield database
    database.close()


@given(growth=GROWTH)
def test_every_token_of_every_branch_belongs_to_the_turn_it_came_with(shared, growth):
    tree = Tree(shared, name=f"trip-{uuid4().hex}")
    for parent, tokens, back in growth:
        tree.add(tree.turns[parent % len(tree.turns)] if parent is not None and tree.turns else None, tokens, back=back)
    for number, grown in enumerate(tree.turns):
        ends = {each.turn.row: len(each.tokens) for each in tree.turns}
        with tree.database.read() as conn:
            found = spans.of_path(conn, turns.path_to(conn, grown.turn.row))
            assert [row for span in found for row in [span.turn.row] * (span.end - span.start)] == grown.owners
            for token in range(1, len(grown.tokens) + 1):
                point = refs.resolve(conn, parse_ref(f"{tree.name}@b{number}:{token}"))
                owner = grown.owners[token - 1]
                assert point.turn == owner
                assert point.token == (None if token == ends[owner] else token)
                assert point.branch is None
                position = trie.position_at(conn, found[-1].state.position, token)
                assert trie.tokens_to(conn, position.node, position.offset) == grown.tokens[:token]
                assert position == trie.match(conn, tree.root, grown.tokens[:token]).position


def test_token_0_is_before_any_turn_and_one_past_the_end_is_told_how_many_there_are(tree: Tree):
    tree.add(tree.add(None, [], role="system"), [1, 2, 3])
    with tree.database.read() as conn:
        beginning = refs.resolve(conn, parse_ref("trip@b1:0"))
        assert (beginning.turn, beginning.token) == (None, None)
        assert refs.resolve(conn, parse_ref("trip@b1~1:0")).turn is None
        for text, count in (("trip@b1:4", 3), ("trip@b0:1", 0), ("trip@main:1", 0)):
            with pytest.raises(RefNotFound) as caught:
                refs.resolve(conn, parse_ref(text))
            assert f"has {count} tokens" in caught.value.hint


def test_a_system_turn_has_no_tokens_and_its_text_belongs_to_the_message_after_it(tree: Tree):
    system = tree.add(None, [], role="system")
    said = tree.add(system, [1, 2, 3])
    with tree.database.read() as conn:
        assert refs.resolve(conn, parse_ref("trip@b1:1")).turn == said.turn.row


def test_there_is_no_point_outside_a_path(tree: Tree):
    tree.add(None, [1, 2, 3])
    with tree.database.read() as conn:
        top = trie.top(conn, tree.root)
        assert trie.position_at(conn, top, 0) == top
        for depth in (-1, 1):
            with pytest.raises(ValueError, match="no point"):
                trie.position_at(conn, top, depth)


def cut_at(tree: Tree, number: int, token: int) -> Turn:
    with tree.database.write() as conn:
        point = refs.resolve(conn, parse_ref(f"trip@b{number}:{token}"))
        span = spans.of_path(conn, turns.path_to(conn, point.turn))[-1]
        return cut.add(conn, span.turn, span.state, token, "cut", {"reopened": ""})


def test_a_cut_turn_is_one_turn_and_one_state_that_stands_on_the_other(tree: Tree):
    said = tree.add(None, [1, 2, 3])
    replied = tree.add(said, [4, 5, 6, 7], role="assistant")
    before = tree.counts()
    made = cut_at(tree, 1, 5)
    assert tree.counts() == {**before, "turn": before["turn"] + 1, "turn_state": before["turn_state"] + 1}
    assert (made.parent, made.role, made.text, made.finish_reason) == (said.turn.row, "assistant", "cut", "cut")
    with tree.database.read() as conn:
        [state], [original] = (turns.states_of(conn, [each.row]) for each in (made, replied.turn))
        assert (state.start, state.end, state.tokens) == (3, 5, [4, 5])
        assert (state.state_start, state.state_end, state.base_state) == (5, 5, original.row)
        assert trie.tokens_to(conn, state.position.node, state.position.offset) == [1, 2, 3, 4, 5]


def test_a_turn_that_is_cut_twice_at_one_token_is_one_cut_turn(tree: Tree):
    said = tree.add(None, [1, 2, 3])
    tree.add(said, [4, 5, 6], role="assistant")
    tree.add(said, [4, 5, 6], role="assistant")  # the same tokens, computed another time
    first = cut_at(tree, 1, 5)
    assert cut_at(tree, 1, 5).row == first.row
    assert cut_at(tree, 1, 4).row != first.row
    assert cut_at(tree, 2, 5).row != first.row


def test_a_message_that_is_cut_has_no_finish_reason(tree: Tree):
    tree.add(None, [1, 2, 3])
    assert (cut_at(tree, 0, 2).finish_reason, cut_at(tree, 0, 2).role) == (None, "user")


@pytest.mark.parametrize("token", [0, 3, 4])
def test_a_turn_is_cut_only_inside(tree: Tree, token: int):
    tree.add(None, [1, 2, 3])
    with tree.database.write() as conn:
        [span] = spans.of_path(conn, [tree.turns[0].turn])
        with pytest.raises(ValueError, match="not inside"):
            cut.add(conn, span.turn, span.state, token, "", {})


def test_a_cut_turn_is_discarded_only_while_nothing_needs_it(tree: Tree):
    said = tree.add(None, [1, 2, 3])
    before = tree.counts()
    made = cut_at(tree, 0, 2)
    with tree.database.write() as conn:
        cut.discard(conn, said.turn.row)  # no cut turn
        refs.add_tag(conn, tree.session, "here", made.row)
        cut.discard(conn, made.row)
        assert turns.get(conn, made.row) == made
        conn.execute(schema.tag.delete())
        cut.discard(conn, made.row)
    assert tree.counts() == before


def test_a_session_with_cut_turns_is_removed_whole(tree: Tree):
    said = tree.add(None, [1, 2, 3])
    tree.add(said, [4, 5, 6], role="assistant")
    cut_at(tree, 1, 5)
    with tree.database.write() as conn:
        removal.remove_session(conn, tree.session)
    counts = tree.counts()
    assert (counts["turn"], counts["turn_state"], counts["node"]) == (0, 0, 1)
