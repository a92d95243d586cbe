"""torch's own table of optimizer inputs and errors, with our classes in place of their namesakes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import gradkern as gk

OURS = {"Adam": gk.Adam, "AdamW": gk.AdamW, "SGD": gk.SGD}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in OURS}
INPUTS = [(name, i, case.desc) for name, info in INFOS.items() for i, case in enumerate(info.optim_inputs_func("cpu"))]
ERRORS = [
    (name, i, case.optimizer_error_input.desc)
    for name, info in INFOS.items()
    for i, case in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]
FLAGS = [{}, {"foreach": True}, {"fused": True}, {"capturable": True}]


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(10, 20), nn.Linear(20, 700), nn.Linear(700, 5)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(dtype)


def train(model, optimizer, steps=6):
    dtype = next(model.parameters()).dtype
    for k in range(steps):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(k)).to(dtype)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        closure() if k % 2 else None
        optimizer.step(None if k % 2 else closure)


def fresh(name, i):
    """A tensor lr must be each optimizer's own: schedulers and torch may change it in place."""
    return INFOS[name].optim_inputs_func("cpu")[i].kwargs


def test_the_table_has_what_it_had():
    assert INFOS.keys() == OURS.keys()
    assert len(INPUTS) >= 19
    assert len(ERRORS) >= 31


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: next(iter(flags), "default"))
@pytest.mark.parametrize(("name", "i"), [case[:2] for case in INPUTS], ids=[f"{n}-{d}" for n, _, d in INPUTS])
def test_inputs_of_torch_train_as_with_torch(name, i, flags):
    if name == "SGD" and "capturable" in flags:
        flags = {}  # torch's SGD has no such argument
    ours, theirs = model_of(), model_of()
    opt = OURS[name](ours.parameters(), **fresh(name, i), **flags)
    plain = INFOS[name].optim_cls(theirs.parameters(), **fresh(name, i), foreach=False)
    train(ours, opt)
    train(theirs, plain)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=2e-5, atol=2e-6)
    saved, expected = opt.state_dict(), plain.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert saved["state"][key].keys() == state.keys()
        for entry, value in state.items():
            got = saved["state"][key][entry]
            assert type(got) is type(value)
            if isinstance(value, torch.Tensor):
                assert got.dtype == value.dtype
                assert got.shape == value.shape
                assert torch.allclose(got, value, rtol=2e-4, atol=1e-7)
    assert [sorted(group) for group in saved["param_groups"]] == [sorted(group) for group in expected["param_groups"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize(("name", "i"), [case[:2] for case in INPUTS], ids=[f"{n}-{d}" for n, _, d in INPUTS])
def test_dtypes_that_kernels_do_not_store_are_torchs_bits(name, i, dtype):
    torch.manual_seed(1)
    start = [torch.randn(5, 3, dtype=dtype), torch.randn((), dtype=dtype)]
    results = []
    for cls in (OURS[name], INFOS[name].optim_cls):
        params = [nn.Parameter(t.clone()) for t in start]
        options = {} if cls is OURS[name] else {"foreach": False}
        opt = cls(params, **fresh(name, i), **options)
        for k in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(k))
            opt.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "i"), [case[:2] for case in ERRORS], ids=[f"{n}-{d}" for n, _, d in ERRORS])
def test_errors_of_torch_are_raised(name, i):
    case = INFOS[name].optim_error_inputs_func("cpu", torch.float32)[i]
    given = case.optimizer_error_input
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            OURS[name](given.params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            OURS[name](given.params, **given.kwargs)


@pytest.mark.parametrize(("name", "i"), [case[:2] for case in INPUTS], ids=[f"{n}-{d}" for n, _, d in INPUTS])
def test_differentiable_steps_are_torchs_and_so_are_their_derivatives(name, i):
    torch.manual_seed(2)
    steps = 1 if fresh(name, i).get("amsgrad") else 2  # torch changes its largest moment in place under autograd
    start = [torch.randn(6, dtype=torch.float64) for _ in range(1 + steps)]
    results = []
    for cls in (OURS[name], INFOS[name].optim_cls):
        param, *grads = [t.clone().requires_grad_() for t in start]
        p = param.clone()
        opt = cls([p], differentiable=True, **fresh(name, i))
        for grad in grads:
            p.grad = grad
            opt.step()
        # The first gradient that a momentum begins with is detached, by torch.
        found = torch.autograd.grad(p.square().sum(), [param, *grads], allow_unused=True, materialize_grads=True)
        results.append([p, *found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().sum() > 0
