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

Q8_0 = "q8_0"
Q4_0 = "q4_0"

LOSSY = (Q8_0, Q4_0)
"""What may be asked for, by name, of state that is stored already: its rows come back as other ones."""

LOSSY_DTYPES = ("float32", "bfloat16", "float16")
"""Of rows of these; never of keyframes."""
