"""A small tree of thought on a puzzle whose answer is checked; killed halfway if you like, it goes on where it was.

python examples/tree_of_thought.py [--model NAME] [--store FILE] [--judge] [--kill]
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from pathlib import Path

import kvloom

PUZZLE = (
    "I have 3 boxes with 4 apples each, and I give 5 apples away. How many apples are left? "
    "Think step by step, one short sentence a step, and end with: The answer is N."
)
ANSWER = 7


def main() -> None:
    """Search, show the tree, and say whether the best path has the right answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--store", type=Path, default=Path("tree_of_thought.db"))
    parser.add_argument("--judge", action="store_true", help="let the model rate each step, instead of this file")
    parser.add_argument("--kill", action="store_true", help="die as by kill -9 in the middle; run again to go on")
    asked = parser.parse_args()
    think(asked.model, asked.store, "judge" if asked.judge else f"python:{Path(__file__).stem}:score", asked.kill)


def score(text: str) -> float:
    """1 for the right answer, 0 for a wrong one; in between, the longer it stays with the numbers of the puzzle."""
    said = re.search(r"answer is (\d+)", text)
    if said:
        return float(int(said[1]) == ANSWER)
    numbers = re.findall(r"\d+", text)
    return 0.3 + 0.1 * sum(number in ("3", "4", "5", "12", "7") for number in numbers) / max(len(numbers), 1)


def think(model: str, store: Path, how: str, kill: bool) -> None:
    """``resume=True`` begins the search if there is none, and goes on with it if there is."""
    steps = 0

    def told(_: int) -> None:
        nonlocal steps
        steps += 1
        if kill and steps == 30:
            print("killed in the middle; run the same again without --kill", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    with kvloom.open(store, model=model) as loom:
        search = loom.session("puzzle").explore(
            prompt=PUZZLE,
            resume=True,
            width=3,
            keep=2,
            depth=4,
            step_tokens=24,
            step_stop=(".", "\n"),
            score=how,
            temperature=0.7,
            seed=3,
            told=told,
        )
        for event in search:
            if event.kind == "resumed":
                print(f"going on with {len(event.nodes)} nodes that are there")
        found = search.result
        for node in found.nodes:
            print(f"{'*' if node.branch in found.path else ' '} {'  ' * node.depth}{node.branch} {node.score:.2f}")
        print(f"\n{found.text.strip()}\n")
        right = re.search(rf"answer is {ANSWER}\b", found.text) is not None
        print(f"{'right' if right else 'not right'}: {ANSWER} apples; computed {found.tokens.computed} tokens here")


if __name__ == "__main__":
    main()
