"""What torch is told about the ops: schemas, fakes, version counters, tracing, the choice of backend, bad lists."""

from __future__ import annotations

import pytest
import torch

import gradkern as gk
from gradkern import functional
from gradkern.ops import _registry
from gradkern.ops._table import Operands
from gradkern.ops.adamw_step.spec import STEP
from gradkern.testing import all_samples, same_bits

FIRST = {}
for _spec, _sample in all_samples():
    FIRST.setdefault(_spec.name, (_spec, _sample))


@pytest.mark.parametrize("name", sorted(FIRST))
def test_opcheck(name):
    spec, sample = FIRST[name]
    op = getattr(torch.ops.gradkern, spec.name).default
    torch.library.opcheck(op, sample.args, sample.kwargs)


def test_accumulate_bumps_the_version_that_autograd_checks():
    x = torch.ones(4, requires_grad=True)
    y = x * 2
    z = y * y  # saves y
    with torch.no_grad():
        functional.accumulate_([y.detach()], [torch.ones(4)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_traces_without_a_graph_break():
    def update(main_grad, grad):
        functional.accumulate_([main_grad], [grad])
        return functional.sumsq([main_grad])

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    a, b = torch.ones(5000), torch.ones(5000)
    grad = torch.arange(5000.0)
    assert same_bits(compiled(a, grad), update(b, grad))
    assert same_bits(a, b)


def test_forced_backend_that_cannot_run_says_why():
    with gk.use_backend("triton"), pytest.raises(gk.BackendUnavailableError, match="interpreter"):
        functional.sumsq([torch.ones(3)])


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="got 'cuda', expected one of reference, native, triton"),
        gk.use_backend("cuda"),
    ):
        pass


def test_forcing_ends_with_the_block():
    with gk.use_backend("reference"):
        inside = _registry.select(_registry.SPECS["sumsq"], torch.device("cpu"))
    assert inside is _registry.SPECS["sumsq"].reference
    with pytest.raises(KeyError), gk.use_backend("reference"):
        raise KeyError
    assert _registry._FORCED.get() is None


@pytest.mark.parametrize(
    ("main_grads", "grads", "message"),
    [
        ([torch.zeros(3)], [torch.zeros(4)], r"grads\[0\] has shape \(4,\)"),
        ([torch.zeros(3)], [], "grads has 0 tensors, expected 1"),
        ([torch.zeros(4, 4)[:, :2]], [torch.zeros(4, 2)], "gaps or overlaps"),
        (
            [torch.zeros(3), torch.zeros(2)],
            [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)],
            r"grads\[1\] is torch.bfloat16",
        ),
    ],
)
def test_bad_lists_are_refused_before_anything_is_written(main_grads, grads, message):
    before = [m.clone() for m in main_grads]
    with gk.use_backend("native"), pytest.raises(ValueError, match=message):
        functional.accumulate_(main_grads, grads)
    assert all(map(torch.equal, main_grads, before))


def test_unsupported_dtype_names_the_way_out():
    with gk.use_backend("native"), pytest.raises(TypeError, match=r"dtype torch\.int32"):
        functional.sumsq([torch.ones(3, dtype=torch.int32)])


def test_meta_and_cpu_mixed_devices_are_refused():
    with pytest.raises(ValueError, match=r"on meta, expected torch\.float32 on cpu"):
        functional.sumsq([torch.ones(3), torch.ones(3, device="meta")])


def test_dtypes_that_kernels_take_for_granted_are_checked():
    with pytest.raises(TypeError, match=r"main_grads\[0\] has dtype torch\.bfloat16, expected torch\.float32"):
        functional.accumulate_([torch.zeros(4, dtype=torch.bfloat16)], [torch.ones(4)])
    scalars = functional.new_scalars(torch.device("cpu"))
    tensors = {
        "params": [torch.zeros(4)], "grads": [torch.ones(4)], "steps": [torch.ones(())],
        "exp_avgs": [torch.zeros(4)], "exp_avg_sqs": [torch.zeros(4, dtype=torch.bfloat16)],
    }  # fmt: skip
    hyper = torch.tensor([*STEP.rule.sample_hyper, 0.0], dtype=torch.float64)
    with pytest.raises(TypeError, match=r"exp_avg_sqs\[0\] has dtype torch\.bfloat16, expected torch\.float32"):
        functional.step_(STEP, tensors, scalars, hyper)
    with pytest.raises(ValueError, match=r"steps\[0\] is torch\.float64"):
        functional.step_scalars_(scalars, [torch.zeros(3, dtype=torch.float64)], [])


def test_traced_sumsq_fills_the_given_partials():
    def fill(x, partials):
        return functional.sumsq([x], partials)

    torch._dynamo.reset()
    compiled = torch.compile(fill, fullgraph=True, backend="aot_eager")
    x, partials = torch.ones(5000), torch.full((2,), -1.0, dtype=torch.float64)
    compiled(x, partials)
    assert partials.tolist() == [4096.0, 904.0]


def test_blocks_of_another_shape_or_dtype_are_refused():
    grads = Operands("test", {"grads": [torch.ones(5000)]})
    with pytest.raises(ValueError, match=r"scalars is torch\.float64 of shape \(4,\), expected"):
        functional.step_scalars_(torch.zeros(4, dtype=torch.float64), [], [])
    scalars = functional.new_scalars(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"grad_partials have \[1\] elements, expected \[2\]"):
        functional.step_scalars_(scalars, [], [], grads=grads, grad_partials=[torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"grad_partials\[0\] is torch\.float32"):
        functional.step_scalars_(scalars, [], [], grads=grads, grad_partials=[torch.zeros(2)])


def test_traced_step_scalars_sums_what_is_given():
    grads = Operands("test", {"grads": [torch.arange(5000.0)]})
    steps = [torch.zeros(())]

    def finish(scalars, partials):
        return functional.step_scalars_(scalars, steps, [partials], grads=grads, max_norm=1.0)

    torch._dynamo.reset()
    compiled = torch.compile(finish, fullgraph=True, backend="aot_eager")
    partials = torch.tensor([3.0], dtype=torch.float64)
    a, b = (functional.new_scalars(torch.device("cpu")) for _ in range(2))
    assert all(map(same_bits, compiled(a, partials), finish(b, partials)))
    assert same_bits(a, b)
    assert steps[0].item() == 2.0
