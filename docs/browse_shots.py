"""Draw docs/browse/*.svg: screenshots of ``kvloom browse``, on a store made on the spot, without a model.

    python docs/browse_shots.py [FOLDER]

The same version of textual draws the same files: ids and times are fixed, and no font is taken from outside.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from kvloom.browse.app import Browser
from kvloom.browse.conversation import Conversation
from kvloom.loom import KVLoom
from kvloom_store import explorations, refs, turns
from kvloom_store.database import Database
from kvloom_store.turns import Turn

FOLDER = Path(__file__).parent / "browse"
SIZE = (96, 24)

TURNS: list[tuple[int | None, str]] = [
    (None, "You are brief."),
    (0, "Name three cities in Italy."),
    (1, "1. Rome\n2. Florence\n3. Venice"),
    (2, "And in Spain?"),
    (3, "1. Barcelona\n2. Madrid\n3. Seville"),
    (2, "And in France?"),
    (5, "1. Paris\n2. Lyon\n3. Marseille"),
    (6, "Which one is best in winter?"),
    (7, "Marseille: it is mild, and the sea is near."),
    (7, "Paris. The museums are warm, and nobody queues."),
]
"""A conversation as (number of the turn it answers, text); who speaks is told by the distance from the first."""

BRANCHES = {"spain": 4, "paris": 9}
SCORES = {4: 0.41, 9: 0.83}
SHOTS = {
    "walk": ["up", "up"],
    "diff": ["m", "home", "down", "down", "down", "down", "down", "m", "d"],
}
"""What is pressed before each picture is taken."""


def make(path: Path) -> None:
    """A store with the conversation above."""
    roles = {0: "system", 1: "user", 2: "assistant"}
    database = Database(path)
    with patch("secrets.token_bytes", random.Random(1).randbytes), database.write() as conn:
        session = refs.create_session(conn, "trip", {"model": "smollm2"})
        made: list[Turn] = []
        depth: list[int] = []
        for parent, text in TURNS:
            depth.append(0 if parent is None else depth[parent] + 1)
            role = roles[0] if not depth[-1] else roles[2 - depth[-1] % 2]
            above = None if parent is None else made[parent]
            made.append(turns.add_turn(conn, session.row, above, {"role": role, "content": text}))
        main = refs.branches(conn, session.row)[0]
        refs.move_branch(conn, main.row, None, made[8].row)
        for name, at in BRANCHES.items():
            refs.add_branch(conn, session.row, name, made[at].row)
        search = explorations.create(conn, session.row, "explore", made[2].row, {})
        for number, (at, score) in enumerate(SCORES.items(), 1):
            found = explorations.add(conn, search, None, number, made[at].row, explorations.ENDED, 10, -9.0)
            explorations.set_score(conn, found, score)
    database.close()


async def shoot(path: Path, keys: list[str]) -> str:
    """The screen after some keys, as SVG."""
    app = Browser(lambda _, progress: KVLoom(path, must_exist=True, progress=progress), "trip")
    async with app.run_test(size=SIZE) as pilot:
        async with asyncio.timeout(60):
            while not isinstance(app.screen, Conversation) or not app.screen.tree_pane.outline.name:
                await pilot.pause(0.01)
        await pilot.press(*keys)
        await pilot.pause()
        picture = app.export_screenshot(title="kvloom browse trip")
    for loom in app.looms:
        loom.close()
    return re.sub(r"@font-face\s*{[^}]*}\s*", "", picture)


def main(folder: Path) -> None:
    """Draw all of them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kvloom.db"
        make(path)
        for name, keys in SHOTS.items():
            (folder / f"{name}.svg").write_text(asyncio.run(shoot(path, keys)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
