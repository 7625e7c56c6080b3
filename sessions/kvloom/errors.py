"""Every error a user of kvloom can meet, in one tree.

KVLoomError                 catch-all: .hint says what to do next, .exit_code is the command line's
  FormatError      10       bytes: NotABundle, Truncated, LimitExceeded, UnsupportedVersion, UnknownCodec,
                            ChecksumMismatch
  StoreError       20       database: NotAStore, StoreUnavailable, StoreLocked, SchemaTooNew,
                            CorruptRow, RefNotFound, RefExists, RefConflict, RemovedMeanwhile,
                            InvalidName, InvalidQuery, AnotherSession,
                            StateDropped, NoRoom
  EngineError      30       model: ModelNotFound, ModelMismatch, UnsupportedModel, UnsupportedInput,
                            ContextOverflow
  SessionError     40       use: InvalidText, NothingToDo, ReuseRequired, Closed
"""

from __future__ import annotations

from collections.abc import Sequence

from kvloom_proto.errors import (
    ChecksumMismatch,
    FormatError,
    KVLoomError,
    LimitExceeded,
    NotABundle,
    Truncated,
    UnknownCodec,
    UnsupportedVersion,
)
from kvloom_store.errors import (
    AnotherSession,
    CorruptRow,
    InvalidName,
    InvalidQuery,
    NoRoom,
    NotAStore,
    RefConflict,
    RefExists,
    RefNotFound,
    RemovedMeanwhile,
    SchemaTooNew,
    StateDropped,
    StoreError,
    StoreLocked,
    StoreUnavailable,
)

__all__ = [
    "AnotherSession",
    "ChecksumMismatch",
    "Closed",
    "ContextOverflow",
    "CorruptRow",
    "EngineError",
    "FormatError",
    "InvalidName",
    "InvalidQuery",
    "InvalidText",
    "KVLoomError",
    "LimitExceeded",
    "ModelMismatch",
    "ModelNotFound",
    "NoRoom",
    "NotABundle",
    "NotAStore",
    "NothingToDo",
    "RefConflict",
    "RefExists",
    "RefNotFound",
    "RemovedMeanwhile",
    "ReuseRequired",
    "SchemaTooNew",
    "SessionError",
    "StateDropped",
    "StoreError",
    "StoreLocked",
    "StoreUnavailable",
    "Truncated",
    "UnknownCodec",
    "UnsupportedInput",
    "UnsupportedModel",
    "UnsupportedVersion",
]


class EngineError(KVLoomError):
    """The model could not be found, loaded, or run as asked."""

    exit_code = 30


class ModelNotFound(EngineError):
    """No model by that alias, folder, file or hub name."""

    def __init__(self, name: str, *, hint: str) -> None:
        super().__init__(f"no model {name!r} here", hint=hint)
        self.name = name


class ModelMismatch(EngineError):
    """The model is not one the stored state belongs to. ``fields`` names all that differ, ``field`` the first."""

    def __init__(self, field: str, stored: str, live: str, *, also: Sequence[str] = ()) -> None:
        more = f"; {', '.join(also)} {'differ' if len(also) > 1 else 'differs'}, too" if also else ""
        super().__init__(
            f"this session's state belongs to another model: {field} is {live!r}, stored {stored!r}{more}",
            hint="use the model the session was made with (kvloom show SESSION names it);"
            " kvloom say SESSION TEXT --model NAME goes on under another one, too, and keeps the state of both",
        )
        self.field = field
        self.fields = (field, *also)
        self.stored = stored
        self.live = live


class UnsupportedModel(EngineError):
    """The model keeps state that kvloom cannot capture exactly; it is refused before it runs."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} is not supported: {reason}", hint="kvloom models lists what is")
        self.what = what
        self.reason = reason


class UnsupportedInput(EngineError):
    """Inputs that are not tokens (images, embeddings), or token ids the model does not have."""


class ContextOverflow(EngineError):
    """The text does not fit into the model's context; nothing was run and nothing is lost."""

    def __init__(self, have: int, limit: int) -> None:
        super().__init__(
            f"the conversation would have {have} tokens; the model's context is {limit}",
            hint="say less, go on shorter (kvloom compact SESSION), or fork at an earlier turn",
        )
        self.have = have
        self.limit = limit


class SessionError(KVLoomError):
    """A conversation was used in a way it does not allow."""

    exit_code = 40


class InvalidText(SessionError):
    """Text that is empty or not valid UTF-8."""


class NothingToDo(SessionError):
    """There is no turn to continue, regenerate or undo at that point."""


class ReuseRequired(SessionError):
    """``--require-reuse`` was given, and some of the stored prefix had to be recomputed."""

    def __init__(self, reused: int, stored: int) -> None:
        super().__init__(
            f"only {reused} of {stored} stored tokens could be reused",
            hint="run it without --require-reuse to recompute the rest",
        )
        self.reused = reused
        self.stored = stored


class Closed(SessionError):
    """The store or session was closed."""
