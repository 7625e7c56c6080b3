"""What a run tells afterwards: contract 4, always told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvloom.choices import Choice


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where the tokens of a run came from.

    ``reused``: their state was loaded (or was in memory). ``replayed``: their recorded passes were run again.
    ``computed``: they were run for the first time here. ``generated``: they were sampled; the last one is still
    pending, and counts as computed in the run that takes it up.
    """

    reused: int = 0
    replayed: int = 0
    computed: int = 0
    generated: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run will cost, told before it: tokens whose state is ``kept`` (loaded, or in memory), those whose recorded
    passes are ``replayed``, those to be ``computed``, and, at most, ``generated``."""

    kept: int = 0
    replayed: int = 0
    computed: int = 0
    generated: int = 0

    @property
    def to_run(self) -> int:
        """Tokens that the model will run."""
        return self.replayed + self.computed + self.generated

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {**asdict(self), "to_run": self.to_run}


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long it took, from the call on: bringing state back, the first token (None without one), all of it."""

    restore: float
    first_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Restored:
    """What the restore planner had read, and from where it had passes run again.

    ``rows`` were read of layers that see every token, ``window_rows`` of layers that see the last few (0: they were in
    memory). State that is overwritten in place came from the keyframe at position ``keyframe`` (None: the model has no
    such state), and the recorded passes from there were run again. ``bytes_read`` is what all that is in the file. The
    state of ``lossy`` of the reused tokens is not exact: it was stored with loss, or follows from such state.
    """

    rows: int = 0
    window_rows: int = 0
    keyframe: int | None = None
    bytes_read: int = 0
    lossy: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished run. ``turn`` is the id of the reply, or of the user's turn where nothing was generated.

    ``finish_reason``: "stop" (end of turn or a stop string), "length" (a limit was reached), "interrupted".
    ``choice``: how the reply was chosen, if it was one of some that were given.
    """

    session: str
    branch: str
    turn: str
    text: str
    finish_reason: str
    tokens: Tokens
    seconds: Seconds
    tokens_per_second: float | None
    model: str
    seed: int | None = None
    restored: Restored = Restored()
    notices: tuple[str, ...] = ()
    choice: Choice | None = None

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints; it has a ``choice`` only where one was made."""
        plain = asdict(self)
        if self.choice is None:
            del plain["choice"]
        return plain


@dataclass(frozen=True, slots=True)
class Added:
    """Turns whose text was given, or was there before: how computing their state went. ``turn`` is the id of the last.

    ``turns`` is how many there are; ``pending`` tokens of them are still to be computed, as the run was stopped, or as
    nothing was to be run.
    """

    session: str
    branch: str
    turn: str
    turns: int
    pending: int
    tokens: Tokens
    seconds: float
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return asdict(self)
