"""What a user chose once: the default model, dtype, device, codec and keyframe spacing, in a small TOML file.

``KVLOOM_CONFIG`` names another file, ``KVLOOM_MODEL`` another model. Only the command line reads these; the
library is told what to use.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvloom.errors import SessionError
from kvloom_proto.codecs import AUTO, SETTINGS

DEFAULTS = {"model": "smollm2", "dtype": "auto", "device": "cpu", "codec": AUTO, "keyframe_spacing": "256"}
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "codec": SETTINGS,
}
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Config:
    """The choices in force: the environment's before the file's before the defaults."""

    model: str
    dtype: str
    device: str
    codec: str
    keyframe_spacing: str


class ConfigError(SessionError):
    """The config file cannot be read or written, or holds something that is no choice."""


def path() -> Path:
    """``KVLOOM_CONFIG`` if set, else ``config.toml`` in the platform's config folder."""
    given = os.environ.get("KVLOOM_CONFIG")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_config_dir("kvloom", appauthor=False)) / "config.toml"


def load() -> Config:
    """The choices in force. Raises ConfigError."""
    values = {**DEFAULTS, **read()}
    if os.environ.get("KVLOOM_MODEL"):
        values["model"] = os.environ["KVLOOM_MODEL"]
    return Config(**{key: values[key] for key in DEFAULTS})


def read() -> dict[str, str]:
    """What the file says; nothing if there is none. Raises ConfigError."""
    return _parse(_text())


def _text() -> str:
    try:
        with path().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path()} is too large for a config file", hint="delete it, or set KVLOOM_CONFIG")
        return data.decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path()}: {reason}", hint="correct it, or set KVLOOM_CONFIG") from error


def _parse(text: str) -> dict[str, str]:
    if not text.strip():
        return {}
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path()} is not valid TOML: {error}", hint="correct it, or delete it") from error
    for key, value in values.items():
        check(key, value)
    return values


def check(key: str, value: object) -> str:
    """A value that may be set. Raises ConfigError with those that may."""
    if key not in DEFAULTS:
        raise ConfigError(f"there is no setting {key!r}", hint=f"there are {', '.join(DEFAULTS)}")
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} must be text, not {value!r}", hint=f'for example {key} = "{DEFAULTS[key]}"')
    if key == "keyframe_spacing" and not (value.isdigit() and 16 <= int(value) <= 1 << 20):
        raise ConfigError(f"{key} cannot be {value!r}", hint="give a number of tokens, at least 16")
    if key in CHOICES and value not in CHOICES[key]:
        raise ConfigError(f"{key} cannot be {value!r}", hint=f"use {', '.join(CHOICES[key])}")
    return value


def put(key: str, value: str | None) -> None:
    """Set a key, or with None take it out; other lines of the file stay as they are. Raises ConfigError."""
    if value is not None:
        check(key, value)
    text = _text()
    _parse(text)
    kept = [line for line in text.splitlines() if not re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line)]
    if value is not None:
        kept.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    _write("".join(f"{line}\n" for line in kept))


def _write(text: str) -> None:
    target = path()
    _parse(text)
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".config-")  # private: 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        message = f"cannot write {target}: {error.strerror}"
        raise ConfigError(message, hint="check its folder, or set KVLOOM_CONFIG") from error
