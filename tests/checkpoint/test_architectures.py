"""Real architectures with random weights: planned out of the box, held to their budget, gradients bit for bit."""

from __future__ import annotations

import pytest
import torch

import gradkern as gk
from bench.architectures import ARCHITECTURES
from gradkern.checkpoint import allocator_unavailable_reason, enforce, plan
from gradkern.loss import compute_loss
from gradkern.testing import same_bits

unavailable = allocator_unavailable_reason()


def gradients(made):
    torch.manual_seed(0)
    compute_loss(*made).backward()
    found = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return found


@pytest.mark.skipif(unavailable is not None, reason=f"enforce needs the allocator hook: {unavailable}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_least_budget_is_held_with_the_same_gradients(name):
    made = ARCHITECTURES[name]()
    optimizer = gk.AdamW(made.model.parameters())
    with pytest.raises(gk.errors.PlanInfeasibleError) as refused:
        plan(*made, budget=1, optimizer=optimizer)
    budget = refused.value.least_feasible_bytes
    planned = plan(*made, budget=budget, optimizer=optimizer)
    assert planned.predicted_peak_bytes <= budget < planned.natural_peak_bytes
    assert planned.gap == 0.0
    expected = gradients(made)
    planned.apply(made.model)
    found = gradients(made)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)
    found, expected = {}, {}
    for _ in range(2):  # the first makes the optimizer's state
        with enforce(budget, model=made.model, optimizer=optimizer):
            compute_loss(*made).backward()
            optimizer.step()
            optimizer.zero_grad()
