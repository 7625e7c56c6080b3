"""What storing state with loss costs: bytes, perplexity, and how far the model's choices move over 512 tokens."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table, words

PREFIX = 2048
MEASURED = 512
QUICK = {"prefix": 512, "measured": 64}


def logprobs(engine: Any, live: Any, ids: list[int], pass_tokens: int = 64) -> Any:
    """Log-probabilities [tokens, vocabulary] of what follows each of some tokens, run on top of a state, in float32."""
    import torch

    found = []
    for start in range(0, len(ids), pass_tokens):
        part = ids[start : start + pass_tokens]
        positions = torch.arange(live.length, live.length + len(part))[None]
        with torch.inference_mode():
            output = engine.model(torch.tensor([part]), past_key_values=live.cache, position_ids=positions)
        live.advance(len(part))
        found.append(torch.log_softmax(output.logits[0].float(), -1))
    return torch.cat(found)


def compare(exact: Any, other: Any, following: Any) -> dict[str, float]:
    """Perplexity of the text, and how often and how far two distributions of each token differ."""
    import torch

    taken = torch.gather(other, 1, following[:, None])
    divergence = (exact.exp() * (exact - other)).sum(-1)
    return {
        "perplexity": float(torch.exp(-taken.mean())),
        "top1_agreement": float((exact.argmax(-1) == other.argmax(-1)).float().mean()),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
    }


def run(dtype: str = "bfloat16", prefix: int = PREFIX, measured: int = MEASURED) -> dict[str, Any]:
    """The novel's first tokens stored exactly and with each lossy codec; the next ones run on what comes back."""
    import torch

    import kvloom
    from kvloom_proto.codecs import LOSSY

    engine = kvloom.load_engine("smollm2", dtype=dtype)
    ids = engine.tokenizer(words(engine.tokenizer, prefix + measured + 1))["input_ids"][: prefix + measured + 1]
    following = torch.tensor(ids[prefix + 1 :])
    results: dict[str, Any] = {"machine": machine(), "dtype": dtype, "prefix": prefix, "measured": measured}
    exact = None
    for codec in ("raw", *LOSSY):
        with tempfile.TemporaryDirectory() as folder, kvloom.open(Path(folder) / "kvloom.db", model=engine) as loom:
            size, live = stored(loom, ids[:prefix], codec)
            found = logprobs(engine, live, ids[prefix:-1])
        exact = found if exact is None else exact
        results[codec] = {"bytes": size, **compare(exact, found, following)}
    return results


def stored(loom: Any, ids: list[int], codec: str) -> tuple[int, Any]:
    """Bytes of the state of some tokens once it is stored with a codec, and a live state with what comes back."""
    from kvloom_store import held, loading, planner, recode, restore, trie
    from kvloom_store.rows import RowBuffer

    live = loom.engine.new_state(len(ids))
    loom.engine.prefill(live, ids)
    loom.capture(ids, live.cache)
    loom.flush()
    with loom.database.read() as conn:
        found = held.longest(conn, trie.match(conn, loom.root, ids), at_most=len(ids))
        assert found is not None
        rows = [link.id for link in restore.chain(conn, found.segment)]
    size = recode.recode(loom.database, rows, codec).after
    buffer = RowBuffer(live.layers, len(ids) + MEASURED)
    with loom.database.read() as conn:
        links = restore.chain(conn, found.segment)
        plan = planner.plan(links, len(ids), live.layers)
        loading.load(conn, links, plan.rows, plan.windows, buffer)
    back = loom.engine.new_state(buffer.capacity, buffer)
    back.show(len(ids))
    return size, back


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The results as a table."""
    from kvloom_proto.codecs import LOSSY

    found = []
    for codec in ("raw", *LOSSY):
        each = results[codec]
        cells = [f"{each['bytes'] / 1e6:.1f}", f"{results['raw']['bytes'] / each['bytes']:.2f}"]
        cells += [f"{each['perplexity']:.3f}", f"{each['top1_agreement']:.1%}"]
        found.append([results["dtype"], codec, *cells, f"{each['kl_mean']:.5f}", f"{each['kl_max']:.3f}"])
    return found


if __name__ == "__main__":
    results = run()
    print(f"{results['measured']} tokens after {results['prefix']}; {results['machine']}", file=sys.stderr)
    head = ["dtype", "codec", "MB", "times smaller", "perplexity", "top-1 agreement", "KL mean", "KL max"]
    print(table(head, rows(results)))
