"""A chat template of the user's own: read from a file, and checked before anything is made for it.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from kvloom.errors import InvalidText, SessionError

MAX_TEMPLATE_BYTES = 1 << 20
"""A published template has a few thousand bytes."""

_HINT = "a chat template is a Jinja text; kvloom's examples/templates/gemma.jinja is one"


def read(path: Path) -> str:
    """The template in a file: UTF-8, at most 1 MiB, valid Jinja. Raises SessionError and InvalidText."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        reason = getattr(error, "strerror", None) or error
        raise SessionError(f"cannot read the chat template {path}: {reason}", hint="give another file") from error
    try:
        # As the tokenizer's own file would give it; a text editor may begin it with a byte-order mark.
        source = data[:MAX_TEMPLATE_BYTES].decode("utf-8-sig") if len(data) <= MAX_TEMPLATE_BYTES else ""
    except UnicodeDecodeError as error:
        message = f"the chat template {path} is not valid UTF-8 (byte {error.start})"
        raise InvalidText(message, hint="convert it first: iconv -t UTF-8") from error
    if len(data) > MAX_TEMPLATE_BYTES:
        raise _too_large()
    check(source)
    return source


def check(source: str) -> None:
    """Refuse what is too large for a template, empty, or no Jinja. Raises SessionError with the line."""
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise InvalidText("the chat template is not valid Unicode", hint=_HINT) from error
    if size > MAX_TEMPLATE_BYTES:
        raise _too_large()
    if not source.strip():
        raise SessionError("the chat template is empty", hint=_HINT)
    from transformers.utils import chat_template_utils as hf

    try:
        hf._compile_jinja_template(source)  # as it is compiled to be rendered: published templates use extensions
    except Exception as error:  # TemplateSyntaxError; others where brackets are nested too deep
        line = getattr(error, "lineno", None)
        reason = str(error).partition("\n")[0] or type(error).__name__
        where = f" (line {line})" if line else ""
        raise SessionError(f"the chat template is not valid Jinja: {reason}{where}", hint=_HINT) from error


def _too_large() -> SessionError:
    return SessionError(f"a chat template has at most {MAX_TEMPLATE_BYTES:,} bytes", hint=_HINT)
