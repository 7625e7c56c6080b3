"""A conversation that goes on after a restart: run this twice, or as often as you like.

python examples/resume.py [--model NAME] [--store FILE] [--kill]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import kvloom

QUESTIONS = ("Name a city in Italy.", "What is it known for?", "And what do people eat there?", "Name another one.")


def main() -> None:
    """Say the next thing, whatever was said in earlier runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--store", type=Path, default=Path("resume-example.db"))
    parser.add_argument("--kill", action="store_true", help="end as kill -9 does: what was acknowledged is kept")
    asked = parser.parse_args()

    with kvloom.open(asked.store, model=asked.model) as loom:
        main = loom.session("trip", system="You are brief.").branch()
        said = [turn for turn in main.log() if turn.role == "user"]
        if said:
            print(f"Going on after {len(said)} questions, the last of which was: {said[-1].text}")
        question = QUESTIONS[len(said) % len(QUESTIONS)]
        print(f"> {question}")
        run = main.stream(question, max_tokens=40)
        for piece in run:
            print(piece, end="", flush=True)
        tokens, first = run.reply.tokens, run.reply.seconds.first_token or 0.0
        print(f"\nreused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}: {first:.3f} s")
        if asked.kill:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
