"""How things are shown, wherever that is: text that is only text, a role's colour, the notes beside a turn."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.listing import TreeTurn
    from kvloom.report import Reply

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ROLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


def clean(text: str) -> str:
    """Text without anything a terminal would obey: control characters become visible signs."""
    return _CONTROL.sub(_visible, text.replace("\r\n", "\n"))


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def preview(text: str, characters: int = 200) -> str:
    """The first words of a text, in one line."""
    return clean(" ".join(text[: 4 * characters].split()))[:characters]


def role_style(role: str) -> str:
    """The colour of a role, the same everywhere."""
    return _ROLES.get(role, "white")


def local_time(us: int) -> str:
    """A moment as people read it, in their own time zone."""
    return datetime.fromtimestamp(us / 1e6).strftime("%Y-%m-%d %H:%M")


def seconds(value: float) -> str:
    """A duration as people read it."""
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def labels(turn: TreeTurn) -> list[str]:
    """What is noted beside a turn: branches, tags, what a search scored it, and that it did not end by itself."""
    notes = [f"[{name}]" for name in turn.branches] + [f"#{name}" for name in turn.tags]
    if turn.score is not None:
        notes.append(f"score {turn.score:.3g}")
    if turn.continues:
        notes.append("(continued)")
    if turn.finish_reason in ("interrupted", "length"):
        notes.append(f"({turn.finish_reason})")
    if turn.cut:
        notes.append("(cut)")
    if turn.pinned:
        notes.append("(pinned)")
    return notes


BARS = "▁▂▃▄▅▆▇█"
UNCERTAIN = 4.0
"""Nats that are drawn as a full bar: as if 55 tokens were equally likely."""


def strip(entropies: Sequence[float], width: int) -> str:
    """How uncertain the model was along a reply: bars, each the most uncertain of its share of the tokens."""
    count = min(width, len(entropies))
    shares = (entropies[n * len(entropies) // count : (n + 1) * len(entropies) // count] for n in range(count))
    return "".join(BARS[min(int(max(share) / UNCERTAIN * len(BARS)), len(BARS) - 1)] for share in shares)


def short_ids(conn: sa.Connection, session_row: int) -> Callable[[str | None], str]:
    """A function from a turn's full id to its shortest unique beginning."""
    from kvloom_store import refs

    known = set(refs.short_ids(conn, session_row).values())

    @functools.cache
    def short(full: str | None) -> str:
        if not full:
            return ""
        return next((full[:n] for n in range(refs.SHORTEST_ID, len(full)) if full[:n] in known), full)

    return short


def told(reply: Reply) -> str:
    """What a run should be known for, in one line: where it went, what was reused, replayed, computed, how fast."""
    tokens = reply.tokens
    parts = [f"{reply.session}@{reply.branch}"]
    if reply.finish_reason != "stop":
        parts.append({"length": "stopped at its limit"}.get(reply.finish_reason, reply.finish_reason))
    parts.append(f"reused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}")
    if reply.seconds.first_token is not None:
        parts.append(f"first token {seconds(reply.seconds.first_token)}")
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:.1f} tokens/s")
    return " · ".join(parts)
