"""The defaults a model's makers recommend: generation_config.json. A field of the request always wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weft import logs
from weft.sampling import validate_sampling
from weft.v1 import generation_pb2 as pb

log = logs.get_logger("gateway.assets")
# Beyond it a number may be too large for a float; the validator refuses it long before.
MAX_NUMBER = 1e30
_FLOATS = ("temperature", "top_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling fields that an unset field takes, and the ids that end an output."""

    sampling: pb.SamplingParams
    eos_token_ids: tuple[int, ...]

    @classmethod
    def parse(cls, document: dict[str, Any]) -> GenerationDefaults:
        """Read what is usable; a value that no request might carry is left out and logged."""
        sampling = pb.SamplingParams()
        for name in _FLOATS:
            value = document.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER:
                _set_if_valid(sampling, name, float(value))
        top_k = document.get("top_k")
        if type(top_k) is int and 0 <= top_k < 2**31:
            _set_if_valid(sampling, "top_k", top_k)
        eos = document.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        return cls(sampling, tuple(i for i in ids if type(i) is int and 0 <= i < 2**31))

    def apply(self, sampling: pb.SamplingParams) -> None:
        """Set what `sampling` leaves open."""
        for field, value in self.sampling.ListFields():
            if not sampling.HasField(field.name):
                setattr(sampling, field.name, value)


def _set_if_valid(sampling: pb.SamplingParams, name: str, value: float) -> None:
    setattr(sampling, name, value)
    if validate_sampling(sampling, vocab_size=None):
        sampling.ClearField(name)
        log.warning("generation config value not usable", field=name, value=value)
