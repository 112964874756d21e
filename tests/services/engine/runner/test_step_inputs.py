"""The packed integers of a step are those of the plain path, whatever the padding."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.engine.core.batch import Chunk  # noqa: E402
from services.engine.core.sequence import SamplingParams, Sequence  # noqa: E402
from services.engine.runner.inputs import make_inputs  # noqa: E402
from services.engine.runner.step_inputs import StepBuffers, StepShape, fill, shape_of  # noqa: E402

BLOCK, SCRATCH = 16, 40
LARGEST = StepShape(256, 16, 16, 32, 256)


def make_sequence(index, num_prompt, num_output=0):
    ids = list(range(100 * index, 100 * index + num_prompt))
    outputs = [1_000 + 10 * index + i for i in range(num_output)]
    sequence = Sequence(
        key=index, prompt_token_ids=ids, params=SamplingParams(max_tokens=99), emitted_token_ids=outputs
    )
    sequence.block_table = [
        (7 * index + i) % SCRATCH for i in range(-(-(num_prompt + num_output + 1) // BLOCK))
    ]
    return sequence


def sent(chunks, shape, drawn=()):
    buffers = StepBuffers(LARGEST, torch.device("cpu"))
    buffers._data.fill_(0xAB)
    if drawn:
        buffers.drawn[: len(drawn)] = torch.tensor(drawn)
    host, arrays = buffers.stage(shape)
    host.fill_(0xCD)
    fill(arrays, chunks, BLOCK, SCRATCH, buffers.num_drawn)
    buffers.send(host)
    return buffers.views(shape)


def tokens_of(inputs):
    return inputs.token_ids.index_select(0, inputs.input_index)


MIXED = [
    Chunk(make_sequence(1, 20), 0, 20, True),
    Chunk(make_sequence(2, 33, 4), 36, 1, True),
    Chunk(make_sequence(3, 50), 16, 17, False),
    Chunk(make_sequence(4, 10, 3), 5, 8, True),
]


@pytest.mark.parametrize("chunks", [MIXED, MIXED[1:2], MIXED[2:3]], ids=["mixed", "decode", "prefill"])
def test_the_arrays_of_the_plain_path(chunks):
    shape = shape_of(chunks, BLOCK)
    inputs = sent(chunks, shape)
    plain = make_inputs(chunks, BLOCK, SCRATCH, 1)
    assert torch.equal(tokens_of(inputs), plain.token_ids)
    assert torch.equal(inputs.positions, plain.metadata.positions)
    assert torch.equal(inputs.slot_mapping, plain.metadata.slot_mapping)
    assert inputs.logits_rows.tolist() == plain.logits_rows.tolist()
    assert inputs.context_lens.tolist() == plain.metadata.context_lens
    assert inputs.query_starts.tolist() == plain.metadata.query_starts
    for row, context in enumerate(plain.metadata.context_lens):
        used = -(-context // BLOCK)
        assert inputs.block_tables[row, :used].tolist() == plain.metadata.block_tables[row, :used].tolist()


def test_padding_reads_nothing_and_writes_to_the_scratch_block():
    chunks = [Chunk(make_sequence(i, 3, 2), 4, 1, True) for i in (1, 2, 3)]
    shape = StepShape(8, 8, 8, 16, 1)
    inputs = sent(chunks, shape)
    assert tokens_of(inputs).tolist() == [1_011, 1_021, 1_031, 0, 0, 0, 0, 0]
    assert inputs.context_lens.tolist() == [5, 5, 5, 0, 0, 0, 0, 0]
    assert inputs.query_starts.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert (inputs.slot_mapping[3:] // BLOCK == SCRATCH).all()
    assert (inputs.logits_rows[3:] == 0).all()
    assert (inputs.block_tables[3:] == 0).all()


def test_a_token_in_flight_comes_from_the_draw_it_names():
    sequences = [make_sequence(i, 5, 1) for i in (1, 2)]
    newcomer = make_sequence(3, 4)
    chunks = [
        Chunk(sequences[0], 6, 1, True, input_row=2),
        Chunk(newcomer, 0, 4, True),
        Chunk(sequences[1], 6, 1, True, input_row=0),
    ]
    inputs = sent(chunks, shape_of(chunks, BLOCK), drawn=[77, 88, 99])
    assert tokens_of(inputs).tolist() == [99, 300, 301, 302, 303, 77]
    assert inputs.positions.tolist() == [6, 0, 1, 2, 3, 6]


def test_the_largest_step_fits_and_every_place_is_aligned():
    for shape in (LARGEST, StepShape(3, 3, 1, 5, 1), StepShape(1, 1, 0, 1, 1)):
        buffers = StepBuffers(LARGEST, torch.device("cpu"))
        host, arrays = buffers.stage(shape)
        assert host.numel() == shape.num_bytes
        base = host.data_ptr()
        assert all((getattr(arrays, name).ctypes.data - base) % 16 == 0 for name in shape.sizes())
        sizes = {name: getattr(arrays, name).size for name in shape.sizes()}
        assert sizes == shape.sizes()
        buffers.send(host)
        assert isinstance(arrays.block_tables, np.ndarray)
