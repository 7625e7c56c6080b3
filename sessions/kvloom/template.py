"""Chat templates: from messages to the exact token ids the model sees, one turn at a time.

A turn is never tokenised twice. What it adds to its parent is the rendering of history plus the new
message, less the rendering of history; only that difference is tokenised, and it is appended to the ids
the model has already seen. Where a template rewrites history (Qwen3 drops the reasoning of earlier
replies) the longest stretch that still holds is kept, and ``Prompt.rewritten`` says so.

Text in messages stays text: a user who types ``<|im_end|>`` gets those ten characters, not the token (``plaintext``).

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgpack

from kvloom.errors import SessionError
from kvloom.plaintext import added_text, added_tokens, broken, encode, free_marker

Message = dict[str, Any]
"""One message as a chat template is given it: ``role``, ``content``, perhaps ``tool_calls`` and others."""

DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.content is string %}{% set text = message.content %}
{%- else %}{% set text = message.content | map(attribute='text') | join %}{% endif %}
{%- if message.role == 'system' %}{{ text | trim + '\\n\\n' }}
{%- else %}{{ message.role | capitalize + ': ' + text | trim + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""For models without a template of their own: the system text and a blank line, then ``User: ...`` and
``Assistant: ...`` lines. Nothing in it ends a reply, so it ends at `DEFAULT_STOP`."""

DEFAULT_STOP = ("\nUser:",)
"""Where a reply under `DEFAULT_TEMPLATE` ends, unless the caller says otherwise: the user would speak next."""

# Keys of an assistant message that templates render and that are not its content.
_BESIDES_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
# Options that hold other people's text, which is treated like messages; Llama 3 and Granite have names of their own
# for tools.
_FOREIGN = ("tools", "custom_tools", "available_tools", "documents")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template with everything else that decides what it renders, so that a session always renders alike.

    ``source`` is Jinja text, ``options`` are extra variables (``enable_thinking``, ``tools``, ...), plain
    data; ``clock`` is the ISO time that templates which print a date are shown: fixed when the session
    began, or the first token of every conversation would change at midnight.
    """

    source: str
    options: Mapping[str, Any] = field(hash=False)
    clock: str

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        source: str | None = None,
        options: Mapping[str, Any] | None = None,
        clock: str | None = None,
    ) -> ChatTemplate:
        """The tokenizer's own template, or ``source``, or `DEFAULT_TEMPLATE` where there is neither.

        Of several named templates it takes "default", or the one that ``source`` names. ``clock`` is now
        unless given. Raises SessionError where named templates have no default, where options are not
        plain data, and where the clock is not an ISO time.
        """
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, Mapping):
            source = own.get(source or "default", source)
            if source is None:
                raise SessionError(
                    f"the model has several chat templates and no default: {', '.join(sorted(own))}",
                    hint="name one of them, or give a template",
                )
        elif source is None:
            source = own
        if source is None:
            # The default writes the token that starts a text only where the model is used to one: GPT-2
            # kinds have such a token and never put it there.
            starts = tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            source = ("{{- bos_token }}" if starts else "") + DEFAULT_TEMPLATE
        template = cls(source, dict(options or {}), clock or datetime.now().isoformat(timespec="seconds"))
        template.checked_digest()
        return template

    @property
    def is_default(self) -> bool:
        """Whether this is `DEFAULT_TEMPLATE`: the model has no format, and nothing that ends a reply."""
        return self.source.endswith(DEFAULT_TEMPLATE)

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of source and options in canonical MessagePack; the clock is not in it.

        Raises SessionError where options are not plain data.
        """
        try:
            packed = msgpack.packb([self.source, _canonical(self.options)], use_bin_type=True)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise SessionError(
                f"template options must be plain data: {error}",
                hint="use strings, numbers, booleans, lists and mappings with string keys",
            ) from error
        return hashlib.sha256(packed).hexdigest()

    def checked_digest(self) -> str:
        """The digest, of a template that comes from outside. Raises SessionError (its options, its clock)."""
        _ = self._now
        return self.digest

    @property
    def _now(self) -> datetime:
        try:
            return datetime.fromisoformat(self.clock)
        except (TypeError, ValueError) as error:
            raise SessionError(f"{self.clock!r} is not an ISO time", hint="for example 2025-01-31T12:00:00") from error

    def render(self, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text that is tokenised for these messages. Raises SessionError where the template refuses.

        ``messages`` hold plain data and are not changed.
        """
        marker = _marker(self, messages)
        text = self._render(tokenizer, messages, add_generation_prompt=add_generation_prompt, marker=marker)
        return text.replace(marker, "")

    def _render(self, tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, marker: str) -> str:
        """`render` with markers left where messages hold the text of an added token."""
        from transformers.utils import chat_template_utils as hf

        added = added_tokens(tokenizer)
        marked = [m if m.get("role") == "assistant" else broken(m, added, marker) for m in messages]
        options = {k: broken(v, added, marker) if k in _FOREIGN else v for k, v in self.options.items()}
        # apply_chat_template turns every callable among its variables into a string, and the date it shows
        # is always the present one; so this is what it does, with the clock handed in. A test compares.
        variables = {
            "tools": None,
            "documents": None,
            **tokenizer.special_tokens_map,
            **options,
            "messages": hf._alias_reasoning_fields(
                [{k: v for k, v in m.items() if v is not None} for m in hf._plain_template_data(marked)]
            ),
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": self._now.strftime,
        }
        try:
            text = hf._compile_jinja_template(self.source).render(**variables)
        except Exception as error:  # a template is a program: it can raise anything
            raise SessionError(
                f"the chat template refused these messages: {error}",
                hint="the model may take no system message, or only alternating user and assistant messages",
            ) from error
        return str(text)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to see next.

    ``ids``: token ids of the whole path, generation prompt included. ``kept``: how many leading ids are
    the parent's own, unchanged. ``rewritten``: the template changed history, so kept < len(parent_ids).
    """

    ids: tuple[int, ...]
    kept: int
    rewritten: bool


def extend(
    template: ChatTemplate,
    tokenizer: Any,
    history: Sequence[Message],
    parent_ids: Sequence[int],
    new: Sequence[Message],
    *,
    reply_start: int | None,
    eos_ids: frozenset[int],
) -> Prompt:
    """The prompt for ``new`` after a path whose messages are ``history`` and whose tokens are ``parent_ids``.

    ``parent_ids`` are the ids as the model saw them, up to the last token of the parent turn.
    ``reply_start`` is the index in them where the last assistant reply begins, None if unknown or if the
    path ends otherwise. ``eos_ids`` are the tokens that end a reply. Raises SessionError where the template
    refuses or ``reply_start`` lies outside, InvalidText where the text is not valid Unicode.
    """
    parent = tuple(parent_ids)
    if reply_start is not None and not 0 <= reply_start <= len(parent):
        raise SessionError(f"the reply cannot start at token {reply_start} of {len(parent)}")
    messages = [*history, *new]
    marker = _marker(template, messages)
    full = template._render(tokenizer, messages, add_generation_prompt=True, marker=marker)
    if not parent:
        return Prompt(tuple(encode(tokenizer, full, marker, None)), 0, False)

    replied = bool(history) and history[-1].get("role") == "assistant"
    before = history[:-1] if replied else history
    try:
        # The very text that the parent prompt was made from: same messages, options and clock.
        seen = template._render(tokenizer, before, add_generation_prompt=True, marker=marker)
    except SessionError:  # a path that begins with a reply: there is nothing a template would render
        seen = ""
    if replied and seen and full.startswith(seen):
        said = parent[reply_start:] if reply_start is not None else ()
        rest = _after_reply(tokenizer, full[len(seen) :], history[-1], said, parent[-1], eos_ids)
        if rest is not None:
            return Prompt((*parent, *encode(tokenizer, rest, marker, parent[-1])), len(parent), False)

    keep, start = _aligned(tokenizer, full, seen, parent, reply_start if replied else None, marker)
    ids = (*parent[:keep], *encode(tokenizer, full[start:], marker, parent[keep - 1] if keep else None))
    kept = common(ids, parent)
    return Prompt(ids, kept, kept < len(parent))


def reply_ids(
    template: ChatTemplate,
    tokenizer: Any,
    history: Sequence[Message],
    prompt_ids: Sequence[int],
    text: str,
    *,
    eos_ids: frozenset[int],
) -> list[int]:
    """Token ids of a reply that says ``text``, as the template writes it, with the token of ``eos_ids`` that ends it.

    ``prompt_ids`` are the tokens of ``history``, generation prompt included. Where the template ends replies with no
    such token, neither does this one. Raises InvalidText, and SessionError where the template refuses.
    """
    marker = _marker(template, [*history, {"text": text}])
    # What ends a reply may be what begins the next message (GLM).
    messages = [*history, {"role": "assistant", "content": marker + text + marker}, {"role": "user", "content": "."}]
    seen = template.render(tokenizer, history, add_generation_prompt=True)
    full = template.render(tokenizer, messages, add_generation_prompt=False)
    same = common(full, seen)
    parts = full[same:].split(marker)
    lead, _, rest = parts if len(parts) == 3 else ("", "", full[same:])  # some templates take a text apart
    # What stands before the text belongs to it ("<|channel|>final<|message|>", or a space after "[/INST]"), unless it
    # is for another prompt than this one. Text that begins with a space of its own keeps that one.
    if same < len(seen) or (text[:1].isspace() and not lead.strip()):
        lead = ""
    added = added_tokens(tokenizer)
    end = next((token for _, token in added.controls(rest)), None)
    if end not in eos_ids:  # or only what ends the last reply of all (gpt-oss)
        last = template.render(tokenizer, messages[:-1], add_generation_prompt=False)
        end = next((token for _, token in added.controls(last.rpartition(marker)[2])), None)
    ids = encode(tokenizer, lead + broken(text, added, marker), marker, prompt_ids[-1] if prompt_ids else None)
    return [*ids, end] if end in eos_ids else ids


def _after_reply(
    tokenizer: Any, tail: str, reply: Message, said: Sequence[int], last: int, eos_ids: frozenset[int]
) -> str | None:
    """``tail`` less the reply it begins with and the end-of-turn text, where the model has seen that.

    None where ``tail`` does not begin with the reply as it was said: the template has changed it.
    ``said`` are the token ids of the reply (empty if unknown), ``last`` is the last of the path.
    """
    content = reply.get("content", "")
    if not isinstance(content, str) or any(reply.get(key) for key in _BESIDES_CONTENT):
        return None
    # Templates trim, and some put a space before the reply ("[/INST] Hello"), which decoding may drop.
    forms = (content, content.strip(), content.lstrip(), content.rstrip())
    found = ((text, form) for form in forms for text in (tail, tail.lstrip()) if text.startswith(form))
    text, form = next(found, ("", None))
    if form is None:
        return None
    rest = text[len(form) :]
    end = added_text(tokenizer, last) if last in eos_ids else ""
    for text in (rest, rest.lstrip()):  # Llama 2 puts a space before it
        if end and text.startswith(end):
            return text[len(end) :]
    # A reply that met a stop string: the model has written the string, which its text ends before.
    spoken = tokenizer.decode(list(said), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = spoken[len(content) :] if spoken.startswith(content) else ""
    if stop and rest.startswith(stop):
        return rest[len(stop) :]
    # A reply that is empty, or as short as the "\n" that GLM 4.5 puts before an empty <think>, begins texts that the
    # template has changed too: then its end comes later, or nothing shows where it is.
    return rest if form and not (end and end in rest) else None


def _aligned(
    tokenizer: Any, full: str, seen: str, parent: Sequence[int], reply_start: int | None, marker: str
) -> tuple[int, int]:
    """Where a rewritten history still agrees: (tokens of ``parent`` to keep, characters of ``full``).

    A sampled reply is not always what tokenising its text would give, so retokenising from the start would
    lose every token after the first difference. Instead ``full`` is compared with ``seen``, the text that
    ``parent`` was made from, and kept up to the last control token they share: control tokens are the one
    thing that text and ids have in common whatever was sampled between them.
    """
    same = common(full, seen)
    if reply_start is not None and seen and same == len(seen):
        return reply_start, same
    added = added_tokens(tokenizer)
    ids = frozenset(added.ids.values())
    positions = (i for i, token in enumerate(parent[:reply_start]) if token in ids)
    keep = start = 0
    for (end, token), position in zip(added.controls(seen), positions, strict=False):
        if end > same or parent[position] != token:
            break
        keep, start = position + 1, end
    return keep, start


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marker(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """A private-use character that neither the template nor its options nor the messages hold."""
    text = json.dumps([template.source, dict(template.options), messages], ensure_ascii=False, default=repr)
    return free_marker(text)


def _canonical(value: Any) -> Any:
    """``value`` with the keys of every mapping sorted, so that equal options have equal bytes."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value
