"""Commands that look: ls, branches, log, show. None of them needs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, parse, reading, ref_argument, shared
from kvloom.cli.scores import show_scores, summary, told
from kvloom.cli.terminal import columns, dim, iso_time, print_facts, print_json, styled_role, warn
from kvloom.cli.tokens import no_tokenizer, show_tokens
from kvloom.shown import clean, labels, local_time, preview, seconds, short_ids

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kvloom.listing import TreeTurn
    from kvloom_store.refs import Point, SessionRow
    from kvloom_store.turns import Turn, TurnState


@click.command()
@shared
def ls(options: Options) -> None:
    """List the sessions, the one used last first.

    \b
    Example:
      kvloom ls
    """
    if not options.path.exists():
        return _no_sessions(options)
    from kvloom_store import refs, turns

    with reading(options) as reader, reader.database.read() as conn:
        counts, branches = turns.count_by_session(conn), refs.branches_by_session(conn)
        found = [(row, [each.name for each in branches.get(row.row, ())]) for row in refs.sessions(conn)]
    if options.json:
        listed = [_session_json(row, names, counts) for row, names in found]
        return print_json({"sessions": listed})
    if not found:
        return _no_sessions(options)
    rows = []
    for row, names in found:
        turns_here, used = counts.get(row.row, 0), local_time(row.updated)
        model = clean(str(row.settings.get("model")))
        rows.append([row.name, str(turns_here), str(len(names)), used, model])
    return columns(rows, ["session", "turns", "branches", "last used", "model"])


def _session_json(row: SessionRow, names: list[str], counts: dict[int, int]) -> dict[str, Any]:
    return {
        "name": row.name,
        "branches": names,
        "turns": counts.get(row.row, 0),
        "model": row.settings.get("model"),
        "dtype": row.settings.get("dtype"),
        "created": iso_time(row.created),
        "updated": iso_time(row.updated),
    }


def _no_sessions(options: Options) -> None:
    if options.json:
        return print_json({"sessions": []})
    click.echo("no sessions yet")
    return dim('kvloom say NAME "some text" begins one')


@click.command()
@shared
@ref_argument("session", metavar="SESSION")
def branches(options: Options, session: str) -> None:
    """List the branches of SESSION: where each has got to, and what was said last on it.

    \b
    Example:
      kvloom branches trip
    """
    with reading(options) as reader:
        found = reader.find(parse(session)[0].session)
        names = [branch.name for branch in found.branches()]
        turns = found.tree()
        with reader.database.read() as conn:
            short = short_ids(conn, found.row.row)
    depth: dict[str, int] = {}
    for turn in turns:
        depth[turn.id] = 1 + (depth[turn.parent] if turn.parent else 0)
    tips = {name: turn for turn in turns for name in turn.branches}
    covered: set[str | None] = set()  # a pin holds the turns before it, too
    for turn in reversed(turns):
        covered |= {turn.id, turn.parent} if turn.pinned or turn.id in covered else set()
    pinned: dict[str | None, int] = {None: 0}
    for turn in turns:
        pinned[turn.id] = depth[turn.id] if turn.id in covered else pinned[turn.parent]
    listed = [_branch_json(name, tips.get(name), depth, pinned) for name in names]
    if options.json:
        return print_json({"session": found.name, "branches": listed})
    rows = [[b["name"], short(b["turn"]), str(b["turns"]), preview(b["text"])] for b in listed]
    if not any(b["pinned"] for b in listed):
        return columns(rows, ["branch", "turn", "turns", "last said"])
    rows = [[*row[:3], str(b["pinned"] or ""), row[3]] for row, b in zip(rows, listed, strict=True)]
    return columns(rows, ["branch", "turn", "turns", "pinned", "last said"])


def _branch_json(
    name: str, tip: TreeTurn | None, depth: dict[str, int], pinned: dict[str | None, int]
) -> dict[str, Any]:
    """A branch, and how many of its turns are ``pinned``: the state of those is never dropped."""
    if tip is None:
        return {"name": name, "turn": None, "turns": 0, "pinned": 0, "text": ""}
    return {"name": name, "turn": tip.id, "turns": depth[tip.id], "pinned": pinned[tip.id], "text": tip.text}


@click.command()
@shared
@ref_argument()
@click.option("-n", "--last", type=click.IntRange(1), metavar="N", help="Only the last N turns.")
@click.option("--scores", is_flag=True, help="Add how likely the model thought each reply.")
def log(options: Options, ref: str, last: int | None, scores: bool) -> None:
    """Show what was said, from the first turn down to REF (default: the branch main), or to its token.

    With --scores, each reply's mean log-probability (nats a token) and perplexity: how many equally likely tokens
    the model was choosing from, as it were.

    \b
    Example:
      kvloom log trip
      kvloom log trip@main~2 --last 4
      kvloom log trip --scores
      kvloom log trip@main:90
    """
    at, point = parse(ref)
    with reading(options) as reader:
        session = reader.find(at.session)
        found = reader.resolve(at)
        turns = session.log(point)
        if found.token is not None and session.tokenizer is None:
            warn(f"{no_tokenizer(session.settings)}, so the text of the last turn is shown whole")
        turns = turns[-last:] if last else turns
        thought = {turn.id: session.token_scores(turn) for turn in turns if turn.role == "assistant"} if scores else {}
        with reader.database.read() as conn:
            short = short_ids(conn, session.row.row)
    branch = found.branch.name if found.branch else None
    if options.json:
        told_of = {turn: summary(each) for turn, each in thought.items()}
        listed = [turn_json(turn) | told_of.get(turn.id, {}) for turn in turns]
        return print_json({"session": session.name, "branch": branch, "turns": listed})
    return print_turns(turns, short, {turn: told(each) for turn, each in thought.items()})


def print_turns(
    turns: Sequence[TreeTurn], short: Callable[[str | None], str], remarks: Mapping[str, str] | None = None
) -> None:
    """Turns in full, one after another, some with a remark behind them (by turn)."""
    if not turns:
        dim("nothing was said yet")
    for number, turn in enumerate(turns):
        _print_turn(turn, short(turn.id), first=number == 0)
        if remarks and remarks.get(turn.id):
            click.echo(click.style(remarks[turn.id], dim=True))


def turn_json(turn: TreeTurn) -> dict[str, Any]:
    """A turn as ``log`` and ``tree`` print it with ``--json``."""
    return {**turn.to_json(), "created": iso_time(turn.created)}


def _print_turn(turn: TreeTurn, short: str, *, first: bool) -> None:
    notes = " ".join([short, f"{turn.tokens} tokens", *labels(turn)] if turn.tokens else [short, *labels(turn)])
    head = f"{styled_role(turn.role)}  {click.style(notes, dim=True)}"
    click.echo(head if first else f"\n{head}")
    click.echo(clean(turn.text))


@click.command()
@shared
@ref_argument(metavar="REF")
@click.option("--tokens", is_flag=True, help="Show the tokens around the point that REF names.")
@click.option("--scores", is_flag=True, help="Show what the model thought of each token of the turn.")
@click.option("--around", type=click.IntRange(1), default=16, metavar="N", help="So many on each side (default 16).")
def show(options: Options, ref: str, tokens: bool, scores: bool, around: int) -> None:
    """Show the turn that REF names in full: text, tokens, settings, timings, and how its state was computed.

    With --tokens, show which token stands where: REF:90 keeps those at positions 0 to 89, and the next one
    will stand at position 90.

    With --scores, show how likely the model thought each token of a reply, at temperature 1 and before any filter:
    its probability, the entropy of the choice (nats; 0: no doubt), and the likeliest others in its place.

    \b
    Example:
      kvloom show trip@main~1
      kvloom show trip --scores
      kvloom show trip@3f2a --json
      kvloom show trip@main:90 --tokens
    """
    at, point = parse(ref)
    if tokens and scores:
        raise click.UsageError("--tokens and --scores exclude each other")
    if tokens:
        return show_tokens(options, at, around)
    if scores:
        return show_scores(options, at, point)
    from kvloom_store import turns

    with reading(options) as reader:
        found = reader.resolve(at)
        with reader.database.read() as conn:
            settings = found.session.settings
            head = {
                "session": found.session.name,
                "branch": found.branch.name if found.branch else None,
                "model": settings.get("model"),
                "dtype": settings.get("dtype"),
                "token": found.token,
                "turn": None,
            }
            if found.turn is not None:
                turn = turns.get(conn, found.turn)
                parent = turns.get(conn, turn.parent).id if turn.parent is not None else None
                states = [_state_json(conn, state) for state in turns.states_of(conn, [turn.row])]
                head["turn"] = _full_json(turn, parent, states, _names(conn, found))
    if options.json:
        return print_json(head)
    return _print_full(head)


def _names(conn: sa.Connection, found: Point) -> dict[str, list[str]]:
    from kvloom_store import refs

    row = found.session.row
    return {
        "branches": [branch.name for branch in refs.branches(conn, row) if branch.turn == found.turn],
        "tags": [name for name, at in refs.tags(conn, row).items() if at == found.turn],
    }


def _full_json(
    turn: Turn, parent: str | None, states: list[dict[str, Any]], names: dict[str, list[str]]
) -> dict[str, Any]:
    return {
        "id": turn.id,
        "parent": parent,
        "role": turn.role,
        "text": turn.text,
        **names,
        "finish_reason": turn.finish_reason,
        "continues": turn.continues,
        "created": iso_time(turn.created),
        "settings": turn.settings,
        "timings": turn.timings,
        "states": states,
    }


def _state_json(conn: sa.Connection, state: TurnState) -> dict[str, Any]:
    from dataclasses import asdict

    from kvloom_store import roots, segments

    passes = state.schedule.passes
    return {
        "model": roots.model_of_root(conn, state.root)["name"],
        "start": state.start,
        "end": state.end,
        "tokens": state.tokens,
        "computed": [state.state_start, state.state_end],
        "held": state.segment is not None or state.state_end == state.state_start,
        "lossy": state.segment is not None and segments.is_lossy(conn, state.segment),
        "variant": state.variant,
        "schedule": {
            "unknown": state.schedule.unknown,
            "passes": [{"start": p.start, "tokens": p.tokens, "count": p.count} for p in passes],
        },
        "provenance": asdict(segments.provenance_of(conn, state.provenance)),
    }


def _print_full(head: dict[str, Any]) -> None:
    facts: list[tuple[str, object]] = [("session", head["session"]), ("model", f"{head['model']}, {head['dtype']}")]
    turn = head["turn"]
    if turn is None:
        print_facts(facts)
        return dim("nothing was said yet")
    names = [f"[{name}]" for name in turn["branches"]] + [f"#{name}" for name in turn["tags"]]
    facts += [("turn", " ".join([turn["id"], *names])), ("parent", turn["parent"] or "none, it is the first")]
    facts += [("said", turn["created"])]
    if head["token"] is not None:
        facts.append(("point", f"{head['token']} tokens are kept; --tokens shows those around that point"))
    if turn["finish_reason"]:
        facts.append(("ended by", turn["finish_reason"]))
    facts += [("settings", _pairs(turn["settings"])), ("timings", _timings(turn["timings"]))]
    for state in turn["states"]:
        facts += _state_facts(state)
    print_facts(facts)
    click.echo()
    click.echo(styled_role(turn["role"]))
    return click.echo(clean(turn["text"]))


def _state_facts(state: dict[str, Any]) -> list[tuple[str, object]]:
    start, end = state["computed"]
    kind = "variant, " if state["variant"] else ""
    held = "held" if state["held"] else "not held (it is replayed when needed)"
    held += ", lossy (kvloom warm REF --exact brings the exact one back)" if state["lossy"] else ""
    passes = sum(each["count"] for each in state["schedule"]["passes"])
    how = "unknown schedule" if state["schedule"]["unknown"] else f"{passes} passes"
    where = state["provenance"]
    return [
        ("tokens", f"{len(state['tokens'])}, at positions {state['start']} to {state['end']}"),
        ("state", f"{kind}{held}; positions {start} to {end} in {how}"),
        ("computed on", f"{where['device']}, {where['threads']} threads, torch {where['torch']}"),
    ]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, [], ""))


def _timings(values: dict[str, Any]) -> str:
    named = {"first_token": "first token", "restore": "restore", "total": "total"}
    shown = {key: value for key, value in values.items() if isinstance(value, float)}
    return ", ".join(f"{named.get(key, key)} {seconds(value)}" for key, value in shown.items())
