"""Regenerate state_pb2.py and state_pb2.pyi from state.proto: python proto/generate.py"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent

if __name__ == "__main__":
    # The schema is registered under kvloom_proto/state.proto: the pool of descriptors is process-wide,
    # and a bare state.proto would collide with somebody else's.
    sys.exit(
        protoc.main(["protoc", f"-I{ROOT}", f"--python_out={ROOT}", f"--mypy_out={ROOT}", "kvloom_proto/state.proto"])
    )
