"""Why: the first token that differs from what is stored, the cause by its class, and what saying it would reuse.

Where tokens differ is worked out here apart from kvloom: the stored ids against the tokenizer's own for the rendering.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kinds import opened
from tiny import tiny_llama_folder, tiny_model, tiny_tokenizer

import kvloom
from kvloom import known_model, models
from kvloom.errors import InvalidText, ModelNotFound, RefNotFound
from kvloom.template import common
from kvloom.why import Why
from kvloom_store import schema, trie
from kvloom_store.checksum import checked, update

Messages = list[dict[str, Any]]
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    engine = kvloom.TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with kvloom.open(store_path, model=engine) as made:
        yield made


@pytest.fixture
def reply(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the model choose these tokens next, whatever it thinks, and end its turn."""

    def script(*pieces: str) -> None:
        vocabulary = TOKENIZER.get_vocab()
        ids = iter([*(vocabulary[piece] for piece in pieces), TOKENIZER.eos_token_id])
        monkeypatch.setattr("kvloom.engine.choose", lambda *args, **options: next(ids, TOKENIZER.eos_token_id))

    return script


@pytest.fixture
def talk(loom: kvloom.KVLoom, reply: Callable[..., None]) -> kvloom.Session:
    """Two exchanges under a system prompt; replies in the tokens that the tokenizer would give."""
    session = loom.session("a", system="be brief")
    for text, said in (("hello there", "Ġthe Ġmore"), ("and some of it", "Ġwhat Ġis")):
        reply(*said.split())
        session.branch().say(text)
    return session


def messages_of(branch: kvloom.Branch, *more: tuple[str, str]) -> Messages:
    said = [(turn.role, turn.text) for turn in branch.log()]
    return [{"role": role, "content": text} for role, text in [*said, *more]]


def stored_ids(branch: kvloom.Branch) -> list[int]:
    path, states = branch._path()
    position = states[path[-1].row].position
    with branch._loom.database.read() as conn:
        return trie.tokens_to(conn, position.node, position.offset)


def asked_ids(messages: Messages, **options: Any) -> list[int]:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def differs(branch: kvloom.Branch, messages: Messages, **options: Any) -> int:
    return common(stored_ids(branch), asked_ids(messages, **options))


def agrees(found: Why, branch: kvloom.Branch, asked: list[int]) -> None:
    """The first differing token is the one that a plain comparison finds, and both its sides are what is there."""
    stored, seen = stored_ids(branch), found.difference
    at = common(stored, asked)
    assert seen is not None
    assert seen.position == at
    assert seen.asked_token == (asked[at] if at < len(asked) else None)
    assert TOKENIZER.decode(asked[:at]).endswith(seen.before)
    assert TOKENIZER.decode(asked[at:]).startswith(seen.asked)
    if seen.turn is not None:
        assert seen.stored_token == stored[at]
        assert TOKENIZER.decode(stored[at:]).startswith(seen.stored)


# --- new text ---


@pytest.mark.parametrize("text", ["go on", "and some of it", "the the the", " <|im_end|> "])
def test_a_new_message_is_all_that_is_new(talk: kvloom.Session, text: str):
    main = talk.branch()
    found = main.why(text)
    held = len(stored_ids(main))
    assert (found.cause, found.detail) == ("new text", "only the new text is new")
    assert found.difference is not None
    assert (found.difference.position, found.difference.turn, found.difference.stored) == (held, None, "")
    assert (found.tokens.known, found.tokens.reused, found.tokens.replayed) == (held, held - 1, 0)


def test_in_a_session_where_nothing_was_said_all_is_new(loom: kvloom.KVLoom):
    found = loom.session("empty", system="be brief").branch().why("hello")
    assert (found.cause, found.tokens.reused, found.tokens.known) == ("new text", 0, 0)
    assert found.tokens.computed == found.tokens.asked > 0
    assert found.difference is not None
    assert found.difference.position == 0


def test_another_message_in_the_place_of_one_is_new_text_and_shares_its_beginning(talk: kvloom.Session):
    other = talk.fork("other", "main~2")
    found = other.why("and some more")
    agrees(found, talk.branch(), asked_ids(messages_of(other, ("user", "and some more"))))
    assert found.cause == "new text"
    assert found.difference is not None
    assert found.difference.turn == talk.branch().log()[3].id
    assert found.tokens.reused == found.difference.position


def test_what_was_said_before_is_not_new_at_all(talk: kvloom.Session):
    found = talk.fork("other", "main~2").why("and some of it")
    assert (found.cause, found.difference, found.tokens.computed) == ("new text", None, 0)
    assert found.tokens.reused == found.tokens.asked


def test_of_another_session_what_it_shares_is_known(loom: kvloom.KVLoom, talk: kvloom.Session):
    found = loom.session("b", system="be brief").branch().why("hello there")
    assert (found.cause, found.tokens.computed) == ("new text", 0)
    assert "known from another session" in found.detail


def test_a_client_that_sends_what_is_stored_and_one_message_more_adds_only_that(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    found = talk.why(asked)
    agrees(found, talk.branch(), asked_ids(asked))
    assert found.cause == "new text"
    assert found.tokens.reused == len(stored_ids(talk.branch())) - 1


def test_several_messages_behind_what_is_stored_are_new_text(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"), ("assistant", "no"), ("user", "do"))
    assert talk.why(asked).cause == "new text"


def test_a_beginning_of_what_is_stored_is_not_new(talk: kvloom.Session):
    found = talk.why(messages_of(talk.branch())[:2])
    assert (found.cause, found.difference, found.tokens.computed) == ("new text", None, 0)


def test_text_in_parts_is_the_text(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    asked[1]["content"] = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    assert talk.why(asked).cause == "new text"


# --- edited history ---

EDITS = {
    "the system prompt": (0, "be brief!", 8),
    "the first letter": (1, "Hello there", 0),
    "the middle of a message": (1, "hello where", 6),
    "the end of a message": (1, "hello there?", 11),
    "a message cut short": (1, "hello", 5),
    "a reply": (2, " the mode", 7),
    "a later message": (3, "and more of it", 4),
    "the last reply": (4, " what was", 6),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_message_is_named_with_its_turn_and_the_place(talk: kvloom.Session, edit: str):
    number, text, character = EDITS[edit]
    main = talk.branch()
    asked = messages_of(main, ("user", "go on"))
    asked[number]["content"] = text
    found = talk.why(asked)
    agrees(found, main, asked_ids(asked))
    turn = main.log()[number]
    assert found.cause == "edited history"
    assert found.difference is not None
    assert (found.difference.turn, found.difference.role) == (turn.id, turn.role)
    assert found.difference.character == character
    assert f"turn {turn.id[:4]}" in found.detail
    assert found.tokens.reused <= found.difference.position == found.tokens.known


def test_a_message_that_is_left_out_is_an_edit(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    del asked[2]
    found = talk.why(asked)
    agrees(found, talk.branch(), asked_ids(asked))
    assert found.cause == "edited history"
    assert found.detail.endswith("is left out")


def interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_message_without_a_reply_is_no_reason_to_blame_anything(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    main = loom.session("a").branch()
    monkeypatch.setattr("kvloom.engine.choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main.say("hello")
    for found in (main.why("go on"), main.session.why(messages_of(main, ("user", "go on"), ("user", "do")))):
        assert (found.cause, "has no reply on this path" in found.detail) == ("new text", True)


def test_a_message_that_was_put_in_is_an_edit(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    asked.insert(1, {"role": "assistant", "content": "hi"})
    found = talk.why(asked)
    agrees(found, talk.branch(), asked_ids(asked))
    assert (found.cause, "a message that is not stored there" in found.detail) == ("edited history", True)


def test_another_role_is_an_edit(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    asked[1]["role"] = "tool"
    found = talk.why(asked)
    agrees(found, talk.branch(), asked_ids(asked))
    assert (found.cause, "'tool'" in found.detail) == ("edited history", True)


def test_the_path_that_agrees_furthest_is_compared(talk: kvloom.Session, reply: Callable[..., None]):
    other = talk.fork("other", "main~2")
    reply("Ġwhat")
    other.say("or not")
    asked = messages_of(other, ("user", "go on"))
    asked[-2]["content"] = "who"
    found = talk.why(asked)
    agrees(found, other, asked_ids(asked))
    assert found.difference is not None
    assert (found.cause, found.difference.turn) == ("edited history", other.log()[-1].id)


# --- the template ---

SHORT = TOKENIZER.chat_template.replace("message.role + '\\n'", "message.role + ' '")
DATED = (
    "{% if messages[0].role != 'system' %}<|im_start|>{% endif %}{{ strftime_now('%d') + (style or '') }}"
    + TOKENIZER.chat_template
)
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{{ 'the' if message.role == 'assistant' and not loop.last else message.content }}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_another_template_for_the_same_messages_is_named(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    found = talk.why(asked, chat_template=SHORT)
    agrees(found, talk.branch(), asked_ids(asked, chat_template=SHORT))
    assert (found.cause, "another template" in found.detail) == ("template", True)


@pytest.mark.parametrize("day", ["2020-01-01T00:00:00", "2021-12-31T10:00:00"])
def test_another_day_on_the_clock_is_named(loom: kvloom.KVLoom, day: str):
    session = loom.session("dated", chat_template=DATED, template_options={"style": ""})
    object.__setattr__(session.row, "settings", {**session.settings, "clock": "2020-01-15T00:00:00"})
    main = session.branch()
    main.say("hello", max_tokens=3)
    asked = messages_of(main, ("user", "go on"))
    assert session.why(asked, clock="2020-02-15T00:00:00").cause in ("new text", "tokenizer seam")
    found = session.why(asked, clock=day)
    assert (found.cause, "the clock" in found.detail) == ("template", True)
    assert found.difference is not None
    assert found.difference.position <= 3


def test_another_option_is_named(loom: kvloom.KVLoom, reply: Callable[..., None]):
    session = loom.session("styled", chat_template=DATED, template_options={"style": "plain"})
    reply("Ġthe")
    session.branch().say("hello")
    asked = messages_of(session.branch(), ("user", "go on"))
    assert session.why(asked, template_options={"style": "plain"}).cause == "new text"
    found = session.why(asked, template_options={"style": "poor"})
    assert (found.cause, "style ('plain', asked 'poor')" in found.detail) == ("template", True)


def test_a_template_that_is_not_to_blame_is_not_blamed(talk: kvloom.Session):
    asked = messages_of(talk.branch(), ("user", "go on"))
    asked[1]["content"] = "hello where"
    assert talk.why(asked, clock="2020-01-01T00:00:00").cause == "edited history"


@pytest.mark.parametrize("whole", [False, True])
def test_a_template_that_rewrites_history_is_told(loom: kvloom.KVLoom, reply: Callable[..., None], whole: bool):
    session = loom.session("forgetful", chat_template=FORGETFUL)
    main = session.branch()
    reply("Ġmore", "Ġof")
    main.say("hello")
    asked = messages_of(main, ("user", "go on"))
    found = session.why(asked) if whole else main.why("go on")
    agrees(found, main, asked_ids(asked, chat_template=FORGETFUL))
    assert (found.cause, "otherwise when more is said" in found.detail) == ("template", True)
    assert found.difference is not None
    assert found.difference.role == "assistant"


# --- where tokens meet ---

SPLITS = {
    "a word in two": ("Ġth", "e"),
    "a word in letters": ("Ġ", "t", "h", "a", "t"),
    "in the middle": ("Ġthe", "Ġ", "w", "h", "a", "t", "Ġis"),
    "the last of several": ("Ġthe", "Ġwha", "t"),
    "behind a character of two bytes": ("Ġof", "Ã", "¶", "u", "s", "e", "r"),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_reply_in_other_tokens_than_its_text_is_a_seam(loom: kvloom.KVLoom, reply: Callable[..., None], split: str):
    main = loom.session("a", system="be brief").branch()
    reply(*SPLITS[split])
    main.say("hello")
    asked = messages_of(main, ("user", "go on"))
    found = main.session.why(asked)
    agrees(found, main, asked_ids(asked))
    assert found.cause == "tokenizer seam"
    assert found.difference is not None
    assert (found.difference.role, found.difference.turn) == ("assistant", main.log()[-1].id)
    # Said on the branch, the stored tokens are gone on from.
    assert main.why("go on").cause == "new text"


def test_a_reply_that_met_its_limit_goes_on_without_a_seam(loom: kvloom.KVLoom, reply: Callable[..., None]):
    main = loom.session("a").branch()
    reply("Ġthe", "Ġof")
    main.say("hello", max_tokens=2)
    found = main.session.why(messages_of(main, ("user", "go on")))
    assert found.cause == "new text"


def test_a_seam_where_a_reply_ends_without_a_control_token(loom: kvloom.KVLoom, reply: Callable[..., None]):
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    main = loom.session("plain", chat_template=plain).branch()
    reply("Ġth")
    main.say("hello", max_tokens=1)
    asked = messages_of(main, ("user", "e end"))
    found = main.session.why(asked)
    agrees(found, main, asked_ids(asked, chat_template=plain))
    assert found.cause == "tokenizer seam"


def test_an_edit_behind_a_seam_does_not_hide_it(loom: kvloom.KVLoom, reply: Callable[..., None]):
    main = loom.session("a").branch()
    for pieces in (("Ġth", "e"), ("Ġwhat",)):
        reply(*pieces)
        main.say("hello")
    asked = messages_of(main, ("user", "go on"))
    asked[2]["content"] = "another"
    assert main.session.why(asked).cause == "tokenizer seam"


# --- another model ---


def other_engine(change: str) -> kvloom.TransformersEngine:
    tokenizer = tiny_tokenizer()
    if change == "tokenizer":
        tokenizer.add_tokens(["hello"])
    options: dict[str, Any] = {"weights": {"seed": 1}, "hidden_size": {"hidden_size": 32}}.get(change, {})
    model = tiny_model("llama", "bfloat16" if change == "dtype" else "float32", **options)
    return kvloom.TransformersEngine(model, tokenizer, name=change)


@pytest.mark.parametrize("change", ["weights", "hidden_size", "dtype", "tokenizer"])
def test_the_field_of_another_model_is_named(talk: kvloom.Session, store_path: Path, change: str):
    talk._loom.flush()
    with kvloom.open(store_path, model=other_engine(change)) as other:
        for found in (
            other.find("a").branch().why("go on"),
            other.find("a").why(messages_of(talk.branch(), ("user", "go on"))),
        ):
            assert found.cause == "other model"
            assert change in [name for name, _, _ in found.fields]
            assert found.fields[0][0] == change
            assert found.detail.startswith(change)
            assert (found.tokens.reused, found.tokens.computed) == (0, found.tokens.asked)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "jamba"])
def test_what_is_known_of_a_model_without_loading_it_is_what_the_loaded_one_says(tmp_path: Path, kind: str):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    identity = kvloom.TransformersEngine(model, tiny_tokenizer(), name="tiny").identity()
    known = known_model.of_name(str(tmp_path), "float32")
    assert known.fields.items() <= identity.fields.items()
    assert {"config", "layers", "hidden_size", "vocab_size", "dtype"} <= known.fields.keys()
    assert known.digest == identity.tokenizer
    engine = kvloom.load_engine(str(tmp_path), dtype="float32")
    assert known.eos_ids == engine.eos_ids


def test_weights_that_were_loaded_here_before_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kvloom.identity._SETTLED_NS", 0)
    folder = str(tiny_llama_folder(tmp_path / "m"))
    assert "weights" not in known_model.of_name(folder, "float32").fields
    identity = kvloom.load_engine(folder, dtype="float32").identity()
    assert known_model.of_name(folder, "float32").fields["weights"] == identity.fields["weights"]
    tiny_llama_folder(tmp_path / "m", seed=1)
    assert "weights" not in known_model.of_name(folder, "float32").fields


def test_a_model_that_is_not_here_is_an_error_with_what_to_do(store_path: Path, talk: kvloom.Session):
    talk._loom.flush()
    for name in ("no/such-model", "nosuch"):
        with kvloom.open(store_path, model=name) as other, pytest.raises(ModelNotFound) as error:
            other.find("a").branch().why("go on")
        assert error.value.hint


# --- state that is not held ---


def spoil(branch: kvloom.Branch, how: str) -> None:
    """Take the state of the last turn away: all of it, a part of it, or the note that says where it is."""
    branch._loom.flush()
    branch._loom.resumer.forget()
    path, states = branch._path()
    state = states[path[-1].row]
    with branch._loom.database.write() as conn:
        if how == "a chunk is missing":
            chunks = sa.select(schema.chunk.c.position).where(schema.chunk.c.segment == state.segment)
            first = conn.execute(chunks).scalars().first()
            where = (schema.chunk.c.segment == state.segment) & (schema.chunk.c.position == first)
            conn.execute(schema.chunk.delete().where(where))
        elif how == "the segment is incomplete":
            row = conn.execute(sa.select(schema.segment).where(schema.segment.c.id == state.segment)).one()
            update(conn, schema.segment, checked(schema.segment, row), complete=0)
        else:
            row = conn.execute(sa.select(schema.turn_state).where(schema.turn_state.c.id == state.row)).one()
            update(conn, schema.turn_state, checked(schema.turn_state, row), segment=None)


@pytest.mark.parametrize("how", ["a chunk is missing", "the segment is incomplete", "it was never written"])
@pytest.mark.parametrize("whole", [False, True])
def test_state_that_is_missing_is_told_with_its_turn_and_replayed(talk: kvloom.Session, how: str, whole: bool):
    main = talk.branch()
    spoil(main, how)
    found = talk.why(messages_of(main, ("user", "go on"))) if whole else main.why("go on")
    assert found.cause == "state not held"
    assert main.log()[-1].id[:4] in found.detail
    path, states = main._path()
    last = states[path[-1].row]
    assert found.tokens.replayed == last.state_end - last.state_start
    assert found.tokens.reused == last.state_start
    told = main.say("go on", max_tokens=2).tokens
    assert (told.reused, told.replayed, told.computed) == counted(found)


def test_a_turn_said_without_reuse_left_no_state(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say("hello", max_tokens=5, reuse=False)
    found = main.why("go on")
    assert (found.cause, found.tokens.reused) == ("state not held", 0)
    told = main.say("go on", max_tokens=2).tokens
    assert (told.reused, told.replayed, told.computed) == counted(found)


def test_a_message_that_was_never_run_is_known_and_has_no_state(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    cancel = threading.Event()
    cancel.set()
    main.stream("hello", cancel=cancel).reply  # noqa: B018
    for found in (main.why("go on"), main.session.why(messages_of(main, ("user", "go on")))):
        assert (found.cause, found.tokens.reused) == ("state not held", 0)
        assert found.tokens.known > 1


def test_an_edit_goes_before_state_that_is_not_held(talk: kvloom.Session):
    spoil(talk.branch(), "it was never written")
    asked = messages_of(talk.branch(), ("user", "go on"))
    asked[1]["content"] = "hello where"
    assert talk.why(asked).cause == "edited history"


# --- what it costs ---


def counted(found: Why) -> tuple[int, int, int]:
    tokens = found.tokens
    assert tokens.reused + tokens.replayed + tokens.computed == tokens.asked
    return tokens.reused, tokens.replayed, tokens.computed


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "jamba", "mamba", "qwen3_next"])
def test_saying_it_reuses_replays_and_computes_what_was_foretold(store_path: Path, kind: str):
    with opened(store_path, kind) as loom:
        session = loom.session("a", system="be brief")
        main = session.branch()
        for text in ("hello there", "and some more of it", "what is that"):
            main.say(text, max_tokens=9)
        main.say("once more", max_tokens=4, reuse=False)
        loom.flush()
        for at, text in (("main~6", "what then"), ("main~4", "what is"), ("main~2", "once"), ("main", "go on")):
            branch = session.fork(f"at-{at.replace('~', '-')}", at)
            loom.resumer.forget()
            foretold = counted(branch.why(text))
            told = branch.say(text, max_tokens=1).tokens
            assert (told.reused, told.replayed, told.computed) == foretold, (at, text)
            loom.flush()


@pytest.mark.parametrize("kept", [3, 20, 33, 40])
def test_at_a_token_it_foretells_what_is_said_there(loom: kvloom.KVLoom, kept: int):
    from kvloom import foresee
    from kvloom_store.names import parse_ref

    session = loom.session("a", system="be brief")
    for text in ("hello there", "and some more of it"):
        session.branch().say(text, max_tokens=9)
    found = foresee.of_text(session, parse_ref(f"a:{kept}"), "go on")
    assert found.cause == "new text"
    told = session.checkout(f"main:{kept}").say("go on", max_tokens=1).tokens
    assert (told.reused, told.replayed, told.computed) == counted(found)


def test_nothing_is_written_and_no_weights_are_loaded(
    loom: kvloom.KVLoom, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = str(tiny_llama_folder(tmp_path / "m"))
    with kvloom.open(tmp_path / "k.db", model=folder, dtype="float32") as first:
        first.session("a").branch().say("hello", max_tokens=3)
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    before = (tmp_path / "k.db").read_bytes()
    with kvloom.open(tmp_path / "k.db") as bare:
        found = bare.find("a").branch().why("go on")
        assert not bare.has_engine
    assert (tmp_path / "k.db").read_bytes() == before
    assert found.cause == "new text"
    assert {"adapters", "architecture", "rope"} <= set(found.unchecked)
    assert found.tokens.reused > 0


def test_seconds_follow_from_what_replies_took_and_are_unknown_without_any(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    assert main.why("hello").cost.seconds is None
    main.say("hello", max_tokens=8)
    found = main.why("and some more").cost
    assert found.replies == 1
    assert found.prompt_rate is not None
    assert found.seconds == pytest.approx(main.why("and some more").tokens.computed / found.prompt_rate)


def test_rates_of_another_kind_of_processor_do_not_count(loom: kvloom.KVLoom, monkeypatch: pytest.MonkeyPatch):
    main = loom.session("a").branch()
    main.say("hello", max_tokens=8)
    monkeypatch.setattr("kvloom.support.cpu_capability", lambda: "another")
    assert main.why("and some more").cost.seconds is None


def test_a_regenerated_reply_says_nothing_of_how_long_prompts_take(loom: kvloom.KVLoom):
    main = loom.session("a").branch()
    main.say(" ".join(["the and of to"] * 30), max_tokens=4)
    before = main.why("go on").cost.prompt_rate
    main.regenerate(max_tokens=4).reply  # noqa: B018
    assert main.why("go on").cost.prompt_rate == before
    assert main.why("go on").cost.replies == 2


# --- what is refused ---


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "no role"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "half a pair \ud800"}],
    ],
)
def test_what_is_no_list_of_messages_is_refused(talk: kvloom.Session, messages: Messages):
    with pytest.raises(InvalidText):
        talk.why(messages)


def test_no_text_and_no_such_ref_are_refused(talk: kvloom.Session):
    with pytest.raises(InvalidText):
        talk.branch().why("  ")
    with pytest.raises(RefNotFound):
        talk.why([{"role": "user", "content": "hello"}], "nowhere")
