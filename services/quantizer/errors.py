"""What the quantizer tells the person who started it, in one line."""

from __future__ import annotations


class QuantizerError(Exception):
    """The job cannot go on; the message names the file, the tensor or the flag."""


class GateMissed(QuantizerError):
    """The finished artifact is worse than the user allows: nothing was published. The work is good all the
    same, so what was kept for resuming it stays: a run with wider bounds has only to publish.
    """


class NameBusyError(QuantizerError):
    """Another run of the same name is at work; the message says which, if it is known."""
