"""The norm against fp64 truth and exact rational arithmetic, and its independence of order and cut."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern as gk
from gradkern import functional
from gradkern.ops.step_scalars.reference import NORM, exact_sum
from gradkern.testing import random_values, same_bits

# Sums of squares of fp32 values lie between 2^-298 and 2^268.
partial = st.builds(
    lambda m, e: math.ldexp(m, e),
    st.integers(2**52, 2**53 - 1),
    st.integers(-350, 200),
)


@settings(deadline=None)
@given(st.lists(partial, max_size=60), st.randoms(use_true_random=False))
def test_sum_of_partials_is_exact_up_to_its_own_rounding_and_order_free(values, random):
    exact = sum(map(Fraction, values))
    got = exact_sum([torch.tensor(values, dtype=torch.float64)])
    # 22 additions of limbs from the lowest to the highest, each rounding at most half an ulp of a smaller sum.
    assert abs(Fraction(got) - exact) <= exact * Fraction(2, 2**53)
    shuffled = list(values)
    random.shuffle(shuffled)
    cut = random.randint(0, len(values))
    blocks = [torch.tensor(part, dtype=torch.float64) for part in (shuffled[:cut], shuffled[cut:])]
    assert exact_sum(blocks) == got


def _norm(tensors):
    scalars = functional.new_scalars(torch.device("cpu"))
    functional.step_scalars_(scalars, [], [functional.sumsq([t]) for t in tensors])
    return scalars[NORM]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relative_error_to_fp64_truth(dtype):
    tensors = [random_values(n, dtype, seed=n) for n in (3_000_001, 17, 4096)]
    truth = math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors))
    assert abs(float(gk.get_total_norm(tensors)) - truth) <= 1e-7 * truth


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_norm_does_not_depend_on_order_or_chunk_aligned_cut(sizes, random):
    tensors = [random_values(n, torch.float32, seed=n) for n in sizes]
    expected = _norm(tensors)
    pieces = []
    for t in tensors:
        chunks = -(-t.numel() // 4096)
        cut = random.randint(0, chunks) * 4096
        pieces += [piece for piece in (t[:cut], t[cut:]) if piece.numel()]
    random.shuffle(pieces)
    assert same_bits(_norm(pieces), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_overflow_and_no_underflow(dtype):
    largest = torch.finfo(dtype).max
    huge = torch.full((100,), largest, dtype=dtype)
    assert float(_norm([huge])) == pytest.approx(largest * 10, rel=1e-12)
    smallest = torch.finfo(dtype).smallest_normal
    tiny = torch.full((100,), smallest, dtype=dtype)
    assert float(_norm([tiny])) == pytest.approx(smallest * 10, rel=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 4095, 4096, 9999])
def test_one_nonfinite_element_makes_the_norm_nonfinite(bad, position):
    x = random_values(10_000, torch.float32)
    x[position] = bad
    norm = gk.get_total_norm([random_values(5, torch.float32), x])
    assert math.isnan(norm) if math.isnan(bad) else math.isinf(norm)
