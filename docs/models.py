"""Write the tables of docs/models.md by running the models: python docs/models.py (make models).

    python docs/models.py                       sizes, refusals, and a few trials of exactness: some minutes
    python docs/models.py --json found.json     the trials are those of make exact ARGS="--json found.json"
    python docs/models.py --keep                everything but the trials, which stay as the page has them

Each table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A test makes them again, trials aside.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from tiny import KINDS, OTHERS, tiny_model, tiny_tokenizer
from tiny_configs import TYPES
from transformers import PreTrainedModel

import kvloom
from kvloom import support
from kvloom.errors import KVLoomError
from kvloom.overwritten import StateList
from kvloom.passes import KEYFRAME_SPACING
from kvloom.probe import Probe
from kvloom_proto.records import STORED_BY_ROW, LayerKind, LayerSpec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
RUN = tuple(kind for kind in KINDS if kind not in OTHERS)
DTYPES = ("float32", "bfloat16")
REAL = ("smollm2", "gemma3-270m")
TRIALS, PROCESSES, JUDGED = 8, 3, 3
LEVELS = {"L0": "L0", "L1": "L1", "L2": "elements"}
"""Each level, and what a row of exact.run calls its number of comparisons."""

Cells = dict[str, list[str]]
"""What the three columns of exactness say, by kind."""

# What is kept, in words and bytes.


def named(spec: LayerSpec) -> str:
    """What one of these states is, by what it holds."""
    names = Counter(tensor.name.partition(".")[0] for tensor in spec.tensors)
    if spec.kind == LayerKind.EMPTY:
        return "nothing"
    if spec.kind == LayerKind.KEYFRAME:
        short = [(name.removesuffix("_states").removesuffix("_cache"), n) for name, n in names.items()]
        return f"keyframe ({', '.join(name if n == 1 else f'{name} × {n}' for name, n in short)})"
    if spec.kind == LayerKind.BLOCKS:
        return f"row per {spec.block:,} tokens"
    if spec.kind == LayerKind.WINDOW:
        return f"window of {spec.window:,}"
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    special = ["latents"] if shapes.get("values", shapes["keys"]) != shapes["keys"] else []
    special += ["indexer keys"] if "indexer_keys" in names else []
    return f"rows ({', '.join(special)})" if special else "rows"


def states(layers: Iterable[LayerSpec]) -> str:
    """All states of a model, those that are alike counted together."""
    counts: Counter[str] = Counter()
    for spec in layers:
        counts[named(spec)] += spec.count
    return ", ".join(f"{count} × {name}" for name, count in counts.items())


def token_bytes(layers: Iterable[LayerSpec]) -> int:
    """What one more token adds."""
    return sum(spec.count * spec.row_bytes // (spec.block or 1) for spec in layers if spec.kind in STORED_BY_ROW)


def keyframe_bytes(layers: Iterable[LayerSpec]) -> int:
    """What one keyframe weighs; 0 where nothing is overwritten in place."""
    return sum(spec.count * spec.row_bytes for spec in layers if spec.kind == LayerKind.KEYFRAME)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; figures to the right."""
    made = [tuple(row) for row in rows]
    right = [all(re.fullmatch(r"[\d,/ –]+", row[n]) for row in made) for n in range(len(head))]
    lines = [head, ["--:" if figures else "---" for figures in right], *made]
    return "\n".join(f"| {' | '.join(cell or '–' for cell in line)} |" for line in lines)


# The tiny models.


class Kind(NamedTuple):
    """What an engine says of one tiny model."""

    architecture: str
    layers: dict[str, tuple[LayerSpec, ...]]
    singly: bool
    together: bool


@cache
def examined(kind: str) -> Kind:
    """Build a tiny model in each dtype, and let the engine look at it."""
    engines = {dtype: kvloom.TransformersEngine(tiny_model(kind, dtype), tiny_tokenizer()) for dtype in DTYPES}
    one = engines[DTYPES[0]]
    singly = {len(list(engine.passes(8, 16))) > 1 for engine in engines.values()}
    together = all(engine.apart is None for engine in engines.values())
    return Kind(type(one.model).__name__, {d: e.layers for d, e in engines.items()}, singly == {True}, together)


def table(cells: Mapping[str, Sequence[str]]) -> str:
    """All kinds that are run; the columns of exactness as given."""
    head = ["kind", "in transformers", "layer states", "fed in", "siblings", "bytes per token", "keyframe bytes"]
    head += ["replay bound", *LEVELS]
    rows = []
    for kind in RUN:
        found = examined(kind)
        per_token, frame = ([size(found.layers[d]) for d in DTYPES] for size in (token_bytes, keyframe_bytes))
        figures = [" / ".join(f"{value:,}" for value in both) if any(both) else "0" for both in (per_token, frame)]
        bound = str(KEYFRAME_SPACING if any(frame) else 0)
        fed = "single tokens" if found.singly else "passes"
        siblings = "together" if found.together else "in turn"
        about = [f"`{kind}`", found.architecture, states(found.layers[DTYPES[0]]), fed, siblings, *figures, bound]
        rows.append([*about, *cells[kind]])
    return markdown(head, rows)


# Sizes of models as large as they are published: shapes alone, no weights.


class Shapes(Probe):
    """The probe of a model without weights: what depends on their values is not asked."""

    def _forgets_in_longer_passes(self) -> bool:
        return False

    def _check_shape_stays(self) -> None:
        pass


def shapes_of(config: Any) -> tuple[LayerSpec, ...]:
    """The layer states of a model in bfloat16, from a forward pass that computes shapes only."""
    config._experts_implementation = "batched_mm"  # the default looks at which experts are chosen
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    argument = support.cache_argument(model) or ""

    def forward(cache: Any, ids: list[int], _start: int) -> Any:
        listed = isinstance(cache, StateList)
        given = {argument: cache.state if listed else cache, "use_cache": True}
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids], device="meta"), **given)
        if listed:
            cache.state = output.state
        return output

    with mock.patch("torch.equal", return_value=False):  # tensors without numbers: keys are never the very values
        return Shapes(model, forward, lambda _: None).layers


def size_table(configs: Mapping[str, Any]) -> str:
    """What models of these configs keep."""
    head = ["model", "layers", "layer states", "bytes per token", "keyframe bytes"]
    head += [f"bytes per token with a keyframe every {KEYFRAME_SPACING}"]
    rows = []
    for name, config in configs.items():
        layers = shapes_of(config)
        count = config.get_text_config(decoder=True).num_hidden_layers
        per_token, frame = token_bytes(layers), keyframe_bytes(layers)
        figures = [per_token, frame, per_token + frame // KEYFRAME_SPACING]
        rows.append([f"`{name}`", str(count), states(layers), *(f"{figure:,}" for figure in figures)])
    return markdown(head, rows)


# Without an attention layer, as their defaults are, transformers itself fails on these two.
WITH_DEFAULTS = tuple(kind for kind in RUN if kind not in (*TYPES, "bamba", "granitemoehybrid"))


def default_sizes(kinds: Sequence[str] = WITH_DEFAULTS) -> str:
    """Models of transformers' default configs."""
    return size_table({kind: transformers.AutoConfig.for_model(kind) for kind in kinds})


def real_sizes() -> str:
    """The models that have a name in kvloom."""
    from kvloom.convert import convert
    from kvloom.models import resolve

    return size_table({name: transformers.AutoConfig.from_pretrained(convert(resolve(name))) for name in REAL})


# What is refused.


def said(attempt: Callable[[], object]) -> str:
    """The message and the hint of what users see."""
    try:
        attempt()
    except KVLoomError as error:
        return " ".join(filter(None, [f"{error}.", f"Hint: {error.hint}." if error.hint else ""]))
    raise SystemExit("this was to be refused, and is not: the page must say so")


def small(name: str, architecture: str, **settings: Any) -> PreTrainedModel:
    """A model of another architecture than the tiny ones."""
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tiny_tokenizer()), **settings)
    model: PreTrainedModel = getattr(transformers, architecture)(config)
    return model


def engine_of(model: PreTrainedModel) -> kvloom.TransformersEngine:
    """An engine; it is what refuses models."""
    return kvloom.TransformersEngine(model, tiny_tokenizer(), name="tiny")


def capture(loom: kvloom.KVLoom, cache: Any) -> int:
    """Run three tokens with a cache of some kind, and hand it over."""
    with torch.inference_mode():
        loom.engine.model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    return loom.capture([1, 2, 3], cache)


def refused() -> str:
    """Each thing that is refused, by trying it."""
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    rows = [(f"`{kind}`", said(partial(engine_of, tiny_model(kind)))) for kind in OTHERS]
    for what, name, architecture, settings in (
        ("encoder and decoder (T5)", "t5", "T5ForConditionalGeneration", t5),
        ("no cache at all (the first GPT)", "openai-gpt", "OpenAIGPTLMHeadModel", gpt),
        ("no text generation (BERT)", "bert", "BertForMaskedLM", bert),
    ):
        rows.append((what, said(partial(engine_of, small(name, architecture, **settings)))))
    with tempfile.TemporaryDirectory() as folder:
        loom = kvloom.open(Path(folder) / "models.db", model=engine_of(tiny_model("llama")))
        config = loom.engine.model.config
        for what, handed in (
            ("`capture` of a `QuantizedCache`", transformers.QuantizedCache("fp8", config)),
            ("`capture` of a `StaticCache`", transformers.StaticCache(config, 32)),
        ):
            rows.append((what, said(partial(capture, loom, handed))))
        embeddings: Any = [[0.5, 0.25]]
        rows.append(("images, embeddings", said(partial(loom.lookup, embeddings))))
        loom.close()
    return markdown(["what", "what kvloom says"], rows)


# Exact or not.


def few_trials() -> dict[str, Any]:
    """A short run of what ``make exact`` does."""
    from exact import run

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        few = f"--trials {TRIALS} --processes {PROCESSES} --judged {JUDGED} --together 17 --json {out}"
        run.main(few.split())
        return cast("dict[str, Any]", json.loads(out.read_text()))


def cells_of(found: Mapping[str, Any]) -> Cells:
    """The columns of exactness from a run's JSON.

    Failures name their level, the referee's are of L2; whatever else went wrong leaves all three unshown.
    """
    cells: Cells = {}
    for row in found["kinds"]:
        wrong = set()
        for text in row["failures"]:
            words = text.split()[:2]
            level = next((level for level in LEVELS if level in words), "L2" if words[:1] == ["referee"] else "")
            wrong |= {level} if level else set(LEVELS)
        compared = {level: row[count] for level, count in LEVELS.items()}
        cells[row["kind"]] = ["**differs**" if n in wrong else f"0 of {compared[n]:,}" for n in LEVELS]
    missing = [kind for kind in RUN if kind not in cells]
    if missing:
        raise SystemExit(f"the run has nothing on {', '.join(missing)}")
    return cells


def told(found: Mapping[str, Any]) -> str:
    """One sentence on the run that the columns of exactness are from."""
    rows = [row for row in found["kinds"] if row["kind"] in RUN]
    trials, restarts = (min(row[count] for row in rows) for count in ("trials", "restarts"))
    versions = "".join(f", {name} {number}" for name, number in found.get("versions", {}).items())
    return (
        f"L0 to L2 say how many comparisons differed, of how many:\nat least {trials} trials a kind over {restarts} "
        f"restarts, float32 and bfloat16 (seed {found['seed']}{versions})."
    )


# The page.


def cells_on(page: str) -> Cells:
    """The columns of exactness that the page has."""
    rows = [line.strip("| ").split(" | ") for line in part(page, "table").splitlines()[2:]]
    return {row[0].strip("`"): row[-len(LEVELS) :] for row in rows}


def part(page: str, name: str) -> str:
    """A generated part of the page as it is."""
    found = re.search(rf"<!-- generated: {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    if not found:
        raise SystemExit(f"{PAGE} has no part {name!r}")
    return found[1]


def replaced(page: str, name: str, made: str) -> str:
    """The page with one generated part made anew."""
    start = page.index(f"<!-- generated: {name} -->\n")
    end = page.index("<!-- end -->", start)
    return f"{page[:start]}<!-- generated: {name} -->\n{made}\n{page[end:]}"


def main(given: Sequence[str]) -> int:
    """Write the page; 1 if something is not exact."""
    parser = argparse.ArgumentParser(prog="docs/models.py", description="Write the tables of docs/models.md.")
    parser.add_argument("--json", type=Path, help="take the trials from this file, which make exact wrote")
    parser.add_argument("--keep", action="store_true", help="leave the columns of exactness as they are")
    options = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    page = PAGE.read_text()
    made = {"defaults": default_sizes(), "real": real_sizes(), "refused": refused()}
    if options.keep:
        cells = cells_on(page)
    else:
        found = json.loads(options.json.read_text()) if options.json else few_trials()
        cells, made["trials"] = cells_of(found), told(found)
    made["table"] = table(cells)
    for name, text in made.items():
        page = replaced(page, name, text)
    PAGE.write_text(page)
    wrong = [kind for kind, said in cells.items() if any("differs" in cell for cell in said)]
    print(f"{PAGE.relative_to(ROOT)}: {len(RUN)} kinds, not exact: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
