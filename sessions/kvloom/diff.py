"""Where two paths part: the turn, the token, the text around it; and what each says from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvloom.template import common
from kvloom.tokens import text_of
from kvloom.why import SHOWN, behind
from kvloom_store import refs, spans, turns
from kvloom_store.names import Ref
from kvloom_store.spans import Span

if TYPE_CHECKING:
    from kvloom.listing import TreeTurn
    from kvloom.loom import KVLoom
    from kvloom.session import Session

CHARACTERS = 60
"""Shown of a text on each side of where it parts, where no tokens are shown."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of two paths: its turns from the first one on that the other has not, and how many tokens it has in all.

    ``token`` is the id at which it parts, ``text`` what it says from there (None and "": it ends there). Where a model
    generated that token, ``logprob`` is what it gave it (nats), and ``other_logprob`` what it gave the token that the
    other path has there, if that was among the likeliest, whose scores are kept.
    """

    ref: str
    turns: tuple[TreeTurn, ...]
    tokens: int
    token: int | None
    text: str
    logprob: float | None = None
    other_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Diff:
    """Where the paths to two refs part.

    ``shared`` turns are the same, and then ``position`` tokens in all (None: they were tokenised otherwise, or no model
    ran them). ``character`` is where the texts of the turns at which they part begin to differ, if both have one.
    ``before`` is the text in front of that.
    """

    shared: int
    position: int | None
    character: int | None
    before: str
    a: Side
    b: Side

    @property
    def same(self) -> bool:
        """Whether they do not part at all."""
        return not (self.a.turns or self.b.turns)


@dataclass(frozen=True, slots=True)
class _Path:
    """A path as it was read: ``own`` are the tokens [start, end) of each turn that has any, by its id."""

    ref: Ref
    session: Session
    turns: list[TreeTurn]
    ids: list[int]
    own: dict[str, tuple[int, int]]


def between(loom: KVLoom, first: Ref, second: Ref) -> Diff:
    """Where the paths to two refs part. Raises RefNotFound."""
    loom.flush()
    a, b = _read(loom, first), _read(loom, second)
    comparable = a.session.settings["tokenizer"] == b.session.settings["tokenizer"]
    position = common(a.ids, b.ids) if comparable and a.ids and b.ids else None
    shared = _shared(a, b, position)
    left, right = a.turns[shared:], b.turns[shared:]
    character = None
    if left and right and left[0].role == right[0].role and left[0].text != right[0].text:
        character = common(left[0].text, right[0].text)
    before, texts = _around(a, b, position, shared, character)
    ids = [path.ids[position] if position is not None and position < len(path.ids) else None for path in (a, b)]
    return Diff(
        shared=shared,
        position=position,
        character=character,
        before=before,
        a=Side(str(first), tuple(left), len(a.ids), ids[0], texts[0], *_thought(a, left, position, ids[1])),
        b=Side(str(second), tuple(right), len(b.ids), ids[1], texts[1], *_thought(b, right, position, ids[0])),
    )


def _read(loom: KVLoom, ref: Ref) -> _Path:
    session = loom.find(ref.session)
    log = session.log(ref.at)
    with loom.database.read() as conn:
        whole = refs.resolve(conn, replace(ref, token=None))
        found = spans.of_path(conn, turns.path_to(conn, whole.turn))
        ids = spans.tokens_of(conn, found)
    end = len(ids) if ref.token is None else ref.token
    return _Path(ref, session, log, ids[:end], _own(found, end))


def _thought(
    path: _Path, turns: Sequence[TreeTurn], position: int | None, other: int | None
) -> tuple[float | None, float | None]:
    """What the model that generated the token at a position thought of it, and of the other path's token there."""
    if position is None:
        return None, None
    for turn in turns:
        start, end = path.own.get(turn.id, (0, 0))
        if start <= position < end:
            scores = path.session.token_scores(turn)[position - start :]
            likely = dict(scores[0].top) if scores else {}
            return (scores[0].logprob if scores else None), (likely.get(other) if other is not None else None)
    return None, None


def _own(found: Sequence[Span], end: int) -> dict[str, tuple[int, int]]:
    return {span.turn.id: (span.start, min(span.end, end)) for span in found if span.start < end}


def _shared(a: _Path, b: _Path, position: int | None) -> int:
    """How many leading turns are the same: in what they say, and in their tokens as far as these can be compared."""
    count = 0
    for left, right in zip(a.turns, b.turns, strict=False):
        ends = {path.own.get(turn.id, (0, 0))[1] for path, turn in ((a, left), (b, right))}
        tokens = position is None or (len(ends) == 1 and max(ends) <= position)
        if (left.role, left.text, left.continues) != (right.role, right.text, right.continues) or not tokens:
            break
        count += 1
    return count


def _around(
    a: _Path, b: _Path, position: int | None, shared: int, character: int | None
) -> tuple[str, tuple[str, str]]:
    """The text in front of where two paths part, and what each says there.

    It takes the tokenizer only where they part inside a turn: else, and where it is not here, their texts will do.
    """
    parting = [(path, turn) for path in (a, b) for turn in path.turns[shared : shared + 1]]
    inside = position is not None and any(path.own.get(turn.id, (position, 0))[0] < position for path, turn in parting)
    tokenizer = a.session.tokenizer if inside else None
    if tokenizer is None or position is None:
        told = [path.turns[shared].text if shared < len(path.turns) else "" for path in (a, b)]
        at = character or 0
        left, right = (text[at : at + CHARACTERS] for text in told)
        return told[0][max(0, at - CHARACTERS) : at], (left, right)
    decoder, first = tokenizer, max(0, position - SHOWN)

    def decode(ids: Sequence[int]) -> str:
        return text_of(decoder, ids)

    left, right = (behind(path.ids[first : position + SHOWN], position - first, decode) for path in (a, b))
    return decode(a.ids[first:position]), (left, right)
