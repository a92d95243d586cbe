from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gradkern.checkpoint import _allocator, allocator_unavailable_reason, enforce, measure_peak
from gradkern.checkpoint._allocator import load_allocator
from gradkern.checkpoint._meter import ProfilerMeter, interval_peak
from gradkern.errors import BackendUnavailableError, BudgetExceededError

KIB = 1024


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """Let the loader look where no library was built, as on a machine without a compiler."""
    monkeypatch.setattr(_allocator, "LIBRARY", tmp_path / "_alloc.so")


def test_library_is_built():
    assert load_allocator().live_bytes >= 0
    assert allocator_unavailable_reason() is None
    assert load_allocator() is load_allocator()


def test_peak_equals_running_sum_of_profiler_events(case):
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer)
    meter = ProfilerMeter()
    with meter:
        measured = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer)
    assert measured.source == "allocator"
    assert measured.peak_bytes - measured.start_bytes == interval_peak(meter.marks) > 100 * KIB


def test_without_library_the_profiler_gives_the_same_peak(case, without_library):
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer)
    profiled = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer)
    assert profiled.source == "profiler"
    state = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    params = sum(param.nbytes for param in (*case.model.parameters(), *case.model.buffers()))
    assert profiled.start_bytes == params + state
    assert max(nbytes for _, nbytes in profiled.timeline) == profiled.peak_bytes


def test_exact_numbers_of_a_known_program():
    def program():
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(500, dtype=torch.float32)
        del first
        third = torch.empty(3000, dtype=torch.uint8)
        return second, third

    measured = measure_peak(program)
    live = [nbytes - measured.start_bytes for _, nbytes in measured.timeline]
    assert measured.peak_bytes - measured.start_bytes == 10000
    assert live == [0, 8000, 10000, 2000, 5000]
    assert [tensor.nbytes for tensor in measured.result] == [2000, 3000]
    assert [seconds for seconds, _ in measured.timeline] == sorted(seconds for seconds, _ in measured.timeline)


def test_long_timeline_stays_bounded_and_keeps_its_peak():
    def program():
        for index in range(30000):
            torch.empty(4 * (index % 100))
        spike = torch.empty(10**6)
        del spike
        for _ in range(30000):
            torch.empty(8)

    measured = measure_peak(program)
    assert len(measured.timeline) <= 16384
    assert max(nbytes for _, nbytes in measured.timeline) == measured.peak_bytes
    assert measured.peak_bytes - measured.start_bytes >= 4 * 10**6


def test_counts_every_thread_exactly():
    allocator = load_allocator()
    kept = []

    def allocate():
        for _ in range(500):
            torch.empty(256)
        kept.append(torch.empty(1024, dtype=torch.uint8))

    def program():
        threads = [threading.Thread(target=allocate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    before = allocator.live_bytes
    measured = measure_peak(program)
    assert allocator.live_bytes - before == 4096
    assert 4096 <= measured.peak_bytes - measured.start_bytes <= 4096 + 4 * 1024
    program()
    assert allocator.live_bytes - before == 8192


def test_counts_tensors_older_than_the_hook_once():
    # Memory that torch did not allocate stands for tensors older than the hook: both are invisible to it.
    weight = torch.frombuffer(bytearray(64 * KIB), dtype=torch.float32)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight)
    model.view = torch.nn.Parameter(weight[:10])
    assert not load_allocator().owns(weight.untyped_storage())
    without = measure_peak(lambda: None).start_bytes
    assert measure_peak(lambda: None, model=model).start_bytes == without + 64 * KIB
    optimizer = torch.optim.SGD(model.parameters())
    assert measure_peak(lambda: None, model=model, optimizer=optimizer).start_bytes == without + 64 * KIB


def test_cap_at_the_peak_passes_and_below_it_raises(case):
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer)
    peak = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer).peak_bytes
    with enforce(peak, model=case.model, optimizer=optimizer):
        case.cycle(optimizer)
    with (
        pytest.raises(BudgetExceededError, match=f"{int(0.99 * peak)} bytes"),
        enforce(int(0.99 * peak), model=case.model, optimizer=optimizer),
    ):
        case.cycle(optimizer)
    case.model.zero_grad()
    case.cycle(optimizer)
    again = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer)
    assert again.peak_bytes <= peak + 4 * KIB


def test_enforce_refuses_what_is_over_already():
    kept = torch.empty(64 * KIB)
    with pytest.raises(BudgetExceededError, match="alive already"), enforce(kept.nbytes // 2):
        pytest.fail("the block must not run")


def test_enforce_leaves_other_errors_alone():
    with pytest.raises(RuntimeError, match="mine"), enforce("1 GiB"):
        raise RuntimeError("mine")
    with enforce("1 TiB"):
        with pytest.raises(torch.OutOfMemoryError, match="gradkern cap"):
            torch.empty(2**41, dtype=torch.uint8)
        torch.ones(10)


def test_requests_and_budgets_near_the_end_of_the_integers():
    before = load_allocator().live_bytes
    with pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2**63 - 1, dtype=torch.uint8)
    with pytest.raises(BudgetExceededError), enforce("1 GiB"):
        torch.empty(2**63 - 1, dtype=torch.uint8)
    assert load_allocator().live_bytes == before
    with enforce(2**64 + 7):
        torch.ones(10)
        assert load_allocator().cap_bytes is not None


def test_no_block_begins_a_page():
    before = load_allocator().live_bytes
    tensors = [torch.empty(64 * (index % 70), dtype=torch.uint8) for index in range(4000)]
    tensors += [torch.empty(2**22 + 4096 * index, dtype=torch.uint8) for index in range(4)]
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.nbytes]
    assert all(address % 64 == 0 for address in addresses)
    assert not any(address % 4096 == 0 for address in addresses)
    assert {64, 4096 - 64} <= {address % 4096 for address in addresses}
    tensors.clear()
    assert load_allocator().live_bytes == before


def test_nested_use_is_refused_and_the_outer_survives():
    with pytest.raises(RuntimeError, match="measured already"):
        measure_peak(lambda: measure_peak(lambda: None))
    with enforce("1 GiB"):
        with pytest.raises(RuntimeError, match="cannot be nested"), enforce("1 GiB"):
            pytest.fail("the block must not run")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**31, dtype=torch.uint8)
        assert measure_peak(lambda: torch.ones(4).sum().item()).result == 4.0


def test_a_raising_function_ends_the_measurement():
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0)
    assert measure_peak(lambda: 7).result == 7


def test_bad_arguments():
    with pytest.raises(TypeError, match="callable"):
        measure_peak(3)
    with pytest.raises(ValueError, match="meta"):
        measure_peak(lambda: None, model=torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="cannot read"), enforce("much"):
        pytest.fail("the block must not run")


def test_enforce_says_why_it_is_unavailable(without_library):
    with pytest.raises(BackendUnavailableError, match="not built") as caught, enforce("1 GiB"):
        pytest.fail("the block must not run")
    assert allocator_unavailable_reason() == str(caught.value)


def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path):
    garbage = tmp_path / "_alloc.so"
    garbage.write_bytes(b"not a library")
    monkeypatch.setattr(_allocator, "LIBRARY", garbage)
    with pytest.raises(BackendUnavailableError, match="does not load"):
        load_allocator()
    monkeypatch.setattr(_allocator, "LIBRARY", Path(torch.__file__).parent / "lib" / "libc10.so")
    assert "gradkern_alloc_torch_version" in allocator_unavailable_reason()


def test_blocks_older_than_the_hook_are_freed_in_peace():
    program = """
import gc
import torch
from torch import nn
from gradkern.checkpoint import measure_peak

torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3))
older = [torch.ones(n) for n in (0, 1, 1000, 10**6)]

def step(size):
    model(torch.randn(2, 3, size, size)).mean().backward()

step(16)
first = measure_peak(lambda: step(16))
older.clear()
model.zero_grad()
gc.collect()
for size in range(8, 40):  # more shapes than oneDNN needs to drop what it cached before
    step(size)
again = measure_peak(lambda: step(16))
del model
gc.collect()
print("done", first.source, again.source)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["done", "allocator", "allocator"]), done.stderr
