"""`python -m services.engine serve`: signals first, then the imports, which take a while."""

from __future__ import annotations

import sys

from weft.config import keep_grpc_quiet
from weft.extras import need, said_in_one_line
from weft.rpc.early import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()
    keep_grpc_quiet()

    with said_in_one_line("engine", "python -m services.engine"):
        need("torch")  # imported once the server listens
        from services.engine.serve import main
    from weft.rpc.server import exit_process

    exit_process(main(sys.argv[1:]))
