"""The names of the ways in which a chunk's bytes are stored, as manifests and users say them."""

from __future__ import annotations

RAW = "raw"
LZ4 = "lz4"
ZSTD = "zstd"

LOSSLESS = (RAW, LZ4, ZSTD)
"""From the one that decodes fastest to the one that packs best."""

AUTO = "auto"
"""Setting, in no manifest: the one of LOSSLESS that a chunk is worth."""

SETTINGS = (*LOSSLESS, AUTO)
"""What may be asked for when state is stored."""
