"""Why tokens are reused or not: what is asked compared with what is stored, down to the first token that differs.

Only comparing is done here, on token ids and messages that were read and rendered before (``foresee``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvloom.template import common

Cause = Literal["other model", "edited history", "template", "tokenizer seam", "state not held", "new text"]

SHOWN = 12
"""Tokens shown on each side of the first one that differs."""

Decode = Callable[[Sequence[int]], str]
"""From token ids to text, control tokens included."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that differs from what is stored.

    ``position``: so many tokens before it agree. ``turn`` is the id of the stored turn it is in, None where it is
    behind everything stored; ``character`` is where in that turn's text the message asked for begins to differ.
    The ids are None, and the texts "", on a side that ends there. ``before`` is the text both share in front of it.
    """

    position: int
    turn: str | None
    role: str | None
    character: int | None
    stored_token: int | None
    asked_token: int | None
    before: str
    stored: str
    asked: str


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Of ``asked`` tokens ``known`` are stored; state is held of the ``reused`` ones, ``replayed`` ones would be run
    again as recorded, ``computed`` ones be run for the first time (or again, where no turn that goes on needs them)."""

    asked: int
    known: int
    reused: int
    replayed: int
    computed: int


@dataclass(frozen=True, slots=True)
class Wait:
    """What that would take: seconds until the first token, from the rates that earlier replies were timed at.

    None where no reply of this model was timed on this machine. Rates are tokens a second, of prompts and of replies.
    """

    seconds: float | None = None
    prompt_rate: float | None = None
    reply_rate: float | None = None
    replies: int = 0


@dataclass(frozen=True, slots=True)
class Why:
    """What would be reused if something were said now, and why not more.

    ``fields`` are (field, stored, asked) of a model that is another one; ``unchecked`` those that only the loaded model
    would tell. ``advice`` says what to do.
    """

    session: str
    cause: Cause
    detail: str
    advice: str
    tokens: Foreseen
    difference: Difference | None
    cost: Wait
    fields: tuple[tuple[str, str, str], ...] = ()
    unchecked: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object ``--json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A stored turn: ``id``, the short ``name`` people are shown, and the tokens [start, end) that are its.

    ``message`` is the index of its message; a reply that was continued is several turns of one. ``first`` is the index
    of the first message its tokens hold: those of a system turn, which has none of its own, come with the next one's.
    """

    id: str
    name: str
    role: str
    first: int
    message: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"turn {self.name} ({self.role})"


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored path: its turns down to the one where tokens differ, or where it ends, with their tokens.

    Its messages may go on behind that, in the turns ``below``, whose tokens are not looked at.
    """

    tokens: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    turns: Sequence[StoredTurn]
    below: Sequence[StoredTurn] = ()

    def turn_at(self, token: int) -> StoredTurn | None:
        """The turn that the token at a position belongs to."""
        return next((turn for turn in self.turns if turn.start <= token < turn.end), None)

    def turn_of(self, message: int) -> StoredTurn:
        """The turn that a message began with."""
        return next(turn for turn in (*self.turns, *self.below) if turn.message == message)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: tokens and messages.

    ``new``: it is said behind so many stored tokens; None if it came as a whole, and any message may differ.
    ``rendered`` names what renders it otherwise than the session does, where the session's own template would have
    agreed with more tokens ("" if it would not).
    """

    tokens: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    new: int | None = None
    rendered: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause: what it is in one line, what to do, the turn it lies in, and the character of that turn's text."""

    cause: Cause
    detail: str
    advice: str
    turn: StoredTurn | None = None
    character: int | None = None


def compare(stored: Stored, asked: Asked, decode: Decode) -> tuple[Finding, Difference | None]:
    """The cause, and the first token that differs; None where everything asked is stored."""
    at = common(stored.tokens, asked.tokens)
    if at == len(asked.tokens):
        return Finding("new text", "nothing is new: all of it was said before", "nothing"), None
    turn = stored.turn_at(at)
    if turn is None:
        found = Finding("new text", "only the new text is new", "nothing: this is what new text costs")
    elif asked.new is not None and at >= asked.new:
        found = _other_message(turn)
    else:
        found = _cause(stored, asked, at, turn, decode)
    return found, _difference(stored.tokens, asked.tokens, at, found, decode)


def _cause(stored: Stored, asked: Asked, at: int, turn: StoredTurn, decode: Decode) -> Finding:
    """Why tokens differ in a stored turn."""
    if asked.rendered:
        advice = "render it as the session does: kvloom say, or the template, options and clock of session.settings"
        return Finding("template", f"{asked.rendered} gives other tokens in {turn}", advice, turn)
    edited = _first_edit(stored.messages, asked.messages, turn) if asked.new is None else None
    if edited is None and _unanswered(stored, asked, at, turn, decode):
        edited = turn.message + 1
        if edited >= len(stored.messages):
            detail = f"only the new text is new; {turn} has no reply on this path"
            return Finding("new text", detail, "nothing: this is what new text costs", turn)
    elif edited is not None and edited == len(asked.messages) - 1:
        return _other_message(turn)
    if edited is not None:
        return _edit(stored, asked.messages, edited)
    if _same_text(stored.tokens[: turn.end], asked.tokens, decode):
        detail = f"{turn} has the same text in other tokens: the model split it otherwise than the tokenizer does"
        advice = "go on from the stored tokens instead of tokenising the whole again: kvloom say, branch.say"
        return Finding("tokenizer seam", detail, advice, turn)
    detail = f"the template writes {turn} otherwise when more is said after it"
    return Finding("template", detail, "nothing: the model expects it so, and what comes before is reused", turn)


def _unanswered(stored: Stored, asked: Asked, at: int, turn: StoredTurn, decode: Decode) -> bool:
    """Whether tokens differ where a turn leads over to its reply, and what is asked for there is no reply."""
    following = asked.messages[turn.message + 1 :]
    if not following or following[0].get("role") == "assistant":
        return False
    return content_of(stored.messages[turn.message]).strip() in decode(stored.tokens[turn.start : at])


def _other_message(turn: StoredTurn) -> Finding:
    detail = f"only the new message is new; {turn} was said in its place before"
    return Finding("new text", detail, "nothing: this is what a new message costs", turn)


def _first_edit(
    stored: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], turn: StoredTurn
) -> int | None:
    """The index of the first message that differs, of those in the turn where tokens do; else of those before it.

    A change without effect on the tokens (a space that the template trims) is none, if another one has.
    """
    count = min(len(stored), len(asked), turn.message + 1)
    differ = [n for n in range(count) if plain(stored[n]) != plain(asked[n])]
    return next((n for n in differ if n >= turn.first), differ[-1] if differ else None)


def _edit(stored: Stored, asked: Sequence[Mapping[str, Any]], at: int) -> Finding:
    """What was done to the message of a turn."""
    old, new = plain(stored.messages[at]), plain(asked[at])
    turn, character = stored.turn_of(at), None
    left_out = old["role"] == "assistant" and new["role"] == "user"
    if left_out or (at + 1 < len(stored.messages) and plain(stored.messages[at + 1]) == new):
        detail = f"{turn} is left out"
    elif at + 1 < len(asked) and plain(asked[at + 1]) == old:
        detail = f"in front of {turn} stands a message that is not stored there"
    elif old["role"] != new["role"]:
        detail = f"{turn} is asked for in the role {new['role']!r}"
    elif old["content"] != new["content"]:
        character = common(old["content"], new["content"])
        detail = f"the text of {turn} differs from character {character} on"
    else:
        key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
        detail = f"{key!r} of {turn} differs"
    advice = "ask with the text as it is stored, or take the change for what it is: all behind it is new"
    return Finding("edited history", detail, advice, turn, character)


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what is empty, its text in one piece: messages that say the same are equal."""
    rest = {key: value for key, value in message.items() if key != "content" and value not in (None, [], {})}
    return {**rest, "content": content_of(message)}


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message whose content may be a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _same_text(stored: Sequence[int], asked: Sequence[int], decode: Decode) -> bool:
    """Whether what is asked begins with the stored text; a character that was cut in two is no other text."""
    return decode(asked).startswith(decode(stored).rstrip("\ufffd"))


def _difference(stored: Sequence[int], asked: Sequence[int], at: int, found: Finding, decode: Decode) -> Difference:
    first, turn = max(0, at - SHOWN), found.turn
    return Difference(
        position=at,
        turn=turn.id if turn else None,
        role=turn.role if turn else None,
        character=found.character,
        stored_token=stored[at] if at < len(stored) else None,
        asked_token=asked[at] if at < len(asked) else None,
        before=decode(asked[first:at]),
        stored=behind(stored[first : at + SHOWN], at - first, decode),
        asked=behind(asked[first : at + SHOWN], at - first, decode),
    )


def behind(ids: Sequence[int], at: int, decode: Decode) -> str:
    """The text of ids[at:], decoded with what comes before: a decoder may treat the first token otherwise."""
    head, whole = decode(ids[:at]), decode(ids)
    return whole[len(head) :] if whole.startswith(head) else decode(ids[at:])
