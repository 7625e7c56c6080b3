"""A search, from its first round to its best path; killed at any point it goes on from what is stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvloom.binding import check_model
from kvloom.commit import Commits
from kvloom.errors import NothingToDo, SessionError
from kvloom.explore import beams, rounds
from kvloom.explore.judge import Judge
from kvloom.explore.plan import Beam, Done, ExploreSettings, Grow, Score, next_step
from kvloom.explore.scoring import scorer_of
from kvloom.path import said
from kvloom.planned import PlannedBranch
from kvloom.report import Tokens
from kvloom.sampling import SamplingSettings, fresh_seed
from kvloom.steps import Given
from kvloom_store import explorations, refs, turns
from kvloom_store.errors import RefExists
from kvloom_store.explorations import Candidate, Exploration

if TYPE_CHECKING:
    from kvloom.growing import Told
    from kvloom.loom import KVLoom
    from kvloom.session import Session


@dataclass(frozen=True, slots=True)
class Node:
    """A candidate as users see it: the ``branch`` it is, and its ``parent``'s ('' for the beginning)."""

    branch: str
    parent: str
    depth: int
    status: str
    score: float | None
    tokens: int
    logprob: float


NO_TOKENS = Tokens()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: "began", "resumed", "made" or "scored" (``nodes``), "stopped" or "done".

    ``tokens`` are those of the whole run so far, ``frontier`` how many paths were worked on.
    """

    kind: str
    nodes: tuple[Node, ...] = ()
    tokens: Tokens = NO_TOKENS
    frontier: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: the ``best`` node (None if nothing was made), its ``text``, and the branches down to it.

    ``tokens`` are those of this run, ``nodes`` all there are, ``pruned`` the branches that do not lead to the best.
    ``notices``: what the user should be told of the state that it began on.
    """

    name: str
    best: Node | None
    text: str
    path: tuple[str, ...]
    nodes: tuple[Node, ...]
    pruned: tuple[str, ...]
    tokens: Tokens
    seconds: float
    finished: bool
    reason: str
    notices: tuple[str, ...] = ()


class Search:
    """Iterate over it for its events; afterwards ``result`` says what it came to. See ``Session.explore``."""

    def __init__(
        self,
        session: Session,
        at: str | None,
        prompt: str | None,
        name: str,
        given: Mapping[str, Any],
        *,
        resume: bool = False,
        cancel: threading.Event | None = None,
        told: Told | None = None,
    ) -> None:
        self._session = session
        self._loom = session.loom
        self._cancel = cancel
        self._told = told
        self._began = time.perf_counter()
        self._tokens = NO_TOKENS
        self._notices: tuple[str, ...] = ()
        self._result: Found | None = None
        self._judges: list[tuple[Judge, KVLoom | None]] = []
        check_model(session)
        with self._loom.database.read() as conn:
            there = explorations.find(conn, session.row.row, name)
        if there is not None and not resume:
            raise RefExists("exploration", name)
        self._resumed = there is not None
        if there is None:
            self.settings = _settings(given)
        else:
            self.settings = _same(ExploreSettings.from_plain(there.settings), given)
        self._scorer = scorer_of(self.settings, self._judge)  # before anything is said or stored
        if self.settings.strategy == "beam":
            beams.beam_settings(self.settings).check_for(self._loom.engine)
        self._exploration = there or self._begin(at, prompt, name, resume)
        if self._unread([self._exploration.turn, *(each.turn for each in self._candidates())]):
            raise SessionError(
                f"{name!r} was made by another model, and is gone on with by that alone",
                hint="leave --model out, or begin another search (--name)",
            )

    @property
    def name(self) -> str:
        """What the search, and the first part of its branches, is called."""
        return self._exploration.name

    @property
    def result(self) -> Found:
        """What it came to; does the search first if that was not done."""
        if self._result is None:
            for _ in self:
                continue
        assert self._result is not None
        return self._result

    def __iter__(self) -> Iterator[Event]:
        made = self._candidates()
        yield Event("resumed" if self._resumed else "began", self._nodes(made))
        try:
            while True:
                step = next_step(self.settings, made)
                if isinstance(step, Done) or (self._cancel is not None and self._cancel.is_set()):
                    break
                yield from self._score(step) if isinstance(step, Score) else self._grow(step)
                made = self._candidates()
        finally:
            for _, loom in self._judges:
                if loom is not None:
                    loom.close()
            self._judges.clear()
        finished = isinstance(step, Done)
        self._result = self._found(made, step if isinstance(step, Done) else None)
        yield Event("done" if finished else "stopped", tokens=self._tokens, reason=self._result.reason)

    def accept(self, branch: str) -> None:
        """Let a branch of the session point at the best path. Raises NothingToDo if there is none."""
        best = self.result.best
        if best is None:
            raise NothingToDo("the search has found nothing to accept")
        self._session.branch(branch).move_to(best.branch)

    def prune(self) -> list[str]:
        """Delete the branches that do not lead to the best path; their turns stay in the tree. The names deleted."""
        with self._loom.database.write() as conn:
            rows = {branch.name: branch.row for branch in refs.branches(conn, self._session.row.row)}
            gone = [name for name in self.result.pruned if name in rows]
            for name in gone:
                refs.remove_branch(conn, rows[name])
        return gone

    def _grow(self, step: Grow | Beam) -> Iterator[Event]:
        about = (self._loom, self._exploration, self.settings)
        if isinstance(step, Beam):
            done = beams.run(*about, step, cancel=self._cancel, told=self._told)
        else:
            done = rounds.run(*about, step, cancel=self._cancel, told=self._told)
        if done is None:
            return
        self._tokens = Tokens(*(getattr(self._tokens, f.name) + getattr(done.tokens, f.name) for f in fields(Tokens)))
        nodes = self._nodes(done.candidates)
        yield Event("made", nodes, self._tokens, len(nodes))

    def _score(self, step: Score) -> Iterator[Event]:
        texts = {each.row: self._text(each) for each in {*step.candidates, *step.among}}
        for each, score in self._scorer(step, texts):
            with self._loom.database.write() as conn:
                scored = explorations.set_score(conn, each, score)
            yield Event("scored", self._nodes([scored]), self._tokens, len(step.candidates))
            if self._cancel is not None and self._cancel.is_set():
                return

    # --- where it begins ---

    def _begin(self, at: str | None, prompt: str | None, name: str, resume: bool) -> Exploration:
        session, ref = self._session, self._session.ref(at)
        turn = session.point(ref).turn
        if prompt is not None:
            turn = self._said_before(name, prompt) if resume else None
            turn = turn if turn is not None else self._say(at, prompt, name)
        if turn is None:
            raise NothingToDo("nothing was said here yet", hint="give a prompt")
        if self._unread([turn]):
            session.warm(at, cancel=self._cancel)
        self._close(turn)
        with self._loom.database.write() as conn:
            return explorations.create(conn, session.row.row, name, turn, self.settings.to_plain())

    def _unread(self, rows: Iterable[int]) -> set[int]:
        """Those of some turns that the model in use has no state of."""
        wanted = set(rows)
        with self._loom.database.read() as conn:
            states = turns.states_of(conn, sorted(wanted))
        return wanted - {state.turn for state in states if state.root == self._loom.root}

    def _said_before(self, name: str, prompt: str) -> int | None:
        """The turn of a search that was killed right after its prompt was said."""
        with self._loom.database.read() as conn:
            branch = next((each for each in refs.branches(conn, self._session.row.row) if each.name == name), None)
            last = turns.get(conn, branch.turn) if branch is not None and branch.turn is not None else None
        return last.row if last is not None and (last.role, last.text) == ("user", prompt) else None

    def _say(self, at: str | None, prompt: str, name: str) -> int:
        point = self._session.point(self._session.ref(at))
        plan = PlannedBranch(self._session, point.turn, [Given({"role": "user", "content": prompt})], name, name)
        plan.run(cancel=self._cancel)
        turn = plan.branch.row.turn
        assert turn is not None
        return turn

    def _close(self, turn: int) -> None:
        """Have the state of all tokens of the turn that the search begins at: what was pending is run once."""
        loom, start = self._loom, rounds.start_at(self._loom, turn)
        if start.replies and start.ids[-1] in loom.engine.eos_ids:
            raise NothingToDo("the reply is complete", hint="give a prompt, or name the message before it")
        with loom.engine.lock:
            live, account = loom.resumer.resume(start.ids, start.state, room=1, cancel=self._cancel)
            self._notices = tuple(account.notices)
            first = live.length
            if first == len(start.ids):
                return
            loom.engine.prefill(live, start.ids[first:], cancel=self._cancel)
            with loom.database.read() as conn:
                branch = refs.branches(conn, self._session.row.row)[0]  # none is moved: the turn is there
            passes = list(loom.engine.passes(first, len(start.ids)))
            Commits(loom, branch).add(start.turn, None, start.state, start.ids, start.state.start, live, passes)

    def _judge(self) -> Judge:
        if not self._judges:
            own = self.settings.judge is None
            loom = self._loom if own else _open_beside(self._loom, self.settings.judge)
            with self._loom.database.read() as conn:
                problem = [each.message for each in said(turns.path_to(conn, self._exploration.turn))]
            judge = Judge(loom, f"{self._session.name}-{self.name}-judge", problem)
            self._judges.append((judge, None if own else loom))
        return self._judges[0][0]

    # --- what there is ---

    def _candidates(self) -> list[Candidate]:
        with self._loom.database.read() as conn:
            return explorations.candidates(conn, self._exploration)

    def _text(self, candidate: Candidate) -> str:
        with self._loom.database.read() as conn:
            return str(said(turns.path_to(conn, candidate.turn))[-1].message["content"])

    def _nodes(self, some: Iterable[Candidate]) -> tuple[Node, ...]:
        return tuple(
            Node(
                rounds.branch_name(self._exploration, each.path),
                rounds.branch_name(self._exploration, each.path.rpartition(".")[0]) if each.parent is not None else "",
                each.depth,
                each.status,
                each.score,
                each.tokens,
                each.logprob,
            )
            for each in some
        )

    def _found(self, made: list[Candidate], done: Done | None) -> Found:
        nodes = self._nodes(made)
        by_row = {each.row: node for each, node in zip(made, nodes, strict=True)}
        best, path = done.best if done else None, []
        at = best
        while at is not None:
            path.append(by_row[at.row].branch)
            at = next((each for each in made if each.row == at.parent), None) if at.parent is not None else None
        return Found(
            name=self.name,
            best=by_row[best.row] if best else None,
            text=self._text(best) if best else "",
            path=tuple(reversed(path)),
            nodes=nodes,
            pruned=tuple(by_row[each.row].branch for each in done.pruned) if done else (),
            tokens=self._tokens,
            seconds=time.perf_counter() - self._began,
            finished=done is not None,
            reason=done.reason if done else "stopped; --resume goes on",
            notices=self._notices,
        )


def _settings(given: Mapping[str, Any]) -> ExploreSettings:
    """Settings from fields of ExploreSettings and of SamplingSettings. Raises SessionError."""
    own = {each.name for each in fields(ExploreSettings)} - {"sampling"}
    sampling = {"temperature": 1.0, **{name: value for name, value in given.items() if name not in own}}
    checked = SamplingSettings.from_plain({**sampling, "stop": tuple(sampling.get("stop", ()))})
    plain = {name: value for name, value in checked.to_plain().items() if name in sampling}
    others = sorted(set(given) - own - {"stop", "temperature"})
    if given.get("strategy") == "beam" and (others or sampling["temperature"] != 1.0):
        other = (others or ["temperature"])[0]
        raise SessionError(f"a beam search does not sample: {other} has no part in it", hint="leave it out")
    chosen = {name: value for name, value in given.items() if name in own}
    if chosen.get("seed") is None:
        chosen["seed"] = fresh_seed()
    if isinstance(chosen.get("step_stop"), (list, tuple)):
        chosen["step_stop"] = tuple(chosen["step_stop"])
    return ExploreSettings(**chosen, sampling=plain)


def _same(settings: ExploreSettings, given: Mapping[str, Any]) -> ExploreSettings:
    """The settings a search has, if those given do not differ. Raises SessionError naming one that does."""
    asked = _settings({**settings.sampling, **_plain(settings), **given})
    for each in fields(ExploreSettings):
        if getattr(asked, each.name) != getattr(settings, each.name):
            raise SessionError(
                f"the search was begun with another {each.name}: {getattr(settings, each.name)!r}",
                hint="resume it without that option, or begin another one with --name",
            )
    return settings


def _plain(settings: ExploreSettings) -> dict[str, Any]:
    return {each.name: getattr(settings, each.name) for each in fields(settings) if each.name != "sampling"}


def _open_beside(loom: KVLoom, model: str | None) -> KVLoom:
    """The same store under another model."""
    from kvloom.loom import open

    return open(loom.database.path, model=model)
