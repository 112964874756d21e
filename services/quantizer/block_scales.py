"""Where the scales of a block's groups may lie, and what they do to the block: the bridge from the
architecture's groups to `scales.py` and `folding.py`.

This module does not know which scales are good, nor that anything is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.quantizer.folding import Folding, fold
from services.quantizer.model_map import ScaleGroup
from services.quantizer.scales import Candidate, ScaleSpace, one_per_producer, weight_means
from services.quantizer.source import STORED_DTYPES, Source, Weights


class BlockScales:
    """Of block `index`: `weights` are its own, in full precision; `groups` those that are quantized, of
    `group_size` input channels per grid.
    """

    def __init__(
        self, source: Source, index: int, weights: Weights, groups: Sequence[ScaleGroup], group_size: int
    ) -> None:
        self._source, self._index, self._weights = source, index, weights
        self._groups, self._group_size = groups, group_size

    def is_scalable(self, group: ScaleGroup) -> bool:
        """A linear that stays in full precision takes no scales: stored in 16 bits, dividing it would cost
        accuracy.
        """
        is_linear = group.previous in self._source.architecture.linears
        return not is_linear or any(group.previous in other.linears for other in self._groups)

    def space(self, group: ScaleGroup, mean_abs: Tensor) -> ScaleSpace:
        """What candidates of a group are made from; `mean_abs` [in] of its inputs."""
        is_norm = group.previous not in self._source.architecture.linears
        producer_name = f"{group.previous}.weight" if is_norm else f"{group.previous}.bias"
        return ScaleSpace(
            x_mean=mean_abs,
            w_mean=weight_means([self._weights[f"{n}.weight"] for n in group.linears], self._group_size),
            num_repeats=self._num_repeats(group),
            head_size=self._source.head_size if group.is_value else 1,
            producer=self._weights.get(producer_name),
            dtype=self._dtype(producer_name) if producer_name in self._weights else torch.float32,
            is_norm=is_norm,
            offset=group.norm_offset,
        )

    def producer_rows(self, group: ScaleGroup, scales: Tensor) -> Tensor:
        """[out of the producer]: what the rows of a linear that produces the input are divided by under
        `scales` [in]. One that has more rows than there are scales produces with its last ones.
        """
        producer_scales = self._producer_scales(group, scales)
        num_others = len(self._weights[f"{group.previous}.weight"]) - len(producer_scales)
        return torch.cat([producer_scales.new_ones(num_others), producer_scales])

    def folding(self, chosen: Mapping[str, Candidate]) -> Folding:
        """Fold one candidate per group, by the group's first linear; identity divides nothing."""
        scaled = []
        for group in self._groups:
            scales = chosen[group.linears[0]].scales
            scaled.append((group, scales, self._producer_scales(group, scales)))
        return fold(self._weights, self._source.architecture.linears, scaled, self._store)

    def _producer_scales(self, group: ScaleGroup, scales: Tensor) -> Tensor:
        return one_per_producer(scales, self._num_repeats(group), self._source.head_size)

    def _num_repeats(self, group: ScaleGroup) -> int:
        return self._source.num_repeats if group.is_value else 1

    def _dtype(self, name: str) -> torch.dtype:
        return STORED_DTYPES[self._source.checkpoint.dtype(self._source.full_name(self._index, name))]

    def _store(self, name: str, tensor: Tensor) -> Tensor:
        """As it will be read back: through the dtype on disk."""
        return tensor.to(self._dtype(name)).float()
