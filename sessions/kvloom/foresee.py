"""What would be reused if something were said: read from the store and rendered, without the model's weights.

``why`` compares what comes out of here. The tokens asked for are those the same words would have when said: on a branch
they are appended to the stored ones; a list of messages is rendered and tokenised as a whole, as a client does that
holds no tokens of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.errors import InvalidText
from kvloom.passes import KEYFRAME_SPACING
from kvloom.path import merged
from kvloom.plaintext import check_unicode
from kvloom.template import ChatTemplate, Message, common, extend
from kvloom.tokens import text_of
from kvloom.transcripts import checked
from kvloom.warm import unread
from kvloom.why import Asked, Finding, Foreseen, Stored, StoredTurn, Wait, Why, compare, plain
from kvloom_store import outlook, rates, refs, roots, spans, trie, turns
from kvloom_store.names import Ref
from kvloom_store.outlook import Outlook
from kvloom_store.turns import Turn, TurnState

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.known_model import KnownModel
    from kvloom.session import Session


@dataclass(frozen=True, slots=True)
class _Tree:
    """A session's turns, oldest first, what its model made of each, and where its tokens are (None: nowhere yet)."""

    root: int | None
    turns: dict[int, Turn]
    states: dict[int, TurnState]
    short: dict[int, str]

    def path(self, row: int | None) -> list[Turn]:
        """The turns from the first one down to this one."""
        found = []
        while row is not None:
            found.append(self.turns[row])
            row = self.turns[row].parent
        return found[::-1]


def of_text(session: Session, ref: Ref, text: str) -> Why:
    """What saying a text at a ref would reuse. Raises InvalidText, RefNotFound, EngineError and its kinds."""
    if not text.strip():
        raise InvalidText("there is nothing to say", hint="give some text")
    check_unicode(text)
    loom = session.loom
    loom.flush()
    model, template = loom.known_model(session.settings), session.template()
    with loom.database.read() as conn:
        tree = _tree(conn, session)
        point = refs.resolve(conn, ref)
        path, tip = tree.path(point.turn), tree.states.get(point.turn or 0)
        if point.token is not None and tip is not None:
            path[-1], tip = _cut(conn, model, path[-1], tip, point.token)
        history, reply_start = merged(path, {**tree.states, **({path[-1].row: tip} if path and tip else {})})
        before = trie.tokens_to(conn, tip.position.node, tip.position.offset) if tip else []
        if tip is None and tree.root is not None and len(session.models) > 1:
            tip, before, reply_start = unread(conn, session, tree.root, point.turn, template, model)
        said = [{"role": "user", "content": text}]
        prompt = extend(
            template, model.tokenizer, history, before, said, reply_start=reply_start, eos_ids=model.eos_ids
        )
        # As when it is said: where the template rewrote history, its state is not a beginning of this path any more.
        tip = tip if tip is not None and prompt.kept >= tip.state_end else None
        asked = Asked(prompt.ids, [*history, *said], new=len(before))
        return _told(conn, session, model, tree, asked, point.turn, tip)


def of_messages(
    session: Session,
    messages: Sequence[Mapping[str, Any]],
    ref: Ref,
    *,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    clock: str | None = None,
) -> Why:
    """What asking for a whole list of messages would reuse; see ``Session.why``."""
    asked = [plain(checked(message)) for message in messages]
    if not asked:
        raise InvalidText("there are no messages", hint='give a list such as [{"role": "user", "content": "..."}]')
    loom = session.loom
    loom.flush()
    model, own = loom.known_model(session.settings), session.template()
    other = ChatTemplate(
        own.source if chat_template is None else chat_template,
        own.options if template_options is None else template_options,
        own.clock if clock is None else clock,
    )
    ids = _whole(other, model, asked)
    with loom.database.read() as conn:
        tree = _tree(conn, session)
        at = refs.resolve(conn, ref).turn
        rendered = ""
        if other != own:
            agreed = max(_agreeing(tree, ids).values(), default=0)
            if agreed < max(_agreeing(tree, _whole(own, model, asked)).values(), default=0):
                rendered = _differing(own, other)
        chosen = _nearest(tree, ids, at)
        below = [tree.states[turn.row] for turn in tree.path(chosen) if turn.row in tree.states]
        agreeing = _agreeing(tree, ids)
        tip = next((state for state in reversed(below) if state.end <= agreeing[state.turn]), None)
        return _told(conn, session, model, tree, Asked(ids, asked, rendered=rendered), at, tip)


def _told(
    conn: sa.Connection,
    session: Session,
    model: KnownModel,
    tree: _Tree,
    asked: Asked,
    at: int | None,
    tip: TurnState | None,
) -> Why:
    """The comparison, what is held, and what it costs."""
    fields = model.differences(session.settings)
    seen = Outlook()
    if not fields and tree.root is not None:
        seen = outlook.of_tokens(conn, tree.root, asked.tokens, tip, grid=KEYFRAME_SPACING)
    count = len(asked.tokens)
    tokens = Foreseen(count, seen.known, seen.reused, seen.replayed, count - seen.reused - seen.replayed)
    finding, difference = Finding("new text", "", ""), None
    if fields:
        finding = _other_model(session, fields)
    else:
        stored = _stored(conn, tree, asked.tokens, at)
        finding, difference = compare(stored, asked, lambda ids: text_of(model.tokenizer, ids))
        if finding.cause == "new text":
            finding = _not_held(tree, seen) or finding
        if difference is not None and seen.known > difference.position:
            more = f"{seen.known - difference.position} tokens behind that are known from another session"
            finding = replace(finding, detail=f"{finding.detail}; {more}")
    return Why(
        session=session.name,
        cause=finding.cause,
        detail=finding.detail,
        advice=finding.advice,
        tokens=tokens,
        difference=difference,
        cost=_cost(conn, tree.root if not fields else None, tokens, seen),
        fields=tuple(fields),
        unchecked=tuple(model.unchecked(session.settings)),
    )


def _other_model(session: Session, fields: Sequence[tuple[str, str, str]]) -> Finding:
    name, stored, live = fields[0]
    detail = f"{name} is {live[:40]!r}; that of the session's model is {stored[:40]!r}"
    advice = f"use the session's own: --model {session.settings['model']} --dtype {session.settings['dtype']}"
    return Finding("other model", detail, advice)


def _not_held(tree: _Tree, seen: Outlook) -> Finding | None:
    """Nothing differs; but is all that is known held, except the last token, which always waits for the next run?"""
    names = {state.row: tree.short[row] for row, state in tree.states.items()}
    lost = [names[row] for row in reversed(seen.missing) if row in names]
    where = f"the state of turn {', '.join(lost)}" if lost else "some state"
    if seen.gone:
        advice = "fork at an earlier turn, or say the whole again with --no-reuse in a new session"
        return Finding("state not held", f"{where} is not held, and nothing says how it was computed", advice)
    if seen.missing:
        advice = "nothing: it is run again when it is needed, and held from then on"
        return Finding("state not held", f"{where} is not held: it was never written, or is incomplete", advice)
    lacking = seen.known - seen.reused - seen.replayed
    if lacking > 1 and seen.dropped:
        advice = (
            "nothing: it is computed anew when it is needed; --exact runs it again just as it was, which takes longer"
        )
        return Finding("state not held", f"the state of {lacking} tokens was dropped to make room", advice)
    if lacking > 1:
        detail = f"{lacking} tokens are known, but no state of theirs is there to go on from"
        return Finding("state not held", detail, "nothing: it is computed when it is needed")
    return None


# --- what is stored ---


def _tree(conn: sa.Connection, session: Session) -> _Tree:
    model = roots.find_model(conn, bytes.fromhex(session.settings["model_digest"]))
    root = roots.find_root(conn, model) if model is not None else None
    said = {turn.row: turn for turn in turns.of_session(conn, session.row.row)}
    states: dict[int, list[TurnState]] = {}
    for state in turns.states_of_session(conn, session.row.row):
        states.setdefault(state.turn, []).append(state)
    best = {row: turns.best_state(some, root) for row, some in states.items()} if root is not None else {}
    held = {row: state for row, state in best.items() if state is not None}
    return _Tree(root, said, held, refs.short_ids(conn, session.row.row))


def _agreeing(tree: _Tree, ids: Sequence[int]) -> dict[int, int]:
    """Of every turn's path, how many leading tokens agree with some ids."""
    found: dict[int | None, int] = {None: 0}
    for row, turn in tree.turns.items():  # parents come before their children
        same, state = found[turn.parent], tree.states.get(row)
        if state is not None and same >= state.start:
            same = state.start + common(state.tokens, ids[state.start : state.end])
        found[row] = same
    return {row: same for row, same in found.items() if row is not None}


def _nearest(tree: _Tree, ids: Sequence[int], at: int | None) -> int | None:
    """The turn in which some ids differ from what is stored, where most of them agree; else the one they go on from.

    Of several, one on the path to the turn ``at``, else the newest.
    """
    same = _agreeing(tree, ids)
    most = max((same[row] for row in tree.states), default=0)
    near = [row for row, state in tree.states.items() if same[row] == most and most < state.end]
    near = near or [row for row in tree.states if same[row] == most]
    own = {turn.row for turn in tree.path(at)}
    return max(near, key=lambda row: (row in own, row), default=None)


def _stored(conn: sa.Connection, tree: _Tree, ids: Sequence[int], at: int | None) -> Stored:
    """The stored path that agrees with most of some ids."""
    row = _nearest(tree, ids, at)
    if row is None:
        return Stored((), [plain(message) for message in merged(tree.path(at), tree.states)[0]], ())
    path, position = tree.path(row), tree.states[row].position
    whole, own = _whole_path(tree, path, at), {span.turn.row: span for span in spans.of_path(conn, path, tree.root)}
    said: list[StoredTurn] = []
    message, first, end = -1, 0, 0
    for turn in whole:
        message += not turn.continues
        start, end = (own[turn.row].start, own[turn.row].end) if turn.row in own else (end, end)
        said.append(StoredTurn(turn.id, tree.short[turn.row], turn.role, min(first, message), message, start, end))
        first = message + 1 if turn.row in tree.states else first
    tokens, messages = trie.tokens_to(conn, position.node, position.offset), merged(whole, tree.states)[0]
    return Stored(tokens, messages, said[: len(path)], said[len(path) :])


def _whole_path(tree: _Tree, path: list[Turn], at: int | None) -> list[Turn]:
    """A path with what was said after it: on the way to ``at``, else the newest."""
    own = tree.path(at)
    if path[-1] in own:
        return own
    newest: dict[int | None, Turn] = {turn.parent: turn for turn in tree.turns.values()}
    while path[-1].row in newest:
        path = [*path, newest[path[-1].row]]
    return path


def _cut(conn: sa.Connection, model: KnownModel, turn: Turn, state: TurnState, token: int) -> tuple[Turn, TurnState]:
    """A turn as it would be if it were cut at a token (``kvloom_store.cut``); nothing is written."""
    from kvloom.partial import partial

    before = trie.tokens_to(conn, state.position.node, state.position.offset)[: state.start]
    said = partial(model.tokenizer, turn, state.tokens, token - state.start, before)
    end = min(token, state.state_end)
    held = replace(
        state,
        tokens=state.tokens[: token - state.start],
        end=token,
        position=trie.position_at(conn, state.position, token),
        state_start=end,
        state_end=end,
        base_state=state.row,
        segment=None,
        hidden=None,
    )
    settings = {**turn.settings, **said.settings}
    return replace(turn, message={"role": turn.role, "content": said.text}, settings=settings), held


# --- what is asked ---


def _whole(template: ChatTemplate, model: KnownModel, messages: Sequence[Message]) -> tuple[int, ...]:
    return extend(template, model.tokenizer, [], (), messages, reply_start=None, eos_ids=model.eos_ids).ids


def _differing(own: ChatTemplate, other: ChatTemplate) -> str:
    """What renders otherwise, by name."""
    keys = sorted(key for key in {*own.options, *other.options} if own.options.get(key) != other.options.get(key))
    parts = [f"the option {key} ({own.options.get(key)!r}, asked {other.options.get(key)!r})" for key in keys]
    if own.source != other.source:
        parts.insert(0, "another template")
    if own.clock != other.clock:
        parts.append(f"the clock ({own.clock}, asked {other.clock})")
    return " and ".join(parts)


# --- what it costs ---


def _cost(conn: sa.Connection, root: int | None, tokens: Foreseen, seen: Outlook) -> Wait:
    """Seconds until the first token, from how long the last replies of this model took on this machine."""
    from kvloom.support import cpu_capability

    if root is None:
        return Wait()
    known = rates.of_root(conn, root, cpu_capability())
    at_once, singly = tokens.computed + tokens.replayed - seen.one_by_one, seen.one_by_one
    prefill = known.prefill.tokens_per_second
    if (at_once and prefill is None) or (singly and known.reply is None) or not known.replies:
        return Wait(None, prefill, known.reply, known.replies)
    seconds = at_once / (prefill or 1) + singly / (known.reply or 1)
    return Wait(seconds, prefill, known.reply, known.replies)
