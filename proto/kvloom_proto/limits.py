"""A named limit for every length and count that is read from outside."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 << 20
"""A serialized manifest, schedule, provenance or token scores."""

MAX_LAYERS = 4096
"""Layers of one model."""

MAX_TENSORS_PER_LAYER = 64

MAX_DIMENSIONS = 8

MAX_TOKENS = 1 << 24
"""Tokens of one path."""

MAX_CHUNKS = 1 << 20
"""Chunks of one segment."""

MAX_PASSES = 1 << 20
"""Entries of one schedule."""

MAX_BATCH = 1024
"""Paths that are decoded together."""

MAX_CHUNK_BYTES = 256 << 20
"""Raw bytes of one chunk."""

MAX_NAME_BYTES = 256
"""A tensor, codec, dtype or device name."""

MAX_ALTERNATIVES = 64
"""Tokens kept beside each generated one."""

MAX_TURN_BYTES = 64 << 20
"""One message as MessagePack."""

MAX_VOCABULARY = 1 << 31
"""Token ids are below this: they are stored as 32-bit unsigned integers."""

MAX_SETTINGS_BYTES = 16 << 20
"""Settings of a session or a turn, or the fields of a model, as MessagePack."""

MAX_DEPTH = 32
"""Lists and mappings within one another in a MessagePack value of a bundle."""

MAX_HIDDEN_BYTES = 4 << 20
"""A final hidden state."""

MAX_RECORD_BYTES = (256 << 20) + 4096
"""One record of a bundle: a chunk, or a message with its settings."""

MAX_BUNDLE_RECORDS = 1 << 18
"""Records of one kind in a bundle, chunks aside."""

MAX_BUNDLE_TOKENS = 1 << 26
"""Tokens of all nodes of a bundle."""

CHUNK_TOKENS = 256
"""Chunks are cut at absolute multiples of this many tokens."""

WINDOW_CHUNK_TOKENS = 32
"""Chunks of a model that has windows are cut at absolute multiples of this many tokens: only the last W rows are read,
and what is read besides them is less than one chunk at either end, and wherever a branch left its path."""

CHUNK_BYTES = 4 << 20
"""Layers are put into one chunk until it has about this many raw bytes (measured: benchmarks/NOTES.md)."""
