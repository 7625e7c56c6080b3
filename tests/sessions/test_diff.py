"""Where two paths part: turns, tokens and texts, of refs of every form; and how the command shows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.cli.scores import percent
from kvloom.errors import InvalidName, RefNotFound
from kvloom_store import spans, turns
from kvloom_store.names import parse_ref

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as made:
        yield made


@pytest.fixture
def forked(loom: kvloom.KVLoom) -> kvloom.KVLoom:
    session = loom.session("a", system="be brief")
    session.branch().say("hello there", max_tokens=6)
    session.branch().say("and some of it", max_tokens=6)
    session.fork("other", "main~2").say("and some more of it", max_tokens=6)
    return loom


def ids(loom: kvloom.KVLoom, ref: str) -> list[int]:
    with loom.database.read() as conn:
        at = loom.resolve(parse_ref(ref))
        return spans.tokens_of(conn, spans.of_path(conn, turns.path_to(conn, at.turn)))


def first_difference(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_two_branches_part_inside_the_message_that_was_said_otherwise(forked: kvloom.KVLoom):
    found = forked.diff("a", "a@other")
    a, b = ids(forked, "a"), ids(forked, "a@other")
    assert found.position == first_difference(a, b)
    assert (found.shared, found.character, found.same) == (3, len("and some "), False)
    assert (found.a.token, found.b.token) == (a[found.position], b[found.position])
    assert next(turn.text for turn in found.a.turns) == "and some of it"
    assert [turn.id for turn in found.b.turns] == [turn.id for turn in forked.find("a").log("other")[3:]]
    assert found.before.endswith("user\nand some")
    assert (found.a.text[:7], found.b.text[:11]) == (" of it<", " more of it")


def test_it_is_the_same_the_other_way_round(forked: kvloom.KVLoom):
    one, other = forked.diff("a", "a@other"), forked.diff("a@other", "a")
    assert (one.a, one.b, one.position, one.before) == (other.b, other.a, other.position, other.before)


def test_each_side_tells_what_its_model_gave_its_own_token_and_the_other_one(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello there", max_tokens=6)
    first = session.token_scores()[0]
    likely = next(token for token, _ in first.top if token != first.token)
    for seed in range(100):  # until a reply begins with another one of the likeliest
        other = session.fork(f"other-{seed}", "main~1")
        other.regenerate(max_tokens=1, temperature=1.0, top_k=2, seed=seed).reply  # noqa: B018
        if session.token_scores(other.name)[0].token == likely:
            break
    found = loom.diff("a", f"a@{other.name}")
    chances = dict(first.top)
    assert (found.a.token, found.b.token) == (first.token, likely)
    assert (found.a.logprob, found.a.other_logprob) == (first.logprob, chances[likely])
    assert (found.b.logprob, found.b.other_logprob) == (chances[likely], first.logprob)


def test_of_tokens_that_were_given_no_model_thought_anything(forked: kvloom.KVLoom):
    found = forked.diff("a", "a@other")
    assert (found.a.token is None, found.a.logprob, found.a.other_logprob) == (False, None, None)


@pytest.mark.parametrize("ref", ["a", "a@main", "a~1", "a~3", "a:30", "a:0"])
def test_a_path_does_not_part_from_itself(forked: kvloom.KVLoom, ref: str):
    found = forked.diff(ref, ref)
    assert found.same
    assert found.shared == len(forked.find("a").log(parse_ref(ref).at))


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_path_parts_from_its_beginning_where_that_ends(forked: kvloom.KVLoom, back: int):
    found = forked.diff(f"a~{back}", "a")
    assert (found.a.turns, found.a.token, found.shared) == ((), None, 5 - back)
    assert found.position in (found.a.tokens, None)
    assert len(found.b.turns) == back


def test_refs_to_tokens_part_inside_a_turn(forked: kvloom.KVLoom):
    whole = ids(forked, "a")
    log = forked.find("a").log()
    for token in range(1, len(whole)):
        found = forked.diff(f"a:{token}", "a")
        assert (found.position, found.a.token, found.b.token) == (token, None, whole[token])
        assert found.shared == len([turn for turn in log if turn.id not in {t.id for t in found.b.turns}])
        said = TOKENIZER.decode(whole[token:]) if found.a.turns else found.b.turns[0].text
        assert said.startswith(found.b.text)


def test_two_tokens_of_one_path_part_at_the_nearer_one(forked: kvloom.KVLoom):
    found = forked.diff("a:20", "a:40")
    assert (found.position, found.a.tokens, found.b.tokens) == (20, 20, 40)


def test_a_regenerated_reply_parts_where_its_tokens_do(loom: kvloom.KVLoom):
    session = loom.session("a")
    session.branch().say("hello", max_tokens=8)
    session.fork("again", "main").regenerate(max_tokens=8, temperature=2.0, seed=3).reply  # noqa: B018
    found = loom.diff("a", "a@again")
    assert found.position == first_difference(ids(loom, "a"), ids(loom, "a@again"))
    assert (found.shared, found.a.turns[0].role) == (1, "assistant")


def test_two_sessions_are_compared_by_what_was_said(forked: kvloom.KVLoom):
    twin = forked.session("b", system="be brief")
    twin.branch().say("hello there", max_tokens=6)
    twin.branch().say("and what", max_tokens=6)
    found = forked.diff("a", "b")
    assert (found.shared, found.character) == (3, len("and "))
    assert found.position == first_difference(ids(forked, "a"), ids(forked, "b"))
    assert forked.diff("a~2", "b~2").same


def test_of_other_tokenizers_only_texts_are_compared(forked: kvloom.KVLoom, store_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["hello"])
    forked.flush()
    engine = kvloom.TransformersEngine(tiny_model("llama"), tokenizer, name="another")
    with kvloom.open(store_path, model=engine) as other:
        other.session("b", system="be brief").branch().say("hello where", max_tokens=3)
        found = other.diff("a", "b")
    assert (found.position, found.shared, found.character) == (None, 1, 6)
    assert (found.before, found.a.text, found.b.text) == ("hello ", "there", "where")


def test_without_its_tokenizer_the_texts_around_are_those_of_the_messages(forked: kvloom.KVLoom, store_path: Path):
    whole = forked.diff("a", "a@other")
    forked.flush()
    with kvloom.open(store_path) as bare:
        assert bare.find("a").tokenizer is None
        found = bare.diff("a", "a@other")
    assert (found.position, found.character) == (whole.position, whole.character)
    assert (found.before, found.a.text, found.b.text) == ("and some ", "of it", "more of it")


def test_where_whole_turns_differ_no_tokenizer_is_asked_for(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    session = loom.session("a")
    session.branch().say("hello", max_tokens=8)
    session.branch().say("more", max_tokens=2)
    monkeypatch.setattr("kvloom.tokens.tokenizer_of", lambda *args: pytest.fail("the tokenizer was asked for"))
    assert loom.diff("a~2", "a").b.text == "more"


def test_an_empty_session_parts_from_everything_at_its_beginning(forked: kvloom.KVLoom):
    forked.session("empty")
    found = forked.diff("a", "empty")
    assert (found.shared, found.position, found.b.turns, found.b.tokens) == (0, None, (), 0)
    assert forked.diff("empty", "empty").same


def test_what_is_not_there_is_refused(forked: kvloom.KVLoom):
    for a, b, error in (("a", "nosuch", RefNotFound), ("a@nosuch", "a", RefNotFound), ("a", "@", InvalidName)):
        with pytest.raises(error):
            forked.diff(a, b)


# --- the command ---


@pytest.fixture
def two(trip: Command) -> Command:
    trip("say", "trip", "and some of it", "--max-tokens", "4")
    trip("fork", "trip~2", "other")
    trip("say", "trip@other", "and some more of it " + "the and of to " * 12, "--max-tokens", "4")
    return trip


def test_it_tells_the_point_and_both_sides(two: Command) -> None:
    result = two("diff", "trip", "trip@other")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].split() == ["shared", "3", "turns,", *lines[0].split()[3:]]
    assert lines[1].endswith("and some'")
    assert lines[2].startswith("A goes on   token ")
    assert " of it<" in lines[2]
    assert " more of it" in lines[3]
    assert result.out.index("\nA  trip\n") < result.out.index("\nand some of it\n") < result.out.index("\nB  trip@oth")


def test_where_replies_part_it_says_what_the_model_gave_each_token(trip: Command) -> None:
    trip("fork", "trip~1", "other")
    trip("regenerate", "trip@other", "--temperature", "5", "--seed", "1", "--max-tokens", "2")
    told = trip("diff", "trip", "trip@other", "--json").json
    lines = trip("diff", "trip", "trip@other").out.splitlines()
    assert told["a"]["logprob"] < 0
    for line, side in zip(lines[2:4], (told["a"], told["b"]), strict=True):
        other = f", the other's {percent(side['other_logprob'])}" if side["other_logprob"] is not None else ""
        assert f"token {side['token']} (the model gave it {percent(side['logprob'])}{other}) " in line


def test_json_is_the_object_of_the_api(two: Command) -> None:
    found = two("diff", "trip", "trip@other", "--json").json
    assert (found["same"], found["shared"], found["character"]) == (False, 3, 9)
    assert [turn["role"] for turn in found["b"]["turns"]] == ["user", "assistant"]
    assert found["a"]["token"] != found["b"]["token"]


def shown(two: Command, monkeypatch: pytest.MonkeyPatch, columns: int, *more: str) -> list[str]:
    monkeypatch.setattr("kvloom.cli.diff.stdout_is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    result = two("diff", "trip", "trip@other", *more)
    assert result.code == 0
    plain: Callable[[str], str] = lambda line: re.sub(r"\x1b\[[\d;]*m", "", line)  # noqa: E731
    return [plain(line).rstrip() for line in result.out.splitlines()[5:]]


@pytest.mark.parametrize("columns", [80, 60, 133])
def test_on_a_terminal_the_sides_are_beside_each_other_and_wrap(
    two: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    lines = shown(two, monkeypatch, columns)
    assert max(map(len, lines)) <= columns
    assert re.fullmatch(r"A  trip +B  trip@other", lines[0])
    second, first = lines[0].index("B"), next(n for n, line in enumerate(lines) if line.startswith("and some of it "))
    said = "".join(line[second:] + " " for line in lines[first:])
    assert said.split()[:5] == ["and", "some", "more", "of", "it"]
    assert said.split().count("to") >= 12


@pytest.mark.parametrize(("columns", "more"), [(50, ()), (80, ("--plain",))])
def test_on_a_narrow_terminal_or_when_asked_for_they_are_below_each_other(
    two: Command, monkeypatch: pytest.MonkeyPatch, columns: int, more: tuple[str, ...]
) -> None:
    assert "and some of it" in shown(two, monkeypatch, columns, *more)


def test_the_same_is_said_in_one_line_and_what_ends_is_said(two: Command) -> None:
    assert "are the same: 5 turns" in two("diff", "trip", "trip@main").out
    assert "A goes on   it ends there" in two("diff", "trip~2", "trip").out
    assert "B goes on   it ends there" in two("diff", "trip", "trip:30").out


def test_a_terminal_is_shown_no_control_characters(trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    trip("say", "a", "x\x1b[31my [bold]z", "--max-tokens", "2")
    trip("say", "b", "x\x1b[31mw", "--max-tokens", "2")
    for option in ("", "--plain"):
        monkeypatch.setattr("kvloom.cli.diff.stdout_is_terminal", lambda: True)
        monkeypatch.setenv("NO_COLOR", "1")
        out = trip("diff", "a", "b", *filter(None, [option])).out
        assert "\x1b" not in out
        assert "␛[31my [bold]z" in out


def test_no_model_is_loaded_and_what_is_not_there_is_told(two: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.models.load", lambda *args, **options: pytest.fail("the model was loaded"))
    assert two("diff", "trip", "trip@other").code == 0
    fails(two("diff", "trip", "nosuch"), 20, "nosuch")
    fails(two("diff", "trip", "trip:9999"), 20, "tokens")
    fails(two("diff", "trip"), 2, "B")
