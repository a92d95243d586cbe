"""Memory of a GPU, without one: ``torch.cuda.memory`` is stood in for by the allocator hook, which counts the CPU's."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import mlp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradkern.checkpoint import _here, _peak, allocator_unavailable_reason, measure_peak, plan
from gradkern.checkpoint._allocator import load_allocator
from gradkern.checkpoint._cuda import CudaMemory, enforce_cuda
from gradkern.checkpoint._meter import AllocatorMeter
from gradkern.checkpoint._storages import device_of
from gradkern.errors import BudgetExceededError

GPU = torch.device("cuda", 0)
unavailable = allocator_unavailable_reason()
needs_hook = pytest.mark.skipif(unavailable is not None, reason=f"the stand-in is the allocator hook: {unavailable}")


class StandIn:
    """The functions of ``torch.cuda`` that read memory, reading the hook instead, and those that cap it."""

    def __init__(self, monkeypatch):
        self.fraction, self.fractions, self.waits = 1.0, [], 0
        self._hook = load_allocator()
        self._hook.start_recording()
        self._peak = self._hook.take_peak()
        for name in (
            "memory_allocated",
            "max_memory_allocated",
            "reset_peak_memory_stats",
            "synchronize",
            "get_device_name",
            "get_per_process_memory_fraction",
            "get_device_properties",
            "empty_cache",
            "set_per_process_memory_fraction",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def stop(self):
        self._hook.stop_recording()

    def memory_allocated(self, device):
        assert device == GPU
        return self._hook.live_bytes

    def max_memory_allocated(self, device):
        assert device == GPU
        self._peak = max(self._peak, self._hook.take_peak())
        return self._peak

    def reset_peak_memory_stats(self, device):
        assert device == GPU
        self._hook.take_peak()
        self._peak = self._hook.live_bytes

    def synchronize(self, device):
        self.waits += device == GPU

    def get_device_name(self, device):
        return "Stand-in"

    def get_per_process_memory_fraction(self, device):
        return self.fraction

    def get_device_properties(self, device):
        return type("Properties", (), {"total_memory": 10**12})

    def empty_cache(self):
        self.fractions.append("empty")

    def set_per_process_memory_fraction(self, fraction, device):
        self.fraction = fraction
        self.fractions.append(fraction)


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn(monkeypatch)
    yield made
    made.stop()


def work(meter):
    """Allocations and frees, with a mark in between."""
    with meter:
        kept = torch.zeros(1000)
        torch.zeros(5000).sum()
        meter.mark()
        torch.zeros(2000).sum()
        del kept
    return [(mark.live_bytes, mark.peak_bytes) for mark in meter.marks]


@needs_hook
def test_marks_are_those_of_the_hook(monkeypatch):
    expected = work(AllocatorMeter(load_allocator()))
    made = StandIn(monkeypatch)
    try:
        meter = AllocatorMeter(CudaMemory(GPU))
        assert work(meter) == expected
    finally:
        made.stop()
    assert made.waits == len(expected)
    assert [nbytes for _, nbytes in meter.timeline] == [live for live, _ in expected]
    assert meter.bytes_of(torch.zeros(129)) == 1024


@needs_hook
def test_a_plan_is_that_of_the_cpu(monkeypatch):
    case = mlp()
    optimizer = torch.optim.AdamW(case.model.parameters())
    arguments = {"loss_fn": case.loss_fn, "optimizer": optimizer}
    free = plan(case.model, case.batch, budget="1 GiB", **arguments)
    budget = (free.least_feasible_bytes + free.natural_peak_bytes) // 2
    here = plan(case.model, case.batch, budget=budget, **arguments)
    made = StandIn(monkeypatch)
    monkeypatch.setattr(_here, "device_of", lambda *_: GPU)
    try:
        there = plan(case.model, case.batch, budget=budget, **arguments)
    finally:
        made.stop()
    assert (here.source, there.source) == ("cpu", "Stand-in")
    assert there.predicted_peak_bytes <= budget
    # Gradients of the optimizer's trial come off again in blocks.
    assert abs(there.least_feasible_bytes - here.least_feasible_bytes) <= 512 * len(list(case.model.parameters()))


@needs_hook
def test_a_peak_is_read_from_cuda(stand_in, monkeypatch):
    monkeypatch.setattr(_peak, "device_of", lambda *_: GPU)
    found = measure_peak(lambda: torch.zeros(5000).sum().item(), model=nn.Linear(1, 1))
    assert found.source == "cuda"
    assert found.peak_bytes - found.start_bytes >= 20000
    assert found.timeline[0][1] == found.start_bytes


@needs_hook
def test_a_cap_is_a_share_of_the_gpu(stand_in):
    stand_in.fraction = 0.8
    with enforce_cuda(10**11, GPU):
        assert stand_in.fraction == 0.1
    # No looser than it was; and what runs out of memory is told by the budget.
    with pytest.raises(BudgetExceededError, match=r"on cuda:0 was exceeded: no memory"), enforce_cuda(10**12, GPU):
        raise torch.OutOfMemoryError("no memory\nat all")
    assert stand_in.fractions == ["empty", 0.1, 0.8, "empty", 0.8, 0.8]
    with pytest.raises(RuntimeError, match="not about memory"), enforce_cuda(10**12, GPU):
        raise RuntimeError("not about memory")
    alive = torch.zeros(1000)
    with pytest.raises(BudgetExceededError, match="alive on cuda:0 already"), enforce_cuda(alive.nbytes - 1, GPU):
        pass


@needs_hook
def test_peaks_and_caps_do_not_nest(stand_in):
    meter = AllocatorMeter(CudaMemory(GPU))
    with meter, pytest.raises(RuntimeError, match="being measured already"):
        AllocatorMeter(CudaMemory(GPU)).__enter__()
    with AllocatorMeter(CudaMemory(GPU)):
        pass
    with enforce_cuda(10**11, GPU), pytest.raises(RuntimeError, match=r"on cuda:0 already; enforce cannot be nested"):
        enforce_cuda(10**10, GPU).__enter__()
    with enforce_cuda(10**11, GPU):
        pass


def test_memory_of_a_storage_comes_in_blocks():
    assert [CudaMemory(GPU).size_of(torch.zeros(n).untyped_storage()) for n in (0, 1, 128, 129)] == [0, 512, 512, 1024]
    assert not CudaMemory(GPU).owns(torch.zeros(1).untyped_storage())


def test_the_device_of_a_model():
    assert device_of("here", nn.Linear(2, 2), None) == torch.device("cpu")
    with FakeTensorMode():
        there = [torch.zeros(2, device=f"cuda:{at}") for at in (0, 1)]
        assert device_of("here", there[0], {"step": torch.tensor(0.0)}) == GPU
        with pytest.raises(ValueError, match=r"here measures .* got tensors on cuda:0, cuda:1"):
            device_of("here", there)
        with pytest.raises(ValueError, match=r"got tensors on cpu, cuda:0"):
            device_of("here", there[0], torch.zeros(3))
    with pytest.raises(ValueError, match="got tensors on meta"):
        measure_peak(lambda: None, model=nn.Linear(2, 2, device="meta"))
