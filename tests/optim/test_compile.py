"""Steps and clip functions trace in one graph where torch's do, and the traced ops are what eager runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import loss_of, mlp

ALL = {
    "AdamW": lambda params: gk.AdamW(params, lr=1e-2, max_norm=0.1),
    "Adam": lambda params: gk.Adam(params, lr=1e-2, max_norm=0.1),
    "SGD": lambda params: gk.SGD(params, lr=1e-2, momentum=0.9, max_norm=0.1),
    "Lion": lambda params: gk.Lion(params, lr=1e-3, max_norm=0.1),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("any_cut", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_norm_and_clip_functions_trace_in_one_graph(backend, any_cut):
    def both(tensors):
        return gk.get_total_norm(tensors, any_cut=any_cut)

    torch.manual_seed(0)
    tensors = [torch.randn(30, 50), torch.randn(7)]
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    assert same_bits(compiled(tensors), both(tensors))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_clip_grad_norm_traces_in_one_graph(backend):
    torch.manual_seed(0)
    grads = [torch.randn(30, 50), torch.randn(7)]
    params = [nn.Parameter(torch.zeros(g.shape)) for g in grads]

    def clip():
        return gk.clip_grad_norm_(params, 0.5)

    results = []
    for function in (clip, torch.compile(clip, fullgraph=True, backend=backend)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        results.append([function(), *(p.grad for p in params)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_compiled_step_has_the_bits_of_an_eager_one(name):
    ours, theirs = mlp(), mlp()
    opt, plain = ALL[name](ours.parameters()), ALL[name](theirs.parameters())
    step = torch.compile(opt.step, backend="eager")
    for k in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            loss_of(model, k).backward()
        step()
        plain.step()
    assert all(same_bits(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert same_bits(opt.grad_norm, plain.grad_norm)
