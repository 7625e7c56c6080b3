"""Which chat template a session has: the model's, the default, or one from a file; and where replies end under each."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Command, fails
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

import kvloom as library
from kvloom.errors import InvalidText, NothingToDo, RefExists, SessionError
from kvloom.template import DEFAULT_TEMPLATE
from kvloom.template_file import MAX_TEMPLATE_BYTES, read
from kvloom_store import turns

OWN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[reply] "
PLAIN = "this model brings no chat template"


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose folder has no chat template."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_model("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(bare_model: str) -> str:
    """What the command line has for a default here."""
    return bare_model


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.jinja"
    path.write_text(OWN, encoding="utf-8")
    return str(path)


def engine(template: str | None) -> library.TransformersEngine:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return library.TransformersEngine(tiny_model("llama"), tokenizer, name="tiny")


class TestTheFile:
    def test_is_taken_for_a_new_session_and_kept(self, kvloom: Command, own: str) -> None:
        told = kvloom("say", "trip", "hello", "--chat-template", own, "--max-tokens", "2", "--json").json
        assert told["template"] == "file"
        again = kvloom("say", "trip", "more", "--chat-template", own, "--max-tokens", "2", "--json")
        assert "template" not in again.json
        with library.open(must_exist=True) as loom:
            assert loom.find("trip").settings["chat_template"] == OWN

    def test_is_taken_by_chat_too(self, kvloom: Command, own: str) -> None:
        told = kvloom("chat", "talk", "--chat-template", own, "--max-tokens", "2", "--json", stdin=b"hello\n").json
        assert told["template"] == "file"

    def test_is_refused_where_the_session_has_another(self, kvloom: Command, own: str, tmp_path: Path) -> None:
        kvloom("say", "trip", "hello", "--max-tokens", "2")
        other_prompt = kvloom("say", "trip", "more", "--system", "Be brief.")
        other_template = kvloom("say", "trip", "more", "--chat-template", own)
        fails(other_template, 20, "session with another chat template 'trip'")
        assert other_template.code == other_prompt.code
        assert len(kvloom("log", "trip", "--json").json["turns"]) == 2

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (None, "cannot read"),
            (b"\xff\xfe{{ messages }}", "not valid UTF-8"),
            (b"", "empty"),
            (b"{% for m in messages %}\n{{ m.content }", "line 2"),
            (b"{% endfor %}", "not valid Jinja"),
            (b"a" * (MAX_TEMPLATE_BYTES + 1), "at most 1,048,576 bytes"),
        ],
    )
    def test_that_is_no_template_is_one_line_and_no_session(
        self, kvloom: Command, tmp_path: Path, content: bytes | None, word: str
    ) -> None:
        path = tmp_path / "template.jinja"
        if content is not None:
            path.write_bytes(content)
        fails(kvloom("say", "trip", "hello", "--chat-template", str(path)), 40, word)
        assert kvloom("ls", "--json").json == {"sessions": []}

    def test_that_is_a_folder_or_has_an_impossible_name_is_one_line(self, kvloom: Command, tmp_path: Path) -> None:
        for name in (str(tmp_path), "x" * 5000, "~nobody-here/x"):
            fails(kvloom("say", "trip", "hello", "--chat-template", name), 40, "cannot read the chat template")

    def test_that_refuses_the_messages_leaves_no_session(self, kvloom: Command, tmp_path: Path) -> None:
        path = tmp_path / "refuses.jinja"
        path.write_text("{{ raise_exception('no users here') }}")
        fails(kvloom("say", "trip", "hello", "--chat-template", str(path)), 40, "no users here")
        assert kvloom("ls", "--json").json == {"sessions": []}

    def test_may_begin_with_a_byte_order_mark_and_use_what_published_templates_use(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jinja"
        source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        path.write_text(source, encoding="utf-8-sig")
        assert read(path) == source


class TestWhichOne:
    def test_the_default_is_told_once_when_a_session_begins_under_it(self, kvloom: Command) -> None:
        first = kvloom("say", "trip", "hello", "--max-tokens", "2")
        assert [line for line in first.err.splitlines() if PLAIN in line and "--chat-template FILE" in line]
        assert PLAIN not in kvloom("say", "trip", "more", "--max-tokens", "2").err
        told = kvloom("say", "other", "hello", "--max-tokens", "2", "--json")
        assert (told.json["template"], told.err) == ("default", "")

    def test_the_models_own_is_taken_without_a_word(
        self, kvloom: Command, store_path: Path, tmp_path: Path, bare_model: str
    ) -> None:
        folder = tmp_path / "model"
        tiny_model("llama").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        assert PLAIN not in kvloom("say", "trip", "hello", "--max-tokens", "2", "--model", str(folder)).err
        told = kvloom("say", "other", "hello", "--max-tokens", "2", "--json", "--model", str(folder)).json
        assert told["template"] == "model"


class TestFromPython:
    def test_another_template_or_other_options_for_a_session_are_refused(self, store_path: Path) -> None:
        with library.open(store_path, model=engine(CHAT_TEMPLATE)) as loom:
            loom.session("a", chat_template=OWN, template_options={"b": 1, "a": [2]})
            assert loom.session("a").settings["chat_template"] == OWN
            loom.session("a", chat_template=OWN)
            loom.session("a", template_options={"a": (2,), "b": 1})
            for options in ({"chat_template": CHAT_TEMPLATE}, {"chat_template": "x"}, {"template_options": {"a": 1}}):
                with pytest.raises(RefExists, match="another chat template"):
                    loom.session("a", **options)

    def test_the_name_of_one_of_the_models_templates_is_that_template(self, store_path: Path) -> None:
        named = engine(CHAT_TEMPLATE)
        named.tokenizer.chat_template = {"default": CHAT_TEMPLATE, "own": OWN}
        with library.open(store_path, model=named) as loom:
            loom.session("a", chat_template="own")
            assert loom.session("a", chat_template="own").settings["chat_template"] == OWN
            with pytest.raises(RefExists):
                loom.session("a", chat_template="default")

    @pytest.mark.parametrize(
        ("source", "error"),
        [("{% if %}", SessionError), ("a" * (MAX_TEMPLATE_BYTES + 1), SessionError), ("\ud800", InvalidText)],
    )
    def test_what_is_no_template_is_refused_before_anything_is_made(
        self, store_path: Path, source: str, error: type[Exception]
    ) -> None:
        with library.open(store_path, model=engine(None)) as loom:
            with pytest.raises(error):
                loom.session("a", chat_template=source)
            assert loom.sessions() == []


class TestWhereRepliesEnd:
    def test_under_the_default_template_where_the_user_would_speak_next(self, kvloom: Command) -> None:
        kvloom("say", "trip", "hello", "--max-tokens", "2")
        assert kvloom("show", "trip", "--json").json["turn"]["settings"]["stop"] == ["\nUser:"]
        kvloom("continue", "trip", "--max-tokens", "2")
        assert kvloom("show", "trip", "--json").json["turn"]["settings"]["stop"] == ["\nUser:"]
        kvloom("regenerate", "trip", "--max-tokens", "2")
        assert kvloom("show", "trip", "--json").json["turn"]["settings"]["stop"] == ["\nUser:"]

    def test_where_the_caller_says_if_they_do(self, kvloom: Command, own: str, store_path: Path) -> None:
        kvloom("say", "trip", "hello", "--max-tokens", "2", "--stop", "zq")
        assert kvloom("show", "trip", "--json").json["turn"]["settings"]["stop"] == ["zq"]
        kvloom("say", "other", "hello", "--max-tokens", "2", "--chat-template", own)
        assert kvloom("show", "other", "--json").json["turn"]["settings"]["stop"] == []

    def test_nowhere_if_the_caller_says_so(self, store_path: Path) -> None:
        with library.open(store_path, model=engine(None)) as loom:
            main = loom.session("a").branch()
            main.say("hello", max_tokens=2, stop=())
            _ = main.stream("more", library.SamplingSettings(max_tokens=2)).reply
            with loom.database.read() as conn:
                replies = [turn for turn in turns.of_session(conn, main.session.row.row) if turn.role == "assistant"]
            assert [turn.settings["stop"] for turn in replies] == [[], ["\nUser:"]]

    def test_a_reply_that_ended_there_is_complete_and_the_conversation_goes_on_behind_it(
        self, store_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with library.open(store_path, model=engine(None)) as loom:
            whole = loom.session("a").branch().say("hello", max_tokens=30).text
            stop = whole[8:11]
            monkeypatch.setattr("kvloom.template.DEFAULT_STOP", (stop,))
            main = loom.session("b").branch()
            reply = main.say("hello", max_tokens=30)
            assert (reply.text, reply.finish_reason) == (whole[: whole.index(stop)], "stop")
            with pytest.raises(NothingToDo, match="complete"):
                main.continue_reply()
            assert main.say("more", max_tokens=2).tokens.generated == 2

    def test_what_the_model_wrote_of_the_next_line_is_not_written_again(self) -> None:
        from kvloom.template import ChatTemplate, extend

        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        template = ChatTemplate.of(tokenizer)
        assert template.source == DEFAULT_TEMPLATE
        asked, replied = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": " A man. "}
        first = extend(template, tokenizer, [], [], [asked], reply_start=None, eos_ids=frozenset()).ids
        said = tokenizer(" A man. \nUser:", add_special_tokens=False)["input_ids"]
        ids = (*first, *said)
        grown = extend(template, tokenizer, [asked, replied], ids, [asked], reply_start=len(first), eos_ids=frozenset())
        assert (grown.kept, grown.rewritten) == (len(ids), False)
        assert tokenizer.decode(grown.ids) == "User: Who?\nAssistant: A man. \nUser: Who?\nAssistant:"
