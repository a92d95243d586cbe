"""The native library has the bits of the reference: every op, sample, instruction set and number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gradkern as gk
from gradkern import _native, functional
from gradkern.testing import all_samples, random_values, run_sample, same_bits

needs_native = pytest.mark.skipif(
    _native.unavailable_reason() is not None, reason=f"no native library: {_native.unavailable_reason()}"
)

CASES = [pytest.param(spec, sample, id=f"{spec.name}-{sample.name}") for spec, sample in all_samples()]


@needs_native
@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_native_has_the_bits_of_the_reference(spec, sample):
    expected = run_sample(spec, sample, "reference")
    got = run_sample(spec, sample, "native")
    assert len(got) == len(expected)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(g, e), f"operand {i}: {(g != e).sum()} of {g.numel()} elements differ"


EVERY_ISA = """
import sys
import torch
from gradkern import _native
from gradkern.testing import all_samples, run_sample, same_bits
assert _native.isa() == sys.argv[1], _native.isa()
bad = [
    (spec.name, sample.name)
    for spec, sample in all_samples()
    if not all(map(same_bits, run_sample(spec, sample, "native"), run_sample(spec, sample, "reference")))
]
assert not bad, bad
print("compared", sum(1 for _ in all_samples()))
"""


def _has(isa: str) -> bool:
    if isa == "baseline":
        return True
    with open("/proc/cpuinfo") as info:
        flags = info.read()
    return {"avx2": all(f"{name} " in flags for name in ("avx2", "f16c", "fma")), "avx512": "avx512vl" in flags}[isa]


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_has_the_bits_of_the_reference(isa):
    if not os.path.exists("/proc/cpuinfo") or not _has(isa):
        pytest.skip(f"this CPU has no {isa}")
    run = subprocess.run(
        [sys.executable, "-c", EVERY_ISA, isa],
        env={**os.environ, "GRADKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "compared" in run.stdout


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bits_do_not_depend_on_threads(threads):
    tensors = [random_values(n, torch.float32, seed=n) for n in (70_001, 3, 200_000, 4096)]
    with gk.use_backend("reference"):
        expected = functional.sumsq(tensors)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(functional.sumsq(tensors), expected)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("offset", [0, 1, 3, 7, 13, 63])
def test_bits_do_not_depend_on_alignment(offset):
    base = random_values(20_000, torch.float32)
    moved = torch.empty(20_064)[offset : offset + 20_000]
    moved.copy_(base)
    assert same_bits(functional.sumsq([moved]), functional.sumsq([base]))
    grads = random_values(20_000, torch.bfloat16, seed=1)
    shifted = torch.empty(20_064, dtype=torch.bfloat16)[offset : offset + 20_000]
    shifted.copy_(grads)
    functional.accumulate_([moved], [shifted])
    functional.accumulate_([base], [grads])
    assert same_bits(moved, base)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", range(1, 9))
def test_the_tree_is_the_same_where_the_last_groups_of_a_chunk_are_absent(groups, dtype):
    # Groups of 512 join their tree as they come; what is then left of it differs with how many there are.
    for numel in (512 * groups, 512 * groups - 7, 4096 + 512 * groups - 1):
        grad = random_values(numel, dtype, seed=groups)
        start = random_values(numel, torch.float32, seed=-groups)
        results = []
        for backend in ("native", "reference"):
            main_grad = start.clone()
            partials = functional.new_partials([main_grad])
            with gk.use_backend(backend):
                functional.accumulate_([main_grad], [grad], partials)
                results.append([main_grad, partials, functional.sumsq([grad])])
        assert all(map(same_bits, *results)), numel


@needs_native
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_lists_are_overwritten_past_the_cache_with_the_same_bits(dtype, with_norm):
    # 64 MiB of fp32 and more are written with streaming stores, where an address allows them: the second tensor's does
    # not, and the third ends within a vector.
    sizes = (1 << 23, (1 << 23) - 4096, 10_003)
    memory = torch.full((sum(sizes) + 64,), float("nan"))
    main_grads, begin = [], 0
    for size, shift in zip(sizes, (0, 3, 13), strict=True):
        main_grads.append(memory[begin + shift : begin + shift + size])
        begin += shift + size
    assert 4 * sum(sizes) >= 1 << 26
    assert main_grads[1].data_ptr() % 32 != 0
    values = random_values(sizes[0], dtype, seed=3)
    grads = [values[:size] for size in sizes]
    partials = functional.new_partials(main_grads) if with_norm else None
    with gk.use_backend("native"):
        functional.accumulate_(main_grads, grads, partials, overwrite=True)
        if partials is not None:
            assert same_bits(partials, functional.sumsq(grads))
    for main_grad, grad in zip(main_grads, grads, strict=True):
        assert same_bits(main_grad, grad.float())
    assert memory.isnan().sum() == 64


def test_channels_last_is_summed_in_memory_order():
    x = random_values(2 * 8 * 9 * 9, torch.float32).view(2, 8, 9, 9).to(memory_format=torch.channels_last)
    flat = x.permute(0, 2, 3, 1).reshape(-1)
    assert same_bits(functional.sumsq([x]), functional.sumsq([flat]))
    with gk.use_backend("reference"):
        assert same_bits(functional.sumsq([x]), functional.sumsq([flat]))


@needs_native
def test_unknown_isa_is_an_error():
    run = subprocess.run(
        [sys.executable, "-c", "import gradkern"],
        env={**os.environ, "GRADKERN_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "GRADKERN_CPU_ISA is 'mmx', expected one of baseline, avx2, avx512, neon" in run.stderr
