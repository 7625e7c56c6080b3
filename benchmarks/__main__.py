"""``python -m benchmarks`` (or ``make bench``): every measurement, one after another, as JSON.

QUICK=1 leaves out the slow ones and makes the others short.
"""

from __future__ import annotations

import json
import os
import sys

from benchmarks import explore, first_token, fork, grid, keyframes, long, scale, shared_prompts, siblings, tree, windows


def main() -> None:
    quick = bool(os.environ.get("QUICK"))
    parts = {
        "fork": fork.run,
        "first_token": lambda: first_token.run(rounds=1 if quick else 3),
        "tree": lambda: tree.run(branches=2, exchanges=2) if quick else tree.run(),
        "windows": lambda: windows.run(lengths=(2000,)) if quick else windows.run(),
        "keyframes": lambda: keyframes.run(exchanges=4, points=20) if quick else keyframes.run(),
        "shared_prompts": lambda: shared_prompts.run(prompts=6) if quick else shared_prompts.run(),
        "siblings": lambda: siblings.run(1, steps=16, dtypes=("float32",)) if quick else siblings.run(),
        "scale": lambda: scale.measure(quick),
        "long": lambda: long.measure(quick),
        "explore": lambda: explore.run(depth=3, kills=1) if quick else explore.run(),
    }
    if not quick:
        parts["grid"] = grid.run
        parts["spacings"] = keyframes.spacings
    results = {}
    for name, run in parts.items():
        print(f"measuring {name} ...", file=sys.stderr)
        results[name] = run()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
