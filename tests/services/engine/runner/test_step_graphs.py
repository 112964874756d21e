"""Which steps replay a graph, of which shape, and what happens when one cannot be captured."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.engine.runner.step_graphs import StepGraphs, batch_buckets, logits_held, width_buckets  # noqa: E402
from services.engine.runner.step_inputs import StepShape  # noqa: E402


class FakeGraph:
    def __init__(self, shape):
        self.shape, self.replays = shape, 0
        self.output = torch.empty(shape.num_logits)

    def replay(self):
        self.replays += 1
        self.output.fill_(self.replays)


def decode(num_seqs, width=3):
    return StepShape(num_seqs, num_seqs, num_seqs, width, 1)


def test_buckets_ascend_and_end_at_the_maximum():
    assert batch_buckets(1) == [1]
    assert batch_buckets(6) == [1, 2, 4, 6]
    assert batch_buckets(64)[-3:] == [48, 56, 64]
    assert batch_buckets(1000)[-1] == 256
    assert width_buckets(5) == [5]
    assert width_buckets(1024) == [16, 64, 256, 1024]
    for maximum in range(1, 300):
        buckets = batch_buckets(maximum)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == min(maximum, 256)


def test_every_decode_gets_the_smallest_bucket_that_holds_it():
    graphs = StepGraphs(64, 1024, FakeGraph)
    for num_seqs in range(1, 65):
        for width in (1, 16, 17, 1024):
            bucket = graphs.bucket(decode(num_seqs, width))
            assert bucket.num_seqs >= num_seqs
            assert bucket.table_width >= width
            assert bucket.num_seqs < num_seqs + 8
    assert graphs.num_captured == 0, "asking captures nothing"


def test_prefills_and_too_large_batches_have_no_graph():
    graphs = StepGraphs(8, 64, FakeGraph)
    assert graphs.bucket(StepShape(9, 8, 8, 1, 2)) is None
    assert graphs.bucket(StepShape(8, 8, 7, 1, 1)) is None, "a row that does not sample is a prefill's"
    assert graphs.bucket(decode(9)) is None


def test_a_graph_is_captured_once_and_replayed():
    made = []

    def capture(shape):
        made.append(FakeGraph(shape))
        return made[-1]

    graphs = StepGraphs(8, 64, capture)
    first = graphs.bucket(decode(3))
    for turn in range(1, 4):
        assert graphs.run(first)[0] == turn
    assert graphs.run(graphs.bucket(decode(5)))[0] == 1
    assert [graph.shape.num_seqs for graph in made] == [4, 8]
    assert graphs.num_captured == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    ],
)
def test_what_cannot_be_captured_runs_without_a_graph(error):
    is_failing = False

    def capture(shape):
        if is_failing:
            raise error
        return FakeGraph(shape)

    graphs = StepGraphs(8, 64, capture)
    assert graphs.run(graphs.bucket(decode(1))) is not None
    is_failing = True
    assert graphs.run(graphs.bucket(decode(2))) is None
    assert graphs.bucket(decode(2)) is None, "it is not tried again and again"
    assert graphs.bucket(decode(1)) is not None, "what was captured goes on"


def test_the_rows_of_logits_held_are_those_of_all_buckets():
    graphs = StepGraphs(12, 64, FakeGraph)
    for num_seqs in range(1, 13):
        for width in range(1, 65):
            graphs.run(graphs.bucket(decode(num_seqs, width)))
    assert sum(len(graph.output) for graph in graphs._graphs.values()) == logits_held(12, 64)
