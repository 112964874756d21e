"""Penalties from counts on the device give the bits of the CPU's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from services.engine.core.sequence import SamplingParams, Sequence  # noqa: E402
from services.engine.kernels.gpu.penalties import IN_PROMPT, penalize  # noqa: E402
from services.engine.runner.penalties import RowState, apply_edits  # noqa: E402

CASES = [(1.0, 0.5, 0.0), (1.0, 0.0, 0.7), (1.3, 0.0, 0.0), (0.7, -0.4, 1.9), (1.1, 0.33, -0.2)]


def counts_of(sequence, vocab_size):
    counts = torch.zeros(vocab_size, dtype=torch.int32)
    counts[torch.tensor(sequence.prompt_token_ids)] = IN_PROMPT
    for token_id in sequence.output_token_ids:
        counts[token_id] += 1
    return counts


@pytest.mark.parametrize("vocab_size", [7, 100, 1500])
def test_the_bits_of_the_plain_formula(vocab_size, device):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(8, vocab_size, generator=generator) * 5
    logits[:, 3] = float("-inf")
    states, rows, strengths, table = [], [], [], torch.full((9, vocab_size), -1, dtype=torch.int32)
    for index, (repetition, frequency, presence) in enumerate(CASES):
        params = SamplingParams(
            max_tokens=9,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        prompt = torch.randint(vocab_size, (5,), generator=generator).tolist()
        output = torch.randint(vocab_size, (9,), generator=generator).tolist()
        sequence = Sequence(index, prompt, params, emitted_token_ids=output)
        states.append(RowState(sequence, vocab_size))
        row, slot = (3 * index + 1) % 8, 8 - index
        rows.append((row, slot))
        strengths.append((repetition, frequency, presence))
        table[slot] = counts_of(sequence, vocab_size)
    expected = logits.clone()
    touched = [row for row, _ in rows]
    expected[touched] = apply_edits(logits[touched], states)
    found = logits.clone().to(device)
    penalize(
        found,
        table.to(device),
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(strengths, dtype=torch.float32, device=device),
    )
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, logits)


def test_wrong_shapes_are_refused():
    logits, counts = torch.zeros(2, 5), torch.zeros(3, 5, dtype=torch.int32)
    rows, strengths = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 3)
    for bad in (
        (logits.half(), counts, rows, strengths),
        (logits, counts[:, :4], rows, strengths),
        (logits, counts, rows.long(), strengths),
        (logits, counts, rows, strengths[:, :2]),
    ):
        with pytest.raises(ValueError, match=r"expected|must be"):
            penalize(*bad)
