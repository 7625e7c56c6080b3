"""Contract 1, bitwise: what is restored is what was captured, goes on like a run that never stopped, and is what plain
transformers computes from the recorded passes.

Nine processes, one after another, converse at random in twelve stores and check what the earlier ones left; three of
them close the store, three are killed when all state is written, three before it is. Then the referee recomputes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from tiny import tiny_model, tiny_tokenizer

import kvloom.passes
from exact import harness, trials
from kvloom.convert import convert
from kvloom.engine import TransformersEngine
from kvloom.loom import KVLoom
from kvloom.models import resolve
from kvloom_proto import limits
from kvloom_proto.records import read_manifest
from kvloom_store.database import Database
from kvloom_store.schema import segment, turn_state

GRID = 32
PROCESSES = 9
TRIALS = 2
SEED = 20250131
JOBS_EACH = 4

CODECS = trials.CODECS
KINDS = ("llama", "qwen3", "gpt2", "phi", "deepseek_v3")
SCENARIOS = [
    {
        "name": f"{kind}-{dtype}",
        "kind": kind,
        "dtype": dtype,
        "codec": CODECS[number % len(CODECS)],
        "threads": threads,
        **trials.FEW_STEPS,
    }
    for number, (kind, dtype, threads) in enumerate(
        [
            *((kind, dtype, 1) for kind in KINDS for dtype in ("float32", "bfloat16")),
            ("mistral", "float32", 2),
            ("qwen2", "bfloat16", 2),
        ]
    )
]
NAMES = [scenario["name"] for scenario in SCENARIOS]


class Outcome:
    """What all processes of the random run found, and where their stores are."""

    def __init__(self, folder: Path, results: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.results = results

    def total(self, count: str, name: str | None = None) -> int:
        """A count over all processes, of one scenario or of all."""
        return sum(r[n][count] for r in self.results for n in r if name in (None, n))

    def failures(self, name: str, level: str) -> list[str]:
        """What failed at a level (the second word of each failure)."""
        return [text for r in self.results for text in r[name]["failures"] if text.split()[1] == level]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("random")
    print(f"seed {SEED}, grid {GRID}, {PROCESSES} rounds of {TRIALS} trials in each of {len(SCENARIOS)} stores")
    shares = [TRIALS] * PROCESSES

    return Outcome(folder, trials.converse(folder, SCENARIOS, shares, grid=GRID, seed=SEED))


@pytest.fixture(scope="module")
def judged(outcome: Outcome) -> tuple[int, dict[str, dict[str, Any]]]:
    """The referee's exit status, and its verdicts by job name; some leaves of every store's tree."""
    jobs = []
    for scenario in SCENARIOS:
        database = Database(outcome.folder / f"{scenario['name']}.db")
        found = harness.leaves(database)
        for state in found[:: max(1, len(found) // JOBS_EACH)]:
            folder = outcome.folder / "jobs" / f"{scenario['name']}-{state['id']}"
            model = {"tiny": scenario["kind"]}
            jobs.append(harness.export(database, state["id"], folder, model, scenario["dtype"], single=True))
        database.close()
    status, verdicts = harness.referee(jobs)
    return status, {verdict["job"]: verdict for verdict in verdicts}


@pytest.mark.parametrize("name", NAMES)
def test_l0_what_is_read_back_is_what_was_captured(outcome: Outcome, name: str) -> None:
    assert outcome.failures(name, "L0") == []
    assert outcome.total("L0", name) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_l1_restores_are_equal_and_go_on_like_the_run_that_never_stopped(outcome: Outcome, name: str) -> None:
    assert outcome.failures(name, "L1") == []
    assert outcome.total("L1", name) >= 30
    assert outcome.total("live", name) >= 15, "turns whose continuation was seen before they were ever restored"


@pytest.mark.parametrize("name", NAMES)
def test_l2_plain_transformers_computes_the_stored_bits_from_the_recorded_passes(
    judged: tuple[int, dict[str, dict[str, Any]]], name: str
) -> None:
    verdicts = [verdict for job, verdict in judged[1].items() if job.rsplit("-", 1)[0] == name]
    assert len(verdicts) >= 3
    assert [verdict for verdict in verdicts if not verdict["ok"]] == []
    assert all(verdict["compared"] > 0 and verdict["never_compared"] == [] for verdict in verdicts)


def test_the_referee_is_content_as_a_whole(judged: tuple[int, dict[str, dict[str, Any]]]) -> None:
    assert judged[0] == 0


def test_two_hundred_trials_ran_over_eight_restarts(outcome: Outcome) -> None:
    assert outcome.total("trials") >= 200
    assert len(outcome.results) - 1 >= 8


def test_the_trials_met_what_they_are_for(outcome: Outcome) -> None:
    """Several grid passes, several chunks, deltas that begin inside their base, zero-row turns, lost state."""
    assert outcome.total("replayed") > 0
    assert outcome.total("reused") > 10_000
    inside = chunks = packed = rowless = long = 0
    for name in NAMES:
        database = Database(outcome.folder / f"{name}.db")
        with database.read() as conn:
            base = segment.alias("base")
            joined = segment.join(base, segment.c.base_segment == base.c.id)
            inside += len(
                conn.execute(sa.select(segment.c.id).select_from(joined).where(segment.c.start < base.c.end)).all()
            )
            rowless += len(
                conn.execute(sa.select(turn_state.c.id).where(turn_state.c.state_start == turn_state.c.state_end)).all()
            )
            manifests = [
                read_manifest(m)
                for m in conn.execute(sa.select(segment.c.manifest).where(segment.c.complete == 1)).scalars()
            ]
        chunks += sum(len({c.position for c in m.chunks}) > 1 for m in manifests)
        packed += sum(c.codec != "raw" for m in manifests for c in m.chunks)
        long += sum(m.end - m.start > limits.CHUNK_TOKENS for m in manifests)
        database.close()
    print(f"deltas inside their base {inside}, segments of several chunks {chunks}, longer than one {long}")
    assert min(inside, chunks, packed, rowless, long) > 0


def test_l3_the_distance_from_one_single_prefill_is_measured(
    judged: tuple[int, dict[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed, and never claimed to be nothing."""
    lines = []
    for name in NAMES:
        found = [verdict["single"] for job, verdict in judged[1].items() if job.rsplit("-", 1)[0] == name]
        worst = max(single["max_logit_difference"] for single in found)
        equal = sum(single["equal_keys"] for single in found) / len(found)
        lines.append(
            f"L3 {name:22} max |logit difference| {worst:.3g} of {found[0]['max_logit']:.3g}, keys equal {equal:.0%}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert all(np.isfinite(verdict["single"]["max_logit_difference"]) for verdict in judged[1].values())


# What the referee would miss is worth nothing: state that is wrong in each of these ways must make it fail.


def _mutants(
    job: dict[str, Any], expect: dict[str, torch.Tensor]
) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    shifted = {**expect, "keys.1": torch.roll(expect["keys.1"], 1, dims=1)}
    swapped = {
        **expect,
        **{f"{name}.{a}": expect[f"{name}.{b}"] for name in ("keys", "values") for a, b in ((0, 1), (1, 0))},
    }
    last = job["passes"][-1]
    counted = {**job, "passes": [*job["passes"][:-1], {**last, "positions": [p + 1 for p in last["positions"]]}]}
    flipped = expect["values.2"].clone()
    flipped.view(-1)[flipped.numel() // 2] ^= 1
    hidden = next(name for name in expect if name.startswith("hidden."))
    other = expect[hidden].clone()
    other[3] ^= 1
    return {
        "a row shifted by one": (job, shifted),
        "two layers swapped": (job, swapped),
        "a counter off by one": (counted, expect),
        "one flipped bit": (job, {**expect, "values.2": flipped}),
        "one flipped bit of the hidden state": (job, {**expect, hidden: other}),
        "a pass cut in another place": ({**job, "passes": _cut_elsewhere(job["passes"])}, expect),
    }


def _cut_elsewhere(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    at = next(n for n, each in enumerate(passes) if len(each["tokens"]) == GRID)
    whole = passes[at]
    first = {**whole, "tokens": whole["tokens"][:-1], "positions": whole["positions"][:-1]}
    second = {
        **whole,
        "keep": whole["keep"] + GRID - 1,
        "tokens": whole["tokens"][-1:],
        "positions": whole["positions"][-1:],
    }
    return [*passes[:at], first, second, *passes[at + 1 :]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of a Llama in float32, with nothing wrong."""
    folder = tmp_path_factory.mktemp("mutants")
    kept, kvloom.passes.GRID = kvloom.passes.GRID, GRID
    try:
        engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer())
        with KVLoom(folder / "store.db", model=engine) as loom:
            branch = loom.session("talk", system="You were there.").branch()
            branch.say("When was it that they were all there, and who said it would be so? " * 3, max_tokens=9)
            branch.say("And what then?", max_tokens=9)
            loom.flush()
            state = harness.leaves(loom.database)[-1]
            return harness.export(loom.database, state["id"], folder / "sound", {"tiny": "llama"}, "float32")
    finally:
        kvloom.passes.GRID = kept


@pytest.fixture(scope="module")
def tried(sound: Path) -> dict[str, dict[str, Any]]:
    """The referee's verdicts on the sound job and on its mutants."""
    job, expect = harness.load_job(sound)
    mutants = _mutants(job, expect)
    folders = [harness.tampered(sound, sound.parent / name, *mutant) for name, mutant in mutants.items()]
    status, verdicts = harness.referee([sound, *folders])
    assert status == 1
    return {verdict["job"]: verdict for verdict in verdicts}


def test_a_sound_job_passes(tried: dict[str, dict[str, Any]]) -> None:
    assert tried["sound"]["ok"]
    assert tried["sound"]["first_token"] is None


def test_a_row_shifted_by_one_is_noticed(tried: dict[str, dict[str, Any]]) -> None:
    verdict = tried["a row shifted by one"]
    assert (verdict["ok"], list(verdict["layers"]), verdict["first_token"]) == (False, ["1"], 0)


def test_two_swapped_layers_are_noticed(tried: dict[str, dict[str, Any]]) -> None:
    verdict = tried["two layers swapped"]
    assert (verdict["ok"], sorted(verdict["layers"])) == (False, ["0", "1"])


def test_a_counter_off_by_one_is_noticed(tried: dict[str, dict[str, Any]]) -> None:
    verdict = tried["a counter off by one"]
    assert (verdict["ok"], verdict["first_token"]) == (False, verdict["tokens"] - 1)


def test_one_flipped_bit_is_noticed(tried: dict[str, dict[str, Any]], sound: Path) -> None:
    verdict = tried["one flipped bit"]
    assert (verdict["ok"], verdict["layers"]) == (False, {"2": 1})
    assert not tried["one flipped bit of the hidden state"]["ok"]
    assert harness.referee([sound.parent / "one flipped bit"])[0] == 1


def test_a_pass_cut_in_another_place_is_noticed(tried: dict[str, dict[str, Any]]) -> None:
    """The schedule matters: it is recorded for a reason."""
    assert not tried["a pass cut in another place"]["ok"]


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_l0_the_tables_hold_the_bits_of_the_live_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, codec_name: str
) -> None:
    monkeypatch.setattr(kvloom.passes, "GRID", GRID)
    engine = TransformersEngine(tiny_model(kind, dtype), tiny_tokenizer())
    with KVLoom(tmp_path / "store.db", model=engine, codec=codec_name) as loom:
        branch = loom.session("talk").branch()
        branch.say("Who was there with them? " * 30, max_tokens=3)
        branch.say("And who was not?", max_tokens=20, temperature=1.0, seed=5)
        loom.flush()
        live = loom.resumer.live
        assert live is not None
        assert live.captured == live.length > limits.CHUNK_TOKENS
        codecs = set()
        with loom.database.read() as conn:
            for link in live.chain:
                row, stored = harness.stored_rows(conn, link.handle.segment)
                codecs |= {chunk.codec for chunk in read_manifest(row["manifest"]).chunks}
                assert (row["start"], row["end"]) == (link.start, link.end)
                for (layer, number), rows in stored.items():
                    held = np.moveaxis(live.source.rows(layer, number, link.start, link.end), 1, 0)
                    assert np.array_equal(held, rows.view(held.dtype))
        assert codecs <= ({"raw", "lz4", "zstd"} if codec_name == "auto" else {"raw", codec_name})
        assert codec_name == "auto" or codec_name in codecs  # "auto" may find none worth it


def test_the_referee_never_imports_what_it_judges() -> None:
    folder = harness.REFEREE.parent
    for file in (*folder.glob("*.py"), harness.TESTS / "tiny.py", harness.TESTS / "tiny_configs.py"):
        names = set()
        for item in ast.walk(ast.parse(file.read_text())):
            if isinstance(item, ast.Import):
                names |= {alias.name for alias in item.names}
            elif isinstance(item, ast.ImportFrom):
                names.add(item.module or "")
        assert not [name for name in names if name.startswith("kvloom")]
        assert "import_module" not in file.read_text()
    code = (
        f"import sys, runpy; runpy.run_path({str(harness.REFEREE)!r}); print([m for m in sys.modules if 'kvloom' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=harness.environment(), check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_is_resumed_exactly_after_a_kill(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = convert(resolve("smollm2"))
    scenario = {
        "name": "smol",
        "folder": str(folder),
        "dtype": dtype,
        "codec": "raw",
        "threads": torch.get_num_threads(),
        **trials.FEW_STEPS,
    }
    spec = {"scenarios": [scenario], "folder": str(tmp_path), "trials": 1, "grid": 64, "seed": SEED}
    results = [
        harness.work({**spec, "process": number, "end": end}, killed=end != "close")["smol"]
        for number, end in enumerate(["flush", "kill", "close"])
    ]
    assert [text for result in results for text in result["failures"]] == []
    assert sum(result["L0"] for result in results) >= 2
    assert sum(result["L1"] for result in results) >= 4
    database = Database(tmp_path / "smol.db")
    state = max(harness.leaves(database), key=lambda row: row["state_end"])
    job = harness.export(database, state["id"], tmp_path / "job", {"folder": str(folder)}, dtype, single=True)
    database.close()
    status, (verdict,) = harness.referee([job])
    assert (status, verdict["differences"]) == (0, [])
    with capsys.disabled():
        print(f"\nL3 SmolLM2 {dtype}: {verdict['single']} over {verdict['tokens']} tokens, {verdict['passes']} passes")
