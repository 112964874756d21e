"""Whatever the weights and the inputs: no linear is further from the source than by rounding, in the norm
that its inputs weigh.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.func import functional_call

from services.quantizer.block_scales import BlockScales
from services.quantizer.config import BEST, METHODS
from services.quantizer.grid import round_to_nearest
from services.quantizer.quantize import BlockQuantizer
from services.quantizer.source import Source
from services.quantizer.statistics import output_energy

GROUP = 32
HARD = ("zero groups", "one sign", "tiny", "outlier channels", "dead channels", "none")


@pytest.fixture
def source(make_checkpoint):
    changes = {"num_key_value_heads": 4, "tie_word_embeddings": False}
    return Source(make_checkpoint("Qwen2", torch.float32, **changes), torch.device("cpu"))


def spoil(weights, case, generator):
    """The block's weights with something in them that rounding formulas stumble over."""
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.2, 2.0, generator=generator)
            if case == "outlier channels":
                tensor[::17] *= 1e4
            if case == "dead channels":
                tensor[::5] = 0.0
        elif name.endswith("proj.weight"):
            tensor.normal_(std=0.2, generator=generator).pow_(3)
            if case == "zero groups":
                tensor[::2, :GROUP] = 0.0
            if case == "one sign":
                tensor[:, GROUP:].abs_().add_(0.5)
                tensor[::3, :GROUP].abs_().neg_()
            if case == "tiny":
                tensor[::2] *= 1e-7


def outside(quantizer, block, source, hidden, weights):
    """Per linear: (error, rounding's), over the inputs that the quantized block itself gives."""
    folding = BlockScales(source, 0, weights, source.architecture.groups, GROUP).folding(quantizer.chosen)
    layer, grams = source.block(0), {}

    def listen(name):
        def hook(_module, arguments):
            inputs = arguments[0].flatten(0, 1) * folding.columns[name]
            grams[name] = grams.get(name, 0) + inputs.T @ inputs

        return layer.get_submodule(name).register_forward_pre_hook(hook)

    for name in block.linears:
        listen(name)
    for _, batch, positions in source.batches(hidden, 0):
        functional_call(layer, block.weights, (batch,), positions)
    for name, linear in block.linears.items():
        exact = weights[f"{name}.weight"]
        effective = folding.outer(name, linear.dequantize() / folding.columns[name])
        rounded = round_to_nearest(exact, GROUP).dequantize()
        energy = output_energy(exact, grams[name])
        yield (
            name,
            output_energy(effective - exact, grams[name]),
            output_energy(rounded - exact, grams[name]),
            energy,
        )


@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@hypothesis.given(
    case=st.sampled_from(HARD),
    seed=st.integers(0, 1 << 20),
    shape=st.sampled_from([(1, 1), (1, 7), (2, 40), (5, 60)]),
    has_drift=st.booleans(),
)
@torch.inference_mode()
def test_no_linear_is_further_from_the_source_than_by_rounding(source, method, case, seed, shape, has_drift):
    generator = torch.Generator().manual_seed(seed)
    weights = source.block_weights(0)
    spoil(weights, case, generator)
    hidden = torch.randn(*shape, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    exact = None
    if method == BEST and has_drift:
        exact = hidden * (1.0 + 0.1 * torch.randn(hidden.shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in weights.items()}
    quantizer = BlockQuantizer(
        source, 0, weights, hidden.clone(), GROUP, set(), method=method, exact=exact, is_last=True
    )
    block = quantizer.run()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    for name, error in block.errors.items():
        assert error.chosen <= error.rounding, name
    for name, chosen, rounding, energy in outside(quantizer, block, source, hidden, weights):
        # What the search saw and what is measured here differ in the last digits of fp32 inputs.
        assert chosen <= 1.005 * rounding + 1e-9 * energy, (name, chosen / energy, rounding / energy)
