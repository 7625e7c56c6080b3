"""Recoding a branch: exact before and after, shared state once for all, from Python and from the command line."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command, fails
from tiny import tiny_model, tiny_tokenizer

import kvloom
from kvloom.errors import NothingToDo, UnknownCodec

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = " ".join(["the and of to it was"] * 200)


@functools.cache
def engine(kind: str = "llama") -> kvloom.TransformersEngine:
    model = tiny_model(kind, **({"max_position_embeddings": 16384} if kind == "llama" else {}))
    return kvloom.TransformersEngine(model, tiny_tokenizer(), name="tiny")


@pytest.fixture
def loom(store_path: Path) -> Iterator[kvloom.KVLoom]:
    with kvloom.open(store_path, model=engine(), codec="raw") as opened:
        yield opened


def talk(loom: kvloom.KVLoom) -> kvloom.Branch:
    branch = loom.session("a", system="be brief").branch()
    branch.say(LONG, max_tokens=4)
    branch.say("and what was it that they said?", max_tokens=4)
    return branch


def rows(loom: kvloom.KVLoom) -> list[bytes]:
    live = loom.resumer.live
    assert live is not None
    return [t[..., : live.length, :].contiguous().numpy().tobytes() for some in live.tensors for t in some]


def test_a_recoded_branch_holds_the_same_bits_and_goes_on_alike(loom: kvloom.KVLoom) -> None:
    branch = talk(loom)
    before = rows(loom)
    twin = branch.fork("twin")
    done = branch.session.recode("main", codec="zstd")
    assert done.done.after < done.done.before == done.found.raw
    loom.resumer.forget()
    reply = branch.say("go on", max_tokens=12)
    assert (reply.tokens.replayed, reply.notices) == (0, ())
    length = len(before[0]) // (loom.resumer.live.tensors[0][0][..., :1, :].numel() * 4)
    held = [t[..., :length, :].contiguous().numpy().tobytes() for some in loom.resumer.live.tensors for t in some]
    assert held == before
    branch.session.recode("main", codec="raw")
    loom.resumer.forget()
    assert twin.say("go on", max_tokens=12).text == reply.text


def test_what_other_branches_stand_on_is_recoded_once_and_told(loom: kvloom.KVLoom) -> None:
    main = talk(loom)
    spain = main.fork("spain", back=2)
    spain.say("something else", max_tokens=4)
    found, other = main.session.survey("spain"), main.session.survey("main")
    assert (found.others, other.others) == (("a@main",), ("a@spain",))
    assert found.shared == other.shared == set(found.segments) & set(other.segments)
    assert 0 < len(found.shared) < min(len(found.segments), len(other.segments))
    assert main.session.recode("spain", codec="zstd").done.chunks >= len(found.segments)
    assert set(main.session.survey("main").stored) == {"raw", "zstd"}
    rest = len(set(other.segments) - other.shared)
    assert main.session.recode("main", codec="zstd").done.chunks == rest, "what is shared is done already"


def test_another_sessions_shared_beginning_is_told(loom: kvloom.KVLoom) -> None:
    first = loom.session("a", system=LONG).branch()
    first.say("and what?", max_tokens=3)
    second = loom.session("b", system=LONG).branch()
    assert second.say("and who?", max_tokens=3).tokens.reused > 100
    assert first.session.survey().others == ("b@main",)


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "gemma3_text"])
def test_state_of_every_kind_can_be_recoded(store_path: Path, kind: str) -> None:
    with kvloom.open(store_path, model=engine(kind), codec="raw") as loom:
        branch = talk(loom)
        twin = branch.fork("twin")
        branch.session.recode(codec="zstd")
        loom.resumer.forget()
        reply = branch.say("go on", max_tokens=8)
        assert (reply.tokens.replayed, reply.notices) == (0, ())
        branch.session.recode(codec="raw")
        loom.resumer.forget()
        assert twin.say("go on", max_tokens=8).text == reply.text


def test_stopped_at_once_nothing_is_changed(loom: kvloom.KVLoom) -> None:
    branch, cancel = talk(loom), threading.Event()
    cancel.set()
    done = branch.session.recode(codec="zstd", cancel=cancel).done
    assert (done.stopped, done.chunks, done.before) == (True, 0, done.after)


def test_where_nothing_is_stored_it_says_so(loom: kvloom.KVLoom) -> None:
    with pytest.raises(NothingToDo):
        loom.session("empty").recode()


@pytest.mark.parametrize("codec", ["zip", "q8_0", ""])
def test_new_state_is_never_stored_with_a_codec_nobody_offers(store_path: Path, codec: str) -> None:
    with pytest.raises(UnknownCodec):
        kvloom.open(store_path, model=engine(), codec=codec)
    assert not store_path.exists()


# From the command line


def test_bytes_are_printed_before_and_after(trip: Command) -> None:
    told = trip("recode", "trip", "--codec", "zstd")
    assert (told.code, told.out.count("\n")) == (0, 1)
    assert told.out.startswith("trip@main: ")
    assert "before" in told.out
    assert "stored as" in told.err, "what is there is told first"
    assert trip("say", "trip", "go on", "--max-tokens", "2", "--require-reuse").code == 0


def test_a_dry_run_changes_nothing(trip: Command, store_path: Path) -> None:
    before = trip("stats", "--json").json
    told = trip("recode", "trip@main", "--dry-run")
    assert (told.code, told.err) == (0, "")
    assert "2 segments, stored as" in told.out
    found = trip("recode", "trip", "--dry-run", "--json").json
    assert (found["session"], found["at"], found["segments"]) == ("trip", "main", 2)
    assert sum(found["by_codec"].values()) == found["bytes"]["before"]
    assert trip("stats", "--json").json == before


def test_json_holds_bytes_before_and_after(trip: Command) -> None:
    done = trip("recode", "trip", "--codec", "zstd", "--json")
    assert done.err == ""
    assert done.json["codec"] == "zstd"
    assert done.json["bytes"]["after"] <= done.json["bytes"]["before"] <= done.json["bytes"]["raw"]
    assert (done.json["damaged"], done.json["stopped"]) == (0, False)


def test_a_name_that_is_no_codec_and_a_ref_that_is_none_are_refused(trip: Command) -> None:
    fails(trip("recode", "trip", "--codec", "zip"), 2, "raw", "zstd")
    fails(trip("recode", "nobody"), 20, "nobody")


def test_the_codec_of_new_state_can_be_set(trip: Command) -> None:
    assert trip("config", "codec", "lz4").code == 0
    trip("say", "trip", "go on and on", "--max-tokens", "2")
    assert "lz4" in trip("recode", "trip", "--dry-run", "--json").json["by_codec"]
    fails(trip("config", "codec", "q8_0"), 40, "raw, lz4, zstd, auto")


STOPPED = """
import os, signal
from kvloom.cli import main
from kvloom_store import segments
segments.TRANSACTION_BYTES, encoded, seen = 1, segments.encoded, []
def slowly(*args):
    seen.append(0)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.{name})
    return encoded(*args)
segments.encoded = slowly
main(["recode", "trip", "--codec", "zstd", "--json", "--store", {store!r}])
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)])
def test_interrupted_or_killed_it_leaves_a_good_store_and_can_be_run_again(
    kvloom: Command, store_path: Path, name: str, code: int
) -> None:
    kvloom("config", "codec", "raw")
    for text in ("hello there", "and what?", "and who?"):
        kvloom("say", "trip", text, "--max-tokens", "3")
    script = STOPPED.format(name=name, store=str(store_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert set(kvloom("recode", "trip", "--dry-run", "--json").json["by_codec"]) == {"raw", "zstd"}
    again = kvloom("recode", "trip", "--codec", "zstd", "--json").json
    assert (set(again["by_codec"]), again["stopped"], again["damaged"]) == ({"raw", "zstd"}, False, 0)
    assert set(kvloom("recode", "trip", "--dry-run", "--json").json["by_codec"]) == {"zstd"}
    assert kvloom("say", "trip", "go on", "--max-tokens", "2", "--require-reuse").code == 0
