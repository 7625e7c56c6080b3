"""Names: sessions, branches, tags, and what a ref points at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom_store import refs, turns
from kvloom_store.database import Database
from kvloom_store.errors import InvalidName, RefConflict, RefExists, RefNotFound
from kvloom_store.names import Ref, check_name, parse_ref
from kvloom_store.refs import SessionRow
from kvloom_store.turns import Turn


@pytest.fixture
def opened(store_path: Path) -> Iterator[Database]:
    database = Database(store_path)
    yield database
    database.close()


def grow(database: Database, name: str, count: int) -> tuple[SessionRow, list[Turn]]:
    """A session whose branch main has so many turns."""
    with database.write() as conn:
        session = refs.create_session(conn, name, {"model": "none"})
        path: list[Turn] = []
        for number in range(count):
            message = {"role": "user" if number % 2 == 0 else "assistant", "content": f"turn {number}"}
            path.append(turns.add_turn(conn, session.row, path[-1] if path else None, message))
        main = refs.branches(conn, session.row)[0]
        refs.move_branch(conn, main.row, None, path[-1].row if path else None)
    return session, path


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("trip", Ref("trip", None, 0)),
        ("trip@main", Ref("trip", "main", 0)),
        ("trip@main~2", Ref("trip", "main", 2)),
        ("trip~1", Ref("trip", None, 1)),
        ("my-trip/2026.1@feature/x", Ref("my-trip/2026.1", "feature/x", 0)),
        ("voyage-été@4f2a", Ref("voyage-été", "4f2a", 0)),
        ("trip:0", Ref("trip", None, 0, 0)),
        ("trip@main:1234", Ref("trip", "main", 0, 1234)),
        ("trip@main~2:900", Ref("trip", "main", 2, 900)),
        ("trip@4f2a:7", Ref("trip", "4f2a", 0, 7)),
    ],
)
def test_a_ref_is_taken_apart(text: str, ref: Ref):
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    ["", "@main", "a@", "a@b@c", "a~x", "a b", "-a", "a@main~", "a@main:", "a@:12", "a:12@main", "a:12~1", "a:-1"],
)
def test_what_is_not_a_ref_is_refused(text: str):
    with pytest.raises(InvalidName):
        parse_ref(text)


@pytest.mark.parametrize("name", ["", " ", "a@b", "a~1", "a:b", "x" * 101, ".hidden", "a/", "a\nb", "\x1b[31m"])
def test_a_bad_name_is_refused(name: str):
    with pytest.raises(InvalidName):
        check_name("session", name)


def test_refs_find_branches_tags_and_turns(opened: Database):
    session, path = grow(opened, "trip", 5)
    with opened.write() as conn:
        refs.add_branch(conn, session.row, "other", path[2].row)
        refs.add_tag(conn, session.row, "good", path[1].row)
    with opened.read() as conn:

        def at(text: str) -> int | None:
            return refs.resolve(conn, parse_ref(text)).turn

        assert at("trip") == at("trip@main") == path[4].row
        assert at("trip@other") == path[2].row
        assert at("trip@good") == path[1].row
        assert at("trip@main~2") == path[2].row
        assert at("trip@good~1") == path[0].row
        assert at("trip@main~5") is None
        assert at(f"trip@{path[3].id[:8]}") == path[3].row
        assert refs.resolve(conn, parse_ref("trip@main")).branch is not None
        assert refs.resolve(conn, parse_ref("trip@main~1")).branch is None
        with pytest.raises(RefNotFound):
            at("trip@main~6")


def test_what_is_not_there_is_refused_with_the_nearest_names(opened: Database):
    session, _ = grow(opened, "travel", 1)
    with opened.read() as conn:
        with pytest.raises(RefNotFound) as caught:
            refs.get_session(conn, "travle")
        assert caught.value.nearest == ("travel",)
        with pytest.raises(RefNotFound) as caught:
            refs.resolve(conn, Ref("travel", "mian", 0))
        assert caught.value.nearest == ("main",)
    assert session.name == "travel"


def test_a_branch_moves_only_from_where_it_is_believed_to_be(opened: Database):
    session, path = grow(opened, "trip", 3)
    with opened.write() as conn:
        main = refs.branches(conn, session.row)[0]
        refs.move_branch(conn, main.row, path[2].row, path[1].row)
    with pytest.raises(RefConflict) as caught, opened.write() as conn:
        refs.move_branch(conn, main.row, path[2].row, path[0].row)
    assert caught.value.name == "main"
    with opened.read() as conn:
        assert refs.branches(conn, session.row)[0].turn == path[1].row


def test_names_are_unique_among_branches_and_tags(opened: Database):
    session, path = grow(opened, "trip", 2)
    with opened.write() as conn:
        refs.add_branch(conn, session.row, "a", path[0].row)
        refs.add_tag(conn, session.row, "b", path[0].row)
        for name in ("a", "b", "main"):
            with pytest.raises(RefExists):
                refs.add_branch(conn, session.row, name, None)
            with pytest.raises(RefExists):
                refs.add_tag(conn, session.row, name, path[0].row)
        assert refs.free_name(conn, session.row, "a") == "a-2"


def test_a_session_is_renamed_unless_the_name_is_taken(opened: Database):
    grow(opened, "one", 1)
    grow(opened, "two", 1)
    with opened.write() as conn:
        with pytest.raises(RefExists):
            refs.rename_session(conn, "one", "two")
        refs.rename_session(conn, "one", "three")
        assert {s.name for s in refs.sessions(conn)} == {"two", "three"}


def test_short_ids_are_unique_and_as_short_as_can_be(opened: Database):
    session, path = grow(opened, "trip", 60)
    with opened.read() as conn:
        short = refs.short_ids(conn, session.row)
        assert len(set(short.values())) == 60
        for turn in path:
            assert turn.id.startswith(short[turn.row])
            assert refs.resolve(conn, Ref("trip", short[turn.row], 0)).turn == turn.row


def test_a_turns_digest_covers_its_whole_past(opened: Database):
    _, one = grow(opened, "one", 3)
    _, two = grow(opened, "two", 3)
    assert [turn.digest for turn in one] == [turn.digest for turn in two]
    assert turns.chained_digest(b"", {"role": "user", "content": "x"}) == turns.chained_digest(
        b"", {"content": "x", "role": "user"}
    )
    assert turns.chained_digest(b"a", {"role": "user"}) != turns.chained_digest(b"b", {"role": "user"})
