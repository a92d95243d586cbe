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
from gradkern.testing import edge_values, random_values, same_bits

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


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _exact(tensors):
    """The sum of squares as a fraction, of finite values."""
    return sum((Fraction(float(x)) ** 2 for t in tensors for x in t.tolist()), Fraction(0))


def _total(limbs):
    return sum(Fraction(word) * Fraction(2) ** (32 * k - 352) for k, word in enumerate(limbs.tolist()[:22]))


@st.composite
def values(draw):
    """A tensor of mixed magnitudes: edges, one range of exponents or all of them; with a few chunks at most."""
    dtype = draw(st.sampled_from(DTYPES))
    n = draw(st.integers(0, 9000))
    if draw(st.booleans()):
        return edge_values(n, dtype, finite=True)
    info = torch.finfo(dtype)
    lowest = math.floor(math.log2(info.smallest_normal)) - 5
    low, high = sorted((draw(st.integers(lowest, 127)), draw(st.integers(lowest, 127))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    exponents = torch.randint(low, high + 1, (n,), generator=generator)
    x = torch.ldexp(torch.rand(n, generator=generator, dtype=torch.float64) - 0.5, exponents)
    return x.clamp(info.min, info.max).to(dtype)


@settings(deadline=None, max_examples=60)
@given(values())
def test_exact_sum_of_squares_is_exact(x):
    limbs = functional.sumsq_exact([x])
    assert _total(limbs) == _exact([x])
    assert limbs[22:].tolist() == [0, 0]
    assert bool((limbs[:21] < 2**32).all())
    assert bool((limbs >= 0).all())
    partials = functional.exact_partials(limbs)
    assert sum(map(Fraction, partials.tolist())) == _exact([x])


@settings(deadline=None, max_examples=60)
@given(st.lists(values(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_norm_of_any_cut_depends_on_no_cut_and_no_order(tensors, random):
    expected = gk.get_total_norm(tensors, any_cut=True)
    pieces = []
    for t in tensors:
        cuts = sorted(random.randint(0, t.numel()) for _ in range(random.randint(0, 4)))
        pieces += [t[a:b] for a, b in zip([0, *cuts], [*cuts, t.numel()], strict=True)]
    random.shuffle(pieces)
    threads = torch.get_num_threads()
    torch.set_num_threads(random.choice((1, 2)))
    try:
        assert same_bits(gk.get_total_norm(pieces, any_cut=True), expected)
    finally:
        torch.set_num_threads(threads)
    flat = [x for t in tensors for x in t.double().tolist()]
    truth = math.sqrt(math.fsum(x * x for x in flat))
    if truth > torch.finfo(torch.float32).max:
        assert math.isinf(expected)
    else:  # below the smallest normal fp32 the norm itself is rounded to a multiple of 2^-149
        assert float(expected) == pytest.approx(truth, rel=1e-7, abs=2.0**-150)


def test_limbs_of_parts_add_up():
    tensors = [random_values(n, torch.float32, seed=n) * 10.0**k for k, n in enumerate((9000, 17, 4096))]
    whole = functional.sumsq_exact(tensors)
    summed = torch.stack([functional.sumsq_exact([t]) for t in tensors]).sum(0)
    assert _total(summed) == _total(whole)
    scalars = []
    for limbs in (whole, summed, summed * 1000):
        scalars.append(functional.new_scalars(torch.device("cpu")))
        functional.step_scalars_(scalars[-1], [], [functional.exact_partials(limbs)])
    assert same_bits(scalars[0], scalars[1])
    assert float(scalars[2][NORM]) == pytest.approx(math.sqrt(1000) * float(scalars[0][NORM]), rel=1e-15)


def test_exact_sum_counts_what_is_not_finite():
    x = edge_values(9001, torch.float32)
    limbs = functional.sumsq_exact([x, torch.tensor([math.nan, math.inf, -math.inf])])
    assert limbs[22:].tolist() == [int(x.isinf().sum()) + 2, int(x.isnan().sum()) + 1]
    assert _total(limbs) == _exact([x[x.isfinite()]])
    for bad in (math.inf, -math.inf, math.nan):
        norm = gk.get_total_norm([torch.ones(5000), torch.tensor([1.0, bad])], any_cut=True)
        assert math.isnan(norm) if math.isnan(bad) else math.isinf(norm)


def test_a_chunk_of_the_largest_values_overflows_nothing():
    largest = torch.finfo(torch.float32).max
    huge = torch.full((3 * 4096 + 5,), largest)
    assert _total(functional.sumsq_exact([huge])) == huge.numel() * Fraction(largest) ** 2
    mixed = torch.full((4096,), largest)
    mixed[::2] = 2.0**-149
    assert _total(functional.sumsq_exact([mixed])) == _exact([mixed])


@settings(deadline=None, max_examples=40)
@given(st.lists(values(), min_size=1, max_size=3))
def test_sums_of_magnitudes_and_maxima_against_exact_arithmetic(tensors):
    flat = [abs(x) for t in tensors for x in t.double().tolist()]
    total = math.fsum(flat)
    if total <= torch.finfo(torch.float32).max:
        assert float(gk.get_total_norm(tensors, 1)) == pytest.approx(total, rel=1e-7, abs=2.0**-150)
    assert float(gk.get_total_norm(tensors, math.inf)) == max(flat, default=0.0)
