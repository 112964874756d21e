"""What two services of Weft must agree on: the wire, the artifact, configuration, logs, the size formulas.

It does not know any service: nothing below this package imports `services`.
"""

__version__ = "0.1.0"
