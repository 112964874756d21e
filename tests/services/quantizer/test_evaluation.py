"""The evaluation's figures on small models that are only a head: against their definitions."""

from types import SimpleNamespace

import pytest
import torch

from services.quantizer.errors import QuantizerError
from services.quantizer.evaluation import VARIANTS, Evaluation

VOCABULARY, HIDDEN, LENGTH = 11, 5, 7


def evaluate(num_windows=12, spoil=None):
    """(quality, token ids, log probabilities by variant)"""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (num_windows, LENGTH), generator=generator)
    base = torch.randn(num_windows, LENGTH, HIDDEN, generator=generator)
    noise = torch.randn(num_windows, LENGTH, HIDDEN, generator=generator)
    hidden = {"source": base, "rounding": base + 0.5 * noise, "chosen": base + 0.1 * noise}
    if spoil is not None:
        hidden[spoil] = hidden[spoil].clone()
        hidden[spoil][1, 2, 3] = float("inf")
    weight = torch.randn(HIDDEN, VOCABULARY, generator=generator)
    source = SimpleNamespace(vocab_size=VOCABULARY)
    head = SimpleNamespace(logits=lambda rows: rows @ weight)
    quality = Evaluation(source, ids, hidden).finish(head)
    return quality, ids, {v: torch.log_softmax(hidden[v] @ weight, -1)[:, :-1] for v in VARIANTS}


@pytest.mark.parametrize("chunk", [1, 10, 10_000])
def test_the_figures_are_what_they_are_called(monkeypatch, chunk):
    monkeypatch.setattr("services.quantizer.evaluation.TOKENS_PER_CHUNK", chunk)
    quality, ids, log_probs = evaluate()
    log_p = log_probs["source"]
    means = {v: float(q.gather(-1, ids[:, 1:, None]).mean()) for v, q in log_probs.items()}
    for variant in ("rounding", "chosen"):
        log_q, found = log_probs[variant], quality[variant]
        assert found["perplexity"] == pytest.approx(float(torch.tensor(-means[variant]).exp()), rel=1e-5)
        ratio = found["perplexity"] / quality["source"]["perplexity"]
        assert found["perplexity_increase"] == pytest.approx(ratio - 1, abs=1e-5)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert found["mean_kl"] == pytest.approx(float(kl), rel=1e-4)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
        assert found["greedy_agreement"] == pytest.approx(float(same), abs=1e-6)
    assert (quality["windows"], quality["predicted_tokens"]) == (12, 12 * (LENGTH - 1))


def test_every_figure_lies_in_its_interval():
    quality, _, _ = evaluate(40)
    intervals = quality["intervals"]
    assert intervals["level"] == 0.95
    assert intervals["source"].keys() == quality["source"].keys()
    for variant in VARIANTS:
        for key, figure in quality[variant].items():
            low, high = intervals[variant][key]
            assert low < figure < high, (variant, key)
    assert evaluate(40)[0] == quality


def test_few_windows_have_figures_and_no_intervals():
    assert evaluate(7)[0]["intervals"] is None
    assert evaluate(8)[0]["intervals"] is not None


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(QuantizerError, match="the rounding model's outputs are not finite"):
        evaluate(spoil="rounding")
