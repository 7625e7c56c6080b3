"""Hostile bytes: mutated bundles are imported, mutated manifests parsed. Refused with an error of ours, or sound.

Hypothesis draws what is mutated and how, in blocks: what it remembers of each would grow with their number.
"""

from __future__ import annotations

import functools
import io
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import sqlalchemy as sa
from golden import FILES, golden, records
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvloom.bundles import check_settings, check_turn
from kvloom.errors import FormatError, KVLoomError, StoreError
from kvloom.loom import KVLoom
from kvloom_proto.bundle import SegmentRecord
from kvloom_proto.frames import Reader
from kvloom_proto.records import read_manifest
from kvloom_store import schema
from kvloom_store.bundle_check import Contents, Rules
from kvloom_store.checksum import checked
from torture.mutations import MUTATIONS, manifest_changed

BLOCK = 1000
"""Cases drawn in one go."""

TAKEN = 8
"""Of bundles that are still sound, one in so many is taken in and looked at: that takes a hundred times as long."""

LOOKED = 20
"""After so many refusals the store is compared with what it was."""

MOST_BYTES = 256 << 20
"""What the process may grow by."""


@dataclass
class Fuzz:
    """What was found."""

    bundles: int = 0
    refused: int = 0
    sound: int = 0
    taken: int = 0
    manifests: int = 0
    manifests_refused: int = 0
    grew_mib: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def torture(folder: Path, seed: int, *, cases: int) -> Fuzz:
    """So many mutated bundles, and as many manifests."""
    found, errors = Fuzz(bundles=cases, manifests=cases), Counter[str]()
    before = 0
    with _Store(folder) as store:
        for first in range(0, cases, BLOCK):
            count = min(BLOCK, cases - first)
            _drawn(lambda number, dice: _import(store, number, dice, found, errors), count, seed + first)
            _drawn(lambda number, dice: _parse(number, dice, found, errors), count, seed + first)
            before = before or _peak_bytes()  # all modules are there now, and the caches have filled
        store.compare(found)
    found.grew_mib = (_peak_bytes() - before) >> 20
    if _peak_bytes() - before > MOST_BYTES:
        found.wrong.append(f"the process grew by {found.grew_mib} MiB")
    found.errors = dict(errors)
    return found


class _Store:
    """An empty store that mutated bundles are imported into; a new one once something was taken in."""

    def __init__(self, folder: Path) -> None:
        self._empty, self._path = folder / "fuzz-empty.db", folder / "fuzz.db"
        with KVLoom(self._empty):
            pass
        self._open()
        self._before = dump(self.loom)

    def _open(self) -> None:
        self._path.unlink(missing_ok=True)
        shutil.copy(self._empty, self._path)
        self.loom = KVLoom(self._path)

    def renew(self) -> None:
        """An empty one again."""
        self.loom.close()
        self._open()

    def compare(self, found: Fuzz) -> None:
        """What was refused must have left nothing."""
        if dump(self.loom) != self._before:
            found.wrong.append("something that was refused has changed the store")
            self.renew()

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.loom.close()


def _drawn(one: Callable[[int, random.Random], None], cases: int, seed: int) -> None:
    """Call ``one`` with a number and dice that Hypothesis drew, so often."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**16), st.integers(0, 2**63))
    def run(number: int, dice: int) -> None:
        one(number, random.Random(dice))

    run()


def _import(store: _Store, number: int, dice: random.Random, found: Fuzz, errors: Counter[str]) -> None:
    """One mutated bundle."""
    mutation = MUTATIONS[number % len(MUTATIONS)]
    data = mutation(golden(dice.choice(sorted(FILES))), dice)
    try:
        if dice.randrange(TAKEN) and _is_sound(data):
            found.sound += 1
            return
        store.loom.import_bundle(io.BytesIO(data))
        found.taken += 1
        _look_at(store.loom)
        store.renew()
    except (FormatError, StoreError) as error:
        errors[type(error).__name__] += 1
        found.refused += 1
        if isinstance(error, FormatError) and (error.offset is None or error.offset > len(data)):
            found.wrong.append(f"{mutation.__name__}: no place of the file is named: {error}")
        if found.refused % LOOKED == 0:
            store.compare(found)
    except Exception as error:  # whatever it is, nobody has documented it
        found.wrong.append(f"{mutation.__name__}: {type(error).__name__}: {error}")
        store.renew()


def _parse(number: int, dice: random.Random, found: Fuzz, errors: Counter[str]) -> None:
    """One mutated manifest."""
    every = _manifests()
    data = manifest_changed(every[number % len(every)], dice)
    try:
        read_manifest(data)
    except FormatError as error:
        errors[type(error).__name__] += 1
        found.manifests_refused += 1
    except Exception as error:  # whatever it is, nobody has documented it
        found.wrong.append(f"a manifest: {type(error).__name__}: {error}")


@functools.cache
def _manifests() -> list[bytes]:
    return [each.manifest for each in records() if isinstance(each, SegmentRecord)]


def dump(loom: KVLoom) -> list[object]:
    """Every row, its checksum verified."""
    found: list[object] = []
    with loom.database.read() as conn:
        for table in schema.metadata.sorted_tables:
            for row in conn.execute(sa.select(table)):
                found.append(tuple(row) if table.name == "chunk" else checked(table, row))
    return found


def _is_sound(data: bytes) -> bool:
    try:
        for _ in Contents(Rules(check_settings, check_turn)).read(Reader(io.BytesIO(data))):
            continue
    except FormatError:
        return False
    return True


def _look_at(loom: KVLoom) -> None:
    """What was taken in can be read and written out again, or says why not."""
    dump(loom)
    for session in loom.sessions():
        for branch in session.branches():
            try:
                session.tree()
                session.log(branch.name)
                session.missing(branch.name, verify=True)
                session.cost()
            except KVLoomError:
                continue
        session.export(io.BytesIO())


def _peak_bytes() -> int:
    """The most memory this process has had."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) << 10
