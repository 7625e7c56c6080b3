"""Shared fixtures: a store in a temporary folder, hypothesis profiles, no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: each on one, and none spins while it waits
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONGEST = (
    "exact/test_exact.py",
    "exact/test_kinds.py",
    "exact/test_referee.py",
    "test_examples.py",
    "sessions/test_explore.py",
    "sessions/test_gemma.py",
    "sessions/test_resume.py",
    "torture/test_torture.py",
)
"""The files that take longest, which run first: begun last, one would keep one core busy while the other waits."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    order = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def store_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's own store lies; nothing of the user's is touched."""
    path = tmp_path / "store" / "kvloom.db"
    monkeypatch.setenv("KVLOOM_STORE", str(path))
    return path
