"""Chat templates: from messages to the exact token ids the model sees, one turn at a time.

A turn is never tokenised twice. What it adds to its parent is the rendering of history plus the new
message, less the rendering of history; only that difference is tokenised, and it is appended to the ids
the model has already seen. Where a template rewrites history (Qwen3 drops the reasoning of earlier
replies) the longest stretch that still holds is kept, and ``Prompt.rewritten`` says so.

Text in messages stays text: a user who types ``<|im_end|>`` gets those ten characters, not the token.
Before rendering, every added token's text inside a message is broken by a marker character; the rendering
is tokenised in pieces cut at the markers, which are dropped.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import msgpack

from kvloom.errors import InvalidText, SessionError

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
        _ = template.digest, template._now
        return template

    @classmethod
    def of_session(cls, settings: Mapping[str, Any]) -> ChatTemplate:
        """The template a session was begun with, from its settings."""
        return cls(settings["chat_template"], settings["template_options"], settings["clock"])

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

        added = _added(tokenizer)
        marked = [m if m.get("role") == "assistant" else _break(m, added, marker) for m in messages]
        options = {k: _break(v, added, marker) if k in _FOREIGN else v for k, v in self.options.items()}
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
        return Prompt(tuple(_encode(tokenizer, full, marker, None)), 0, False)

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
            return Prompt((*parent, *_encode(tokenizer, rest, marker, parent[-1])), len(parent), False)

    keep, start = _aligned(tokenizer, full, seen, parent, reply_start if replied else None, marker)
    ids = (*parent[:keep], *_encode(tokenizer, full[start:], marker, parent[keep - 1] if keep else None))
    kept = common(ids, parent)
    return Prompt(ids, kept, kept < len(parent))


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
    end = _text(tokenizer, last) if last in eos_ids else ""
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
    added = _added(tokenizer)
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


# --- text that is only text ---


def _marker(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """A private-use character that neither the template nor its options nor the messages hold."""
    text = json.dumps([template.source, dict(template.options), messages], ensure_ascii=False, default=repr)
    marker = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in text), None)
    if marker is None:
        raise InvalidText("the text uses every private-use character there is")
    return marker


@dataclass(frozen=True, slots=True)
class _Added:
    """The tokens that user text must not reach: ``ids`` by text, and what finds them fast in a text."""

    ids: Mapping[str, int]
    folded: frozenset[str]  # their texts in lower case, since some tokenizers fold the case
    beginnings: frozenset[str]  # every proper beginning of those
    lengths: tuple[int, ...]  # the longest first
    first: re.Pattern[str]  # a character that begins one

    def controls(self, text: str) -> Iterator[tuple[int, int]]:
        """(end, token id) of every token that a tokenizer finds in ``text``: leftmost, then longest."""
        done = 0
        for at in (match.start() for match in self.first.finditer(text)):
            end = next((at + n for n in self.lengths if text[at : at + n] in self.ids), 0)
            if at >= done and end:
                done = end
                yield end, self.ids[text[at:end]]

    def forged(self, text: str) -> Iterator[int]:
        """Where in ``text`` a token begins, overlapping or not. The end counts where it is a token's
        beginning, since a template could put the rest of the token after it."""
        stem = text.rstrip()
        for at in (match.start() for match in self.first.finditer(text)):
            whole = any(text[at : at + n].lower() in self.folded for n in self.lengths)
            if whole or stem[at:].lower() in self.beginnings:
                yield at


def _added(tokenizer: Any) -> _Added:
    """All added tokens, special or not, but for runs of whitespace and single characters.

    Gemma and others add "\\n\\n" or "▁▁" to their vocabulary as ordinary text: breaking those would make
    ordinary text unusual to the model, and nothing can be forged with them.
    """
    vocab: dict[str, int] = tokenizer.get_added_vocab()
    return _index(tuple((t, i) for t, i in vocab.items() if len(t) > 1 and t.strip(" \t\r\n▁")))


@lru_cache(maxsize=8)
def _index(ids: tuple[tuple[str, int], ...]) -> _Added:
    folded = frozenset(text.lower() for text, _ in ids)
    firsts = {c for text, _ in ids for c in (text[0], text[0].lower(), text[0].upper())}
    return _Added(
        ids=dict(ids),
        folded=folded,
        beginnings=frozenset(text[:n] for text in folded for n in range(1, len(text))),
        lengths=tuple(sorted({len(text) for text, _ in ids}, reverse=True)),
        first=re.compile("|".join(map(re.escape, sorted(firsts))) or "(?!)"),
    )


def _break(value: Any, added: _Added, marker: str) -> Any:
    """``value`` with a marker after the first character of every added token's text in its strings.

    A key that is a plain word stays as it is, and so does such a role, since templates look for them. Other keys
    are text as well: tools name their parameters, and templates write those names.
    """
    if isinstance(value, str):
        cuts = [at + 1 for at in added.forged(value)]
        return marker.join(value[a:b] for a, b in zip([0, *cuts], [*cuts, len(value)], strict=True))
    if isinstance(value, Mapping):
        pairs = ((key if _is_word(key) else _break(key, added, marker), item) for key, item in value.items())
        return {k: v if k == "role" and _is_word(v) else _break(v, added, marker) for k, v in pairs}
    if isinstance(value, list | tuple):
        return [_break(item, added, marker) for item in value]
    return value


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


# --- text to token ids ---


def _encode(tokenizer: Any, text: str, marker: str, before: int | None) -> list[int]:
    """Token ids of rendered ``text``, as they would be in context after the token ``before``.

    ``before`` None means that the text starts here. Control tokens are recognised, except where a marker
    breaks them; the markers themselves give no tokens.
    """
    first, *others = text.split(marker)
    guard = "" if before is None else _text(tokenizer, before)
    if before is None:
        ids = _plain(tokenizer, first)
    elif not guard:
        ids = _continue(tokenizer, first)
    else:
        # SentencePiece kinds may or may not put a space before text that follows a control token, and a
        # control token may swallow the whitespace after it: tokenise with that very token in front.
        ids = _plain(tokenizer, guard + first)
        ids = ids[1:] if ids[:1] == [before] else _plain(tokenizer, first)
    for piece in others:
        ids += _continue(tokenizer, piece)
    return ids


def _continue(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` that goes on after plain text: without the space that starts a text.

    A neutral character goes in front, and its tokens are taken off; where they have merged with the text,
    another one is tried.
    """
    for neutral in ("\n", "a", ".", "\t"):
        front, ids = _plain(tokenizer, neutral), _plain(tokenizer, neutral + text)
        if ids[: len(front)] == front:
            return ids[len(front) :]
    return _plain(tokenizer, text)


def _plain(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    try:
        text.encode()
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"not valid Unicode: {error.reason}", hint="the text holds half of a surrogate pair"
        ) from error
    return [int(i) for i in ids]


def _text(tokenizer: Any, token: int) -> str:
    """The text of an added token, "" for every other one."""
    return next((text for text, i in tokenizer.get_added_vocab().items() if i == token), "")


def _canonical(value: Any) -> Any:
    """``value`` with the keys of every mapping sorted, so that equal options have equal bytes."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value
