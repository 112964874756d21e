"""A quantized checkpoint that reads like a plain one: each packed linear appears as the fp32 weight that an
artifact will hold of it.

So whatever can work on a checkpoint (the source with its layers, the canary) works on this. Does not know
what an architecture is made of, nor how artifacts are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.quantizer.errors import QuantizerError
from services.quantizer.grid import QuantizedWeight
from services.quantizer.importing.conform import GROUP_SIZES, Rounded, conform, largest_group_size
from services.quantizer.importing.layouts import Layout, open_layout
from services.quantizer.importing.scheme import Scheme, parse_scheme
from services.quantizer.model_map import ARCHITECTURES
from weft.artifact.checkpoint import Checkpoint

_HINT = "--allow-requantize rounds them"


class PackedCheckpoint:
    """An opened checkpoint of a known scheme, with the reading half of `Checkpoint`'s interface.

    Attributes:
        directory, config, names: as of a plain checkpoint: no quantization_config, `<linear>.weight` in place
            of what is packed.
        scheme: what config.json said.
        linears: names of the packed linears.
        key: what marks one: the ending of its packed weight's name.
        group_size: of the artifact, the largest that all of them can have.
        rounded: by name, the groups that are not what the source holds; filled as weights are read.
    """

    def __init__(self, checkpoint: Checkpoint, *, allow_requantize: bool) -> None:
        where = checkpoint.directory / "config.json"
        packed = next((n for n in sorted(checkpoint.names) if n.endswith(".qweight")), None)
        if packed is not None and checkpoint.config.get("quantization_config") is None:
            raise QuantizerError(
                f"{where}: no quantization_config, though tensor {packed} is packed; older tools kept it in "
                "a file of its own, whose contents belong there, with a quant_method"
            )
        self.scheme: Scheme = parse_scheme(checkpoint.config, where)
        self.directory = checkpoint.directory
        self.config: dict[str, Any] = {
            key: value for key, value in checkpoint.config.items() if key != "quantization_config"
        }
        self.rounded: dict[str, Rounded] = {}
        self._checkpoint, self._allow_requantize = checkpoint, allow_requantize
        self._layout: Layout = open_layout(checkpoint, self.scheme)
        self._read: tuple[str, QuantizedWeight] | None = None
        self.key = self._layout.key
        suffix = f".{self.key}"
        self.linears = frozenset(n.removesuffix(suffix) for n in checkpoint.names if n.endswith(suffix))
        if not self.linears:
            raise QuantizerError(f"{checkpoint.directory}: no tensor is named *{suffix}")
        parts = {f"{n}.{s}" for n in self.linears for s in (self.key, *self._layout.others)}
        for name in sorted(n for n in self.linears if f"{n}.weight" in checkpoint.names):
            raise QuantizerError(f"tensor {name}.weight: is also there as {name}{suffix}")
        self.names = (checkpoint.names - parts - self._empty_biases()) | {
            f"{name}.weight" for name in self.linears
        }
        self.group_size = self._find_group_size()

    @classmethod
    def open(cls, directory: Path, *, allow_requantize: bool = False) -> PackedCheckpoint:
        """Open what lies in `directory`. Raises CheckpointError and QuantizerError."""
        return cls(Checkpoint.open(directory, implemented=ARCHITECTURES), allow_requantize=allow_requantize)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return self._checkpoint.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor."""
        linear = self._linear(name)
        return self._checkpoint.shape(name) if linear is None else self._layout.shape(linear)

    def dtype(self, name: str) -> str:
        """As safetensors calls it; "F32" for what was packed."""
        return self._checkpoint.dtype(name) if self._linear(name) is None else "F32"

    def load(self, name: str) -> Tensor:
        """A tensor in its stored dtype; fp32 [out, in] for what was packed."""
        linear = self._linear(name)
        return self._checkpoint.load(name) if linear is None else self.quantized(linear).dequantize()

    def quantized(self, linear: str) -> QuantizedWeight:
        """A packed linear as the artifact will hold it. Raises QuantizerError when that is not what the
        source holds, unless it may be rounded.
        """
        if self._read is not None and self._read[0] == linear:
            return self._read[1]
        stored = self._layout.read(linear)
        name = f"{linear}.{'weight_scale' if self.key == 'weight_packed' else 'scales'}"
        rounded = Rounded()
        weight = conform(stored, name, self.group_size, rounded)
        if rounded.groups:
            if not self._allow_requantize:
                reason, count = next(iter(rounded.groups.items()))
                num_groups = weight.zeros.numel()
                raise QuantizerError(
                    f"tensor {linear}.{self.key}: {count} of {num_groups} groups have {reason}, "
                    f"which an artifact cannot hold exactly; {_HINT}"
                )
            self.rounded[linear] = rounded
        self._read = (linear, weight)
        return weight

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if name.endswith(".weight") and linear in self.linears else None

    def _empty_biases(self) -> frozenset[str]:
        """Biases of zeros that some writers add to every packed linear. They are not listed, so that nobody
        wonders about them, but can be read by whoever expects one.
        """
        names = {f"{linear}.bias" for linear in self.linears} & self._checkpoint.names
        return frozenset(name for name in names if not bool(torch.any(self._checkpoint.load(name) != 0)))

    def _find_group_size(self) -> int:
        sizes = []
        for linear in sorted(self.linears):
            num_out, num_in = self._layout.shape(linear)
            name = f"{linear}.{self.key}"
            if num_out % 8:
                raise QuantizerError(f"tensor {name}: {num_out} outputs do not divide by 8")
            num_groups, index = self._layout.num_groups(linear), self._layout.group_index(linear)
            size = largest_group_size(num_in, num_groups, index)
            if size is None and index is not None:
                size = largest_group_size(num_in, 1, None) if self._allow_requantize else None
                if size is None:
                    raise QuantizerError(
                        f"tensor {linear}.{self._layout.index}: act-order puts the inputs of one run into "
                        f"several groups, which an artifact cannot hold exactly; {_HINT}"
                    )
            if size is None:
                raise QuantizerError(
                    f"tensor {name}: groups of {num_in // num_groups} inputs; an artifact has groups of "
                    f"{', '.join(map(str, sorted(GROUP_SIZES)))}, or whole multiples in the source"
                )
            sizes.append(size)
        return min(sizes)
