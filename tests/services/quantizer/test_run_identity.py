"""What two runs must share for one to go on where the other was ended."""

import dataclasses

import pytest
import torch

from services.quantizer.config import QuantizerConfig
from services.quantizer.identity import draft_manifest
from services.quantizer.inputs import Inputs
from services.quantizer.run_identity import run_identity


@pytest.fixture
def identity(make_checkpoint, tmp_path):
    """identity(inputs, **changes of the configuration) -> the digest."""
    source = make_checkpoint(num_hidden_layers=1)

    def make(inputs, **changes):
        config = QuantizerConfig(source=source, artifacts=tmp_path / "a", name="tiny", samples=2)
        config = dataclasses.replace(config, **changes)
        return run_identity(config, draft_manifest(config), inputs)

    return make


def test_token_ids_and_what_is_asked_for_decide_and_places_do_not(identity, tmp_path):
    ids = torch.arange(12).view(2, 6)
    one = identity(Inputs(ids, ids))
    assert one == identity(Inputs(ids.clone(), ids))
    assert one == identity(Inputs(ids, ids), artifacts=tmp_path / "b", name="other", workers="local:2")
    others = [
        identity(Inputs(ids + 1, ids)),
        identity(Inputs(ids, ids + 1)),
        identity(Inputs(ids, None)),
        identity(Inputs(ids.view(3, 4), ids)),
        identity(Inputs(ids, ids), method="awq"),
        identity(Inputs(ids, ids), propagate_error=False),
        identity(Inputs(ids, ids), seed=1),
    ]
    assert len({one, *others}) == 8
