"""Bundles: a conversation in a file, brought back in another store, where it goes on with the same bits."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from kinds import GRID, digests, ids_of, live_digests, opened

import kvloom.passes
from kvloom import KVLoom, Session
from kvloom.errors import AnotherSession, EngineError, NothingToDo, RefNotFound, StoreError
from kvloom_proto.bundle import ChunkRecord, Encoding, NodeRecord, Record, SegmentRecord, StateRecord, TurnRecord
from kvloom_proto.frames import Reader, Writer
from kvloom_store import schema
from kvloom_store.checksum import checked
from kvloom_store.planner import StateDamaged
from kvloom_store.trie import unpack_tokens

LONG = "And when was it that they were all there, and who said it would be so with them, had you been there to see it?"
SHORT = "Who was it?"
SECRET = "which nobody else may ever read"


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kvloom.passes, "GRID", GRID)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tree(loom: KVLoom, name: str = "talk") -> Session:
    """A session with a fork, a branch that begins inside a reply, a continued reply and a tag."""
    session = loom.session(name, system="be brief")
    main = session.branch()
    main.say(LONG, max_tokens=7)
    session.tag("first")
    main.say(SHORT, max_tokens=5)
    session.fork("aside", "main~2").say("and who were they?", max_tokens=4)
    total = len(ids_of(loom, main))
    session.fork("cut", f"main:{total - 3}")
    session.branch("cut").continue_reply(max_tokens=3).reply  # noqa: B018
    loom.flush()
    return session


def bundle(session: Session, at: str | None = None, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    session.export(file, at, **options)
    file.seek(0)
    return file


def records(file: io.BytesIO) -> list[Record]:
    file.seek(0)
    found = list(Reader(file))
    file.seek(0)
    return found


def dump(loom: KVLoom) -> dict[str, list[object]]:
    """Every row of the store, its checksum verified, but for what only counts ids."""
    found: dict[str, list[object]] = {}
    with loom.database.read() as conn:
        for table in schema.metadata.sorted_tables:
            if table.name in ("chunk", "sequence"):
                found[table.name] = [tuple(row) for row in conn.execute(sa.select(table))]
            else:
                found[table.name] = [checked(table, row) for row in conn.execute(sa.select(table))]
    return found


def shape(session: Session) -> list[object]:
    """What a tree says, and which names point where."""
    return [
        (t.id, t.parent, t.role, t.text, t.branches, t.tags, t.tokens, t.cut, t.finish_reason) for t in session.tree()
    ]


@pytest.mark.parametrize("kind", ["llama", "jamba", "gemma3_text", "mamba2"])
def test_a_tree_comes_back_and_goes_on_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", kind) as here, opened(tmp_path / "b" / "b.db", kind) as there:
        session = tree(here)
        done = there.import_bundle(bundle(session))
        assert (done.created, done.new_turns, done.names["aside"]) == (True, len(session.tree()), "aside")
        copy = there.find("talk")
        assert shape(copy) == shape(session)
        assert not copy.missing("aside", verify=True)
        for name in ("main", "aside", "cut"):
            assert digests(there, copy.branch(name)) == digests(here, session.branch(name))
        for name in ("main", "aside", "cut"):
            a, b = session.branch(name), copy.branch(name)
            ours, theirs = a.say("and then?", max_tokens=5), b.say("and then?", max_tokens=5)
            assert theirs.tokens.replayed == ours.tokens.replayed
            assert (ids_of(there, b), live_digests(there)) == (ids_of(here, a), live_digests(here))
            assert theirs.tokens.reused > 0


def test_both_encodings_hold_the_same_records(tmp_path: Path) -> None:
    with opened(tmp_path / "a.db", "jamba") as loom:
        session = tree(loom)
        one, other = bundle(session), bundle(session, format="msgpack")
    assert one.getvalue() != other.getvalue()
    assert records(one)[1:] == records(other)[1:]  # the first one has the time


def test_importing_twice_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        file = bundle(tree(here))
        there.import_bundle(file)
        before = dump(there)
        file.seek(0)
        done = there.import_bundle(file)
        assert (done.created, done.new_turns, done.new_states, done.new_segments) == (False, 0, 0, 0)
        assert dump(there) == before
        # Under another name in the same store: turns have ids of their own, state is shared, and it can be repeated.
        file.seek(0)
        again = there.import_bundle(file, "copy")
        assert (again.new_turns, again.new_segments) == (done.turns, 0)
        before = dump(there)
        file.seek(0)
        assert there.import_bundle(file, "copy").new_turns == 0
        assert dump(there) == before
        file.seek(0)
        assert here.import_bundle(file).new_turns == 0


def test_what_was_said_since_is_added_and_no_branch_is_moved(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        session = tree(here)
        there.import_bundle(bundle(session))
        there.find("talk").branch().say("mine", max_tokens=2)
        tip = there.find("talk").log("main")[-1].id
        session.branch().say("theirs", max_tokens=2)
        for _ in range(2):
            done = there.import_bundle(bundle(session))
            assert done.names["main"] == "main-2"
        assert [turn.text for turn in there.find("talk").log("main-2")] == [turn.text for turn in session.log()]
        assert there.find("talk").log("main")[-1].id == tip
        assert len(there.find("talk").branches()) == 4


def test_another_session_of_that_name_is_refused_and_another_name_helps(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        file = bundle(tree(here))
        there.session("talk", chat_template="{{ messages[-1].content }}").branch()
        before = dump(there)
        with pytest.raises(AnotherSession, match="chat template differs") as refused:
            there.import_bundle(file)
        assert "--as" in refused.value.hint
        assert dump(there) == before
        file.seek(0)
        assert there.import_bundle(file, "talk-2").session == "talk-2"


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_one_branch_goes_alone_and_nothing_of_the_others_with_it(kind: str, tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", kind) as here, opened(tmp_path / "b" / "b.db", kind) as there:
        session = here.session("talk")
        main = session.branch()
        main.say(LONG, max_tokens=4)
        # Another session shares the beginning of this one's tokens, and state: it goes on inside of a turn.
        other = here.session("other").branch()
        other.say(f"{LONG[:60]} {SECRET}", max_tokens=4)
        third = here.session("third").branch()
        third.say(f"{LONG[:60]} and nothing more", max_tokens=4)
        session.fork("aside", "main~1").say(SECRET, max_tokens=4)
        here.flush()
        for source in ("talk", "third"):
            file = bundle(here.find(source), "main")
            assert SECRET.encode() not in file.getvalue()
            path = ids_of(here, here.find(source).branch())
            for record in records(file):
                if isinstance(record, NodeRecord | StateRecord):
                    tokens = unpack_tokens(record.tokens)
                    assert tokens in [path[at : at + len(tokens)] for at in range(len(path))]
            done = there.import_bundle(file)
            assert not done.made_main
            copy = there.find(source).branch()
            assert digests(there, copy) == digests(here, here.find(source).branch())
            a, b = here.find(source).branch().say(SHORT, max_tokens=4), copy.say(SHORT, max_tokens=4)
            assert (a.text, b.tokens.replayed) == (b.text, a.tokens.replayed)
            assert live_digests(there) == live_digests(here)


def test_state_that_a_bundle_cuts_inside_a_pass_is_the_same_and_says_that_its_passes_are_not_known(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "a.db", "llama") as here, opened(tmp_path / "b.db", "llama") as there:
        session = tree(here)
        inside = session.fork("inside", "main:10")
        inside.say(SHORT, max_tokens=3)
        there.import_bundle(bundle(session, "inside"))
        copy = there.find("talk")
        assert digests(there, copy.branch("inside")) == digests(here, inside)
        assert session.verify("inside", replay=True).difference is None
        with pytest.raises(EngineError, match="not known"):
            copy.verify("inside", replay=True)
        assert copy.branch("inside").say("and then?", max_tokens=3).tokens.replayed == 0


def test_a_tag_or_a_turn_is_a_path_whose_end_is_named(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        session = tree(here)
        done = there.import_bundle(bundle(session, "first"), "tagged")
        assert (done.names, done.made_main) == ({"first": "first"}, True)
        assert [t.text for t in there.find("tagged").log()] == [t.text for t in session.log("first")]
        done = there.import_bundle(bundle(session, "main~2"), "back")
        assert [t.text for t in there.find("back").log()] == [t.text for t in session.log("main~2")]
        with pytest.raises(NothingToDo, match="inside a turn"):
            session.export(io.BytesIO(), "main:12")
        with pytest.raises(RefNotFound):
            session.export(io.BytesIO(), "nosuch")


@pytest.mark.parametrize("where", ["export", "import"])
def test_text_alone_is_small_and_computes_the_same_again(where: str, tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        session = tree(here)
        file = bundle(session, text_only=where == "export")
        assert any(isinstance(r, ChunkRecord | SegmentRecord) for r in records(file)) == (where == "import")
        done = there.import_bundle(file, text_only=where == "import")
        assert (done.segments, done.text_only) == (0, True)
        copy = there.find("talk")
        assert shape(copy) == shape(session)
        assert copy.missing("main")
        for name in ("main", "cut"):
            assert digests(there, copy.branch(name)) == digests(here, session.branch(name))
        # A later bundle with state fills it in.
        whole = there.import_bundle(bundle(session))
        assert whole.new_turns == 0
        assert not there.find("talk").missing("aside", verify=True)


def test_a_branch_without_what_it_stands_on_has_its_tokens_still_to_be_run(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        first = here.session("first").branch()
        first.say(LONG, max_tokens=3)
        second = here.session("second").branch()
        second.say(f"{LONG} And so?", max_tokens=3)  # stands on the first one's state
        done = there.import_bundle(bundle(here.find("second"), text_only=True))
        assert done.turns == 2
        copy = there.find("second").branch()
        assert copy.say(SHORT, max_tokens=3).tokens.computed > 0
        assert [t.text for t in copy.log()][:2] == [t.text for t in second.log()]


def test_a_failure_while_it_is_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        file = bundle(tree(here))
        before = dump(there)
        for function in ("add_chunk", "adopt", "add_provenance"):
            with monkeypatch.context() as patch:
                patch.setattr(f"kvloom_store.segments.{function}", failing)
                file.seek(0)
                with pytest.raises(StoreError, match="full"):
                    there.import_bundle(file)
            assert dump(there) == before


def failing(*_: object) -> None:
    raise StoreError("the disk is full")


class Counting(io.RawIOBase):
    """A file that is long, and is held by nobody: how much is asked for at once."""

    def __init__(self) -> None:
        self.most = self.total = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.most, self.total = max(self.most, len(data)), self.total + len(data)
        return len(data)


def test_state_is_written_a_chunk_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path / "a.db", "llama") as loom:
        session = loom.session("talk")
        for _ in range(6):
            session.branch().say(" ".join([LONG] * 6), max_tokens=2)
        told: list[tuple[int, int]] = []
        file = Counting()
        done = session.export(file, progress=lambda *at: told.append(at))
        chunks = [len(r.blob) for r in records(bundle(session)) if isinstance(r, ChunkRecord)]
    assert file.total == done.bytes
    assert file.most < max(chunks) + 1000
    assert sum(chunks) > 5 * max(chunks)
    assert all(a <= b for a, b in told)
    assert told == sorted(told)


def test_a_bundle_of_a_cut_file_or_a_damaged_one_is_found(tmp_path: Path) -> None:
    from kvloom.errors import ChecksumMismatch, FormatError, NotABundle, Truncated, UnsupportedVersion

    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        data = bundle(tree(here)).getvalue()
        before = dump(there)
        cases = {
            Truncated: [data[:-1], data[: len(data) // 2], data[:11], data[:5]],
            NotABundle: [b"x" + data[1:], b"no", b""],
            UnsupportedVersion: [data[:8] + b"\x02" + data[9:]],
            ChecksumMismatch: [data[:500] + bytes([data[500] ^ 1]) + data[501:]],
            FormatError: [data + b"x", data[:9] + b"\x03" + data[10:]],
        }
        for error, files in cases.items():
            for broken in files:
                with pytest.raises(error) as found:
                    there.import_bundle(io.BytesIO(broken))
                assert found.value.offset is not None
                assert f"at byte {found.value.offset}" in str(found.value)
        assert dump(there) == before


def test_a_bundle_can_be_written_again_from_its_records(tmp_path: Path) -> None:
    with opened(tmp_path / "a.db", "llama") as loom:
        file = bundle(tree(loom))
    again = io.BytesIO()
    writer = Writer(again, Encoding.PROTOBUF)
    for record in records(file)[:-1]:
        writer.add(record)
    writer.finish()
    assert again.getvalue() == file.getvalue()
    assert sum(isinstance(r, TurnRecord) for r in records(file)) == records(file)[-1].turns  # type: ignore[union-attr]


def test_what_else_a_tree_may_hold_comes_back_too(tmp_path: Path) -> None:
    """Edits left unrun, replies sampled together, a compacted branch, a search, a reply without reuse."""
    with opened(tmp_path / "a" / "a.db", "llama") as here, opened(tmp_path / "b" / "b.db", "llama") as there:
        session = here.session("talk", system="be brief")
        main = session.branch()
        main.say(LONG, max_tokens=5)
        main.say(SHORT, max_tokens=5)
        main.sample("And who else?", n=3, max_tokens=4)
        session.edit("main~2", "Why was it?", branch="edited", replay_turns=True).run(compute=False)
        session.edit("main~2", "Where was it?", branch="run").run()
        session.branch("run").regenerate(max_tokens=3).reply  # noqa: B018
        session.compact(keep=1, branch="shorter").run()
        for _ in session.explore("main", prompt="And then?", name="hunt", width=2, depth=1, step_tokens=3):
            continue
        unsaid = main.stream("and more?", max_tokens=5, reuse=False)
        assert unsaid.reply.text is not None
        here.flush()
        for at in (None, "edited", "run", "shorter", "main"):
            there.import_bundle(bundle(session, at), f"copy-{at}")
        copy = there.find("copy-None")
        assert [t[2:] for t in shape(copy)] == [t[2:] for t in shape(session)]
        for branch in session.branches():
            assert ids_of(there, copy.branch(branch.name)) == ids_of(here, branch)
            theirs, ours = copy.missing(branch.name, verify=True), session.missing(branch.name, verify=True)
            assert theirs == ours
            if not ours:
                assert digests(there, copy.branch(branch.name)) == digests(here, branch)


def test_damaged_state_is_found_when_it_is_written_and_text_alone_still_goes(tmp_path: Path) -> None:
    with opened(tmp_path / "a.db", "llama") as loom:
        session = tree(loom)
        with loom.database.write() as conn:
            conn.execute(schema.chunk.update().values(blob=b"damaged"))
        file = tmp_path / "talk.kvb"
        with pytest.raises(StateDamaged):
            session.export(file)
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("a.db")] == []
        assert session.export(file, text_only=True).segments == 0
