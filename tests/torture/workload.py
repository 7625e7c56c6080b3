"""What the tortured process does: one operation after another, each told of when it has begun and when it is done.

To add an operation, write a function that takes the ``World`` and returns the name of the session it changed, and put
it into ``OPERATIONS`` with how often it is to be chosen.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from exact.worker import WORDS, frame_of, rows_of
from older import make_schema_1

from kvloom.branch import Branch
from kvloom.engine import TransformersEngine
from kvloom.errors import CorruptRow, NothingToDo
from kvloom.loom import KVLoom
from kvloom.session import Session
from kvloom_proto.codecs import LOSSLESS
from kvloom_store import refs, trie, turns
from kvloom_store.names import parse_ref
from kvloom_store.schema import segment
from kvloom_store.turns import TurnState
from torture.forks import Tell

SYSTEM = "You are the one who was there with them."
LONGEST = 500
"""Tokens of a path; longer ones are left alone, or the tiny models' contexts would end."""

SHORT_TURNS = 26
"""Exchanges behind which some of their state is merged."""


class World:
    """An open store, what is chosen in it at random, and whom to tell."""

    def __init__(
        self, path: Path, engine: TransformersEngine, rng: random.Random, tell: Tell, *, noticed: bool = False
    ) -> None:
        """``noticed``: a reply may come with notices, because writes fail."""
        self.loom = KVLoom(path, model=engine)
        self.rng = rng
        self.tell = tell
        self.noticed = noticed

    def text(self) -> str:
        """Some words."""
        return " ".join(self.rng.choice(WORDS) for _ in range(self.rng.choice([2, 6, 15, 40]))) + "."

    def how(self) -> dict[str, Any]:
        """Settings of a reply."""
        return {
            "max_tokens": self.rng.choice([1, 4, 12, 30]),
            "temperature": self.rng.choice([0.0, 1.0]),
            "seed": self.rng.getrandbits(32),
        }

    def session(self) -> Session:
        """One of the sessions there are."""
        return self.rng.choice(sorted(self.loom.sessions(), key=lambda each: each.name))

    def branch(self) -> Branch:
        """A branch that is not too long yet."""
        session = self.session()
        short = [each for each in session.branches() if sum(turn.tokens for turn in each.log()) < LONGEST]
        return self.rng.choice(short) if short else self.begun()

    def begun(self) -> Branch:
        """A new session."""
        return self.loom.session(f"s{self.rng.getrandbits(40):x}", system=SYSTEM).branch()

    def turn(self, session: Session) -> str:
        """The id of some turn of a session, or main where there is none yet."""
        known = [each.id for each in session.tree() if each.role != "system"]
        return self.rng.choice(known) if known else "main"

    def name(self) -> str:
        """A name nothing has."""
        return f"n{self.rng.getrandbits(40):x}"


def begin(world: World) -> str:
    """A new session, and something said in it."""
    return _said(world, world.begun())


def say(world: World) -> str:
    """Something said on a branch."""
    return _said(world, world.branch())


def fork(world: World) -> str:
    """A new branch at some turn, and something said on it."""
    session = world.session()
    return _said(world, session.fork(world.name(), at=world.turn(session)))


def fork_at_token(world: World) -> str:
    """A new branch inside a turn, which is cut."""
    branch = world.branch()
    tokens = sum(turn.tokens for turn in branch.log())
    if tokens:
        branch.session.fork(world.name(), at=f"{branch.name}:{world.rng.randint(1, tokens)}")
    return branch.session.name


def tag(world: World) -> str:
    """A name that stays."""
    session = world.session()
    if session.tree():
        session.tag(world.name(), at=world.turn(session))
    return session.name


def regenerate(world: World) -> str:
    """Another reply."""
    return _run(world, world.branch(), "regenerate")


def continue_reply(world: World) -> str:
    """More of a stopped reply."""
    return _run(world, world.branch(), "continue_reply")


def sample(world: World) -> str:
    """Three replies at once."""
    branch = world.branch()
    branch.sample(world.text(), n=3, max_tokens=6, seed=world.rng.getrandbits(32))
    return branch.session.name


def beam(world: World) -> str:
    """The likeliest two replies, where the model's paths can be decoded together."""
    branch = world.branch()
    if world.loom.engine.apart is not None:
        return _said(world, branch)
    branch.beam(world.text(), width=2, max_tokens=10)
    return branch.session.name


def edit(world: World) -> str:
    """A past message said otherwise, on a new branch, what follows it appended again."""
    branch = world.branch()
    said = [each for each in branch.log() if each.role == "user"]
    if said:
        branch.session.edit(world.rng.choice(said).id, world.text(), branch=world.name(), replay_turns=True).run()
    return branch.session.name


def undo(world: World) -> str:
    """A branch moved back."""
    branch = world.branch()
    try:
        branch.undo()
    except NothingToDo:
        return _said(world, branch)
    return branch.session.name


def explore(world: World) -> str:
    """A small search."""
    branch = world.branch()
    settings = {"width": 2, "keep": 1, "depth": 2, "step_tokens": 3, "seed": world.rng.getrandbits(32)}
    result = branch.session.explore(branch.name, prompt=world.text(), name=world.name(), **settings).result
    assert result.finished
    return branch.session.name


def remove(world: World) -> str:
    """A session taken away, if there are others."""
    session = world.session()
    if len(world.loom.sessions()) > 3:
        world.tell({"removing": session.name})
        world.loom.remove(session.name)
    return session.name


def rename(world: World) -> str:
    """A session called otherwise."""
    session = world.session()
    name = f"s{world.rng.getrandbits(40):x}"
    world.tell({"removing": session.name})  # under its old name it is gone
    session.rename(name)
    return name


def gc(world: World) -> str:
    """State dropped, some of it or all."""
    world.loom.gc(world.rng.choice([0, 30_000, 300_000]))
    return world.session().name


def recode(world: World) -> str:
    """A branch's state put down with another codec, one that loses nothing."""
    branch = world.branch()
    with suppress(NothingToDo):  # none is stored
        branch.session.recode(branch.name, codec=world.rng.choice(LOSSLESS))
    return branch.session.name


def move(world: World) -> str:
    """A session written as a bundle, and read as another one."""
    session, file, name = world.session(), io.BytesIO(), f"s{world.rng.getrandbits(40):x}"
    if session.tree():
        session.export(file)
        file.seek(0)
        world.loom.import_bundle(file, name)
    return name


def reopen(world: World) -> str:
    """The store closed, which writes all state and the log into the file, and opened again."""
    engine, path = world.loom.engine, world.loom.database.path
    world.loom.close()
    world.loom = KVLoom(path, model=engine)
    return world.session().name


def short_turns(world: World, count: int = SHORT_TURNS) -> str:
    """A long message, and many short turns that are each stored by themselves."""
    branch = world.begun()
    _run(world, branch, "stream", " ".join(world.rng.choice(WORDS) for _ in range(6 * count)))
    for _ in range(count):
        _said(world, branch, "And?")
        world.loom.flush()
    return branch.session.name


def merge(world: World) -> str:
    """Something said where the path is the longest, and the store closed, which merges small segments."""
    longest = max(world.loom.sessions(), key=lambda each: len(each.log("main")))
    _said(world, longest.branch())
    reopen(world)
    return longest.name


def consolidate(world: World) -> str:
    """Both."""
    name = short_turns(world)
    reopen(world)
    with world.loom.database.read() as conn:
        merged = conn.execute(sa.select(segment.c.id).where(segment.c.merged > 0)).first()
    assert merged is not None or world.noticed
    return name


def migrate(world: World) -> str:
    """The store as a kvloom of schema 1 would have left it, opened by this one."""
    engine, path = world.loom.engine, world.loom.database.path
    world.loom.close()
    make_schema_1(path)
    world.loom = KVLoom(path, model=engine)
    return world.session().name


Operation = Callable[[World], str]

OPERATIONS: list[tuple[Operation, int]] = [
    (begin, 2),
    (say, 6),
    (fork, 4),
    (fork_at_token, 2),
    (tag, 2),
    (regenerate, 3),
    (continue_reply, 3),
    (sample, 1),
    (beam, 1),
    (edit, 1),
    (undo, 1),
    (explore, 1),
    (remove, 1),
    (rename, 1),
    (gc, 1),
    (recode, 1),
    (move, 1),
    (reopen, 1),
    (consolidate, 1),
    (migrate, 1),
]


def _said(world: World, branch: Branch, text: str | None = None) -> str:
    return _run(world, branch, "stream", world.text() if text is None else text)


def _run(world: World, branch: Branch, what: str, *args: str) -> str:
    """A run of the model; from its first piece on, the message is acknowledged."""
    try:
        run = getattr(branch, what)(*args, **world.how())
    except NothingToDo:
        return _said(world, branch)
    for number, _ in enumerate(run):
        if number == 0:
            world.tell(described(world.loom, branch.session.name, begun=True))
    assert world.noticed or run.reply.notices == (), run.reply.notices
    return branch.session.name


def work(world: World, count: int) -> None:
    """So many operations; a store without sessions gets one first."""
    chosen = world.rng.choices([each for each, _ in OPERATIONS], [often for _, often in OPERATIONS], k=count)
    if not world.loom.sessions():
        chosen[0] = begin
    for operation in chosen:
        perform(world, operation)


def perform(world: World, operation: Operation) -> None:
    """One operation, told of when it begins and when it is done."""
    world.tell({"begins": operation.__name__})
    changed = operation(world)
    for each in world.loom.kept:  # replies that were refused in the end, and moved their branches on when taken up
        world.tell(described(world.loom, each.session))
    world.loom.kept.clear()
    world.tell({"done": operation.__name__, **described(world.loom, changed)})


def described(loom: KVLoom, name: str, *, begun: bool = False) -> dict[str, Any]:
    """A session as a user sees it, and a digest of the state in memory; ``begun``: a reply is still running."""
    with loom.database.read() as conn:
        found = refs.find_session(conn, name)
    if found is None:
        return {"session": name, "gone": True}
    session = Session(loom, found)
    said = {each.id: [each.role, each.text, each.finish_reason] for each in session.tree()}
    names = {name: each.id for each in session.tree() for name in (*each.branches, *each.tags)}
    event: dict[str, Any] = {"session": name, "turns": said, "names": names}
    live = None if begun or "resumer" not in loom.__dict__ else loom.resumer.live
    if live is not None and live.chain and live.chain[-1].handle.state is not None:
        with loom.database.read() as conn:
            try:
                state = turns.state(conn, live.chain[-1].handle.state)
                turn = turns.get(conn, state.turn)
            except CorruptRow:  # its session was removed
                return event
        if live.length == state.state_end and not state.variant:  # of what was dropped, the first bits count
            event["state"] = {turn.id: [rows_of(live, state.state_end), frame_of(live)]}
    return event


def state_of(loom: KVLoom, ref: str) -> tuple[TurnState | None, list[int]]:
    """What this model made of the turn at a ref, and the tokens of its path."""
    with loom.database.read() as conn:
        row = refs.resolve(conn, parse_ref(ref)).turn
        state = turns.best_state(turns.states_of(conn, [row]), loom.root) if row is not None else None
        return state, trie.tokens_to(conn, state.position.node, state.position.offset) if state else []
