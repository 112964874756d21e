"""What the quantizer tells the person who started it, in one line."""

from __future__ import annotations


class QuantizerError(Exception):
    """The job cannot go on; the message names the file, the tensor or the flag."""
