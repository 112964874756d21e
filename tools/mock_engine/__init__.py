"""An engine without a model: the real scheduler, block manager, link and server around a runner that draws
each next token as a keyed hash of the whole history read back through the block table.

Whatever loses, doubles or mixes up tokens, reads a wrong block or resumes at a wrong place changes what comes
next, and `oracle.expected_tokens` says what should have come. For tests, load and fault runs.
"""

from tools.mock_engine.config import MockConfig
from tools.mock_engine.engine import MockEngine

__all__ = ["MockConfig", "MockEngine"]
