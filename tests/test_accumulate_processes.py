"""Accumulation in two processes: under DistributedDataParallel, and with collectives called by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import gradkern as gk
from gradkern.grad_fold import FOLD_MIN_NUMEL
from gradkern.testing import same_bits


def whole_numbers(*shape, seed):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


class Exact(nn.Module):
    """All sums are of small whole numbers, exact in any order; one weight is large enough for an optimizer's fold."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.inner = nn.Linear(8, 512)
        self.outer = nn.Linear(512, 512)
        for i, param in enumerate(self.parameters()):
            param.data.copy_(whole_numbers(*param.shape, seed=i))
        self.to(dtype)

    def forward(self, x):
        return self.outer(self.inner(x)).float()


def micro_batch(rank, k):
    return whole_numbers(2, 8, seed=10 * rank + k)


def exact_loss(output):
    return (output * whole_numbers(512, seed=99)).sum() / 2  # the mean of two processes halves once more


def ddp_backward(ddp, rank, micro_batches=3, sync=True):
    dtype = next(ddp.parameters()).dtype
    for k in range(micro_batches):
        with torch.enable_grad() if sync and k == micro_batches - 1 else ddp.no_sync():
            exact_loss(ddp(micro_batch(rank, k).to(dtype))).backward()


def fp32_under_ddp(rank):
    results = {}
    for view in (False, True):
        for comm_hook in (False, True):
            for first in ("accumulator", "ddp"):
                model = Exact()
                accumulator = gk.GradAccumulator(model.parameters()) if first == "accumulator" else None
                ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
                if comm_hook:
                    ddp.register_comm_hook(None, allreduce_hook)
                accumulator = accumulator or gk.GradAccumulator(ddp.parameters())
                for clear in (True, False, True):
                    ddp_backward(ddp, rank)
                    results[view, comm_hook, first, clear] = [p.grad.clone() for p in model.parameters()]
                    assert same_bits(accumulator.norm(), gk.get_total_norm(accumulator.grads))
                    # Set to zero in place, a gradient stays a view of DDP's bucket, which a collective then writes.
                    ddp.zero_grad(set_to_none=clear)
        model = Exact()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
        opt = gk.AdamW(ddp.parameters(), max_norm=1.0)
        for clear in (False, True):
            ddp_backward(ddp, rank)
            expected = gk.get_total_norm([p.grad for p in model.parameters()])
            opt.step()
            assert same_bits(opt.grad_norm, expected)
            ddp.zero_grad(set_to_none=clear)
    return list(results.values())


def bf16_under_ddp(rank):
    model = Exact(torch.bfloat16)
    ddp = DistributedDataParallel(model)
    accumulator = gk.GradAccumulator(ddp.parameters())
    ddp_backward(ddp, rank, micro_batches=2, sync=False)
    before = [p.grad.clone() for p in model.parameters()]
    message = ""
    try:
        exact_loss(ddp(micro_batch(rank, 2).bfloat16())).backward()
    except RuntimeError as error:
        message = str(error)
    untouched = all(same_bits(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))

    model = Exact(torch.bfloat16)
    ddp = DistributedDataParallel(model)
    accumulator = gk.GradAccumulator(ddp.parameters())
    with ddp.no_sync():
        outputs = [ddp(micro_batch(rank, k).bfloat16()) for k in range(3)]
    for output in outputs:
        exact_loss(output).backward()  # where forward ran decides, not where backward runs
    for grad in accumulator.grads:
        torch.distributed.all_reduce(grad)  # bumps no version
    assert same_bits(accumulator.norm(), gk.get_total_norm(accumulator.grads))
    for grad in accumulator.grads:
        grad.div_(2)
    return message, untouched, [p.grad for p in model.parameters()]


ALL_MICRO_BATCHES = [micro_batch(rank, k) for rank in range(2) for k in range(3)]


def test_fp32_under_ddp_equals_one_large_batch(tmp_path):
    model = Exact()
    exact_loss(model(torch.cat(ALL_MICRO_BATCHES))).div(2).backward()
    expected = [p.grad for p in model.parameters()]
    for runs in in_two_processes(fp32_under_ddp, tmp_path):
        assert runs
        for grads in runs:
            assert all(same_bits(g, e) for g, e in zip(grads, expected, strict=True))


def reduced_by_hand(rank):
    big = nn.Parameter(torch.zeros(2 * FOLD_MIN_NUMEL))
    opt = gk.SGD([big], lr=1.0, max_norm=0.5)
    for _ in range(2):  # the second is added, and normed, in backward
        (big * float(rank + 1)).sum().backward()
    torch.distributed.all_reduce(big.grad)  # bumps no version: what was normed in backward is out of date
    opt.step()
    return opt.grad_norm, big.detach()


def test_gradients_reduced_by_hand_are_normed_as_they_are(tmp_path):
    for norm, param in in_two_processes(reduced_by_hand, tmp_path):
        assert float(norm) == pytest.approx(6.0 * (2 * FOLD_MIN_NUMEL) ** 0.5, rel=1e-6)
        assert float(param.norm()) == pytest.approx(0.5, rel=1e-5)


def test_bf16_under_ddp_refuses_its_reducer_and_averages_in_fp32(tmp_path):
    model = Exact(torch.bfloat16)
    params = list(model.parameters())
    each = [torch.autograd.grad(exact_loss(model(x.bfloat16())), params) for x in ALL_MICRO_BATCHES]
    expected = [torch.stack([grad.float() for grad in grads]).sum(0) / 2 for grads in zip(*each, strict=True)]
    for message, untouched, grads in in_two_processes(bf16_under_ddp, tmp_path):
        assert "run every micro-batch under no_sync()" in message
        assert untouched
        assert all(g.dtype == torch.float32 for g in grads)
        assert all(same_bits(g, e) for g, e in zip(grads, expected, strict=True))
