"""Choosing a token: the same sets as transformers, the same token for the same seed and position, anywhere."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import msgpack
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kvloom.errors import EngineError, SessionError
from kvloom.filters import float32, penalised, weighted
from kvloom.sampling import (
    MAX_SEED,
    SamplingSettings,
    choose,
    fresh_seed,
    uniform,
)


def distribution(logits: torch.Tensor, chosen: SamplingSettings, seen: list[int]) -> torch.Tensor:
    """Probabilities (float64 [vocab]) that choose draws from."""
    scores = penalised(float32(logits), chosen.repetition_penalty, seen)
    ids, weights = weighted(scores, float(scores.max()), chosen)
    full = torch.zeros(len(logits), dtype=torch.float64)
    if ids is None:
        full = weights
    else:
        full[ids] = weights
    return full / full.sum()


def by_transformers(logits: torch.Tensor, chosen: SamplingSettings, seen: list[int]) -> torch.Tensor:
    """The same from transformers' processors, in the order in which generate applies them."""
    steps = LogitsProcessorList()
    if chosen.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    if chosen.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(chosen.temperature))
    if chosen.top_k:
        steps.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1.0:
        steps.append(TopPLogitsWarper(chosen.top_p))
    if chosen.min_p > 0.0:
        steps.append(MinPLogitsWarper(chosen.min_p))
    if chosen.typical_p < 1.0:
        steps.append(TypicalLogitsWarper(chosen.typical_p))
    # In float64, so that rounding does not decide what is kept.
    scores = steps(torch.tensor([seen], dtype=torch.int64), logits.double()[None])
    return scores[0].softmax(-1)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # Tokens of hardly any probability may underflow on one side only.
    assert bool((((ours > 0) == (theirs > 0)) | (ours.maximum(theirs) < 1e-290)).all())
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-12)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """Logits without ties, of a size and spread drawn at random, and tokens seen."""
    size = draw(st.integers(1, 700))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(size, generator=noise) * draw(st.sampled_from([0.1, 1.0, 4.0, 10.0]))
    assume(len(logits.unique()) == size)
    return logits, draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))


temperatures = st.floats(0.05, 3.0)


@given(cases(), st.floats(0.5, 2.0), temperatures)
def test_repetition_penalty_and_temperature_are_those_of_transformers(case, penalty, temperature):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, repetition_penalty=penalty)
    same(distribution(logits, chosen, seen), by_transformers(logits, chosen, seen))


@given(cases(), st.integers(1, 800), temperatures)
def test_top_k_is_that_of_transformers(case, k, temperature):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, top_k=k)
    ours = distribution(logits, chosen, seen)
    same(ours, by_transformers(logits, chosen, seen))
    possible = distribution(logits, SamplingSettings(temperature=temperature), seen) > 0
    assert int((ours > 0).sum()) == min(k, int(possible.sum()))


def clear_of_the_edge(probabilities: torch.Tensor, p: float) -> bool:
    """Whether rounding can't decide which token is the last of the nucleus."""
    sums = probabilities.sort(descending=True).values.cumsum(0)
    return bool(((sums - p).abs() > 1e-6).all())


@given(cases(), st.floats(0.0, 0.9999), temperatures)
def test_top_p_is_that_of_transformers(case, p, temperature):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, top_p=p)
    plain = distribution(logits, SamplingSettings(temperature=temperature), seen)
    assume(clear_of_the_edge(plain, p))
    ours = distribution(logits, chosen, seen)
    same(ours, by_transformers(logits, chosen, seen))
    # and by its definition: p is reached, and without the least likely token it is not
    kept = plain[ours > 0]
    assert kept.sum() >= p
    assert len(kept) == 1 or kept.sum() - kept.min() < p


@given(cases(), st.floats(0.001, 1.0), temperatures)
def test_min_p_is_that_of_transformers(case, p, temperature):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, min_p=p)
    plain = distribution(logits, SamplingSettings(temperature=temperature), seen)
    assume(bool(((plain / plain.max() - p).abs() > 1e-6).all()) or p == 1.0)
    same(distribution(logits, chosen, seen), by_transformers(logits, chosen, seen))


def typicality(probabilities: torch.Tensor) -> torch.Tensor:
    """How far the information of each token that is possible lies from the entropy (float64)."""
    held = probabilities[probabilities > 0]
    return (-held.log() - float((-held.log() * held).sum())).abs()


def clear_of_the_typical_edge(probabilities: torch.Tensor, p: float) -> bool:
    """The same of the typical set: neither its mass nor the order of its members hangs on rounding."""
    order = typicality(probabilities).sort()
    sums = probabilities[probabilities > 0][order.indices].cumsum(0)
    apart = bool((order.values.diff() > 1e-9).all()) and bool(((sums - p).abs() > 1e-6).all())
    return apart and float(probabilities[probabilities > 0].min()) > 1e-200


@given(cases(), st.floats(0.001, 0.9999), temperatures)
def test_typical_p_is_that_of_transformers(case, p, temperature):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, typical_p=p)
    plain = distribution(logits, SamplingSettings(temperature=temperature), seen)
    assume(clear_of_the_typical_edge(plain, p))
    ours = distribution(logits, chosen, seen)
    same(ours, by_transformers(logits, chosen, seen))
    # and by its definition: what was left out is less typical than all that is kept, of which p of the whole needs each
    far, kept = typicality(plain), ours > 0
    assert bool(kept.all()) or float(far[kept].max()) < float(far[~kept].min())
    assert float(plain[kept].sum()) >= p
    assert int(kept.sum()) == 1 or float(plain[kept].sum()) - float(plain[kept][far[kept].argmax()]) < p


@pytest.mark.parametrize("size", [10, 5000])
def test_typical_p_keeps_those_as_typical_as_the_last(size):
    chosen = SamplingSettings(temperature=1.0, typical_p=0.3)
    assert bool((distribution(torch.zeros(size), chosen, []) > 0).all())


def test_typical_p_may_leave_out_the_likeliest():
    probabilities = torch.tensor([0.4, *[0.6 / 30] * 30])
    kept = distribution(probabilities.log(), SamplingSettings(temperature=1.0, typical_p=0.5), []) > 0
    assert kept.tolist() == [False, *[True] * 30]
    same(
        distribution(probabilities.log(), SamplingSettings(temperature=1.0, typical_p=0.5), []),
        by_transformers(probabilities.log(), SamplingSettings(temperature=1.0, typical_p=0.5), []),
    )


@given(st.integers(0, 2**32), st.floats(0.01, 0.999), st.sampled_from([0.3, 2.0, 8.0]))
def test_typical_p_of_a_large_vocabulary(seed, p, spread):
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * spread
    plain = distribution(logits, SamplingSettings(temperature=0.8), [])
    order = typicality(plain).sort()
    sums = plain[order.indices].cumsum(0)
    at = int((sums < p).sum())
    assume(bool(((sums - p).abs() > 1e-12).all()))
    assume(bool((order.values[max(0, at - 2) : at + 3].diff() > 1e-12).all()))
    expected = torch.zeros(len(plain), dtype=torch.bool)
    expected[order.indices[: at + 1]] = True
    ours = distribution(logits, SamplingSettings(temperature=0.8, typical_p=p), []) > 0
    assert torch.equal(ours, expected)


@given(
    cases(), temperatures, st.integers(0, 100), st.floats(0.05, 1.0), st.floats(0.0, 0.5), st.sampled_from([1.0, 1.3])
)
def test_all_together_are_those_of_transformers(case, temperature, k, p, min_p, penalty):
    logits, seen = case
    chosen = SamplingSettings(temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty)
    before = SamplingSettings(temperature=temperature, top_k=k, repetition_penalty=penalty)
    plain = distribution(logits, before, seen)
    assume(clear_of_the_edge(plain, p) or p == 1.0)
    assume(bool(((plain / plain.max() - min_p).abs() > 1e-6).all()))
    left = distribution(logits, chosen, seen)
    same(left, by_transformers(logits, chosen, seen))
    # transformers takes the typical set of what the other filters have left
    if clear_of_the_typical_edge(left, 0.7):
        typical = replace(chosen, typical_p=0.7)
        same(distribution(logits, typical, seen), by_transformers(logits, typical, seen))


def test_top_k_keeps_those_equal_to_the_last():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    chosen = SamplingSettings(temperature=1.0, top_k=2)
    assert (distribution(logits, chosen, []) > 0).tolist() == [False, True, True, True, False]
    same(distribution(logits, chosen, [0]), by_transformers(logits, chosen, [0]))


@pytest.mark.parametrize("size", [10, 5000])  # below and above the size that is sorted at once
def test_top_p_keeps_the_first_of_equals(size):
    kept = distribution(torch.zeros(size), SamplingSettings(temperature=1.0, top_p=0.35), []) > 0
    assert kept.nonzero().squeeze(1).tolist() == list(range(math.ceil(0.35 * size)))


@given(st.integers(0, 2**32), st.floats(0.0, 0.999), st.sampled_from([0.3, 2.0, 8.0]), st.booleans())
def test_top_p_of_a_large_vocabulary(seed, p, spread, rounded):
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * spread
    if rounded:
        logits = logits.bfloat16()  # full of ties
    plain = distribution(logits, SamplingSettings(temperature=0.8), [])
    order = plain.sort(descending=True, stable=True)
    sums = order.values.cumsum(0)
    assume(bool(((sums - p).abs() > 1e-12).all()))
    expected = torch.zeros(len(plain), dtype=torch.bool)
    expected[order.indices[: int((sums < p).sum()) + 1]] = True
    assert torch.equal(distribution(logits, SamplingSettings(temperature=0.8, top_p=p), []) > 0, expected)


def test_uniform_has_not_changed():
    # Golden: stored conversations depend on them. They must never be edited.
    assert uniform(0, 0) == float.fromhex("0x1.2aa8004013e62p-1")
    assert uniform(0, 1) == float.fromhex("0x1.58baabc8fde0dp-1")
    assert uniform(1, 0) == float.fromhex("0x1.c2e9d497d1326p-2")
    assert uniform(42, 1234) == float.fromhex("0x1.59a51c59e2c3cp-3")
    assert uniform(MAX_SEED, MAX_SEED) == float.fromhex("0x1.2e4d9335b3cf2p-1")


def test_uniform_is_uniform():
    draws = torch.tensor([uniform(5, position) for position in range(20_000)], dtype=torch.float64)
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert float(draws.histc(20, 0, 1).div(1000).sub(1).abs().max()) < 0.15


@pytest.mark.parametrize(("seed", "position"), [(-1, 0), (0, -1), (2**63, 0), (0, 2**63), (1.0, 0), (True, 0)])
def test_uniform_refuses_what_it_cannot_pack(seed, position):
    with pytest.raises(SessionError, match="whole number"):
        uniform(seed, position)


def test_fresh_seeds_are_valid_and_differ():
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    for seed in seeds:
        SamplingSettings(seed=seed)


@pytest.mark.parametrize(
    "chosen",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
        SamplingSettings(temperature=1.1, typical_p=0.6),
    ],
)
def test_samples_follow_the_distribution(chosen):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = distribution(logits, chosen, [4, 5])
    count = 20_000
    drawn = [choose(logits, chosen, seen=[4, 5], seed=11, position=position) for position in range(count)]
    share = torch.tensor(drawn).bincount(minlength=12) / count
    assert bool((share[expected == 0] == 0).all())
    # five standard deviations of a binomial share
    assert bool(((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all())


def test_greedy_takes_the_lowest_of_equals_and_heeds_the_penalty():
    logits = torch.tensor([0.5, 2.0, -1.0, 2.0, 2.0])
    greedy = SamplingSettings()
    assert choose(logits, greedy, seen=[], seed=0, position=0) == 1
    penalty = SamplingSettings(repetition_penalty=1.5)
    assert choose(logits, penalty, seen=[1], seed=0, position=0) == 3
    assert choose(logits, penalty, seen=torch.tensor([1, 3, 3]), seed=0, position=0) == 4
    # negative logits are multiplied; ids the model can't produce are ignored
    below = torch.tensor([-1.0, -1.1])
    assert choose(below, penalty, seen=[0, 2, 99, -1], seed=0, position=0) == 1
    assert logits.tolist() == [0.5, 2.0, -1.0, 2.0, 2.0]
    assert below.tolist() == pytest.approx([-1.0, -1.1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_counts_asfloat32(dtype):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(dtype)
    for chosen in (SamplingSettings(), SamplingSettings(temperature=1.0, top_p=0.9)):
        for position in range(20):
            a = choose(logits, chosen, seen=[], seed=2, position=position)
            assert a == choose(logits.float(), chosen, seen=[], seed=2, position=position)


def test_logits_that_require_grad_and_inference_mode():
    chosen = SamplingSettings(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    token = choose(torch.ones(9, requires_grad=True), chosen, seen=[1], seed=2, position=3)
    with torch.inference_mode():
        assert choose(torch.ones(9), chosen, seen=torch.tensor([1]), seed=2, position=3) == token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("values", [[1.0, math.nan], [math.nan, 1.0], [math.nan] * 2, [-math.inf] * 2, [1.0, math.inf]])
def test_unusable_logits_are_an_error(values, temperature):
    with pytest.raises(EngineError, match="no usable logits"):
        choose(torch.tensor(values), SamplingSettings(temperature=temperature), seen=[], seed=0, position=0)


@pytest.mark.parametrize("logits", [torch.zeros(1, 4), torch.zeros(0), torch.zeros(4, dtype=torch.int64)])
def test_logits_of_another_shape_are_an_error(logits):
    with pytest.raises(EngineError, match="shape"):
        choose(logits, SamplingSettings(), seen=[], seed=0, position=0)


def test_ruled_out_tokens_are_never_drawn():
    logits = torch.full((8,), -math.inf)
    logits[3] = -5.0
    for chosen in (
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=1.0, top_k=4),
        SamplingSettings(temperature=1e-300, top_p=0.0, min_p=1.0),
        SamplingSettings(temperature=1.0, typical_p=0.0),
    ):
        for position in range(50):
            assert choose(logits, chosen, seen=[], seed=0, position=position) == 3


def test_a_draw_of_zero_skips_ruled_out_tokens(monkeypatch):
    monkeypatch.setattr("kvloom.sampling.uniform", lambda seed, position: 0.0)
    logits = torch.tensor([-math.inf, 1.0, 1.0])
    assert choose(logits, SamplingSettings(temperature=1.0), seen=[], seed=0, position=0) == 1


def test_a_draw_that_rounds_up_to_the_whole_sum(monkeypatch):
    monkeypatch.setattr("kvloom.sampling.uniform", lambda seed, position: 1.0)
    logits = torch.tensor([1.0, 1.0, -math.inf])
    assert choose(logits, SamplingSettings(temperature=1.0), seen=[], seed=0, position=0) == 1


THREADS = """
import sys, torch
from kvloom.sampling import SamplingSettings, choose
torch.set_num_threads(int(sys.argv[1]))
logits = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 2
for chosen in (
    SamplingSettings(),
    SamplingSettings(temperature=1.0),
    SamplingSettings(temperature=1.2, top_p=0.97),
    SamplingSettings(temperature=1.2, typical_p=0.9),
    SamplingSettings(temperature=0.9, top_k=3000, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
):
    print([choose(logits, chosen, seen=range(500), seed=9, position=n) for n in range(30)])
"""


def test_the_thread_count_does_not_matter():
    def tokens(threads: int) -> str:
        command = [sys.executable, "-c", THREADS, str(threads)]
        env = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120).stdout

    one = tokens(1)
    assert one.count("\n") == 5
    assert tokens(3) == one


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", 2**31),
        ("top_p", 1.01),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("min_p", 2),
        ("min_p", None),
        ("typical_p", 1.5),
        ("typical_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("seed", False),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("stop", "abc"),
        ("stop", None),
        ("stop", ("",)),
        ("stop", ("a", 1)),
        ("stop", ("x" * 257,)),
        ("stop", ("\ud83d",)),
        ("stop", ("x",) * 17),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(SessionError, match=rf"^{field} ") as caught:
        SamplingSettings(**{field: value})
    assert caught.value.hint
    with pytest.raises(SessionError, match=rf"^{field} "):
        SamplingSettings.from_plain({field: value})


def test_settings_survive_plain_data():
    chosen = SamplingSettings(
        temperature=1,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.8,
        repetition_penalty=1.1,
        seed=MAX_SEED,
        stop=("\n", "User:"),
    )
    packed = msgpack.packb(chosen.to_plain())
    assert SamplingSettings.from_plain(msgpack.unpackb(packed)) == chosen
    assert SamplingSettings.from_plain({}) == SamplingSettings()
    assert SamplingSettings.from_plain({"stop": ["a"]}).stop == ("a",)
    # equal settings, equal bytes
    assert msgpack.packb(SamplingSettings(temperature=-0.0).to_plain()) == msgpack.packb(SamplingSettings().to_plain())
    assert isinstance(chosen.temperature, float)


def test_unknown_settings_are_refused():
    with pytest.raises(SessionError, match="unknown sampling settings: beams, top_q"):
        SamplingSettings.from_plain({"top_q": 1, "beams": 2, "top_k": 3})
