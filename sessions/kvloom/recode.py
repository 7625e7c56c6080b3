"""Stored state put down with another codec: what it takes now, and doing it. No model is needed."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvloom.errors import NothingToDo
from kvloom_proto.codecs import LOSSY, SETTINGS
from kvloom_proto.errors import UnknownCodec
from kvloom_store import recode as stored
from kvloom_store.names import MAIN
from kvloom_store.recode import Recoded, Survey

if TYPE_CHECKING:
    from kvloom.session import Session
    from kvloom_store.names import Ref


@dataclass(frozen=True, slots=True)
class Recoding:
    """What recoding the state down to a point did: what was ``found`` there before, and what was ``done``."""

    session: str
    at: str
    codec: str
    found: Survey
    done: Recoded

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return {
            **survey_json(self.session, self.at, self.found),
            "codec": self.codec,
            "bytes": {"raw": self.found.raw, "before": self.done.before, "after": self.done.after},
            "chunks": self.done.chunks,
            "damaged": self.done.damaged,
            "stopped": self.done.stopped,
        }


def survey_json(session: str, at: str, found: Survey) -> dict[str, Any]:
    """What is there, as ``--dry-run --json`` prints it."""
    return {
        "session": session,
        "at": at,
        "segments": len(found.segments),
        "shared": {"segments": len(found.shared), "with": list(found.others)},
        "by_codec": dict(found.stored),
        "lossy": len(found.lossy),
        "bytes": {"raw": found.raw, "before": sum(found.stored.values())},
    }


def survey(session: Session, ref: Ref) -> Survey:
    """What the state down to a ref takes in the file. Raises RefNotFound."""
    session.loom.flush()
    point = session.point(ref)
    with session.loom.database.read() as conn:
        return stored.survey(conn, point.turn, point.branch.row if point.branch is not None else None)


def recode(
    session: Session,
    ref: Ref,
    codec: str,
    *,
    shared: bool = False,
    cancel: threading.Event | None = None,
    progress: stored.Progress | None = None,
) -> Recoding:
    """Put the state down to a ref down with a codec; a lossy one takes what other branches share only if ``shared``.

    Raises:
        UnknownCodec
        NothingToDo: no state is stored there.
        RefNotFound, StoreError
    """
    if codec not in (*SETTINGS, *LOSSY):
        raise UnknownCodec(codec)
    found = survey(session, ref)
    if not found.segments:
        raise NothingToDo(f"no state is stored of {ref}", hint="kvloom show REF says what is held of a turn")
    rows = found.segments if shared or codec not in LOSSY else [r for r in found.segments if r not in found.shared]
    done = stored.recode(session.loom.database, rows, codec, cancel=cancel, progress=progress)
    session.loom.database.checkpoint()
    return Recoding(session.name, ref.at or MAIN, codec, found, done)
