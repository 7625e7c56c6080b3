"""What is stored of every kind of state: where keyframes stand, how damage is mended, and what a stop leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from kinds import (
    GRID,
    SLIDING,
    SPACING,
    counted,
    digests,
    ids_of,
    live_digests,
    manifests,
    opened,
    tip,
)
from tiny_configs import RESTARTING

import kvloom.passes
from kvloom import live
from kvloom.engine import Cancelled
from kvloom.errors import EngineError
from kvloom.loom import KVLoom
from kvloom.transfer import Lane
from kvloom_proto.records import LayerKind
from kvloom_store import loading, restore
from kvloom_store.schema import chunk

FIRST = "Who was it?"
LONG = "And when was it that they were all there, and who said it would be so with them, had you been there to see it?"
UNLIKE = ("mamba", "mamba2", "rwkv", "falcon_h1", "qwen3_next", "minimax")
"""Ways to overwrite state in place."""


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kvloom.passes, "GRID", GRID)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Damage


def talk(loom: KVLoom) -> None:
    branch = loom.session("talk").branch()
    branch.say(LONG, max_tokens=4)


def third(loom: KVLoom) -> tuple[list[int], Any]:
    """One turn more, and what can be seen of it."""
    branch = loom.find("talk").branch()
    branch.say(FIRST, max_tokens=4)
    return ids_of(loom, branch), live_digests(loom)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[int], Any]]:
    """By kind, how the conversation goes on where nothing was damaged."""

    @functools.cache
    def run(kind: str) -> tuple[list[int], Any]:
        with opened(tmp_path_factory.mktemp(kind) / "kvloom.db", kind) as loom:
            talk(loom)
            return third(loom)

    return run


DAMAGED = [(kind, LayerKind.WINDOW) for kind in SLIDING] + [(kind, LayerKind.KEYFRAME) for kind in UNLIKE]


@pytest.mark.parametrize(("kind", "what"), DAMAGED, ids=[f"{kind}-{what.name}".lower() for kind, what in DAMAGED])
@pytest.mark.parametrize("gone", [False, True], ids=["flipped", "gone"])
def test_damaged_state_is_computed_again_mended_and_reported_and_the_reply_is_the_same(
    store_path: Path, undamaged: Callable[[str], Any], kind: str, what: LayerKind, gone: bool
) -> None:
    with opened(store_path, kind) as loom:
        talk(loom)
        loom.flush()
        last = loom.resumer.live.chain[-1].handle.segment
        with loom.database.write() as conn:
            some = sa.select(chunk).where(chunk.c.segment == last, chunk.c.kind == int(what))
            row = conn.execute(some.order_by(chunk.c.position.desc())).first()
            key = [column == row._mapping[column.name] for column in chunk.primary_key.columns]
            if gone:
                conn.execute(chunk.delete().where(*key))
            else:
                flipped = row.blob[:-3] + bytes([row.blob[-3] ^ 16]) + row.blob[-2:]
                conn.execute(chunk.update().where(*key).values(blob=flipped))
    with opened(store_path, kind) as loom:
        branch = loom.find("talk").branch()
        reply = branch.say(FIRST, max_tokens=4)
        assert any("damaged" in notice for notice in reply.notices)
        assert reply.tokens.replayed > 0
        assert (ids_of(loom, branch), live_digests(loom)) == undamaged(kind)
        loom.flush()
        with loom.database.read() as conn:
            assert conn.execute(sa.select(chunk).where(*key)).one() == row
    with opened(store_path, kind) as loom:
        assert digests(loom, loom.find("talk").branch()) == undamaged(kind)[1]


# Where keyframes stand


@pytest.mark.parametrize("kind", UNLIKE)
def test_keyframes_stand_at_the_ends_of_turns_and_on_the_spacing(store_path: Path, kind: str) -> None:
    with opened(store_path, kind) as loom:
        branch = loom.session("talk").branch()
        for text in (LONG, FIRST, LONG):
            branch.say(text, max_tokens=4)
        ends = {state.state_end for state in branch._path()[1].values() if state}
        found = manifests(loom)
        kept = [position for manifest in found for position in manifest.keyframes]
        assert ends <= set(kept)
        assert len(kept) == len(set(kept)), "no keyframe is stored twice"
        passes = {end for state in branch._path()[1].values() if state for _, end in state.schedule.each()}
        assert set(kept) == ends | {end for end in passes if end % SPACING == 0}
        assert max(b - a for a, b in zip([0, *sorted(kept)], sorted(kept), strict=False)) <= SPACING


@pytest.mark.parametrize("kind", UNLIKE)
def test_where_a_branch_leaves_a_path_stands_a_keyframe_unless_one_stands_there_already(
    store_path: Path, kind: str
) -> None:
    with opened(store_path, kind) as loom:
        session = loom.session("talk")
        session.branch().say(LONG, max_tokens=12)
        whole = tip(session.branch()).state_end
        at = 20
        assert not {at, at + 1} & {end for _, end in tip(session.branch()).schedule.each()}, "it is within a pass"
        for seed in range(3):
            session.checkout(f"main:{at + 1}").continue_reply(max_tokens=3, temperature=1.0, seed=seed).reply  # noqa: B018
            session.fork(f"end-{seed}", at="main").say(FIRST, max_tokens=2)
        found = manifests(loom)
        inside = [manifest for manifest in found if manifest.start == at]
        assert len(inside) >= 2
        assert all(at in manifest.keyframes for manifest in inside)
        at_end = [manifest for manifest in found if manifest.start == whole]
        assert at_end
        assert not any(whole in manifest.keyframes for manifest in at_end)


@pytest.mark.parametrize("kind", UNLIKE)
def test_coming_back_to_any_token_runs_at_most_the_spacing_again(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with opened(store_path, kind) as loom:
        session = loom.session("talk")
        main = session.branch()
        main.say(LONG, max_tokens=4)
        main.say(LONG, max_tokens=4)
        other = session.checkout("main:46")
        other.say(LONG, max_tokens=3)
        loom.flush()
        for branch in (main, other):
            ids, state = ids_of(loom, branch), tip(branch)
            for at in range(3, state.state_end, 7):
                loom.resumer.forget()
                with counted(loom, monkeypatch) as passes:
                    live, account = loom.resumer.resume(ids[:at], state, room=1, logits=False)
                assert live.length == at
                assert sum(passes) == account.replayed <= SPACING


@pytest.mark.parametrize("kind", RESTARTING)
def test_models_that_begin_anew_in_longer_passes_are_fed_single_tokens_behind_the_first_pass(
    store_path: Path, kind: str
) -> None:
    with opened(store_path, kind) as loom:
        session = loom.session("talk")
        main = session.branch()
        main.say(LONG, max_tokens=3)
        passes = [each for state in main._path()[1].values() if state for each in state.schedule.each()]
        assert passes[0] == (0, GRID)
        assert all(end == start + 1 for start, end in passes[1:])
        assert passes[-1][1] == tip(main).state_end
        # At a token within the first pass, that pass is cut; the rest follows from it token by token.
        fork = session.checkout("main:10")
        fork.continue_reply(max_tokens=5).reply  # noqa: B018
        expected = live_digests(loom)
        assert ids_of(loom, fork)[:10] == ids_of(loom, main)[:10]
        assert tip(fork).state_start == 9
        loom.flush()
        assert digests(loom, fork) == expected
    with opened(store_path, kind) as loom:
        again = loom.find("talk").checkout("main:10")
        again.continue_reply(max_tokens=5).reply  # noqa: B018
        assert live_digests(loom) == expected


# Stopped on the way back


@pytest.mark.parametrize("kind", [*SLIDING[:4], "mamba2", "falcon_h1"])
@pytest.mark.parametrize("first", ["rows", "windows or keyframe"])
def test_ctrl_c_while_state_is_read_leaves_nothing_that_is_taken_for_state(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, first: str
) -> None:
    with opened(store_path, kind) as loom:
        main = loom.session("talk").branch()
        main.say(LONG, max_tokens=4)
        loom.find("talk").fork("short", at="main")
        early = digests(loom, loom.find("talk").branch("short"))
        main.say(LONG, max_tokens=4)
        loom.flush()
    with opened(store_path, kind) as loom:
        session = loom.find("talk")
        digests(loom, session.branch("main"))  # in memory is the longer branch, as it was read
        load = loading.load

        def stopped(conn: Any, links: Any, rows: Any, windows: Any, sink: Any) -> int:
            if first != "rows":
                load(conn, links, rows, [], sink)
            raise KeyboardInterrupt

        state = tip(session.branch("short"))
        ids = ids_of(loom, session.branch("short"))[: state.state_end]
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load", stopped)
            patch.setattr(restore, "load_keyframe", stopped)
            with pytest.raises(KeyboardInterrupt):
                loom.resumer.resume(ids, state, room=1, logits=False)
        loom.resumer.resume(ids, state, room=1, logits=False)
        assert live_digests(loom) == early


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1", "qwen3_next"])
@pytest.mark.parametrize("how", [Cancelled, KeyboardInterrupt])
def test_a_stop_while_state_is_brought_forward_costs_nothing_but_the_time(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: type[BaseException]
) -> None:
    with opened(store_path, kind) as loom:
        main = loom.session("talk").branch()
        main.say(LONG * 3, max_tokens=4)
        loom.flush()
        state, ids = tip(main), ids_of(loom, main)[:100]

        def back(**options: Any) -> Any:
            return loom.resumer.resume(ids, state, room=1, logits=False, **options)

        loom.resumer.forget()
        back()
        expected = live_digests(loom)
        digests(loom, main)
        calls: list[int] = []

        def progress(*_: int) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise how

        with pytest.raises(how):
            back(progress=progress)
        live, _ = back()
        assert (live.ready, live_digests(loom)) == (True, expected)
        main.say(FIRST, max_tokens=3)
        loom.flush()
        expected = live_digests(loom)
        assert digests(loom, main) == expected


@pytest.mark.parametrize("kind", ["llama", "mamba2", "minimax"])
def test_state_of_another_layout_is_refused_and_not_taken_for_this_ones(store_path: Path, kind: str) -> None:
    """Two tensors of a size could change places from one version of transformers to the next."""
    with opened(store_path, kind) as loom:
        talk(loom)
    with opened(store_path, kind) as loom:
        specs = loom.engine.layers
        loom.engine.layers = tuple(
            replace(spec, tensors=tuple(replace(tensor, name=f"{tensor.name}s") for tensor in spec.tensors))
            for spec in specs
        )
        with pytest.raises(EngineError, match="another layout"):
            third(loom)
    with opened(store_path, kind) as loom:
        assert third(loom)


# State that is not in the machine's own memory


class Late(Lane):
    """A lane that copies as late as it may: what does not wait for it finds zeros."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        self.begun = 0
        self.moments: list[object] = []

    def begin(self) -> None:
        self.begun += 1

    def send(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        assert self.begun
        self.queue.append((source, targets))

    def settle(self) -> None:
        while self.queue:
            super().send(*self.queue.pop(0))

    def moment(self) -> object:
        return object()

    def fetch(self, rows: torch.Tensor, moment: object) -> torch.Tensor:
        self.moments.append(moment)
        return super().fetch(rows, None)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v32", "falcon_h1", "minimax"])
def test_state_on_a_device_of_its_own_is_stored_and_read_with_the_same_bits(
    store_path: Path, undamaged: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """There is no such device here: tensors that no buffer holds stand in for those of one."""
    expected = undamaged(kind)
    lanes: list[Late] = []
    monkeypatch.setattr(live, "lane_to", lambda _device: lanes.append(Late()) or lanes[-1])
    with opened(store_path, kind) as loom:
        talk(loom)
        loom.flush()
        moments = [moment for lane in lanes for moment in lane.moments]
        assert moments, "nothing was fetched from the device"
        assert None not in moments, "what is stored later is read as it was when it was handed over"
        loom.resumer.forget()
        assert third(loom) == expected
    with opened(store_path, kind) as loom:
        early = loom.find("talk").checkout("main:30")
        early.continue_reply(max_tokens=2).reply  # noqa: B018
        assert digests(loom, loom.find("talk").branch("main")) == expected[1]
