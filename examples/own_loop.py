"""Your own loop with model.generate: take the longest stored prefix as a cache, give the longer cache back.

python examples/own_loop.py [--model NAME] [--store FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import kvloom

CONTEXT = "The lighthouse keeper wrote down the weather every day, and nothing else. " * 12
PROMPTS = (CONTEXT + "On Monday", CONTEXT + "On Tuesday", CONTEXT + "On Monday")


def main() -> None:
    """Complete three texts that begin alike."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="alias, folder, .gguf file or hub name")
    parser.add_argument("--store", type=Path, help="default: a new file in a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        complete(asked.model, asked.store or Path(folder, "own-loop.db"))


def complete(name: str, store: Path) -> None:
    """``generate`` runs only the tokens behind the cache it is given."""
    with kvloom.open(store, model=name) as loom:
        model, tokenizer = loom.engine.model, loom.engine.tokenizer
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            cache, held = loom.lookup(ids)
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                past_key_values=cache,
                max_new_tokens=16,
                do_sample=False,
            )
            whole = output[0].tolist()
            kept = loom.capture(whole, cache)
            print(f"{held} of {len(ids)} tokens were held, {kept} are now: {tokenizer.decode(whole[len(ids) :])!r}")


if __name__ == "__main__":
    main()
