"""Stores as released versions wrote them: whatever comes later must read them, to the bit.

``python tests/sessions/released.py`` writes tests/data/stores/schema-N.db.gz and schema-N.json, which says what is in
it; N is the schema of this version. Once a version with that schema is released, its file is never written again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kvloom_store import loading, pins, planner, refs, restore, turns
from kvloom_store.database import Database
from kvloom_store.rows import RowBuffer
from kvloom_store.schema import SCHEMA_VERSION

FOLDER = Path(__file__).parents[1] / "data" / "stores"


def unpacked(version: int, to: Path) -> dict[str, Any]:
    """Put the store of a schema at a place of its own; what is in it."""
    to.write_bytes(gzip.decompress((FOLDER / f"schema-{version}.db.gz").read_bytes()))
    found: dict[str, Any] = json.loads((FOLDER / f"schema-{version}.json").read_text())
    return found


def described(database: Database) -> dict[str, Any]:
    """All that a store says: of each name that leads somewhere the texts, and of each state there the bits."""
    found: dict[str, Any] = {}
    with database.read() as conn:
        for row in sorted(refs.sessions(conn), key=lambda each: each.name):
            names = {each.name: each.turn for each in refs.branches(conn, row.row)} | refs.tags(conn, row.row)
            pinned = pins.pinned(conn, row.row)
            for name, at in sorted(names.items()):
                path = turns.path_to(conn, at)
                found[f"{row.name}@{name}"] = {
                    "said": [[turn.role, turn.text, turn.finish_reason] for turn in path],
                    "pinned": [turn.row in pinned for turn in path],
                    "states": [_bits(conn, state) for state in turns.states_of(conn, [path[-1].row])],
                }
    return found


def _bits(conn: sa.Connection, state: turns.TurnState) -> dict[str, Any]:
    """The tokens of a state, and the digest of all rows and of the keyframe that are read back for it."""
    segment = state.segment if state.segment is not None else state.base_segment
    assert segment is not None
    links = restore.chain(conn, segment)
    plan = planner.plan(links, state.state_end, links[-1].manifest.layers)
    buffer = RowBuffer(links[-1].manifest.layers, state.state_end)
    loading.load(conn, links, plan.rows, plan.windows, buffer)
    digest = hashlib.sha256()
    for tensors in buffer.tensors:  # of windows, what is not seen any more is not read, and is all zeros
        for rows in tensors:
            digest.update(rows.tobytes())
    if plan.keyframe is not None and plan.keyframe.segment is not None:
        frame, _ = restore.load_keyframe(conn, links, plan.keyframe)
        for layer in sorted(frame):
            for part in frame[layer]:
                digest.update(part.tobytes())
    bits = {"end": state.state_end, "bits": digest.hexdigest(), "lossy": any(link.lossy for link in links)}
    return {"tokens": state.tokens, "scored": state.scores is not None, "codecs": _codecs(links), **bits}


def _codecs(links: Any) -> list[str]:
    return sorted({chunk.codec for link in links for chunk in link.manifest.chunks})


def write(path: Path) -> None:
    """A store with some of everything: two models of other shapes, one session that both have read, branches that leave
    a path between turns and inside one, small deltas, some of them merged, a tag, a pin, replies that went on, codecs.
    """
    import torch
    from tiny import tiny_model, tiny_tokenizer

    from kvloom import KVLoom, TransformersEngine

    torch.set_num_threads(1)

    def opened(kind: str) -> KVLoom:
        engine = TransformersEngine(tiny_model(kind), tiny_tokenizer(), name=f"tiny {kind}")
        return KVLoom(path, model=engine, codec="raw")

    how = {"max_tokens": 5, "temperature": 0.8, "seed": 3}
    with opened("llama") as loom:
        talk = loom.session("talk", system="be brief")
        main = talk.branch()
        for text in ("who was there?", "and then?", "what of the others?"):
            main.say(text, **how)
        main.continue_reply(**how)
        talk.fork("aside", "main~4").say("why?", **how)
        inside = sum(turn.tokens for turn in talk.log("aside")) - 3  # two tokens into its reply
        talk.fork("cut", f"aside:{inside}")
        talk.fork("inside", f"aside:{inside}").continue_reply(**how)
        talk.tag("early", "main~3")
        talk.pin("early")
        packed = loom.session("packed").branch()
        packed.say("they were with her, and he was with them", **how)
        loom.flush()
        packed.session.recode(codec="zstd")
        coarse = loom.session("coarse").branch()
        coarse.say("some said this, and some said that", **how)
        loom.flush()
        coarse.session.recode(codec="q8_0")
    with opened("lfm2") as loom:
        loom.session("other").branch().say("who was there?", **how)
        read = loom.find("talk")
        read.add_model()
        read.branch("aside").say("and more?", **how)
    with opened("llama") as loom:
        loom.find("talk").warm("aside")  # so that both have state of it
        loom.session("long").branch().say("what was said of them, and by whom, and why then? " * 12, **how)
    for _ in range(26):
        with opened("llama") as loom:
            loom.find("long").branch().say("why?", **{**how, "max_tokens": 2})


def main() -> None:
    """Write the store of this version's schema, and what is in it."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        write(path)
        database = Database(path)
        found = described(database)
        database.checkpoint()
        database.close()
        data = gzip.compress(path.read_bytes(), mtime=0)
    (FOLDER / f"schema-{SCHEMA_VERSION}.db.gz").write_bytes(data)
    (FOLDER / f"schema-{SCHEMA_VERSION}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
