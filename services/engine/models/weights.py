"""From a checkpoint's tensors to linears ready to run: one path for our artifacts, AutoAWQ's,
compressed-tensors' and plain checkpoints.

Knows names, shapes, dtypes and the three ways a linear is stored. Does not know any architecture.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from services.engine.kernels import ops
from services.engine.kernels.linear import ConcatLinear, Linear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.reference import dequantize_int4
from services.engine.kernels.scratch import Scratch
from services.engine.models.config import ModelConfig
from weft.artifact.checkpoint import Checkpoint, CheckpointError
from weft.artifact.packing import SEQUENTIAL, SYMMETRIC_ZERO, unpack_int4, unpack_rows

_FLOATS = ("BF16", "F16", "F32")


class WeightLoader:
    """Loads tensors by name, checks each, and remembers which were used.

    `is_strict` adds what our own artifacts promise: no subnormal scale. AutoAWQ writes some for groups that
    are all zero, and they dequantise exactly. `output_factors` [out], by a linear's or a norm's name, are
    multiplied into it as it is loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        numerics: Numerics,
        is_strict: bool,
        *,
        quantizes_head: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.numerics = numerics
        self._is_strict = is_strict
        self._quantizes_head = quantizes_head
        self.scratch = Scratch()
        self.output_factors: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def dense(self, name: str, shape: tuple[int, ...], *, offset: float = 0.0) -> Tensor:
        """A float tensor of exactly this shape, finite, in the activations' dtype, on their device; with an
        `offset` added it stays fp32.
        """
        tensor = self._load(name, shape, _FLOATS)
        if not bool(torch.isfinite(tensor).all()):
            raise self._error(name, "holds a value that is not finite")
        if offset:
            tensor = tensor.float() + offset
        factors = self.output_factors.get(name.rpartition(".")[0])
        if factors is not None:
            tensor = tensor.float() * factors.view(-1, *[1] * (tensor.ndim - 1))
        return tensor.to(self.numerics.device, torch.float32 if offset else self.numerics.dtype)

    def weight(self, name: str, out_features: int, in_features: int) -> Tensor:
        """The weight of one linear in fp32 [out, in], dequantised when it is packed."""
        if self._is_packed(name):
            return dequantize_int4(*self._int4(name, out_features, in_features)).t()
        return self.dense(f"{name}.weight", (out_features, in_features)).float()

    def head(self, embedding: Tensor, name: str) -> Linear:
        """The output projection: the embedding itself when tied, else the tensor of this name."""
        make = ops.make_int8_linear if self._quantizes_head else ops.make_dense_linear
        if not self.config.tie_word_embeddings:
            weight = self.dense(name, (self.config.vocab_size, self.config.hidden_size))
            return make(weight, None, self.numerics)
        if name in self.checkpoint.names:
            stored = self.dense(name, (self.config.vocab_size, self.config.hidden_size))
            if not torch.equal(stored, embedding):
                raise self._error(name, "differs from the embedding although tie_word_embeddings is true")
        return make(embedding, None, self.numerics)

    def linear(
        self,
        parts: Mapping[str, int],
        in_features: int,
        has_bias: bool,
        *,
        is_gate_up: bool = False,
        order: Tensor | None = None,
    ) -> Linear:
        """Linears that share an input, fused: {name: out_features} in order of their outputs. `is_gate_up`
        says that they are for `linear_silu_mul` or `linear_gelu_mul`. `order` [out], for a single one: which
        of the stored outputs each output is.
        """
        is_packed = {name: self._is_packed(name) for name in parts}
        biases = {name: self.dense(f"{name}.bias", (out,)) for name, out in parts.items()} if has_bias else {}
        if len(set(is_packed.values())) == 1:
            all_packed = next(iter(is_packed.values()))
            return self._fused(
                parts, in_features, biases, is_packed=all_packed, is_gate_up=is_gate_up, order=order
            )
        return ConcatLinear(
            [
                self._fused({name: out}, in_features, biases, is_packed=is_packed[name])
                for name, out in parts.items()
            ]
        )

    def check_all_used(self) -> None:
        """Refuse tensors that no layer asked for: they mean another architecture, or fewer layers than
        stored.
        """
        left = sorted(
            name for name in self.checkpoint.names - self._used if not name.endswith("rotary_emb.inv_freq")
        )
        if left:
            names = ", ".join(left[:5])
            raise CheckpointError(
                f"{self.checkpoint.directory}: {len(left)} tensors that {self.config.architecture} with "
                f"{self.config.num_layers} layers does not have: {names}"
            )

    def _fused(
        self,
        parts: Mapping[str, int],
        in_features: int,
        biases: Mapping[str, Tensor],
        *,
        is_packed: bool,
        is_gate_up: bool = False,
        order: Tensor | None = None,
    ) -> Linear:
        def ordered(outputs: list[Tensor], dim: int) -> Tensor:
            whole = torch.cat(outputs, dim=dim)
            return whole if order is None else whole.index_select(dim, order.to(whole.device))

        bias = ordered([biases[name] for name in parts], 0) if biases else None
        if not is_packed:
            weights = [self.dense(f"{name}.weight", (out, in_features)) for name, out in parts.items()]
            return ops.make_dense_linear(ordered(weights, 0), bias, self.numerics)
        # Words are unpacked first: neighbours in one of them may go different ways.
        packed = [self._int4(name, out, in_features) for name, out in parts.items()]
        values, zeros, scales = (ordered(list(tensors), 1) for tensors in zip(*packed, strict=True))
        return ops.make_int4_linear(
            values, zeros, scales, bias, self.numerics, self.scratch, is_gate_up=is_gate_up
        )

    def _is_packed(self, name: str) -> bool:
        return any(f"{name}.{key}" in self.checkpoint.names for key in ("qweight", "weight_packed"))

    def _int4(self, name: str, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values uint8 [in, out], zeros uint8 [groups, out], scales [groups, out]) of one linear."""
        quantization = self.config.quantization
        key = "qweight" if f"{name}.qweight" in self.checkpoint.names else "weight_packed"
        if quantization is None:
            raise self._error(f"{name}.{key}", "is quantized but config.json has no quantization_config")
        group = in_features if quantization.group_size == -1 else quantization.group_size
        if in_features % group or out_features % 8 or (key == "weight_packed" and in_features % 8):
            raise self._error(
                f"{name}.{key}",
                f"[{in_features}, {out_features}] does not divide into groups of {group} by words of 8",
            )
        read = self._gemm if quantization.layout == "gemm" else self._pack_quantized
        values, zeros, scales = read(name, out_features, in_features, in_features // group)
        factors = self.output_factors.get(name)
        if factors is not None:
            scales = scales * factors.to(scales.dtype)
        return values, zeros, scales.to(self.numerics.device)

    def _gemm(
        self, name: str, out_features: int, in_features: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = self._load(f"{name}.qweight", (in_features, out_features // 8), ("I32",))
        zeros = self._load(f"{name}.qzeros", (groups, out_features // 8), ("I32",))
        scales = self._load(f"{name}.scales", (groups, out_features), _FLOATS)
        self._check_scales(f"{name}.scales", scales)
        device = self.numerics.device
        # Moved packed: an eighth of the bytes, and unpacked where that is fast.
        return unpack_int4(words.to(device)), unpack_int4(zeros.to(device)), scales

    def _pack_quantized(
        self, name: str, out_features: int, in_features: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = self._load(f"{name}.weight_packed", (out_features, in_features // 8), ("I32",))
        scales = self._load(f"{name}.weight_scale", (out_features, groups), _FLOATS)
        self._check_scales(f"{name}.weight_scale", scales)
        stated, shape = self._load(f"{name}.weight_shape", (2,), ("I64", "I32")), [out_features, in_features]
        if stated.tolist() != shape:
            raise self._error(f"{name}.weight_shape", f"says {stated.tolist()}, expected {shape}")
        device = self.numerics.device
        values = unpack_int4(words.to(device), SEQUENTIAL).t().contiguous()
        if self.config.quantization is not None and self.config.quantization.has_zeros:
            packed = self._load(f"{name}.weight_zero_point", (out_features // 8, groups), ("I32",))
            zeros = unpack_rows(packed.to(device)).t().contiguous()
        else:
            zeros = torch.full((groups, out_features), SYMMETRIC_ZERO, dtype=torch.uint8, device=device)
        return values, zeros, scales.t().contiguous()

    def _check_scales(self, name: str, scales: Tensor) -> None:
        if not bool(torch.isfinite(scales).all()):
            raise self._error(name, "holds a value that is not finite")
        smallest = float(scales.min())
        if smallest <= 0:
            raise self._error(name, f"holds {smallest}; scales are above zero")
        if self._is_strict and smallest < 2.0**-14:
            raise self._error(name, f"holds {smallest:.3g}, which is subnormal in fp16")

    def _load(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
        if name not in self.checkpoint.names:
            raise self._error(name, "is missing")
        if self.checkpoint.shape(name) != shape:
            raise self._error(name, f"has shape {list(self.checkpoint.shape(name))}, expected {list(shape)}")
        if self.checkpoint.dtype(name) not in dtypes:
            raise self._error(
                name, f"has dtype {self.checkpoint.dtype(name)}, expected {' or '.join(dtypes)}"
            )
        self._used.add(name)
        return self.checkpoint.load(name)

    def _error(self, name: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.directory}: tensor {name} {text}")
