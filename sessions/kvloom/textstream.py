"""From token ids to pieces of text that will not change any more, and can be printed.

What the pieces add up to is ``tokenizer.decode(ids, skip_special_tokens=True,
clean_up_tokenization_spaces=False)``, cut before the first stop string. Special tokens are control
tokens, not text, and are left out; added tokens that are not special (``<think>``) are text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kvloom.errors import SessionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]

_REPLACEMENT = "\ufffd"  # what decoding shows for bytes that are not, or not yet, a character

# How sentencepiece vocabularies spell a token that is one byte.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

# A window of more tokens than this, whose text ends in a replacement character, is cut.
_MAX_HELD = 8


class TextStream:
    """Text of one reply, as its tokens come in; ``push`` each of them, then ``finish``.

    Held back is what later tokens could still change:

    - Bytes that do not make a character yet. A byte-level tokenizer spreads an emoji over up to four tokens.
    - Tokens that stand for one byte each (``<0xF0>``, byte fallback), until another kind of token
      follows: one bad byte makes decoders replace the whole run, characters that were complete too.
    - A suffix that could be the beginning of a stop string.

    Decoding is incremental: only the tokens whose text is held back are decoded, after one more as
    context, since decoders treat the first token they see differently (its leading space). Not safe to
    use from several threads at once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str] = (),
        skip_ids: Collection[int] = (),
        before: Sequence[int] = (),
    ) -> None:
        """Start at a reply's first token, or after the tokens ``before``.

        stop      strings that end the reply. SessionError if one is empty, or for a bare string
        skip_ids  tokens without text, besides the special ones (end of turn)
        before    the tokens of the same reply that were streamed earlier, all of them or the last 16 or
                  more (all of a run of byte tokens), for a reply that goes on. Their text is not
                  repeated, except ``reopened``. A stop string counts only if it begins in the text of
                  this stream.
        """
        if isinstance(stop, str) or not all(stop):
            raise SessionError("stop must be a sequence of strings that are not empty", hint="change stop")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_bytes = tuple(text.encode() for text in self._stop)
        self._longest = max(map(len, self._stop_bytes), default=0)
        # Named special tokens, and those the tokenizer's file flags as special: decode leaves out both.
        self._silent = frozenset(skip_ids) | frozenset(tokenizer.all_special_ids)
        self._silent |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

        # Invariant: the first _shown characters of decode(_window) were passed on, none of those after them.
        self._window: list[int] = []
        self._shown = 0
        self._run = bytearray()  # the byte tokens at the end of the window; their tail is enough
        self._maybe_stop = ""  # certain text, held back as the beginning of a stop string
        self._old = 0  # characters of what was not emitted yet that are old text: no stop begins there
        self._pieces: list[str] = []
        self._finished = False

        self.stopped: str | None = None
        """The stop string that ended the text, once one did."""
        self.reopened = ""
        """The end of the text of ``before`` that this stream emits again, because it is not certain yet.

        It is "" unless ``before`` ends inside a character (then it is one U+FFFD) or in byte tokens (then
        their text). The ``finish`` of the earlier stream has emitted it; whoever joins the texts removes
        it there first: ``earlier.removesuffix(stream.reopened) + stream.text``.
        """
        self._resume(before)

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, possibly "".

        Once a stop string completed (see ``stopped``), tokens are ignored. SessionError after ``finish``.
        """
        if self._finished:
            raise SessionError("this text stream was finished", hint="start another one, with before=")
        if self.stopped is not None or not self._add(token_id):
            return ""
        if self._run:
            # Uncertain, but if a stop string is complete the reply ends here, and what is uncertain is
            # then final. (In such vocabularies a newline is usually a byte token.) The look at the last
            # bytes saves decoding the whole run again for each of its tokens.
            tail = (self._maybe_stop.encode() + self._run)[-self._longest :]
            if not self._stop or not tail.endswith(self._stop_bytes):
                return ""
            new = self._decode(self._window)[self._shown :]
            return self._emit(new) if self._first_stop(self._maybe_stop + new) else ""

        text = self._decode(self._window)
        # An unfinished character is always shown as exactly one replacement character, the last one;
        # those before it stand for bytes that can't become anything else.
        end = len(text) - text.endswith(_REPLACEMENT)
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if end == len(text):
            self._settle()
        elif len(self._window) > _MAX_HELD:
            self._shorten(text)
        return self._emit(new)

    def finish(self) -> str:
        """Return what was held back; bytes that never became a character are U+FFFD now. Idempotent."""
        if self._finished or self.stopped is not None:
            self._finished = True
            return ""
        self._finished = True
        return self._emit(self._decode(self._window)[self._shown :], last=True)

    def copy(self) -> TextStream:
        """The same text so far, to go on from in another way."""
        twin = copy.copy(self)
        twin._window, twin._run, twin._pieces = self._window.copy(), self._run.copy(), self._pieces.copy()
        return twin

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, as it would be if nothing came before them."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _add(self, token_id: int) -> bool:
        """Append a token to the window; False if it has no text."""
        if token_id in self._silent:
            return False
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not token:  # not in the vocabulary (decode leaves it out), or an empty string
            return False
        self._window.append(token_id)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            self._run.append(int(byte[1], 16))
            del self._run[: -self._longest or -1]
        else:
            self._run.clear()
        return True

    def _resume(self, before: Sequence[int]) -> None:
        """Set the window to tokens whose text was emitted, all but ``reopened``."""
        run = 0  # length of the run of byte tokens at the end
        for token_id in before:
            if self._add(token_id):
                run = run + 1 if self._run else 0
        text = self._decode(self._window)
        if run:
            self._shown = len(self._decode(self._window[:-run]))
        else:
            self._shown = len(text) - text.endswith(_REPLACEMENT)
        self.reopened = text[self._shown :]
        if not self.reopened:
            self._settle()
        elif _REPLACEMENT not in self.reopened:
            self._old = len(self.reopened)  # whole characters: a reply that ended at "\n" can go on after it

    def _settle(self) -> None:
        """All of the window's text was passed on: keep its last token, as context for the next one.

        Alone it may decode to something else (without its leading space, or to U+FFFD if it is the end
        of a character), but to the same whatever follows, so the difference is the text of what follows.
        """
        del self._window[:-1]
        self._shown = len(self._decode(self._window))

    def _shorten(self, text: str) -> None:
        """Drop tokens from a window whose text keeps ending in U+FFFD (a model that emits broken bytes).

        A token boundary is safe to cut at if both sides decode to the same text alone as together: a
        character, or the beginning of one, that lies across it would be replaced on both sides. It has
        at most 4 bytes, so one of the last 4 boundaries is safe.
        """
        for kept in range(1, 5):
            head, tail = self._decode(self._window[:-kept]), self._decode(self._window[-kept:])
            if head + tail == text and len(head) <= self._shown:
                del self._window[:-kept]
                self._shown -= len(head)
                return

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string in ``text`` begins, and the longest of those that begin there."""
        found = [(place, -len(stop), stop) for stop in self._stop if (place := text.find(stop, self._old)) >= 0]
        if not found:
            return None
        place, _, stop = min(found)
        return place, stop

    def _emit(self, new: str, *, last: bool = False) -> str:
        """Pass on certain text, up to a stop string or to what could become one."""
        text = self._maybe_stop + new
        self._maybe_stop = ""
        first = self._first_stop(text)
        if first is not None:
            text = text[: first[0]]
            self.stopped = first[1]
        elif not last:
            held = self._stop_prefix(text)
            text, self._maybe_stop = text[: len(text) - held], text[len(text) - held :]
        self._old = max(0, self._old - len(text))
        if text:
            self._pieces.append(text)
        return text

    def _stop_prefix(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
