"""The command line, with a tiny model: what it prints, where, and with which exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_llama_folder


class TestSay:
    def test_prints_the_reply_on_stdout_and_the_dim_line_on_stderr(self, kvloom: Command) -> None:
        result = kvloom("say", "trip", "hello", "--max-tokens", "6")
        shown = kvloom("log", "trip", "--json").json["turns"]
        assert result.out.rstrip("\n") == shown[-1]["text"].rstrip("\n")
        for word in ("trip@main", "reused", "replayed", "computed", "first token", "tokens/s"):
            assert word in result.err

    def test_json_is_one_object_with_the_promised_fields(self, trip: Command) -> None:
        result = trip("say", "trip", "again", "--max-tokens", "4", "--json")
        told = result.json
        assert result.err == ""
        assert told["tokens"].keys() == {"reused", "replayed", "computed", "generated"}
        assert told["seconds"].keys() == {"restore", "first_token", "total"}
        expected = {"session": "trip", "branch": "main", "finish_reason": "length"}
        assert {key: told[key] for key in expected} == expected
        assert told["turn"] == trip("log", "trip", "--json").json["turns"][-1]["id"]
        assert told["text"]
        assert told["tokens"]["generated"] == 4
        assert {"tokens_per_second", "model"} <= told.keys()

    def test_a_dash_reads_stdin(self, kvloom: Command) -> None:
        kvloom("say", "trip", "-", "--max-tokens", "2", stdin="zwei\nZeilen äöü\n".encode())
        assert kvloom("log", "trip", "--json").json["turns"][0]["text"] == "zwei\nZeilen äöü"

    def test_a_ref_that_is_no_branch_begins_one_and_says_so(self, trip: Command) -> None:
        said = trip("say", "trip@main~2", "otherwise", "--max-tokens", "2", "--json")
        assert said.json["branch"] == "main-2"
        assert "trip@main-2" in said.err
        assert [turn["role"] for turn in trip("log", "trip@main-2", "--json").json["turns"]] == [
            "system",
            "user",
            "assistant",
        ]

    def test_a_branch_moves_on(self, trip: Command) -> None:
        trip("fork", "trip", "b")
        assert trip("say", "trip@b", "more", "--max-tokens", "2", "--json").json["branch"] == "b"
        assert len(trip("log", "trip", "--json").json["turns"]) == 3
        assert len(trip("log", "trip@b", "--json").json["turns"]) == 5

    def test_a_session_keeps_its_model_and_dtype(self, trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVLOOM_MODEL", "nosuch")
        assert trip("say", "trip", "more", "--max-tokens", "2").code == 0

    def test_sampling_options_are_recorded_with_the_turn(self, kvloom: Command) -> None:
        options = ["--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
        options += ["--typical-p", "0.95", "--repetition-penalty", "1.1", "--max-tokens", "3"]
        options += ["--stop", "zq", "--stop", "qz"]
        kvloom("say", "trip", "hello", *options)
        settings = kvloom("show", "trip", "--json").json["turn"]["settings"]
        numbers = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "repetition_penalty", "max_tokens")
        for option in numbers:
            value = options[options.index("--" + option.replace("_", "-")) + 1]
            assert settings[option] == float(value)
        assert settings["stop"] == ["zq", "qz"]

    def test_require_reuse_succeeds_on_stored_state_and_no_reuse_loads_none(self, trip: Command) -> None:
        reused = trip("say", "trip", "more", "--max-tokens", "2", "--require-reuse", "--json").json["tokens"]
        assert reused["reused"] > 0
        anew = trip("say", "trip", "more", "--max-tokens", "2", "--no-reuse", "--json").json["tokens"]
        assert (anew["reused"], anew["replayed"]) == (0, 0)

    def test_a_terminal_is_never_shown_control_characters(
        self, kvloom: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kvloom("say", "trip", "a\x1b[31mb\x9bc", "--max-tokens", "2")
        for command in ("log", "tree", "show"):
            result = kvloom(command, "trip@main~1" if command != "tree" else "trip")
            assert not set("\x1b\x9b") & set(result.out)
            assert "␛[31mb" in result.out
        assert not set("\x1b\x9b") & set(kvloom("log", "trip", "--json").out)
        raw = kvloom("regenerate", "trip", "--max-tokens", "200")
        monkeypatch.setattr("kvloom.cli.talk.stdout_is_terminal", lambda: True)
        shown = kvloom("regenerate", "trip", "--max-tokens", "200")
        controls = {chr(code) for code in range(32)} - set("\n\t")
        assert controls & set(raw.out), "a random model says them"
        assert not controls & set(shown.out)


class TestGoingOn:
    def test_continue_gives_the_new_part_and_the_whole_is_one_reply(self, trip: Command) -> None:
        first = trip("log", "trip", "--json").json["turns"][-1]
        went_on = trip("continue", "trip", "--max-tokens", "5", "--json").json
        turns = trip("log", "trip", "--json").json["turns"]
        assert went_on["tokens"]["generated"] == 5
        assert turns[-1]["text"] == went_on["text"]
        assert (turns[-1]["parent"], turns[-1]["continues"]) == (first["id"], True)

    def test_regenerate_adds_a_sibling_and_keeps_the_reply_before(self, trip: Command) -> None:
        before = trip("log", "trip", "--json").json["turns"][-1]
        again = trip("regenerate", "trip", "--max-tokens", "6", "--json").json
        assert again["turn"] != before["id"]
        assert again["text"] == before["text"]  # greedy
        turns = {turn["id"]: turn for turn in trip("tree", "trip", "--json").json["turns"]}
        assert turns[again["turn"]]["parent"] == before["parent"]

    def test_nothing_to_continue_is_told(self, kvloom: Command) -> None:
        fails(kvloom("continue", "trip"), 20, "no store")


class TestTokens:
    """``trip`` has a message of 27 tokens (its system prompt with it) and a reply of 6."""

    def test_log_ends_at_the_token(self, trip: Command) -> None:
        whole = trip("log", "trip", "--json").json["turns"]
        told = trip("log", "trip:30", "--json")
        assert told.err == ""
        assert told.json["branch"] is None
        turns = told.json["turns"]
        assert [(turn["id"], turn["role"]) for turn in turns] == [(turn["id"], turn["role"]) for turn in whole]
        assert [turn["cut"] for turn in turns] == [False, False, True]
        assert (turns[-1]["tokens"], turns[-1]["branches"], turns[-1]["finish_reason"]) == (3, [], "cut")
        assert whole[-1]["text"].startswith(turns[-1]["text"])
        assert "(cut)" in trip("log", "trip@main:30").out
        assert trip("log", "trip:0", "--json").json["turns"] == []
        assert [turn["role"] for turn in trip("log", "trip~1:27", "--json").json["turns"]] == ["system", "user"]

    def test_a_turn_id_and_steps_back_name_the_path_whose_tokens_are_counted(self, trip: Command) -> None:
        ids = [turn["id"] for turn in trip("log", "trip", "--json").json["turns"]]
        for ref in (f"trip@{ids[2][:8]}:20", f"trip@{ids[1]}:20", "trip@main~1:20"):
            turns = trip("log", ref, "--json").json["turns"]
            assert ([turn["id"] for turn in turns], turns[-1]["tokens"]) == (ids[:2], 20)
        fails(trip("log", "trip@main~1:28"), 20, "27 tokens")

    def test_fork_and_continue_go_on_from_the_token(self, trip: Command) -> None:
        whole = trip("log", "trip", "--json").json["turns"][-1]
        forked = trip("fork", "trip@main:30", "again", "--json").json
        assert (forked["branch"], forked["turns"]) == ("again", 3)
        assert forked["turn"] != whole["id"]
        told = trip("continue", "trip@again", "--max-tokens", "3", "--json").json
        assert (told["branch"], told["tokens"]["generated"]) == ("again", 3)
        assert told["tokens"]["reused"] >= 29
        ids = [row["id"] for row in trip("show", "trip@again", "--tokens", "--around", "99", "--json").json["tokens"]]
        assert ids == [row["id"] for row in trip("show", "trip", "--tokens", "--around", "99", "--json").json["tokens"]]

    def test_continue_and_say_at_a_token_begin_a_branch_and_say_so(self, trip: Command) -> None:
        went_on = trip("continue", "trip:30", "--max-tokens", "2", "--json")
        assert went_on.json["branch"] == "main-2"
        assert "trip@main-2" in went_on.err
        assert trip("say", "trip:30", "more", "--max-tokens", "2", "--json").json["branch"] == "main-3"
        roles = [turn["role"] for turn in trip("log", "trip@main-3", "--json").json["turns"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]

    def test_what_fails_leaves_neither_branch_nor_cut_turn(self, kvloom: Command, tmp_path: Path) -> None:
        folder = tiny_llama_folder(tmp_path / "edited")
        assert kvloom("say", "trip", "hello there", "--max-tokens", "6", "--model", str(folder)).code == 0
        before = kvloom("tree", "trip", "--json").json
        tiny_llama_folder(folder, seed=1)
        fails(kvloom("continue", "trip:20"), 30, "another model", "weights")
        assert kvloom("tree", "trip", "--json").json == before
        assert len(kvloom("branches", "trip", "--json").json["branches"]) == 1

    def test_a_chat_moves_to_tokens(self, trip: Command) -> None:
        lines = ["/checkout main:30", "/continue", "/checkout :28", "/fork other main:29", "/continue"]
        told = trip("chat", "trip", "--max-tokens", "2", "--json", stdin="\n".join(lines).encode()).json
        assert [reply["branch"] for reply in told["replies"]] == ["main-2", "other"]
        assert trip("log", "trip@other", "--json").json["turns"][-2]["tokens"] == 2

    def test_show_tokens_tells_which_token_stands_where(self, trip: Command) -> None:
        turns = trip("log", "trip", "--json").json["turns"]
        told = trip("show", "trip:26", "--tokens", "--around", "2", "--json").json
        assert told.keys() == {"session", "turn", "token", "tokens"}
        assert (told["turn"], told["token"]) == (turns[1]["id"], 26)
        assert [row["position"] for row in told["tokens"]] == [24, 25, 26, 27]
        assert [row["role"] for row in told["tokens"]] == ["user", "user", "user", "assistant"]
        assert [row["text"] for row in told["tokens"]][:3] == ["<|im_start|>", "assistant", "\n"]
        assert all(row.keys() == {"position", "id", "text", "turn", "role"} for row in told["tokens"])
        lines = trip("show", "trip:26", "--tokens", "--around", "2").out.splitlines()
        assert "trip:26" in lines[3]
        assert lines[4].split()[:3] == ["26", str(told["tokens"][2]["id"]), r"'\n'"]

    def test_show_tokens_of_a_turn_shows_its_end(self, trip: Command) -> None:
        told = trip("show", "trip", "--tokens", "--json").json
        assert told["token"] == 33
        assert [row["position"] for row in told["tokens"]] == list(range(17, 33))
        assert trip("show", "trip:0", "--tokens", "--json").json["turn"] is None
        assert trip("show", "trip@main~2", "--tokens").out == ""
        assert trip("show", "trip:30", "--json").json["token"] == 30
        assert "30 tokens are kept" in trip("show", "trip:30").out
        fails(trip("show", "trip:34", "--tokens"), 20, "33 tokens")

    def test_without_the_tokenizer_ids_are_shown_and_nothing_is_cut(
        self, kvloom: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tiny_llama_folder(tmp_path / "own")
        monkeypatch.setenv("KVLOOM_MODEL", str(folder))
        kvloom("say", "a", "hello", "--max-tokens", "6")
        (folder / "tokenizer.json").rename(folder / "elsewhere.json")
        shown = kvloom("show", "a:15", "--tokens", "--json")
        assert {row["text"] for row in shown.json["tokens"]} == {None}
        for result in (
            shown,
            kvloom("show", "a:15", "--tokens"),
            kvloom("log", "a:15"),
            kvloom("log", "a:15", "--json"),
        ):
            assert (result.code, result.err.count("\n")) == (0, 1)
            assert "tokenizer" in result.err
        fails(kvloom("fork", "a:15", "b"), 30, "tokenizer", "kvloom continue")
        assert kvloom("log", "a").err == ""


class TestChat:
    def test_lines_of_a_pipe_are_messages_and_commands(self, kvloom: Command) -> None:
        lines = ["one", "", "/fork other", "two", "/undo", "//slash", "/checkout main", "/tag here"]
        lines += ["/regenerate", "/continue", "/log", "/quit", "never said"]
        told = kvloom("chat", "talk", "--max-tokens", "3", "--json", stdin="\n".join(lines).encode()).json
        assert [reply["branch"] for reply in told["replies"]] == ["main", "other", "other", "main", "main"]
        assert told["branch"] == "main"
        turns = kvloom("tree", "talk", "--json").json["turns"]
        assert [turn["text"] for turn in turns if turn["role"] == "user"] == ["one", "two", "/slash"]
        assert [turn["tags"] for turn in turns if turn["tags"]] == [["here"]]

    def test_replies_and_the_tree_go_to_stdout(self, kvloom: Command) -> None:
        result = kvloom("chat", "talk", "--max-tokens", "3", stdin=b"one\n/tree\n/stats\n/help\n/nope\n")
        assert "[main]" in result.out
        assert "turns" in result.out
        assert "/checkout REF" in result.out
        assert "no command /nope" in result.err

    def test_a_chat_in_which_nothing_was_said_leaves_no_session(self, kvloom: Command) -> None:
        assert kvloom("chat", stdin=b"").code == 0
        assert kvloom("ls", "--json").json == {"sessions": []}

    def test_a_session_without_a_name_is_called_after_the_day(self, kvloom: Command) -> None:
        for _ in range(2):
            kvloom("chat", "--max-tokens", "2", stdin=b"hello\n")
        first, second = sorted(each["name"] for each in kvloom("ls", "--json").json["sessions"])
        assert first.startswith("chat-20")
        assert second == f"{first}-2"

    def test_an_error_does_not_end_it_but_shows_in_the_exit_code_of_a_pipe(self, kvloom: Command) -> None:
        result = kvloom("chat", "talk", "--max-tokens", "2", stdin=b"/undo\n/checkout nowhere\nhello\n")
        assert result.code == 20
        assert "nothing to undo" in result.err
        assert "did you mean main?" in result.err
        assert len(kvloom("log", "talk", "--json").json["turns"]) == 2


class TestLooking:
    def test_log_and_tree_have_the_promised_fields(self, trip: Command) -> None:
        fields = {"id", "parent", "role", "text", "finish_reason", "branches", "tokens", "score"}
        for command in ("log", "tree"):
            told = trip(command, "trip", "--json").json
            assert told["session"] == "trip"
            assert "branch" in told
            assert all(fields <= turn.keys() for turn in told["turns"])
            assert [turn["branches"] for turn in told["turns"]] == [[], [], ["main"]]

    def test_ids_are_short_for_people_and_whole_in_json(self, trip: Command) -> None:
        ids = [turn["id"] for turn in trip("log", "trip", "--json").json["turns"]]
        for command in ("log", "tree"):
            shown = trip(command, "trip").out
            assert all(each[:4] in shown and each not in shown for each in ids)
        assert {len(each) for each in ids} == {32}

    def test_show_tells_all_about_a_turn(self, trip: Command, model: str) -> None:
        told = trip("show", "trip", "--json").json
        state = told["turn"]["states"][0]
        assert told["model"] == model
        assert told["turn"]["finish_reason"] == "length"
        assert len(state["tokens"]) == 6
        assert state["held"] is True
        assert state["provenance"]["device"] == "cpu"
        shown = trip("show", "trip").out
        for word in ("settings", "timings", "held", "passes", told["turn"]["id"]):
            assert word in shown

    def test_a_device_is_chosen_once_or_for_one_command(self, trip: Command) -> None:
        assert trip("config", "device", "mps").code == 0
        fails(trip("say", "trip", "and now"), 30, "'mps'")
        assert trip("say", "trip", "and now", "--device", "cpu", "--max-tokens", "2").code == 0
        assert trip("show", "trip", "--json").json["turn"]["states"][0]["provenance"]["device"] == "cpu"

    def test_branches_lists_where_each_has_got_to(self, trip: Command) -> None:
        trip("fork", "trip@main~2", "b")
        told = trip("branches", "trip", "--json").json["branches"]
        assert [(each["name"], each["turns"]) for each in told] == [("main", 3), ("b", 1)]
        assert "hello" not in trip("branches", "trip").out

    def test_ls_lists_sessions_the_last_used_first(self, trip: Command, model: str) -> None:
        trip("say", "work", "hello", "--max-tokens", "2")
        trip("say", "trip", "hello", "--max-tokens", "2")
        listed = trip("ls", "--json").json["sessions"]
        assert [(each["name"], each["turns"], each["model"]) for each in listed] == [
            ("trip", 5, model),
            ("work", 2, model),
        ]
        assert trip("ls").out.splitlines()[1].startswith("trip")

    def test_ls_of_a_store_that_is_not_there_is_friendly_and_makes_none(
        self, kvloom: Command, store_path: Path
    ) -> None:
        assert kvloom("ls").out == "no sessions yet\n"
        assert kvloom("ls", "--json").json == {"sessions": []}
        assert kvloom("stats", "--json").json["turns"] == 0
        assert not store_path.exists()

    def test_stats_has_the_promised_fields(self, trip: Command) -> None:
        for args in ((), ("trip",)):
            told = trip("stats", *args, "--json").json
            assert {"sessions", "turns", "tokens", "bytes"} <= told.keys()
            assert {"file", "state_stored", "state_logical", "state_if_snapshots"} <= told["bytes"].keys()
            assert told["turns"] == 3
        assert "if each reply were one" in trip("stats").out


class TestManaging:
    def test_fork_tag_rename_and_rm(self, trip: Command) -> None:
        forked = trip("fork", "trip@main~2", "b", "--json").json
        first = trip("log", "trip", "--json").json["turns"][0]["id"]
        assert forked["turn"] == first
        assert trip("tag", "trip@b", "start", "--json").json["turn"] == first
        assert len(trip("log", "trip@start", "--json").json["turns"]) == 1
        assert trip("rename", "trip", "journey").code == 0
        removed = trip("rm", "journey", "--yes", "--json").json
        assert {name: removed[name] for name in ("session", "branch", "turns")} == {
            "session": "journey",
            "branch": None,
            "turns": 3,
        }
        assert trip("ls", "--json").json == {"sessions": []}

    def test_rm_wants_a_yes_where_it_cannot_ask(self, trip: Command) -> None:
        fails(trip("rm", "trip"), 2, "--yes")
        assert trip("log", "trip").code == 0

    def test_options_may_stand_before_the_command_or_after_it(self, kvloom: Command, tmp_path: Path) -> None:
        store = str(tmp_path / "elsewhere.db")
        kvloom("--store", store, "say", "a", "hello", "--max-tokens", "2")
        for args in (("--store", store, "--json", "ls"), ("ls", "--json", "--store", store)):
            assert [each["name"] for each in kvloom(*args).json["sessions"]] == ["a"]

    def test_names_are_completed_from_the_store(self, trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        from click.shell_completion import BashComplete

        from kvloom.cli import cli

        trip("fork", "trip", "second")
        complete = BashComplete(cli, {}, "kvloom", "_KVLOOM_COMPLETE")
        assert [item.value for item in complete.get_completions(["log"], "tr")] == ["trip"]
        assert [item.value for item in complete.get_completions(["say"], "trip@s")] == ["trip@second"]
        for shell in ("bash", "zsh", "fish"):
            assert "_KVLOOM_COMPLETE" in trip("completion", shell).out


class TestSettingUp:
    def test_config_shows_sets_and_unsets(self, kvloom: Command, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("# mine\n")
        assert kvloom("config", "dtype", "float32").code == 0
        assert kvloom("config", "dtype").out == "float32\n"
        assert "# mine" in (tmp_path / "config.toml").read_text()
        assert kvloom("config", "--json").json["values"]["dtype"] == "float32"
        kvloom("config", "dtype", "--unset")
        assert kvloom("config", "dtype").out == "auto\n"

    def test_the_default_model_comes_from_the_environment_then_the_config_then_smollm2(
        self, kvloom: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kvloom("config", "model", "mine")
        assert kvloom("config", "model").out != "mine\n"
        monkeypatch.delenv("KVLOOM_MODEL")
        assert kvloom("config", "model").out == "mine\n"
        kvloom("config", "model", "--unset")
        assert kvloom("config", "model").out == "smollm2\n"

    def test_a_config_file_that_is_none_is_told(self, kvloom: Command, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("model = 3\n")
        fails(kvloom("config"), 40, "model must be text")
        (tmp_path / "config.toml").write_text("oh no")
        fails(kvloom("say", "a", "hello"), 40, "not valid TOML")
        fails(kvloom("config", "colour"), 2, "model, dtype, device, codec")

    def test_models_names_the_default(self, kvloom: Command, model: str) -> None:
        told = kvloom("models", "--json").json
        assert told["default"] == model
        assert "smollm2" in [each["name"] for each in told["models"]]
        assert model in kvloom("models").out

    def test_doctor_tells_versions_cpu_files_model_and_disk(
        self, kvloom: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvloom.cli.about.PROBE_BYTES", 1 << 20)
        told = kvloom("doctor", "--full", "--json").json
        assert told["versions"]["python"] == sys.version.split()[0]
        assert told["cpu"]["threads"] >= 1
        assert told["model"]["found"].startswith("yes")
        assert told["disk"]["read_bytes_per_second"] > 0
        assert told["loaded"]["context"] == 4096
        assert "B/s" in kvloom("doctor").out


class TestStartingFast:
    HEAVY = ("torch", "transformers", "numpy")

    @pytest.mark.parametrize(
        ("args", "more"),
        [
            (["--help"], ["sqlalchemy", "rich", "prompt_toolkit", "google.protobuf"]),
            (["say", "--help"], ["sqlalchemy"]),
            (["ls"], ["rich.console", "prompt_toolkit"]),
            (["log", "trip"], ["prompt_toolkit"]),
            (["log", "trip:30"], ["prompt_toolkit"]),
            (["log", "trip", "--scores"], ["prompt_toolkit"]),
            (["show", "trip:30", "--tokens"], ["prompt_toolkit"]),
            (["fork", "trip:30", "b"], ["prompt_toolkit"]),
            (["tree", "trip"], ["prompt_toolkit", "textual"]),
            (["tree", "trip", "--svg", "-"], ["prompt_toolkit", "textual"]),
            (["show", "trip@main~2"], ["prompt_toolkit"]),
            (["show", "trip", "--scores"], ["prompt_toolkit"]),
            (["diff", "trip@main~2", "trip"], ["prompt_toolkit"]),
            (["search", "hello"], ["prompt_toolkit"]),
            (["config"], ["sqlalchemy"]),
        ],
    )
    def test_looking_imports_neither_torch_nor_transformers(
        self, trip: Command, args: list[str], more: list[str]
    ) -> None:
        heavy = [name for name in self.HEAVY if args[0] != "show" or name != "numpy"]
        code = f"""
import sys
from kvloom.cli import run
code = run({args!r})
sys.exit(code or ", ".join(name for name in {[*heavy, *more]!r} if name in sys.modules) or 0)
"""
        done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    def test_every_command_has_help_with_an_example(self, kvloom: Command) -> None:
        from kvloom.cli.commands import BY_NAME

        for name in ("", *BY_NAME):
            shown = kvloom(*filter(None, [name]), "-h")
            assert shown.code == 0
            assert "Example:\n" in shown.out
            assert max(map(len, shown.out.splitlines())) <= 80


class TestBadInput:
    def test_unknown_names_are_answered_with_the_nearest(self, trip: Command) -> None:
        for command in ("log", "tree", "show", "branches", "continue", "regenerate", "stats"):
            fails(trip(command, "tripp"), 20, "no session 'tripp'", "did you mean trip?")
        fails(trip("say", "trip@mian", "hello"), 20, "mian", "did you mean main?")
        fails(trip("log", "trip@main~9"), 20, "trip@main~9", "3 turns")
        fails(trip("fork", "trip", "main"), 20, "exists already")
        fails(trip("fork", "trip", "no good"), 20, "cannot be the name")
        fails(trip("log", "trip:999"), 20, "no token 'trip:999'", "the path to trip has 33 tokens")
        fails(trip("say", "new:5", "hello"), 20, "no session 'new'")
        fails(trip("log", "trip:x"), 20, "not a ref", ":TOKEN")

    @pytest.mark.parametrize(("args", "stdin"), [(["  "], b""), (["-"], b"\n"), (["-"], b"")])
    def test_empty_text(self, kvloom: Command, store_path: Path, args: list[str], stdin: bytes) -> None:
        fails(kvloom("say", "trip", *args, stdin=stdin), 40, "nothing to say")
        assert not store_path.exists()

    def test_text_that_is_not_utf8(self, kvloom: Command, store_path: Path) -> None:
        fails(kvloom("say", "trip", "-", stdin=b"ab\xff"), 40, "not valid UTF-8", "iconv")
        fails(kvloom("say", "trip", os.fsdecode(b"ab\xff")), 40, "not valid UTF-8")
        assert kvloom("chat", "trip", stdin=b"\xff\n").code == 40
        assert kvloom("ls", "--json").json == {"sessions": []}

    def test_text_over_the_context_limit_leaves_nothing_behind(self, trip: Command) -> None:
        before = trip("branches", "trip", "--json").json
        long = b"word " * 5000
        fails(trip("say", "trip@main~1", "-", stdin=long), 30, "4096", "say less")
        fails(trip("say", "new", "-", stdin=long), 30, "4096")
        assert trip("branches", "trip", "--json").json == before
        assert [each["name"] for each in trip("ls", "--json").json["sessions"]] == ["trip"]

    def test_a_model_that_is_not_there(self, kvloom: Command, store_path: Path) -> None:
        fails(kvloom("say", "trip", "hello", "--model", "nosuch"), 30, "no model 'nosuch'", "pip install")
        fails(kvloom("say", "trip", "hello", "--model", "~nobody-at-all/m"), 30, "no model")
        assert not store_path.exists()

    def test_a_precision_that_is_not_the_sessions_own(self, trip: Command) -> None:
        own = trip("show", "trip", "--json").json["dtype"]
        fails(trip("say", "trip", "hello", "--dtype", "float32" if own == "bfloat16" else "bfloat16"), 30, "dtype")
        assert len(trip("log", "trip", "--json").json["turns"]) == 3

    def test_settings_out_of_range(self, kvloom: Command) -> None:
        fails(kvloom("say", "trip", "hello", "--temperature", "-1"), 40, "temperature")
        fails(kvloom("say", "trip", "hello", "--max-tokens", "0"), 40, "max_tokens")

    def test_usage_errors(self, kvloom: Command) -> None:
        fails(kvloom("say", "trip"), 2, "TEXT")
        fails(kvloom("say", "trip", "hello", "--top-k", "many"), 2, "--top-k")
        fails(kvloom("say", "trip", "hello", "there"), 2, "there")
        fails(kvloom("say", "trip", "hello", "--no-reuse", "--require-reuse"), 2, "exclude")
        fails(kvloom("frobnicate"), 2, "frobnicate", "kvloom --help")

    def test_a_file_that_is_no_store_is_left_alone(self, kvloom: Command, tmp_path: Path) -> None:
        notes = tmp_path / "notes.txt"
        notes.write_text("mine " * 1000)
        for args in (["ls"], ["log", "trip"], ["say", "trip", "hello"], ["stats"]):
            fails(kvloom(*args, "--store", str(notes)), 20, "not a kvloom store")
        assert notes.read_text() == "mine " * 1000

    def test_a_store_of_a_newer_version(self, trip: Command, store_path: Path) -> None:
        with contextlib.closing(sqlite3.connect(store_path)) as db:
            db.execute("PRAGMA user_version=99")
        fails(trip("log", "trip"), 20, "version 99", "upgrade")
        fails(trip("say", "trip", "hello"), 20, "version 99")

    def test_a_store_that_may_only_be_read(
        self, trip: Command, store_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **how: path != store_path and access(path, mode, **how))
        assert trip("log", "trip").code == 0
        fails(trip("fork", "trip", "b"), 20, "read-only")
        fails(trip("say", "trip", "hello"), 20, "read-only")

    def test_a_store_that_is_locked(self, trip: Command, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvloom_store.database.Database.__init__.__kwdefaults__", {"must_exist": 0, "busy_ms": 1})
        with contextlib.closing(sqlite3.connect(store_path)) as db:
            db.execute("BEGIN IMMEDIATE")
            fails(trip("fork", "trip", "b"), 20, "locked by another process")
            assert trip("log", "trip").code == 0

    @pytest.mark.parametrize("place", ["/dev/null/x/kvloom.db", "/proc/none/kvloom.db", "/" + 300 * "a", "/tmp"])
    def test_a_store_that_cannot_be_created(self, kvloom: Command, place: str) -> None:
        fails(kvloom("say", "trip", "hello", "--store", place), 20, "--store")

    def test_with_json_an_error_is_an_object_on_stderr(self, kvloom: Command) -> None:
        result = kvloom("log", "trip", "--json")
        told = json.loads(result.err)["error"]
        assert (result.code, result.out) == (20, "")
        assert told.keys() == {"type", "message", "hint", "exit_code"}
        assert (told["type"], told["exit_code"]) == ("StoreUnavailable", 20)
        assert json.loads(kvloom("log", "--json").err)["error"]["exit_code"] == 2

    def test_what_nobody_expected_is_one_line_too(self, kvloom: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: object) -> None:
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr("kvloom.models.available", broken)
        fails(kvloom("models"), 1, "ZeroDivisionError: by zero", "KVLOOM_DEBUG")

    def test_a_closed_pipe_ends_quietly_and_keeps_what_was_said(self, trip: Command) -> None:
        for args in (["log", "trip"], ["tree", "trip"], ["say", "trip", "hello", "--max-tokens", "100"]):
            reading, writing = os.pipe()
            os.close(reading)
            command = [sys.executable, "-m", "kvloom.cli", *args]
            done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
            os.close(writing)
            assert done.returncode == 141
            assert len(done.stderr.splitlines()) == (args[0] == "say")
        assert trip("log", "trip", "--json").json["turns"][-1]["finish_reason"] == "interrupted"

    def test_state_that_cannot_be_stored_is_a_warning_and_the_turn_is_safe(
        self, trip: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kvloom.errors import StoreUnavailable

        def full(*args: object, **options: object) -> None:
            raise StoreUnavailable("no space left", hint="free some")

        monkeypatch.setattr("kvloom_store.segments.write", full)
        result = trip("say", "trip", "more", "--max-tokens", "2")
        assert result.code == 0
        assert "warning: some state could not be stored (no space left)" in result.err
        assert len(trip("log", "trip", "--json").json["turns"]) == 5

    def test_a_store_on_a_network_drive_is_warned_of(self, trip: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvloom_store.sqlite.network_filesystem", lambda path: "nfs4")
        result = trip("say", "trip", "more", "--max-tokens", "2", "--json")
        assert result.json["finish_reason"] == "length"
        assert result.err.count("\n") == 1
        assert "network drive (nfs4)" in result.err
