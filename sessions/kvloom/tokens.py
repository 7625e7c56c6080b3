"""From token ids to text without the model: the tokenizer alone, found where the model was found.

Looking at a conversation must not wait for torch. A tokenizer is taken only if it is the very one the conversation
was made with, by its digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvloom.errors import EngineError, KVLoomError, ModelMismatch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kvloom.loom import KVLoom

TOKENIZER = "tokenizer.json"


class Decoder(Protocol):
    """What of a transformers tokenizer is needed to turn ids into text."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


class TextTokenizer:
    """A tokenizer that only decodes, as transformers' own would: a ``Decoder``."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.all_special_ids = [i for i, token in self.added_tokens_decoder.items() if token.special]

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """A token as the vocabulary spells it; None if it has none of that id."""
        return self._backend.id_to_token(ids)

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """The text of some tokens."""
        return self._backend.decode(token_ids, skip_special_tokens=bool(options.get("skip_special_tokens")))


def tokenizer_of(loom: KVLoom, settings: Mapping[str, Any]) -> Decoder | None:
    """The tokenizer of a session with these settings, if it can be had without loading a model."""
    if loom.has_engine and loom.engine.identity().tokenizer == settings["tokenizer"]:
        engine: Decoder = loom.engine.tokenizer
        return engine
    return tokenizer_for(settings["model"], settings["tokenizer"])


def needed_tokenizer(loom: KVLoom, settings: Mapping[str, Any]) -> Decoder:
    """The tokenizer of a session, with the model if it cannot be had otherwise.

    Raises:
        EngineError: it is not here, and the store was opened without a model.
        ModelMismatch: the store's model has another one.
    """
    found = tokenizer_of(loom, settings)
    if found is not None:
        return found
    if not loom.has_model:
        raise EngineError(
            f"a turn cannot be cut without its tokenizer, and that of {settings['model']} is not here",
            hint="fork at a turn, or use kvloom continue REF or kvloom say REF, which load the model",
        )
    live = loom.engine.identity().tokenizer
    if live != settings["tokenizer"]:
        raise ModelMismatch("tokenizer", settings["tokenizer"][:16], live[:16])
    engine: Decoder = loom.engine.tokenizer
    return engine


def tokenizer_for(model: str, digest: str) -> TextTokenizer | None:
    """The tokenizer of a model by alias, folder, .gguf file or hub name, if it is on this machine and has that digest.

    Nothing is converted or downloaded for it.
    """
    from kvloom.identity import backend_digest

    try:
        path = _file(model)
        if path is None or not path.is_file():
            return None
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(path))
    except (KVLoomError, OSError):
        return None
    except Exception:  # what a damaged file raises is a plain Exception
        return None
    return TextTokenizer(backend) if backend_digest(backend.to_str()) == digest else None


def _file(model: str) -> Path | None:
    from kvloom.models import folder_here, resolve

    folder = folder_here(resolve(model))
    return folder / TOKENIZER if folder is not None else None


def pieces(tokenizer: Decoder, ids: Sequence[int]) -> list[str]:
    """The text of each token, control tokens included; what is less than a character shows as U+FFFD.

    Decoders treat the first token they see differently (its leading space), so each is decoded after the one before.
    """
    return [piece(tokenizer, ids[max(0, at - 1) : at], ids[at]) for at in range(len(ids))]


def piece(tokenizer: Decoder, before: Sequence[int], token: int) -> str:
    """The text of one token where the token ``before`` it is there (none at the very beginning)."""
    alone = text_of(tokenizer, [token])
    head, both = text_of(tokenizer, before), text_of(tokenizer, [*before, token])
    return both[len(head) :] or alone if both.startswith(head) else alone


def text_of(tokenizer: Decoder, ids: Iterable[int], *, control: bool = True) -> str:
    """The text of some tokens, with or without control tokens."""
    ids = list(ids)
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=not control, clean_up_tokenization_spaces=False)
