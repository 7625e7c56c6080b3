"""Reading hostile bundles: only documented errors, nothing changed, and no memory set aside for what is not there.

``make torture`` tries 100,000 mutated ones; ``KVLOOM_FUZZ_CASES`` says how many are tried here (default 600).
"""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from golden import FILES, golden, records, written
from torture import fuzz

from kvloom import KVLoom
from kvloom.errors import FormatError, LimitExceeded, Truncated
from kvloom_proto import limits
from kvloom_proto.frames import Reader

CASES = int(os.environ.get("KVLOOM_FUZZ_CASES", "600"))


@pytest.mark.parametrize("name", FILES)
def test_the_golden_bundle_is_written_as_it_was(name: str) -> None:
    assert written(list(records()), FILES[name]) == golden(name)


@pytest.mark.parametrize("name", FILES)
def test_the_golden_bundle_is_read_as_it_was(name: str, store_path: Path) -> None:
    assert list(Reader(io.BytesIO(golden(name))))[:-1] == list(records())
    with KVLoom(store_path) as loom:
        done = loom.import_bundle(io.BytesIO(golden(name)))
        assert (done.turns, done.states, done.segments) == (3, 3, 3)
        session = loom.find("golden")
        assert [turn.text for turn in session.log()] == ["Who?", "He."]
        assert not session.missing("main", verify=True)
        assert not session.missing("aside", verify=True)
        again = io.BytesIO()
        session.export(again)
        assert list(Reader(io.BytesIO(again.getvalue())))[4:6] == list(records())[4:6]


def test_no_mutated_bundle_or_manifest_does_anything_but_be_taken_or_refused(tmp_path: Path) -> None:
    """Refused with an error of ours that names the place, and nothing changed; or sound, and can be looked at."""
    found = fuzz.torture(tmp_path, 1, cases=CASES)
    assert found.wrong == []
    assert found.bundles == found.refused + found.sound + found.taken == CASES
    assert found.refused > found.sound > found.taken > 0
    assert CASES > found.manifests_refused > 0.5 * CASES


def test_a_length_that_lies_sets_no_memory_aside(store_path: Path) -> None:
    data = golden("talk.kvb")
    lies = [data[:10] + struct.pack("<BI", kind, 256 << 20) + b"x" * 100 for kind in (1, 4)]
    with KVLoom(store_path) as loom:
        for lie in lies:
            tracemalloc.start()
            with pytest.raises(FormatError) as refused:
                loom.import_bundle(io.BytesIO(lie))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert isinstance(refused.value, Truncated if lie is lies[0] else FormatError)
            assert peak < 8 << 20
        with pytest.raises(LimitExceeded):
            loom.import_bundle(io.BytesIO(data[:10] + struct.pack("<BI", 1, limits.MAX_RECORD_BYTES + 1)))
