"""How long a store takes, by how much is in it: 1,000 to 100,000 nodes, 5 million tokens over 2,000 sessions.

Every session is alike (``synthetic``), so what grows with the number of nodes grows with what the other sessions hold.
The three stores are measured in turn. A wide trie (a node with 10,000 children) and a deep one (a path of 5,000 nodes)
stand for themselves.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import synthetic
from benchmarks.common import cell_text, machine, main, table, timed
from benchmarks.plot import LinePlot, Point
from benchmarks.report import Bar, Section, Table
from benchmarks.small import engine_of, one_thread
from benchmarks.synthetic import COMMON, RARE, TOKENS, Synthetic

if TYPE_CHECKING:
    from kvloom import KVLoom, TransformersEngine

SESSIONS = (20, 200, 2_000)
"""Of 50 nodes each."""

WIDE, DEEP = 10_000, 5_000
"""Children of one node; nodes of one path."""

ROUNDS = {
    "open": 30, "match": 500, "held": 200, "fork": 60, "add": 60, "tree": 20, "log": 20, "ls": 5, "search_rare": 20,
    "search_common": 5, "search_session": 5, "say": 5, "remove": 5,
}  # fmt: skip
"""How often each operation is measured on each store."""

ODD = ("match", "held", "fork", "add", "tree", "log", "search_common")
"""Those measured on a wide and on a deep trie."""

TAIL = 32
"""Tokens behind a stored path that nothing has seen."""

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""The model that says something: a pass of it is soon done."""

COMMANDS = ("ls", "tree", "log")
QUICK = {"quick": True}
MEDIAN_MS, P99_MS, GROWTH = 2, 10, 3
"""What the longest match may take, and how much more of it among 100,000 nodes than among 1,000."""


class Subject:
    """An open store, and what is done to it."""

    def __init__(self, made: Synthetic, engine: TransformersEngine | None) -> None:
        from kvloom import KVLoom

        self.made = made
        self.loom: KVLoom = KVLoom(made.path)
        self._engine = engine
        self._draw = random.Random(1)
        self._number = 0
        with self.loom.database.read() as conn:
            self._paths = [
                made.some_path(conn, self._draw) + self._draw.choices(range(30_000, 40_000), k=TAIL) for _ in range(200)
            ]
        if engine is not None:
            with KVLoom(made.path, model=engine) as loom:
                loom.session("talk").branch().say("hello " * 20, max_tokens=1)

    def name(self) -> str:
        """The name of a session."""
        return self._draw.choice(list(self.made.ends))

    def _new_name(self) -> str:
        self._number += 1
        return f"new-{self._number}"

    def open(self) -> Callable[[], Any]:
        from kvloom import KVLoom

        return lambda: KVLoom(self.made.path, must_exist=True).close()

    def match(self) -> Callable[[], Any]:
        from kvloom_store import trie

        return self._reading(lambda conn, ids: trie.match(conn, self.made.root, ids))

    def held(self) -> Callable[[], Any]:
        from kvloom_store import held, trie

        ids = self._draw.choice(self._paths)
        with self.loom.database.read() as conn:
            match = trie.match(conn, self.made.root, ids)
        return self._reading(lambda conn, _: held.longest(conn, match, at_most=len(ids)))

    def _reading(self, action: Callable[[Any, list[int]], Any]) -> Callable[[], Any]:
        ids = self._draw.choice(self._paths)

        def run() -> Any:
            with self.loom.database.read() as conn:
                return action(conn, ids)

        return run

    def fork(self) -> Callable[[], Any]:
        session, name = self.loom.find(self.name()), self._new_name()
        return lambda: session.fork(name)

    def add(self) -> Callable[[], Any]:
        """A turn as a reply commits one: the trie, the turn, its state, the branch."""
        from kvloom_proto.records import Pass, Schedule
        from kvloom_store import refs, trie, turns

        name = self.name()
        with self.loom.database.read() as conn:
            session = refs.get_session(conn, name)
            branch = refs.branches(conn, session.row)[0]
            path = turns.path_to(conn, branch.turn)
            tip = turns.states_of(conn, [path[-1].row])[0]
            ids = trie.tokens_to(conn, tip.position.node, tip.position.offset)
        more = [*ids, *self._draw.choices(range(30_000), k=TOKENS)]
        message = {"role": "user", "content": "what else is there to say about it " * 5}

        def run() -> None:
            with self.loom.database.write() as conn:
                at = trie.extend(conn, self.made.root, more, start_at=tip.position)
                turn = turns.add_turn(conn, session.row, path[-1], message)
                turns.add_state(
                    conn, turn.row, self.made.root, more[len(ids) :], len(ids), at, state_start=tip.state_end,
                    state_end=len(more), base_state=tip.row, base_segment=None, provenance=tip.provenance,
                    schedule=Schedule((Pass(len(ids), TOKENS),)), hidden=None, hidden_dtype=None,
                )  # fmt: skip
                refs.move_branch(conn, branch.row, branch.turn, turn.row)

        return run

    def tree(self) -> Callable[[], Any]:
        return self.loom.find(self.name()).tree

    def log(self) -> Callable[[], Any]:
        return self.loom.find(self.name()).log

    def ls(self) -> Callable[[], Any]:
        """The command, in this process."""
        from kvloom.cli import run

        def ls() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                assert run(["ls", "--store", str(self.made.path)]) == 0

        return ls

    def search_rare(self) -> Callable[[], Any]:
        return lambda: self.loom.search(RARE)

    def search_common(self) -> Callable[[], Any]:
        return lambda: self.loom.search(COMMON)

    def search_session(self) -> Callable[[], Any]:
        name = self.name()
        return lambda: self.loom.search(COMMON, session=name)

    def say(self) -> Callable[[], Any]:
        """A short turn of a tiny model that is loaded, on a store that is opened for it."""
        from kvloom import KVLoom

        name = self._new_name()

        def run() -> None:
            with KVLoom(self.made.path, model=self._engine) as loom:
                loom.session("talk").fork(name).say("And then?", max_tokens=1)

        return run

    def remove(self) -> Callable[[], Any]:
        name, _ = self.made.ends.popitem()
        return lambda: self.loom.remove(name)


def run(quick: bool = False) -> dict[str, Any]:
    """Milliseconds of each operation at each size, and how they grow; seconds of processor time of whole commands.

    ``match`` is the longest-prefix match of a stored path with random tokens behind it, ``held`` what of it has state,
    ``add`` the transaction of a turn, ``say`` that of a tiny model with its store opened anew.
    """
    sizes = (4, 20) if quick else SESSIONS
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        made = [synthetic.conversations(folder / f"{count}.db", count) for count in sizes]
        found["nodes"] = [each.nodes for each in made]
        found["tokens"] = [each.tokens for each in made]
        found["bytes"] = [each.path.stat().st_size for each in made]
        engine = engine_of("llama", TINY, name="tiny llama")
        subjects = [Subject(each, engine) for each in made]
        found["operations"] = {
            operation: _grown(*_interleaved(subjects, operation, max(2, rounds // 50) if quick else rounds))
            for operation, rounds in ROUNDS.items()
        }
        found["commands"] = {
            command: _grown(_processes([each.path for each in made], command, "session-1", 1 if quick else 3))
            for command in COMMANDS
        }
        found |= _odd_shapes(folder, *((200, 100) if quick else (WIDE, DEEP)))
    return found


def _interleaved(subjects: list[Subject], operation: str, rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds of an operation on each store, one store after the other in each round; and of processor time."""
    times: list[list[float]] = [[] for _ in subjects]
    used: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for number, subject in enumerate(subjects):
            action = getattr(subject, operation)()
            before = time.process_time()
            times[number].append(timed(action)[0] * 1000)
            used[number].append((time.process_time() - before) * 1000)
    return times, used


def _grown(times: list[list[float]], used: list[list[float]] | None = None) -> dict[str, Any]:
    medians = [statistics.median(each) for each in times]
    found = {"median": medians, "p99": [_p99(each) for each in times], "growth": medians[-1] / medians[0]}
    return found | ({"processor": _grown(used)} if used else {})


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def _processes(paths: list[Path], command: str, session: str, rounds: int) -> list[list[float]]:
    """Milliseconds of processor time of a whole command, in a process of its own."""
    times: list[list[float]] = [[] for _ in paths]
    for _ in range(rounds):
        for path, taken in zip(paths, times, strict=True):
            of = [] if command == "ls" else [session]
            line = [sys.executable, "-m", "kvloom.cli", command, *of, "--store", str(path)]
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, line
            taken.append((used.ru_utime + used.ru_stime) * 1000)
    return times


def _odd_shapes(folder: Path, wide: int, deep: int) -> dict[str, Any]:
    """The same operations where one node has very many children, and where one path has very many nodes."""
    shapes = {"wide": ((None, 0, *[1] * wide), TOKENS), "deep": ((None, *range(deep)), 4)}
    found: dict[str, Any] = {}
    for name, (parents, tokens) in shapes.items():
        builder = synthetic.Builder(folder / f"{name}.db")
        builder.session(name, parents, tokens=tokens)
        subject = Subject(builder.finish(), None)
        found[name] = {
            "nodes": subject.made.nodes,
            "operations": {each: _grown(*_interleaved([subject], each, 10)) for each in ODD},
            "commands": {each: _grown(_processes([subject.made.path], each, name, 1)) for each in ("tree", "log")},
        }
    return found


def figures(found: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """The head of a table and its rows."""
    head = ["ms (of commands: processor time)", *(f"{count:,} nodes" for count in found["nodes"]), "p99", "times"]
    head += [f"{name}: {found[name]['nodes']:,} nodes" for name in ("wide", "deep")]
    rows: list[list[object]] = []
    for name, each in found["operations"].items():
        odd = [_only(found[shape]["operations"].get(name)) for shape in ("wide", "deep")]
        rows.append([name, *each["median"], each["p99"][-1], each["growth"], *odd])
    for name, each in found["commands"].items():
        odd = [_only(found[shape]["commands"].get(name)) for shape in ("wide", "deep")]
        rows.append([f"kvloom {name}", *each["median"], None, each["growth"], *odd])
    return head, rows


def show(found: dict[str, Any]) -> str:
    """The figures as a table."""
    match = found["operations"]["match"]
    used = match["processor"]
    bars = (
        f"match among {found['tokens'][-1]:,} tokens: median {match['median'][-1]:.2f} ms (at most {MEDIAN_MS}), 99th "
        f"percentile {match['p99'][-1]:.2f} (at most {P99_MS}), grown {match['growth']:.2f} times (at most {GROWTH});\n"
        f"of processor time: {used['median'][-1]:.2f} ms, {used['p99'][-1]:.2f}, {used['growth']:.2f} times"
    )
    return f"{table(*figures(found))}\n{bars}"


def section(found: Mapping[str, Any]) -> Section:
    """The same on the page, with a plot of the longest match; the bars of show 7."""
    head, rows = figures(found)
    match, tokens = found["operations"]["match"], f"{found['tokens'][-1]:,}"
    bars = [
        Bar(f"longest match among {tokens} tokens: median", match["median"][-1], MEDIAN_MS, unit=" ms"),
        Bar(f"longest match among {tokens} tokens: 99th percentile", match["p99"][-1], P99_MS, unit=" ms"),
        Bar(f"longest match: growth to {found['nodes'][-1]:,} nodes", match["growth"], GROWTH, unit=" times"),
    ]
    series = {
        said: [Point(n, y, y, y) for n, y in zip(found["nodes"], match[name], strict=True)]
        for name, said in (("median", "median"), ("p99", "99th percentile"))
    }
    sizes = ", ".join(f"{count:,}" for count in found["nodes"])
    text = (
        f"Stores of {sizes} nodes, the largest of {tokens} tokens, measured by turns: `match` is the longest-prefix "
        "match of a stored path with other tokens behind it, `held` what of it has state, `add` the transaction of a "
        "turn. The 99th percentile is that of the largest store, *times* how much the median grows from the smallest. "
        "A wide trie has a node with very many children, a deep one a very long path."
    )
    plot = LinePlot("scale", "Longest match over the size of the trie", "nodes", "milliseconds", series)
    cells = [[cell_text(value) for value in row] for row in rows]
    return Section("Large stores", text, [Table(head, cells)], [plot], bars)


def _only(figures: dict[str, Any] | None) -> float | None:
    return figures["median"][0] if figures else None


if __name__ == "__main__":
    main(run, show)
