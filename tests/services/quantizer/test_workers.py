"""Tasks in this process and what travels between processes: no Ray needed."""

import dataclasses
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.parcels import Slot, as_array, as_tensor, pack, unpack
from services.quantizer.workers import SerialPool, num_threads, open_pool
from weft.config import ConfigError

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    weight: torch.Tensor
    parts: dict
    note: str


def configure(tmp_path, **changes):
    return QuantizerConfig(source=tmp_path, artifacts=tmp_path, name="tiny", **changes)


@pytest.mark.parametrize(
    "workers",
    ["local:1", "local:16", "ray:auto", "ray:10.0.0.1:6379", "ray:head:6379", "ray:[::1]:6379", "ray://h:1"],
)
def test_forms_of_the_flag(tmp_path, workers):
    assert configure(tmp_path, workers=workers).workers == workers


@pytest.mark.parametrize(
    "workers",
    ["", "local", "local:0", "local:-1", "local:2x", "ray", "ray:", "ray:host", "ray://host",
     "http://h:1", "ray://h:1/path", "ray://u@h:1", "ray:h:1\n"],
)  # fmt: skip
def test_other_forms_are_refused_by_name(tmp_path, workers):
    with pytest.raises(ConfigError, match="--workers"):
        configure(tmp_path, workers=workers)


def test_workers_decide_no_bytes(tmp_path):
    assert configure(tmp_path, workers="local:2").recipe("x") == configure(tmp_path).recipe("x")


def test_private_workers_share_the_cores():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert num_threads(None, None) == num_threads(None, "ray:auto") == 6
        assert num_threads(None, "local:2") == 3
        assert num_threads(None, "local:16") == 1
        assert num_threads(5, "local:16") == 5
    finally:
        torch.set_num_threads(before)


def test_without_ray_one_line_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(QuantizerError, match=r"--workers.*weft\[ray\]"):
        open_pool("local:2", CPU)


def test_serial_pool():
    with open_pool(None, CPU) as pool:
        assert isinstance(pool, SerialPool)
        assert pool.map(len, ["a", "", "abc"]) == [1, 0, 3]
        with pytest.raises(TypeError):
            pool.map(len, [1])


def test_serial_stream_takes_a_task_only_when_its_result_is_asked_for():
    taken = []

    def tasks():
        for index in range(3):
            taken.append(index)
            yield index

    stream = SerialPool().stream(str, tasks())
    assert taken == []
    assert next(stream) == "0"
    assert taken == [0]
    assert list(stream) == ["1", "2"]


def send(content):
    """There and back, as between processes: nothing is shared but the bytes."""
    packed, spans = pack(content)
    return unpack(packed, [as_tensor(as_array(span.data).copy()) for span in spans], CPU), spans


def same(one, other):
    # The place within a line matters to a matrix product, as the strides do.
    assert one.dtype == other.dtype
    assert one.stride() == other.stride()
    assert torch.equal(one, other)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_views_arrive_as_they_were(data):
    base = torch.arange(7 * 11 * 5, dtype=torch.float32).view(7, 11, 5).clone()
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
    )
    tensor = base.to(dtype)
    for dim in range(3):
        begin = data.draw(st.integers(0, tensor.shape[dim]))
        tensor = tensor.narrow(dim, begin, data.draw(st.integers(0, tensor.shape[dim] - begin)))
    if data.draw(st.booleans()):
        tensor = tensor.transpose(*data.draw(st.sampled_from([(0, 1), (0, 2), (1, 2)])))
    if data.draw(st.booleans()):
        tensor = tensor[:, :: data.draw(st.integers(1, 4))]
    arrived, _ = send(tensor)
    same(arrived, tensor)
    if tensor.numel():
        assert arrived.data_ptr() % 64 == tensor.data_ptr() % 64


def test_a_whole_task_travels_and_shared_memory_goes_once():
    gram = torch.randn(32, 32)
    task = Task(gram, {"again": gram, "rows": [gram[3:5], (gram.T, None)], "empty": torch.empty(0, 4)}, "n")
    arrived, spans = send(task)
    assert isinstance(arrived, Task)
    assert arrived.note == "n"
    same(arrived.weight, gram)
    same(arrived.parts["rows"][0], gram[3:5])
    same(arrived.parts["rows"][1][0], gram.T)
    assert arrived.parts["rows"][1][1] is None
    assert arrived.parts["empty"].shape == (0, 4)
    assert len(spans) == 3  # the matrix in three shapes, two of its rows, nothing
    assert task.weight is gram


def test_expanded_tensor_sends_what_it_spans():
    arrived, spans = send(torch.arange(5.0).expand(1000, 5))
    assert spans[0].data.numel() == 20
    same(arrived, torch.arange(5.0).expand(1000, 5))


def test_what_was_on_no_device_stays_on_the_cpu():
    packed, spans = pack([torch.ones(3)])
    assert isinstance(packed[0], Slot)
    assert not packed[0].is_on_device
    meta = torch.device("meta")
    assert unpack(packed, [span.data for span in spans], meta)[0].device.type == "cpu"
    on_device = dataclasses.replace(packed[0], is_on_device=True)
    assert unpack([on_device], [span.data for span in spans], meta)[0].device.type == "meta"
