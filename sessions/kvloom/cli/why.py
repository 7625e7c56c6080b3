"""``kvloom why``: what would be reused if something were said, and why not more. It loads no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.common import Options, parse, ref_argument, shared
from kvloom.cli.opening import absolute, model_options, template_of
from kvloom.cli.talk import read_text
from kvloom.cli.terminal import print_facts, print_json
from kvloom.shown import clean, seconds

if TYPE_CHECKING:
    from kvloom.why import Difference, Foreseen, Wait, Why


@click.command()
@shared
@ref_argument()
@click.argument("text", metavar="[TEXT|-]", required=False)
@click.option("--messages", metavar="FILE", help='A JSON list of messages instead of TEXT ("-": stdin).')
@click.option("--chat-template", metavar="FILE", help="Render the messages by this Jinja template.")
@click.option("--template-options", metavar="JSON", help="Render the messages with these options (a JSON object).")
@click.option("--clock", metavar="TIME", help="Render the messages at this ISO time.")
@model_options
def why(options: Options, ref: str, text: str | None, messages: str | None, **values: Any) -> None:
    """Tell what saying TEXT at REF would reuse: nothing is said, and the model's weights are not loaded.

    With --messages FILE (OpenAI's form), tell it of a client that sends the whole conversation each time, rendered and
    tokenised from the first message on.

    \b
    The cause is one of
      new text        nothing is wrong: only the new message is new
      edited history  a message that was said before has another text
      template        the chat template, its options or clock give other tokens
      tokenizer seam  the same text in other tokens, as the model chose them
      other model     the session's model or tokenizer is another one
      state not held  the tokens are known, but their state is missing

    \b
    Example:
      kvloom why trip "And in Spain?"
      kvloom why trip@main~2 "And in Spain?" --json
      kvloom why trip --messages conversation.json
    """
    if (text is None) == (messages is None):
        raise click.UsageError("give either TEXT or --messages FILE")
    rendering = [name for name in ("chat_template", "template_options", "clock") if values[name] is not None]
    if text is not None and rendering:
        raise click.UsageError(
            f"--{rendering[0].replace('_', '-')} goes with --messages; TEXT is said as the session does"
        )
    from kvloom import foresee
    from kvloom.binding import named
    from kvloom.files import read_messages
    from kvloom.loom import KVLoom
    from kvloom.transcripts import of_openai

    said, asked = (
        (read_text(text) if text is not None else ""),
        (of_openai(read_messages(messages)) if messages else []),
    )
    source, extra = template_of(values["chat_template"]), _options(values["template_options"])
    at, point = parse(ref)
    with KVLoom(options.path, must_exist=True) as reader:
        session = reader.find(at.session)
        known = named(session.row.settings, absolute(values["model"]), values["dtype"]) if values["model"] else None
        own = known or session.settings
    model = absolute(values["model"]) if values["model"] else own["model"]
    with KVLoom(options.path, model=model, dtype=values["dtype"] or own["dtype"], must_exist=True) as loom:
        session = loom.find(at.session)
        session.use(own)
        if text is not None:
            found = foresee.of_text(session, at, said)
        else:
            found = session.why(asked, point, chat_template=source, template_options=extra, clock=values["clock"])
    return print_json(found.to_json()) if options.json else print_why(found)


def _options(text: str | None) -> dict[str, Any] | None:
    import json

    from kvloom.errors import InvalidText

    if text is None:
        return None
    hint = 'for example {"enable_thinking": false}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"the template's options are not valid JSON: {error}", hint=hint) from error
    if not isinstance(found, dict):
        raise InvalidText("the template's options are no JSON object", hint=hint)
    return found


def print_why(found: Why) -> None:
    """What was found, for people."""
    click.echo(f"{click.style(found.cause, bold=True)}: {clean(found.detail)}")
    facts: list[tuple[str, object]] = [("tokens", _tokens(found.tokens))]
    facts += _difference(found.difference) if found.difference is not None else []
    facts += [
        (f"  {name}", f"stored {stored[:60]}, asked {live[:60] or 'none'}") for name, stored, live in found.fields
    ]
    if found.unchecked and not found.fields:
        facts.append(("unchecked", f"{', '.join(found.unchecked)} (known once the model is loaded)"))
    print_facts([*facts, ("cost", _cost(found.tokens, found.cost)), ("to do", found.advice)])


def _tokens(tokens: Foreseen) -> str:
    parts = [f"reused {tokens.reused}, replayed {tokens.replayed}, computed {tokens.computed}"]
    parts.append(f"{tokens.asked} are asked for, {tokens.known} of them known")
    return " · ".join(parts)


def _difference(found: Difference) -> list[tuple[str, object]]:
    where = f"token {found.position}"
    if found.turn is not None:
        where += f", in turn {found.turn[:8]} ({found.role})"
    if found.character is not None:
        where += f", character {found.character}"
    return [
        ("differs at", where),
        ("  after", _shown(found.before)),
        ("  stored", _shown(found.stored) if found.stored_token is not None else "nothing"),
        ("  asked", _shown(found.asked) if found.asked_token is not None else "nothing"),
    ]


def _shown(text: str) -> str:
    return repr(text)


def _cost(tokens: Foreseen, cost: Wait) -> str:
    run = f"{tokens.replayed + tokens.computed} tokens to run"
    if cost.seconds is None:
        return f"{run}; how long that takes is unknown: no reply of this model was timed here"
    rate = f" at {cost.prompt_rate:.0f} tokens/s" if cost.prompt_rate is not None else ""
    timed = "the last reply was" if cost.replies == 1 else f"the last {cost.replies} replies were"
    return f"{run}, about {seconds(cost.seconds)}{rate} (as {timed} timed)"
