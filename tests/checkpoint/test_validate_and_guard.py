"""Closing the loop: a plan that does not hold is replaced, before training or in the middle of it."""

from __future__ import annotations

import gc

import pytest
import torch
from checkpoint_cases import cnn, gpt2, mlp
from torch import nn

from gradkern.checkpoint import allocator_unavailable_reason, enforce, guard, measure_peak, plan
from gradkern.errors import PlanInfeasibleError
from gradkern.testing import same_bits

unavailable = allocator_unavailable_reason()
needs_hook = pytest.mark.skipif(unavailable is not None, reason=f"enforce needs the allocator hook: {unavailable}")


def rows(case, count):
    """The first rows of a case's batch."""
    if isinstance(case.batch, dict):
        ids = case.batch["input_ids"][:count].clone()
        return {"input_ids": ids, "labels": ids}
    return tuple(part[:count].clone() for part in case.batch)


def test_a_plan_that_holds_stays(mlp_case):
    optimizer = torch.optim.AdamW(mlp_case.model.parameters())
    free = plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, budget="1 GiB", optimizer=optimizer)
    budget = (free.least_feasible_bytes + free.natural_peak_bytes) // 2
    made = plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, budget=budget, optimizer=optimizer)
    made.apply(mlp_case.model)
    before = [float(param.detach().double().sum()) for param in mlp_case.model.parameters()]
    checked = made.validate(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, optimizer=optimizer)
    assert checked.plan is made
    assert checked.held
    assert checked.same_gradients
    assert checked.predicted_peak_bytes == made.predicted_peak_bytes
    assert checked.measured_peak_bytes == pytest.approx(made.predicted_peak_bytes, rel=0.01)
    assert before == [float(param.detach().double().sum()) for param in mlp_case.model.parameters()]
    assert all(param.grad is None for param in mlp_case.model.parameters())
    assert not optimizer.state
    assert made.is_applied(mlp_case.model)


@pytest.mark.parametrize("make", [mlp, cnn, gpt2])
def test_a_plan_for_less_is_replaced(make):
    case = make()
    small, whole = rows(case, 2), case.batch
    free = plan(case.model, whole, case.loss_fn, budget="1 GiB")
    budget = (free.least_feasible_bytes + free.natural_peak_bytes) // 2
    made = plan(case.model, small, case.loss_fn, budget=budget)
    assert all(unit.option == "keep" for unit in made.units)
    made.apply(case.model)
    checked = made.validate(case.model, whole, case.loss_fn)
    assert not checked.held
    assert checked.measured_peak_bytes > budget
    assert checked.plan.predicted_peak_bytes <= budget
    assert checked.plan.is_applied(case.model)
    again = checked.plan.validate(case.model, whole, case.loss_fn)
    assert again.held
    assert again.plan is checked.plan


def test_where_nothing_fits_the_plan_stays(mlp_case):
    small = rows(mlp_case, 2)
    free = plan(mlp_case.model, small, mlp_case.loss_fn, budget="1 GiB")
    made = plan(mlp_case.model, small, mlp_case.loss_fn, budget=free.natural_peak_bytes)
    with pytest.raises(RuntimeError, match=r"plan.apply\(model\) first"):
        made.validate(mlp_case.model, mlp_case.batch, mlp_case.loss_fn)
    made.apply(mlp_case.model)
    with pytest.raises(PlanInfeasibleError):
        made.validate(mlp_case.model, mlp_case.batch, mlp_case.loss_fn)
    assert made.is_applied(mlp_case.model)


class Training:
    """Steps over batches of growing size, with dropout and running statistics."""

    def __init__(self, make):
        self.case = make()
        self.optimizer = torch.optim.AdamW(self.case.model.parameters(), lr=1e-2)
        whole = len(next(iter(self.case.batch.values() if isinstance(self.case.batch, dict) else self.case.batch)))
        self.batches = [rows(self.case, count) for count in (whole // 4, whole // 2, whole, whole)]
        torch.manual_seed(9)

    def cycle(self, batch):
        self.case.batch = batch
        loss = self.case.loss()
        loss.backward()
        return loss.item()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self):
        return [tensor.detach().clone() for tensor in self.case.model.state_dict().values()]


@needs_hook
@pytest.mark.parametrize("make", [cnn, gpt2, mlp])
def test_training_goes_on_as_if_it_had_been_planned_so(make):
    free = Training(make)
    losses = []
    for batch in free.batches:
        losses.append(free.cycle(batch))
        free.step()
    expected = free.state()
    del free

    training = Training(make)
    model, optimizer = training.case.model, training.optimizer
    largest = plan(model, training.batches[-1], training.case.loss_fn, budget="1 GiB", optimizer=optimizer)
    budget = (2 * largest.least_feasible_bytes + largest.natural_peak_bytes) // 3
    watched = guard(model, training.case.loss_fn, budget=budget, optimizer=optimizer)
    found = []
    torch.manual_seed(9)
    with enforce(budget, model=model, optimizer=optimizer):
        for batch in training.batches:
            found.append(watched.run(lambda batch=batch: training.cycle(batch), batch))
            training.step()
    assert watched.replans >= 1
    assert watched.plan.is_applied(model)
    assert found == losses
    assert all(map(same_bits, training.state(), expected))


@needs_hook
def test_where_nothing_fits_it_says_so_and_leaves_no_gradient(mlp_case):
    model = mlp_case.model
    # Above what the process holds already, below what a step needs.
    gc.collect()  # of what earlier tests left
    budget = measure_peak(lambda: None, model=model).start_bytes + 100_000
    watched = guard(model, mlp_case.loss_fn, budget=budget)
    with enforce(budget, model=model):
        with pytest.raises(PlanInfeasibleError, match=r"memory ran out.*least feasible budget") as caught:
            watched.run(lambda: mlp_case.loss().backward(), mlp_case.batch)
        assert caught.value.least_feasible_bytes > budget
        assert all(param.grad is None for param in model.parameters())
    assert watched.plan is None


@needs_hook
def test_a_step_that_holds_what_no_plan_knows_of_ends_with_an_error(mlp_case):
    model = mlp_case.model
    free = plan(model, mlp_case.batch, mlp_case.loss_fn, budget="1 GiB")
    budget = 4 * free.natural_peak_bytes  # of which what earlier tests hold is a small part
    watched = guard(model, mlp_case.loss_fn, budget=budget)

    def cycle():
        hoard = torch.zeros(budget // 4)  # all of the budget
        mlp_case.loss().backward()
        return hoard

    with enforce(budget, model=model), pytest.raises(torch.OutOfMemoryError, match="holds more than plan"):
        watched.run(cycle, mlp_case.batch)
    assert watched.replans == 3


def test_other_errors_pass(mlp_case):
    watched = guard(mlp_case.model, mlp_case.loss_fn, budget="1 GiB")

    def wrong():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        watched.run(wrong, mlp_case.batch)
    assert watched.replans == 0
    mlp_case.loss().backward()
    with pytest.raises(RuntimeError, match="gradients of an earlier step"):
        watched.run(lambda: None, mlp_case.batch)


def test_a_step_that_has_changed_parameters_is_not_run_again(mlp_case):
    calls = []

    def cycle():
        calls.append(1)
        with torch.no_grad():
            next(mlp_case.model.parameters()).add_(1)
        raise torch.OutOfMemoryError("no more")

    watched = guard(mlp_case.model, mlp_case.loss_fn, budget="1 GiB")
    with pytest.raises(RuntimeError, match="after parameters had been changed"):
        watched.run(cycle, mlp_case.batch)
    assert calls == [1]


def test_an_error_without_words(mlp_case):
    calls = []

    def cycle():
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return mlp_case.loss().backward()

    watched = guard(mlp_case.model, mlp_case.loss_fn, budget="1 GiB")
    watched.run(cycle, mlp_case.batch)
    assert (len(calls), watched.replans) == (2, 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"accumulate": 0}, ValueError),
        ({"units": "nope"}, ValueError),
        ({"gpu": "X"}, ValueError),
        ({"optimizer": 3}, TypeError),
        ({"recorder": 3}, TypeError),
    ],
)
def test_what_is_wrong_is_said_before_training(mlp_case, options, error):
    with pytest.raises(error):
        guard(mlp_case.model, mlp_case.loss_fn, budget="1 GiB", **options)


def test_a_plan_that_is_not_applied_is_refused(mlp_case):
    made = plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, budget="1 GiB")
    with pytest.raises(RuntimeError, match="not applied"):
        guard(mlp_case.model, mlp_case.loss_fn, budget="1 GiB", plan=made)
    assert isinstance(mlp_case.model, nn.Sequential)
