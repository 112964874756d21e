"""`python -m services.engine serve`: signals first, then the imports, which take a while."""

from __future__ import annotations

import sys

from weft.config import keep_grpc_quiet
from weft.rpc.early import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()
    keep_grpc_quiet()

    from services.engine.serve import main
    from weft.rpc.server import exit_process

    exit_process(main(sys.argv[1:]))
