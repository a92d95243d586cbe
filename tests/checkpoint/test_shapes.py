"""Plans by length: one for every length, in milliseconds, none over the budget."""

from __future__ import annotations

import gc
import operator
import random

import pytest
import torch
from checkpoint_cases import deep, gpt2, mlp
from torch import nn

from gradkern.checkpoint import ShapePlans, allocator_unavailable_reason, enforce, measure_peak, plan
from gradkern.checkpoint._shapes import _parabola
from gradkern.errors import PlanInfeasibleError
from gradkern.testing import same_bits

LENGTHS = [16, 32, 64]
unavailable = allocator_unavailable_reason()


def batch_of(length):
    ids = torch.randint(0, 128, (4, length))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()  # of other tests, before what lives is counted
    case = gpt2(dropout=0.0, layers=6)
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer)
    free = plan(case.model, case.batch, budget="1 GiB", optimizer=optimizer)
    budget = (2 * free.least_feasible_bytes + free.natural_peak_bytes) // 3
    yield case, optimizer, plan(case.model, case.batch, budget=budget, optimizer=optimizer, shapes=LENGTHS)
    torch.set_num_threads(threads)


@pytest.mark.skipif(unavailable is not None, reason=f"enforce needs the allocator hook: {unavailable}")
def test_every_length_holds_the_budget(trained):
    case, optimizer, plans = trained
    assert isinstance(plans, ShapePlans)
    drawn = random.Random(5)
    recomputed = {}
    for length in [*LENGTHS, 1, 63, *(drawn.randrange(1, 65) for _ in range(40))]:
        made = plans.apply(case.model, length)
        recomputed[length] = made.extra_s
        case.batch = batch_of(length)
        with enforce(plans.budget_bytes, model=case.model, optimizer=optimizer):
            peak = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer).peak_bytes
        assert peak <= made.predicted_peak_bytes <= plans.budget_bytes
        assert made.budget_bytes == plans.budget_bytes
    plans.remove(case.model)
    assert recomputed[1] == 0.0 < recomputed[64]


def test_a_length_between_is_predicted_closely(trained):
    case, optimizer, plans = trained
    for length in (24, 40, 48, 56):
        made = plans.at(length)
        assert made is plans.at(length)
        assert all({option.name for option in unit.options} == {"keep", unit.option} for unit in made.units)
        case.batch = batch_of(length)
        made.apply(case.model)
        case.cycle(optimizer)
        peak = measure_peak(lambda: case.cycle(optimizer), model=case.model, optimizer=optimizer).peak_bytes
        made.remove(case.model)
        assert peak <= made.predicted_peak_bytes <= 1.1 * peak


def test_gradients_are_those_without_a_plan(trained):
    case, _, plans = trained
    case.batch = batch_of(50)
    gradients = []
    for planned in (False, True):
        if planned:
            plans.apply(case.model, 50)
        case.loss().backward()
        gradients.append([param.grad for param in case.model.parameters()])
        case.model.zero_grad()
    plans.remove(case.model)
    assert all(map(same_bits, *gradients))


def test_switching_takes_the_old_plan_off(trained):
    case, _, plans = trained
    long, short = plans.at(64), plans.at(1)
    assert not long.does_as(short)
    plans.apply(case.model, 64)
    assert long.is_applied(case.model)
    plans.apply(case.model, 1)
    assert short.is_applied(case.model)
    assert not long.is_applied(case.model)
    plans.remove(case.model)
    with pytest.raises(RuntimeError, match="none of these plans"):
        plans.remove(case.model)
    long.apply(case.model)
    other = plan(mlp().model, torch.zeros(4, 16), lambda y, _: y.mean(), budget="1 GiB")
    with pytest.raises(RuntimeError, match="another plan"):
        other.remove(case.model)
    plans.remove(case.model)


def test_arguments(trained):
    case, _, plans = trained
    for length in (0, 65):
        with pytest.raises(ValueError, match="from 1 to 64"):
            plans.at(length)
    with pytest.raises(TypeError, match="must be an int"):
        plans.at(3.0)
    case.batch = batch_of(64)
    for shapes in ([32, 64], [16, 32, 48], [0, 32, 64], [32, 64, 128]):
        with pytest.raises(ValueError, match=r"three or more lengths.*64"):
            plan(case.model, case.batch, budget="1 GiB", shapes=shapes)
    with pytest.raises(TypeError, match="must be lengths"):
        plan(case.model, case.batch, budget="1 GiB", shapes=[16, 32.0, 64])
    with pytest.raises(ValueError, match="agree in dimension 1"):
        plan(case.model, {**case.batch, "x": torch.zeros(4, 3)}, budget="1 GiB", shapes=LENGTHS)
    with pytest.raises(PlanInfeasibleError):
        plan(case.model, case.batch, budget=1000, shapes=LENGTHS)


def test_where_only_nesting_fits_the_next_longer_plan_serves():
    case = deep(12, (16, 48, 32))
    with pytest.raises(PlanInfeasibleError) as refused:
        plan(case.model, case.batch, case.loss_fn, budget=1000)
    budget = refused.value.least_feasible_bytes
    plans = plan(case.model, case.batch, case.loss_fn, budget=budget, shapes=[24, 36, 48])
    assert plans.at(48).segments
    assert plans.at(47) is plans.at(48)


class ByLength(nn.Module):
    """Runs one block more where there is more to run on."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks[: 3 if x.shape[1] > 16 else 2]:
            x = x + block(x)
        return x


def test_a_length_that_runs_other_units_is_named():
    with pytest.raises(ValueError, match="at length 16 the model runs other units than at 64"):
        plan(ByLength(), torch.zeros(2, 64, 8), lambda y, _: y.square().mean(), budget="1 GiB", shapes=LENGTHS)


def test_the_parabola_is_exact_for_squares():
    lengths = [10, 20, 50]
    values = [7 + 3 * x + 2 * x * x for x in lengths]
    assert sum(map(operator.mul, _parabola(lengths, 33), values)) == pytest.approx(7 + 3 * 33 + 2 * 33 * 33)
