"""Eight replies to one question, decoded together, and a scorer of your own that picks the best.

python examples/best_of.py [--model NAME] [--store FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import kvloom

QUESTION = "Write one short sentence about the sea. Use the words wind, salt and gull."
WANTED = ("wind", "salt", "gull")


def main() -> None:
    """Ask once, get eight replies, keep the one that does best what was asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--store", type=Path, help="default: a new file in a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pick(asked.model, asked.store or Path(folder, "best_of.db"))


def score(sample: kvloom.Sample) -> tuple[int, float]:
    """How many of the words are in it; of equals, the one the model itself thought likelier."""
    text = sample.reply.text.casefold()
    return sum(word in text for word in WANTED), sample.mean_logprob


def pick(model: str, store: Path) -> None:
    """Each reply is a branch; what they share is held, and read, once."""
    with kvloom.open(store, model=model) as loom:
        branch = loom.session("sea").branch()
        samples = sorted(branch.sample(QUESTION, n=8, max_tokens=40, seed=1), key=score, reverse=True)
        for sample in samples:
            words, likely = score(sample)
            print(f"{sample.reply.branch:8} {words} of {len(WANTED)} words, {likely:6.2f}: {sample.reply.text.strip()}")
        branch.move_to(samples[0].reply.branch)
        print(f"\nmain goes on with: {branch.log()[-1].text.strip()}")


if __name__ == "__main__":
    main()
