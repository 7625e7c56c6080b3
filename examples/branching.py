"""One conversation, three ways on: what they share is computed once.

python examples/branching.py [--model NAME] [--store FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import kvloom


def main() -> None:
    """Ask once, then go on in three ways from the same reply."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--store", type=Path, help="default: a new file in a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        branch(asked.model, asked.store or Path(folder, "branching.db"))


def branch(model: str, store: Path) -> None:
    """A fork copies nothing: each branch computes only what it says itself."""
    with kvloom.open(store, model=model) as loom:
        session = loom.session("story", system="You tell very short stories.")
        main = session.branch()
        opening = main.say("Begin a story about a lighthouse.", max_tokens=40)
        print(f"{opening.text}\n")

        for name in ("happy", "sad", "strange"):
            reply = main.fork(name).say(f"End it in a {name} way.", max_tokens=40)
            print(f"[{name}] {reply.text}")
            print(f"    reused {reply.tokens.reused} tokens, computed {reply.tokens.computed}\n")

        # Another reply to the same words: sampled this time, with a seed that makes it repeatable.
        again = session.branch("happy").regenerate(temperature=0.8, seed=7, max_tokens=40).reply
        print(f"[happy, again] {again.text}")

        for turn in session.tree():
            names = f"  <- {', '.join(turn.branches)}" if turn.branches else ""
            print(f"{turn.id[:6]} after {(turn.parent or 'none')[:6]}: {turn.role}, {turn.tokens} tokens{names}")


if __name__ == "__main__":
    main()
