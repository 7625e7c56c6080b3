"""Regenerate the modules *_pb2 from the .proto files beside them: python proto/generate.py"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent

if __name__ == "__main__":
    # The schemas are registered under kvloom_proto/...: the pool of descriptors is process-wide, and a bare state.proto
    # would collide with somebody else's.
    schemas = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("kvloom_proto/*.proto"))
    sys.exit(protoc.main(["protoc", f"-I{ROOT}", f"--python_out={ROOT}", f"--mypy_out={ROOT}", *schemas]))
