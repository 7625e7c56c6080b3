"""One round of a search: some paths brought back together, grown by some tokens, and committed together.

All turns of a round, their branches and what is known of the candidates are there after one transaction, or none is. A
path that goes on after it has the state of all its tokens, the last one's too: whoever follows computes none of them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch

from kvloom.commit import Addition, Commits, Held, NewBranch, commit_all
from kvloom.explore.plan import Child, ExploreSettings, Grow
from kvloom.growing import Growing, Told, grow, grow_alone
from kvloom.passes import joined
from kvloom.path import path_to, tip_of
from kvloom.report import Tokens
from kvloom.sampling import MAX_SEED, SamplingSettings
from kvloom.siblings import Siblings
from kvloom.steps import NewTurn
from kvloom.textstream import TextStream
from kvloom_proto.records import LayerKind, LayerSpec
from kvloom_store import explorations, refs, trie, turns
from kvloom_store.explorations import ENDED, GROWING, OPEN, Candidate, Exploration
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.live import Link
    from kvloom.loom import KVLoom


@dataclass(frozen=True, slots=True)
class Start:
    """Where a path goes on: the last turn, its state, and all tokens to its end. ``replies``: the turn is a reply."""

    turn: Turn
    state: TurnState
    ids: tuple[int, ...]

    @property
    def replies(self) -> bool:
        """Whether what comes next continues a reply."""
        return self.turn.role == "assistant"


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did: the candidates as they are now, in its order, and what it cost."""

    candidates: tuple[Candidate, ...]
    tokens: Tokens


def seed_of(seed: int, path: str) -> int:
    """The seed of a candidate: it follows from that of the search, and from where the candidate stands."""
    digest = hashlib.blake2b(f"{seed} {path}".encode(), digest_size=8, person=b"kvloom-explore-1").digest()
    return int.from_bytes(digest, "little") & MAX_SEED


def start_at(loom: KVLoom, turn: int) -> Start:
    """Where a path goes on that ends with a turn (its row)."""
    root = loom.root  # made now, if it is not there: not within a read
    with loom.database.read() as conn:
        last, state = tip_of(*path_to(conn, turn, root))
        assert last is not None
        assert state is not None
        return Start(last, state, tuple(trie.tokens_to(conn, state.position.node, state.position.offset)))


def run(
    loom: KVLoom,
    exploration: Exploration,
    settings: ExploreSettings,
    step: Grow,
    *,
    cancel: threading.Event | None = None,
    told: Told | None = None,
) -> Round | None:
    """Do one round; None, with nothing stored, if it was cancelled."""
    with loom.engine.lock:
        chosen = _batch(loom, begun(loom, exploration, step.paths))
        places, starts = [each for each, _ in chosen], [at for _, at in chosen]
        paths = [path_of(loom, settings, each, at, step.tokens) for each, at in chosen]
        grown = _grow_alone if loom.engine.apart else _grow
        states, reused = grown(loom, paths, starts, step.tokens, cancel, told)
        if any(path.reason == "interrupted" for path in paths):
            loom.resumer.forget()  # it holds rows of a round that never was
            return None
        limit = loom.engine.context_limit
        grew = [
            Grew(each, path, at, held, _status(settings, each, path, limit))
            for each, path, at, held in zip(places, paths, starts, states, strict=True)
        ]
        made = commit(loom, exploration, grew)
    computed, generated = sum(len(path.passes) for path in paths), sum(len(path.tokens) for path in paths)
    return Round(tuple(made), Tokens(reused, 0, computed, generated))


def begun(
    loom: KVLoom, exploration: Exploration, places: Sequence[Child | Candidate]
) -> list[tuple[Child | Candidate, Start]]:
    """Where each path of a round goes on from; those that go on from the same turn share it."""
    loom.flush()  # rows of the round before are in memory until they are written: of one round, not of many
    rows = [_turn_of(exploration, each) for each in places]
    found = {row: start_at(loom, row) for row in set(rows)}
    return [(each, found[row]) for each, row in zip(places, rows, strict=True)]


def _batch(loom: KVLoom, every: Sequence[tuple[Child | Candidate, Start]]) -> Sequence[tuple[Child | Candidate, Start]]:
    """Those paths of a round that can be decoded together: one by one where none can, and over windows equally long."""
    if loom.engine.apart:
        return every[:1]
    if all(spec.kind != LayerKind.WINDOW for spec in loom.engine.layers):
        return every
    return [(path, at) for path, at in every if len(at.ids) == len(every[0][1].ids)]


def _turn_of(exploration: Exploration, path: Child | Candidate) -> int:
    """The turn a path goes on from."""
    if isinstance(path, Candidate):
        return path.turn
    return path.parent.turn if path.parent else exploration.turn


def path_of(loom: KVLoom, settings: ExploreSettings, each: Child | Candidate, at: Start, tokens: int | None) -> Growing:
    """A path that goes on from there, by ``tokens`` at most (None: to the end of the context)."""
    engine, seed = loom.engine, seed_of(settings.seed, each.path)
    sampling = SamplingSettings.from_plain({**settings.sampling, "seed": seed})
    before = at.ids[-64:] if at.replies else ()
    stream = TextStream(engine.tokenizer, stop=sampling.stop, skip_ids=engine.eos_ids, before=before)
    room = engine.context_limit - len(at.ids) - 1
    budget = room if tokens is None else min(tokens, room)
    return Growing(list(at.ids), sampling, seed, budget, stream, engine.eos_ids, until=settings.step_stop)


def _grow(
    loom: KVLoom,
    paths: Sequence[Growing],
    starts: Sequence[Start],
    steps: int,
    cancel: threading.Event | None,
    told: Told | None,
) -> tuple[list[Held], int]:
    """Grow all paths as one batch; their states, and how many tokens were loaded."""
    batch = together(loom, paths, starts, steps)
    grow(batch.siblings, paths, batch.logits, close=True, cancel=cancel, told=told)
    return [batch.state(path, number) for number, path in enumerate(paths)], batch.reused


@dataclass(frozen=True, slots=True)
class Batch:
    """Paths that were brought back together: the logits ``[paths, vocab]`` of their next tokens, what each stands on,
    and how many tokens were loaded."""

    siblings: Siblings
    logits: torch.Tensor
    chains: list[list[Link]]
    layers: tuple[LayerSpec, ...]
    reused: int

    def state(self, path: Growing, number: int) -> Held:
        """The state of a path that went on from number so-and-so of the batch."""
        return path.state(self.chains[number], self.layers)


def together(loom: KVLoom, paths: Sequence[Growing], starts: Sequence[Start], steps: int) -> Batch:
    """Bring paths back as one batch, with room for ``steps`` more tokens each."""
    resumer, shared = loom.resumer, _shared(loom, starts)
    hidden, chains, reused = [], [], 0
    siblings: Siblings | None = None
    live = None
    for number, start in enumerate(starts):
        if not number or start is not starts[number - 1]:
            live, account = resumer.resume(start.ids, start.state, room=steps, exact=True)
            reused += account.reused if not number else len(start.ids) - shared
        assert live is not None
        assert live.hidden is not None
        if siblings is None:
            siblings = Siblings(loom.engine, live, shared, [len(each.ids) - shared for each in starts], steps)
        siblings.put(number, live)
        hidden.append(live.hidden)
        chains.append(list(live.chain))
    assert siblings is not None
    assert live is not None
    for path, mine in zip(paths, hidden, strict=True):
        path.hidden = mine
    logits = loom.engine.logits_of_all(torch.cat(hidden))
    return Batch(siblings, logits, chains, live.layers, reused)


def _grow_alone(
    loom: KVLoom,
    paths: Sequence[Growing],
    starts: Sequence[Start],
    steps: int,
    cancel: threading.Event | None,
    told: Told | None,
) -> tuple[list[Held], int]:
    """The same of a single path, on the live state."""
    live, account = loom.resumer.resume(starts[0].ids, starts[0].state, room=steps, exact=True)
    assert live.hidden is not None
    logits = loom.engine.logits_of(live.hidden)
    grow_alone(loom.engine, live, paths[0], logits, close=True, cancel=cancel, told=told)
    return [live], account.reused


def _shared(loom: KVLoom, starts: Sequence[Start]) -> int:
    """How many leading tokens of all paths have their rows from the same turns.

    Whether these are stored by now makes no difference: a search that was killed before they were has the same batches.
    """
    with loom.database.read() as conn:
        found = {start.state.row: _computed_by(conn, start.state) for start in starts}
    shared = 0
    for parts in zip(*found.values(), strict=False):
        if len({(row, first) for row, first, _ in parts}) > 1:
            break
        shared = min(end for _, _, end in parts)
        if len({end for _, _, end in parts}) > 1:
            break
    return shared


def _computed_by(conn: sa.Connection, state: TurnState) -> list[tuple[int, int, int]]:
    """Which turn's state (its row) has which rows [first, end) of a path, the first ones first."""
    found: list[tuple[int, int, int]] = []
    upto, at = state.state_end, cast("TurnState | None", state)
    while at is not None:
        if at.state_start < upto:
            found.append((at.row, at.state_start, upto))
            upto = at.state_start
        at = turns.base_of(conn, at)
    return found[::-1]


@dataclass(frozen=True, slots=True)
class Grew:
    """What a round made of a candidate: the path it grew by, from where, the state of that, and its status now."""

    place: Child | Candidate
    path: Growing
    start: Start
    held: Held
    status: str


def commit(loom: KVLoom, exploration: Exploration, grew: Sequence[Grew]) -> list[Candidate]:
    """Commit what a round made, in one transaction; the candidates as they are now, in that order."""
    made: list[Candidate] = []

    def note(conn: sa.Connection, added: list[Turn]) -> None:
        for each, turn in zip(grew, added, strict=True):
            place, more = each.place, (turn.row, each.status, len(each.path.tokens), each.path.logprob)
            if isinstance(place, Candidate):
                made.append(explorations.grow(conn, place, *more))
            else:
                made.append(explorations.add(conn, exploration, place.parent, place.number, *more))

    with loom.database.read() as conn:
        branches = {branch.name: branch for branch in refs.branches(conn, exploration.session)}
    additions = []
    for each in grew:
        name = branch_name(exploration, each.place.path)
        there = branches.get(name) or NewBranch(exploration.session, name, numbered=False)
        additions.append((Commits(loom, there), _addition(each.path, each.start, each.held)))
    commit_all(loom, additions, note)
    return made


def branch_name(exploration: Exploration, path: str) -> str:
    """What the branch of a candidate is called."""
    return f"{exploration.name}/{path}"


def _status(settings: ExploreSettings, each: Child | Candidate, path: Growing, limit: int) -> str:
    before = each.tokens if isinstance(each, Candidate) else 0
    if path.reason == "stop" or len(path.ids) + 2 > limit:  # one more token, run as well, would not fit the context
        return ENDED
    if path.reason == "step" or before + len(path.tokens) >= settings.step_tokens:
        return OPEN
    return GROWING


def _addition(path: Growing, at: Start, held: Held) -> Addition:
    new = NewTurn(
        {"role": "assistant", "content": path.text()},
        finish_reason="stop" if path.reason == "stop" else "length",
        settings={**path.settings.to_plain(), "reopened": path.stream.reopened},
        timings={"tokens": asdict(Tokens(computed=len(path.passes), generated=len(path.tokens)))},
        continues=at.replies,
        scores=path.scores,
    )
    return Addition(new, at.turn, at.state, path.ids, len(at.ids), held, joined(path.passes))
