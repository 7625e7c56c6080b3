"""Text that stays text on its way to token ids: nobody can type a control token.

Every added token's text inside a message is broken by a marker character before the message is rendered; the rendering
is tokenised in pieces cut at the markers, which are dropped.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvloom.errors import InvalidText


@dataclass(frozen=True, slots=True)
class Added:
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


def added_tokens(tokenizer: Any) -> Added:
    """All added tokens, special or not, but for runs of whitespace and single characters.

    Gemma and others add "\\n\\n" or "▁▁" to their vocabulary as ordinary text: breaking those would make
    ordinary text unusual to the model, and nothing can be forged with them.
    """
    vocab: dict[str, int] = tokenizer.get_added_vocab()
    return _index(tuple((t, i) for t, i in vocab.items() if len(t) > 1 and t.strip(" \t\r\n▁")))


@lru_cache(maxsize=8)
def _index(ids: tuple[tuple[str, int], ...]) -> Added:
    folded = frozenset(text.lower() for text, _ in ids)
    firsts = {c for text, _ in ids for c in (text[0], text[0].lower(), text[0].upper())}
    return Added(
        ids=dict(ids),
        folded=folded,
        beginnings=frozenset(text[:n] for text in folded for n in range(1, len(text))),
        lengths=tuple(sorted({len(text) for text, _ in ids}, reverse=True)),
        first=re.compile("|".join(map(re.escape, sorted(firsts))) or "(?!)"),
    )


def broken(value: Any, added: Added, marker: str) -> Any:
    """``value`` with a marker after the first character of every added token's text in its strings.

    A key that is a plain word stays as it is, and so does such a role, since templates look for them. Other keys
    are text as well: tools name their parameters, and templates write those names.
    """
    if isinstance(value, str):
        cuts = [at + 1 for at in added.forged(value)]
        return marker.join(value[a:b] for a, b in zip([0, *cuts], [*cuts, len(value)], strict=True))
    if isinstance(value, Mapping):
        pairs = ((key if _is_word(key) else broken(key, added, marker), item) for key, item in value.items())
        return {k: v if k == "role" and _is_word(v) else broken(v, added, marker) for k, v in pairs}
    if isinstance(value, list | tuple):
        return [broken(item, added, marker) for item in value]
    return value


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def free_marker(text: str) -> str:
    """A private-use character that a text does not hold. Raises InvalidText where it holds them all."""
    marker = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in text), None)
    if marker is None:
        raise InvalidText("the text uses every private-use character there is")
    return marker


def encode_text(tokenizer: Any, text: str, before: int | None) -> list[int]:
    """Token ids of text that is only text, as they would be in context after the token ``before``."""
    marker = free_marker(text)
    return encode(tokenizer, broken(text, added_tokens(tokenizer), marker), marker, before)


def encode(tokenizer: Any, text: str, marker: str, before: int | None) -> list[int]:
    """Token ids of rendered ``text``, as they would be in context after the token ``before``.

    ``before`` None means that the text starts here. Control tokens are recognised, except where a marker
    breaks them; the markers themselves give no tokens.
    """
    first, *others = text.split(marker)
    guard = "" if before is None else added_text(tokenizer, before)
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


def added_text(tokenizer: Any, token: int) -> str:
    """The text of an added token, "" for every other one."""
    return next((text for text, i in tokenizer.get_added_vocab().items() if i == token), "")


def check_unicode(text: str) -> None:
    """Refuse text that cannot be written as UTF-8 (lone surrogates from undecodable input). Raises InvalidText."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidText("the text is not valid UTF-8", hint="convert it first: iconv -t UTF-8") from error
