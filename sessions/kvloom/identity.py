"""Model identity: what defines the function that turns tokens into logits and state.

The digest is taken of the tensors as they were loaded, in the dtype they compute in. So a GGUF file, the
folder it was converted to and a live object are one model, wherever they lie; and any edit, another dtype,
an adapter switched on or a changed rope is another model, with the field that differs named.

Tokenizer and chat template have digests of their own: they decide which tokens there are, not what the
model makes of them. Importing this module costs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgpack
import xxhash

from kvloom.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Config entries, at any depth, that can't change what the model computes from given token ids.
_IGNORED = frozenset(
    {
        # where it came from, and how it was written
        *("_name_or_path", "_model_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("architectures", "auto_map", "dtype", "torch_dtype"),  # the class and the tensors' dtype are fields
        # what is returned besides logits, and where caches are kept
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        # which kernel: rounding, that is provenance
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal"),
        *("_attn_implementation_autoset", "_experts_implementation", "chunk_size_feed_forward"),
        # ids that generation stops or pads at; the tokenizer digest covers what they mean
        *("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("decoder_start_token_id", "tokenizer_class"),
        # other heads than the language model's; how weights were drawn before training
        *("id2label", "label2id", "num_labels", "problem_type", "initializer_range", "initializer_factor"),
    }
)
_ADAPTER_MARKS = ("lora_", "adapter", "modules_to_save")
_MEMO_ENTRIES = 64
_SETTLED_NS = 2_000_000_000
_SAMPLES = 64  # elements of each tensor looked at to notice an edit


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """``digest`` (16 bytes) names the function; ``fields`` is what it was made of, readable.

    ``tokenizer`` and ``chat_template`` are hex digests ("none" where there is none), not part of ``digest``.
    """

    digest: bytes
    fields: Mapping[str, str] = field(hash=False)
    tokenizer: str
    chat_template: str


def identity_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelIdentity:
    """Identify a live model, whatever was done to it since it was loaded.

    There is no parameter for the folder it came from: an object in memory may have been edited, so what a
    folder says of it counts only through ``loaded_from``, and only while the tensors are untouched.

    Adapters are read at every call. The base weights' digest is remembered for as long as no tensor was
    replaced or edited (see ``_fingerprint``). Measured
    with SmolLM2 in float32: the weights 25 to 70 ms (once; nothing with a memo), the tokenizer 20 to 50
    (a caller may take its digest once), everything else 10 to 15 at every call.

    Raises UnsupportedModel for tensors that hold no data here (offloaded to disk, meta device).
    """
    base, adapters = _split(model)
    # PEFT's wrapper answers get_base_model; Any, because torch types every attribute of a module as a module
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    _, rope = _config_parts(inner.config.to_dict())
    fields = {
        "weights": _weights_digest(model, base),
        "adapters": adapters,
        "architecture": type(inner).__name__,
        **config_fields(inner.config),
        "rope": f"{_text(rope)} buffers {_rope_buffers(inner)}",
        "dtype": "+".join(sorted({_dtype(t) for t in base.values() if t.is_floating_point()})),
    }
    packed: bytes = msgpack.packb(["kvloom model", 1, sorted(fields.items())])
    return ModelIdentity(
        digest=hashlib.blake2b(packed, digest_size=16).digest(),
        fields=MappingProxyType(fields),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=_template_digest(tokenizer),
    )


def config_fields(config: Any) -> dict[str, str]:
    """The fields of an identity that follow from a model's config alone, whether the model is loaded or not."""
    parts, _ = _config_parts(config.to_dict())
    sizes = config.get_text_config()
    return {
        "config": _hex(_text(parts).encode()),
        "layers": _size(sizes, "num_hidden_layers"),
        "hidden_size": _size(sizes, "hidden_size"),
        "heads": _size(sizes, "num_attention_heads"),
        "vocab_size": _size(sizes, "vocab_size"),
    }


def differences(stored: Mapping[str, str], live: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What differs, as (field, stored, live), in the stored order; "" stands for a field one side lacks."""
    names = [*stored, *(name for name in live if name not in stored)]
    rows = [(name, stored.get(name, ""), live.get(name, "")) for name in names]
    return [row for row in rows if row[1] != row[2]]


# --- base weights -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Live:
    """What is known of a live model: valid while its tensors have this fingerprint."""

    fingerprint: bytes
    weights: str | None
    key: str | None = None  # the folder it was loaded from, to be told to the memo
    memo: Memo | None = None


_live: WeakKeyDictionary[Any, _Live] = WeakKeyDictionary()
_lock = threading.Lock()


def loaded_from(model: torch.nn.Module, key: str, memo: Memo) -> None:
    """Told by ``load``, at once after loading: these tensors are what the folder of ``key`` holds.

    Only here can that be known. Once the tensors change, folder and memo are forgotten for this object,
    so a memo is neither believed for an edited model nor written from one.
    """
    base, _ = _split(model)
    fingerprint = _fingerprint(base)
    if fingerprint is not None:
        with _lock:
            _live[model] = _Live(fingerprint, memo.get(key), key, memo)


def forget(model: torch.nn.Module) -> None:
    """Have the next ``identity_of`` read every weight again."""
    with _lock:
        _live.pop(model, None)


def _weights_digest(model: torch.nn.Module, base: Mapping[str, torch.Tensor]) -> str:
    fingerprint = _fingerprint(base)
    with _lock:
        known = _live.get(model)
    if known is None or known.fingerprint != fingerprint:
        known = None
    elif known.weights is not None:
        return known.weights
    digest = _tensors_digest(base)
    if fingerprint is not None:
        if known is not None and known.memo is not None and known.key is not None:
            known.memo.put(known.key, digest)
        with _lock:
            _live[model] = _Live(fingerprint, digest)
    return digest


def _fingerprint(tensors: Mapping[str, torch.Tensor]) -> bytes | None:
    """A few milliseconds' work that notices edited or replaced tensors; None where nothing can.

    Version counters see in-place edits and addresses see replaced tensors, but ``weight.data += delta``
    (so PEFT merges adapters) moves neither: hence the samples. An edit through ``.data`` that misses all
    sampled elements is not seen; ``forget`` is for that.
    """
    import torch

    digest = xxhash.xxh3_128()
    samples = []
    for name, tensor in tensors.items():
        if tensor.is_inference() or tensor.is_meta:  # no version counter, or nothing to read
            return None
        digest.update(f"{name} {tensor._version} {tensor.data_ptr()} {tensor.dtype} {tensor.shape}".encode())
        flat = tensor.detach().reshape(-1)
        # an odd stride, so that columns of a matrix whose width is a power of two are all met
        some = flat[:: (flat.numel() // _SAMPLES) | 1]
        samples.append(some.contiguous().view(torch.uint8).reshape(-1))
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    for part in by_device.values():
        digest.update(_raw(torch.cat(part)))  # one transfer a device, not one a tensor
    return digest.digest()


def _tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Over (name, dtype, shape, XXH3-128 of the bytes), sorted by name; 16 bytes as hex."""
    rows = [
        (name, _dtype(tensor), list(tensor.shape), xxhash.xxh3_128_digest(_raw(tensor)))
        for name, tensor in sorted(tensors.items())
    ]
    return _hex(msgpack.packb(rows))


def _raw(tensor: torch.Tensor) -> Any:
    """The tensor's bytes in row-major order, without a copy where it lies so in this machine's memory."""
    import torch

    if tensor.is_meta:
        raise UnsupportedModel("a model with offloaded weights", "their bytes can't be read to identify it")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _split(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    """Base tensors by name, and the digest of the adapters that are switched on ("none" if none is).

    Base names are those of the model without PEFT, so that adding an adapter changes "adapters" alone.
    """
    tuners = _tuners(model)
    base: dict[str, torch.Tensor] = {}
    adapters: dict[str, torch.Tensor] = {}
    for name, tensor in _persistent(model):
        tuner = next((path for path in _prefixes(name) if path in tuners), None)
        inside = tuner is not None and not name.startswith((f"{tuner}.base_layer", f"{tuner}.original_module"))
        if not inside and not any(mark in name for mark in _ADAPTER_MARKS):
            base[_base_name(name)] = tensor
        elif tuner is None or not tuners[tuner].idle.intersection(name.split(".")):
            adapters[_base_name(name)] = tensor
    states = [(_base_name(path), tuner.state) for path, tuner in tuners.items() if tuner.state]
    if not adapters and not states:
        return base, "none"
    rows = [_tensors_digest(adapters), sorted(states), sorted(getattr(model, "peft_config", {}))]
    return base, _hex(msgpack.packb(rows))


@dataclass(frozen=True, slots=True)
class _Tuner:
    state: str  # active adapters, their scales, what is merged; "" when switched off
    idle: frozenset[str]  # names of the adapters it holds and does not use


def _tuners(model: torch.nn.Module) -> dict[str, _Tuner]:
    """PEFT's layers by path: they wrap a ``base_layer``, and scale what each active adapter adds to it."""
    found = {}
    for path, module in model.named_modules():
        scaling = getattr(module, "scaling", None)  # a number in attention layers, a dict in PEFT's
        if not isinstance(scaling, dict) and not hasattr(module, "active_adapter"):
            continue
        active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or []
        names = [active] if isinstance(active, str) else list(active)
        if getattr(module, "disable_adapters", False) is True:
            names = []
        scales = scaling if isinstance(scaling, dict) else {}
        used = [[name, repr(scales.get(name))] for name in names]
        merged = list(getattr(module, "merged_adapters", None) or [])
        state = _text([used, merged]) if used or merged else ""
        found[path] = _Tuner(state, frozenset(scales).difference(names, merged))
    return found


def _persistent(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=True)  # tied weights once
    for path, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), tensor


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _base_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


# --- config and rope --------------------------------------------------------------------------------


def _config_parts(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a config into what matters and, of that, what is rope; None is as good as absent."""
    rest: dict[str, Any] = {}
    rope: dict[str, Any] = {}
    for name, value in config.items():
        if name in _IGNORED or value is None:
            continue
        if name == "quantization_config" and _canonical(value).get("quant_method") == "gguf":
            continue  # the tensors were de-quantised: their own digest says it all
        if name.startswith("rope") or name == "partial_rotary_factor":
            rope[name] = _canonical(value)
        elif isinstance(value, Mapping):
            rest[name], inner = _config_parts(value)
            if inner:
                rope[name] = inner
        else:
            rest[name] = _canonical(value)
    return rest, rope


def _canonical(value: Any) -> Any:
    """Plain data that reads the same before and after a trip through JSON (10000 and 10000.0 are one)."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _canonical(value.to_dict()) if hasattr(value, "to_dict") else str(value)


def _rope_buffers(model: torch.nn.Module) -> str:
    """Digest of the frequencies as they are in memory: ``model.to(bfloat16)`` rounds them, too.

    Dynamic rope rewrites them as a text grows and keeps the original beside: there, that one counts, or a
    model would become another by being used.
    """
    found = {}
    for path, module in model.named_modules():
        kind = getattr(module, "rope_type", "")
        kinds = set(kind.values()) if isinstance(kind, Mapping) else {kind}
        moving = bool(kinds & {"dynamic", "longrope"})
        for name, tensor in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                original = name.removesuffix("inv_freq") + "original_inv_freq"
                if moving and not name.endswith("original_inv_freq"):
                    tensor = getattr(module, original, tensor)
                found[f"{path}.{name}"] = tensor
    return _tensors_digest(found) if found else "none"


# --- tokenizer --------------------------------------------------------------------------------------


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Digest of vocabulary, merges, added tokens, normaliser and what else turns text into ids."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python: no description of its rules to be had but its name and vocabulary
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        return _hex(msgpack.packb(parts))
    return backend_digest(backend.to_str())


def backend_digest(text: str) -> str:
    """The digest of a tokenizer by its description, the text of its tokenizer.json."""
    # Truncation and padding are left behind by calls, and stand before "added_tokens" in the fixed order
    # the library writes. Cutting there instead of parsing: 20 ms, not 150, at every opening of a model.
    start = text.find('"added_tokens"')
    if start < 0 or '"truncation"' not in text[:start] or '"padding"' not in text[:start]:
        content = json.loads(text)
        content.pop("truncation", None)
        content.pop("padding", None)
        return _hex(_text(content).encode())
    return _hex(text[start:].encode())


def _template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return "none" if template is None else _hex(_text(template).encode())


# --- memo -------------------------------------------------------------------------------------------


def folder_key(folder: Path, dtype: str) -> str | None:
    """A key that changes when any file of a model folder does, or None where that can't be told.

    Size and mtime can be set back by copying tools, so inode and ctime count too. Files changed within
    the last two seconds get no key: a second change could fall into the same tick of the file clock.
    """
    import transformers

    rows: list[Any] = [str(folder.resolve()), dtype, transformers.__version__]
    newest = 0
    try:
        for path in sorted(folder.rglob("*")):
            stat = path.stat()
            rows.append([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
            newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError:
        return None
    if len(rows) == 3 or time.time_ns() - newest < _SETTLED_NS:
        return None
    return _hex(msgpack.packb(rows))


class Memo:
    """Weights digests by folder key, in one small JSON file. A damaged or unwritable file is no memo."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> str | None:
        """The digest remembered for ``key``, or None."""
        return self._read().get(key)

    def put(self, key: str, digest: str) -> None:
        """Remember a digest; the oldest of more than 64 is dropped. Of two writers the last one wins."""
        entries = {**self._read(), key: digest}
        kept = dict(list(entries.items())[-_MEMO_ENTRIES:])
        with contextlib.suppress(OSError):  # a cache that can't be written only costs time
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(prefix=".identities-", dir=self._path.parent)  # 0600
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump({"version": 1, "weights": kept}, file)
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_text("utf-8"))
            entries = content["weights"] if content["version"] == 1 else {}
            return {key: value for key, value in entries.items() if _is_digest(value)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")


def _hex(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(config: Any, name: str) -> str:
    return str(getattr(config, name, None) or "?")
