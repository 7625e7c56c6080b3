"""One round of a search: some paths brought back together, grown by some tokens, and committed together.

All turns of a round, their branches and what is known of the candidates are there after one transaction, or none is. A
path that goes on after it has the state of all its tokens, the last one's too: whoever follows computes none of them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

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
from kvloom_proto.records import LayerKind
from kvloom_store import explorations, refs, restore, trie
from kvloom_store.explorations import ENDED, GROWING, OPEN, Candidate, Exploration
from kvloom_store.planner import Read, reads_of
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

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
        loom.flush()  # which rows paths have in common is read from their segments
        found = {turn: start_at(loom, turn) for turn in {_turn_of(exploration, path) for path in step.paths}}
        every = [(path, found[_turn_of(exploration, path)]) for path in step.paths]
        chosen = _batch(loom, every)
        step, starts = replace(step, paths=tuple(path for path, _ in chosen)), [at for _, at in chosen]
        paths = [_path(loom, settings, each, at, step) for each, at in zip(step.paths, starts, strict=True)]
        grown = _grow_alone if loom.engine.apart else _grow
        states, reused = grown(loom, paths, starts, step.tokens, cancel, told)
        if any(path.reason == "interrupted" for path in paths):
            loom.resumer.forget()  # it holds rows of a round that never was
            return None
        made = _commit(loom, exploration, settings, step, paths, starts, states)
    computed, generated = sum(len(path.passes) for path in paths), sum(len(path.tokens) for path in paths)
    return Round(tuple(made), Tokens(reused, 0, computed, generated))


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


def _path(loom: KVLoom, settings: ExploreSettings, each: Child | Candidate, at: Start, step: Grow) -> Growing:
    engine, seed = loom.engine, seed_of(settings.seed, each.path)
    sampling = SamplingSettings.from_plain({**settings.sampling, "seed": seed})
    before = at.ids[-64:] if at.replies else ()
    stream = TextStream(engine.tokenizer, stop=sampling.stop, skip_ids=engine.eos_ids, before=before)
    budget = min(step.tokens, engine.context_limit - len(at.ids) - 1)
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
    resumer, shared = loom.resumer, _shared(loom, starts)
    hidden, chains, reused = [], [], 0
    siblings: Siblings | None = None
    live = None
    for number, start in enumerate(starts):
        if not number or start is not starts[number - 1]:
            live, account = resumer.resume(start.ids, start.state, room=steps)
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
    grow(siblings, paths, logits, close=True, cancel=cancel, told=told)
    return [path.state(chain, live.layers) for path, chain in zip(paths, chains, strict=True)], reused


def _grow_alone(
    loom: KVLoom,
    paths: Sequence[Growing],
    starts: Sequence[Start],
    steps: int,
    cancel: threading.Event | None,
    told: Told | None,
) -> tuple[list[Held], int]:
    """The same of a single path, on the live state."""
    live, account = loom.resumer.resume(starts[0].ids, starts[0].state, room=steps)
    assert live.hidden is not None
    logits = loom.engine.logits_of(live.hidden)
    grow_alone(loom.engine, live, paths[0], logits, close=True, cancel=cancel, told=told)
    return [live], account.reused


def _shared(loom: KVLoom, starts: Sequence[Start]) -> int:
    """How many leading tokens of all paths have their rows in the same segments."""
    found: dict[int, list[Read]] = {}
    with loom.database.read() as conn:
        for start in starts:
            if start.state.row not in found:
                found[start.state.row] = _reads(conn, start)
    shared = 0
    for reads in zip(*found.values(), strict=False):
        if len({(read.segment, read.start) for read in reads}) > 1:
            break
        shared = min(read.end for read in reads)
        if len({read.end for read in reads}) > 1:
            break
    return shared


def _reads(conn: sa.Connection, start: Start) -> list[Read]:
    from kvloom_store import turns

    at: TurnState | None = turns.state(conn, start.state.row)
    while at is not None and at.segment is None and at.state_end == at.state_start:  # it stands on another turn's
        at = turns.base_of(conn, at)
    if at is None or at.segment is None:  # never stored: it is replayed, and shares nothing that is sure
        return []
    return reads_of(restore.chain(conn, at.segment), start.state.state_end)


def _commit(
    loom: KVLoom,
    exploration: Exploration,
    settings: ExploreSettings,
    step: Grow,
    paths: Sequence[Growing],
    starts: Sequence[Start],
    states: Sequence[Held],
) -> list[Candidate]:
    made: list[Candidate] = []

    def note(conn: sa.Connection, turns: list[Turn]) -> None:
        for each, path, turn in zip(step.paths, paths, turns, strict=True):
            if isinstance(each, Candidate):
                status = _status(settings, path, each.tokens, loom.engine.context_limit)
                made.append(explorations.grow(conn, each, turn.row, status, len(path.tokens), path.logprob))
            else:
                status = _status(settings, path, 0, loom.engine.context_limit)
                new = (each.parent, each.number, turn.row, status, len(path.tokens), path.logprob)
                made.append(explorations.add(conn, exploration, *new))

    with loom.database.read() as conn:
        branches = {branch.name: branch for branch in refs.branches(conn, exploration.session)}
    additions = []
    for each, path, at, held in zip(step.paths, paths, starts, states, strict=True):
        name = branch_name(exploration, each.path)
        there = branches.get(name) or NewBranch(exploration.session, name, numbered=False)
        additions.append((Commits(loom, there), _addition(path, at, held)))
    commit_all(loom, additions, note)
    return made


def branch_name(exploration: Exploration, path: str) -> str:
    """What the branch of a candidate is called."""
    return f"{exploration.name}/{path}"


def _status(settings: ExploreSettings, path: Growing, before: int, limit: int) -> str:
    if path.reason == "stop" or len(path.ids) + 2 > limit:  # one more token, run as well, would not fit the context
        return ENDED
    if path.reason == "step" or before + len(path.tokens) >= settings.step_tokens:
        return OPEN
    return GROWING


def _addition(path: Growing, at: Start, held: Held) -> Addition:
    new = NewTurn(
        {"role": "assistant", "content": path.text()},
        finish_reason="length" if path.reason == "step" else path.reason,
        settings={**path.settings.to_plain(), "reopened": path.stream.reopened},
        timings={"tokens": asdict(Tokens(computed=len(path.passes), generated=len(path.tokens)))},
        continues=at.replies,
        scores=path.scores,
    )
    return Addition(new, at.turn, at.state, path.ids, len(at.ids), held, joined(path.passes))
