"""Editing a turn that was said: a new branch begins before it, and says it otherwise. The old branch stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvloom.binding import check_model
from kvloom.errors import InvalidText, NothingToDo
from kvloom.path import Said, find, path_to
from kvloom.plaintext import check_unicode
from kvloom.planned import PlannedBranch
from kvloom.steps import Given
from kvloom_store import cut
from kvloom_store.names import Ref
from kvloom_store.turns import TurnState

if TYPE_CHECKING:
    from kvloom.session import Session

EDITED_FROM = "edited_from"
"""The setting of an edited turn that names the turn it was made from."""

GIVEN = "given"
"""The finish reason of a reply that no model ended."""


def plan(
    session: Session, ref: Ref, text: str, *, branch: str | None = None, replay_turns: bool = False
) -> PlannedBranch:
    """The branch that says ``text`` at a ref; with ``replay_turns`` the messages after it follow as they were.

    Raises:
        InvalidText: there is no text, or it is not valid Unicode.
        NothingToDo: the text is the one that is there.
        and what ``PlannedBranch`` raises.
    """
    if not text.strip():
        raise InvalidText("there is nothing to say", hint="give some text; kvloom fork leaves a turn out")
    check_unicode(text)
    check_model(session)
    root = session.loom.root
    with session.loom.database.read() as conn:
        target = find(conn, ref)
        later = target.later if replay_turns else ()
        rows = [turn.row for each in later for turn in each.turns]
        _, states = path_to(conn, rows[-1] if rows else None, root)
    if text == target.text:
        raise NothingToDo("the text is unchanged")
    first = target.message.turns[0]
    given = Given(
        {**target.message.message, "content": text},
        finish_reason=GIVEN if first.role == "assistant" else None,
        settings={EDITED_FROM: first.id},
    )
    return PlannedBranch(
        session, first.parent, [given, *(again(each, states) for each in later)], branch, target.branch
    )


def again(message: Said, states: Mapping[int, TurnState]) -> Given:
    """A message as it was, to be said on another path: of a reply the very tokens that it had."""
    last = message.turns[-1]
    if last.role != "assistant":
        return Given(message.message)
    tokens = [states[turn.row].tokens if turn.row in states else [] for turn in message.turns]
    settings = {name: value for name, value in last.settings.items() if name != cut.CUT_FROM}
    whole = tuple(token for some in tokens for token in some) if all(tokens) else ()
    return Given(message.message, whole, last.finish_reason, settings)
