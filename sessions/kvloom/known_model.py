"""What can be known of a model without loading its weights: its tokenizer, what ends a reply, parts of its identity.

Importing this module loads neither torch nor transformers; asking it something loads both, which takes seconds, but not
the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom import models
from kvloom.errors import ModelNotFound
from kvloom.identity import config_fields, differences, folder_key, tokenizer_digest
from kvloom.quiet import explained, quiet, silent

if TYPE_CHECKING:
    from kvloom.engine import TransformersEngine


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model's tokenizer, the tokens that end its replies, and those ``fields`` of its identity that can be told."""

    name: str
    dtype: str
    tokenizer: Any
    eos_ids: frozenset[int]
    fields: Mapping[str, str]
    digest: str

    def differences(self, settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """(field, stored, asked) of everything in which this is not the model of a session with these settings."""
        stored = settings["model_fields"]
        found = [("dtype", settings["dtype"], self.dtype)] if settings["dtype"] != self.dtype else []
        # Of other weights in another precision, what the user can change comes first, and of other sizes the sizes.
        found += [row for row in differences(stored, {**stored, **self.fields}) if row[0] != "dtype"]
        found += [("tokenizer", settings["tokenizer"], self.digest)] if settings["tokenizer"] != self.digest else []
        return sorted(found, key=lambda row: row[0] in ("weights", "config"))

    def unchecked(self, settings: Mapping[str, Any]) -> list[str]:
        """The fields of a session's model that only the loaded model would tell."""
        return [name for name in settings["model_fields"] if name not in self.fields]


def of_engine(engine: TransformersEngine) -> KnownModel:
    """A model that is loaded: everything is known."""
    identity = engine.identity()
    return KnownModel(engine.name, engine.dtype, engine.tokenizer, engine.eos_ids, identity.fields, identity.tokenizer)


def of_name(name: str, dtype: str) -> KnownModel:
    """A model by alias, folder, .gguf file or hub name, read from its small files.

    Its weights are known if it was loaded here before, and none of its files has changed since.

    Raises ModelNotFound (also where it would have to be converted or downloaded first), EngineError.
    """
    source = models.resolve(name)
    with explained(name, gguf=False):
        folder = models.folder_here(source)
        if folder is None:
            hint = "it was not downloaded or converted here yet: kvloom say with --model does that"
            raise ModelNotFound(name, hint=hint)
        from transformers import AutoConfig, AutoTokenizer

        with quiet(silent):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        chosen = models.pick_dtype(dtype)  # type: ignore[arg-type]
        key, ends = folder_key(folder, chosen), _eos_ids(folder, config, tokenizer)
    weights = models.memo().get(key) if key is not None else None
    return KnownModel(
        name=source.name,
        dtype=chosen,
        tokenizer=tokenizer,
        eos_ids=ends,
        fields={**config_fields(config), "dtype": chosen, **({"weights": weights} if weights else {})},
        digest=tokenizer_digest(tokenizer),
    )


def _eos_ids(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """What the engine of the loaded model would end a reply at."""
    named, generation = config.eos_token_id, folder / "generation_config.json"
    if generation.is_file():  # else transformers makes one from the config
        named = json.loads(generation.read_text("utf-8")).get("eos_token_id")
    ends = models.turn_ends(named, tokenizer.get_added_vocab())
    return models.eos_ids(ends, config.eos_token_id, tokenizer.eos_token_id)
