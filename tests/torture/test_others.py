"""The wrong-model table: refused, or computed anew, and never the state of another model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torture import others


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[others.Found]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield others.torture(tmp_path_factory.mktemp("models"))
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("what", "there", "reuses"),
    [
        ("other weights of the same shape", "refused: weights differs", False),
        ("the rope base doubled", "refused: rope differs", False),
        ("another dtype", "refused: dtype differs", False),
        ("another tokenizer", "refused: tokenizer differs", True),
        ("another chat template", "goes on under its own template", True),
        ("an adapter added", "refused: adapters differs", False),
        (others.SWITCHED, "refused: adapters differs", False),
    ],
)
def test_another_model_is_refused_or_computes_anew(found: others.Found, what: str, there: str, reuses: bool) -> None:
    row = next(each for each in found.rows if each.what == what)
    assert row.there == there
    assert (row.reused > 0) == reuses
    assert row.same_bits


def test_nothing_else_was_wrong(found: others.Found) -> None:
    assert found.wrong == []
