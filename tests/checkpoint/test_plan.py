from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from checkpoint_cases import mlp
from torch import nn

import gradkern as gk
from gradkern.checkpoint import _allocator, enforce, measure_peak, plan
from gradkern.errors import PlanInfeasibleError


def plan_for(case, budget, **options):
    return plan(case.model, case.batch, case.loss_fn, budget=budget, **options)


def budgets(made, count):
    low, high = made.least_feasible_bytes, made.natural_peak_bytes
    return [low + (high - low) * index // (count - 1) for index in range(count)]


@pytest.mark.parametrize(("optimizer_class", "accumulate"), [(torch.optim.AdamW, 4), (gk.AdamW, 1)])
def test_predicted_peak_holds_at_every_budget(case, accumulate, optimizer_class):
    optimizer = optimizer_class(case.model.parameters())
    case.cycle(optimizer, accumulate)
    natural = plan_for(case, "1 GiB", optimizer=optimizer, accumulate=accumulate)
    assert not any(unit.option != "keep" for unit in natural.units)
    case.cycle(optimizer, accumulate)

    def measured():
        return measure_peak(lambda: case.cycle(optimizer, accumulate), model=case.model, optimizer=optimizer).peak_bytes

    assert measured() <= natural.natural_peak_bytes <= 1.02 * measured() + 8192
    extra = []
    for budget in budgets(natural, 4):
        made = plan_for(case, budget, optimizer=optimizer, accumulate=accumulate)
        assert made.predicted_peak_bytes <= budget
        made.apply(case.model)
        with enforce(budget, model=case.model, optimizer=optimizer):
            peak = measured()
        made.remove(case.model)
        assert peak <= made.predicted_peak_bytes <= 1.02 * peak + 8192
        assert 0.9 * peak <= made.modelled_peak_bytes <= 1.15 * peak + 8192
        extra.append(sum(unit.option != "keep" for unit in made.units))
    assert extra[0] > 0
    assert extra[-1] == 0


def test_every_budget_is_held_and_the_largest_recomputes_nothing(gpt2_case):
    optimizer = torch.optim.AdamW(gpt2_case.model.parameters())
    first = plan_for(gpt2_case, "1 GiB", optimizer=optimizer)
    gpt2_case.cycle(optimizer)
    counts = []
    for budget in budgets(first, 6):
        made = plan_for(gpt2_case, budget, optimizer=optimizer)
        made.apply(gpt2_case.model)
        with enforce(budget, model=gpt2_case.model, optimizer=optimizer):
            gpt2_case.cycle(optimizer)
            gpt2_case.cycle(optimizer)
        made.remove(gpt2_case.model)
        assert made.gap == pytest.approx(0.0, abs=0.02)
        counts.append(sum(unit.option != "keep" for unit in made.units))
    assert counts[0] >= 3
    assert counts[-1] == 0


def test_units_of_gpt2_are_its_blocks(gpt2_case):
    made = plan_for(gpt2_case, "1 GiB")
    assert [unit.name for unit in made.units] == [
        "<stem>",
        *(f"transformer.h.{index}" for index in range(4)),
        "<head>",
    ]


def test_infeasible_budget_names_the_least_which_then_works(case):
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer)
    with pytest.raises(PlanInfeasibleError, match="least feasible budget") as caught:
        plan_for(case, 1000, optimizer=optimizer)
    least = caught.value.least_feasible_bytes
    assert str(least) in str(caught.value)
    made = plan_for(case, least, optimizer=optimizer)
    assert made.least_feasible_bytes == made.predicted_peak_bytes == least
    with pytest.raises(PlanInfeasibleError):
        plan_for(case, least - 1, optimizer=optimizer)


def test_counts_state_that_does_not_exist_yet(gpt2_case):
    optimizer = torch.optim.AdamW(gpt2_case.model.parameters())
    stateless = plan_for(gpt2_case, "1 GiB").natural_peak_bytes
    before = plan_for(gpt2_case, "1 GiB", optimizer=optimizer).natural_peak_bytes
    assert not optimizer.state
    gpt2_case.cycle(optimizer)
    assert plan_for(gpt2_case, "1 GiB", optimizer=optimizer).natural_peak_bytes == before
    params = sum(param.nbytes for param in gpt2_case.model.parameters())
    assert before - stateless >= 2 * params


def bits(tensors):
    return [tensor.detach().clone().contiguous().view(-1).view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, gk.AdamW])
def test_planning_leaves_everything_as_it_was(case, optimizer_class):
    optimizer = optimizer_class(case.model.parameters())
    case.cycle(optimizer)
    case.loss().backward()
    next(iter(case.model.parameters())).grad = None
    case.model.eval()
    next(case.model.children()).train()

    def state():
        tensors = [
            *case.model.parameters(),
            *case.model.buffers(),
            *(param.grad for param in case.model.parameters() if param.grad is not None),
            *(value for state in optimizer.state.values() for value in state.values()),
            torch.get_rng_state(),
        ]
        return [(id(tensor), tensor) for tensor in tensors[:-1]], bits(tensors)

    modes = [module.training for module in case.model.modules()]
    hooks = [
        (dict(module._forward_pre_hooks), dict(module._forward_hooks), list(vars(module)))
        for module in case.model.modules()
    ]
    generators = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    identities, before = state()
    plan_for(case, "1 GiB", optimizer=optimizer, accumulate=2)
    identities_after, after = state()
    assert [key for key, _ in identities] == [key for key, _ in identities_after]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert modes == [module.training for module in case.model.modules()]
    assert hooks == [
        (dict(module._forward_pre_hooks), dict(module._forward_hooks), list(vars(module)))
        for module in case.model.modules()
    ]
    assert generators == (random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, gk.AdamW])
def test_training_goes_on_as_if_never_planned(optimizer_class):
    trained = []
    for planned in (False, True):
        case = mlp()
        optimizer = optimizer_class(case.model.parameters())
        for _ in range(3):
            case.loss().backward()
            if planned:
                plan_for(case, "1 GiB", optimizer=optimizer, accumulate=2)
            case.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(bits(case.model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*trained, strict=True))


def test_without_the_hook_the_plan_is_made_from_profiler_events(mlp_case, monkeypatch, tmp_path):
    hooked = plan_for(mlp_case, "1 GiB")
    monkeypatch.setattr(_allocator, "LIBRARY", tmp_path / "_alloc.so")
    profiled = plan_for(mlp_case, "1 GiB")
    assert [unit.options[0].saved_bytes for unit in profiled.units] == [
        unit.options[0].saved_bytes for unit in hooked.units
    ]
    # The hook also sees what else this process holds; the profiler counts only the model and the batch.
    assert profiled.natural_peak_bytes <= hooked.natural_peak_bytes


class Holder:
    def __init__(self, tensors, nbytes):
        self.tensors = tensors
        self.nbytes = nbytes

    def held_bytes(self):
        return self.nbytes


def test_recorder_counts_once(mlp_case):
    alone = plan_for(mlp_case, "1 GiB").natural_peak_bytes
    lazy = Holder([], 50_000)
    assert plan_for(mlp_case, "1 GiB", recorder=lazy).natural_peak_bytes == alone + 50_000
    live = Holder([torch.empty(40_000, dtype=torch.uint8)], 50_000)
    assert plan_for(mlp_case, "1 GiB", recorder=live).natural_peak_bytes == alone + 50_000


def test_models_without_blocks_fall_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    made = plan(model, torch.randn(4, 8), lambda y, x: y.mean(), budget="1 GiB")
    assert [unit.name for unit in made.units[1:-1]] == ["0", "1", "2"]
    made = plan(nn.Linear(8, 1), torch.randn(4, 8), lambda y, x: y.mean(), budget="1 GiB")
    assert [unit.name for unit in made.units[1:-1]] == ["<model>"]
    shared = nn.Linear(8, 8)
    twice = nn.Sequential(nn.Sequential(shared, shared), nn.Linear(8, 1))
    made = plan(twice, torch.randn(4, 8), lambda y, x: y.mean(), budget="1 GiB")
    assert [unit.name for unit in made.units[1:-1]] == ["0", "1"]


def test_whole_model_can_be_recomputed():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            for _ in range(6):
                x = torch.tanh(x @ self.weight)
            return x.sum(1)

    model, x = Bare(), torch.randn(256, 64)
    made = plan(model, x, lambda y, x: y.mean(), budget="1 GiB")
    assert [unit.name for unit in made.units] == ["<stem>", "<model>", "<head>"]
    assert made.least_feasible_bytes <= made.natural_peak_bytes


def test_bad_arguments(mlp_case):
    good = {"budget": "1 GiB"}
    for options, error, message in [
        ({"budget": "lots"}, ValueError, "cannot read"),
        ({"budget": -5}, ValueError, "at least one byte"),
        (good | {"accumulate": 0}, ValueError, "at least 1"),
        (good | {"accumulate": True}, TypeError, "accumulate"),
        (good | {"optimizer": "adamw"}, TypeError, "optimizer"),
        (good | {"recorder": object()}, TypeError, "held_bytes"),
        (good | {"optimizer": torch.optim.LBFGS(mlp_case.model.parameters())}, ValueError, "closure"),
    ]:
        with pytest.raises(error, match=message):
            plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, **options)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        plan("model", mlp_case.batch, mlp_case.loss_fn, budget="1 GiB")
    with pytest.raises(ValueError, match="meta"):
        plan(nn.Linear(2, 2, device="meta"), torch.ones(2), budget="1 GiB")
    frozen = nn.Linear(8, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="requires grad"):
        plan(frozen, torch.randn(4, 8), lambda y, x: y.mean(), budget="1 GiB")


def test_gradient_checkpointing_of_transformers_is_refused(gpt2_case):
    gpt2_case.model.transformer.h[2].gradient_checkpointing = True
    with pytest.raises(RuntimeError, match=r"transformer\.h\.2"):
        plan_for(gpt2_case, "1 GiB")


class Scheduled(torch.optim.SGD):
    """Sets an attribute of its own, which copies of an optimizer lack."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.pace = 2

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 / self.pace
        return super().step(closure)


def test_an_optimizer_whose_copy_cannot_step_is_named(mlp_case):
    optimizer = Scheduled(mlp_case.model.parameters())
    with pytest.raises(ValueError, match=r"Scheduled cannot step.*'pace'.*optimizer=None"):
        plan_for(mlp_case, "1 GiB", optimizer=optimizer)
    mlp_case.cycle(optimizer)


def test_str_is_a_table(mlp_case):
    made = plan_for(mlp_case, "1 GiB")
    text = str(made)
    for word in ("natural peak", "budget", "predicted peak", "least feasible", "gap", "<head>", "keep"):
        assert word in text
    assert len(text.splitlines()) == 7 + len(made.units)


def unit_names(made):
    return [unit.name for unit in made.units[1:-1]]


def test_units_may_be_named_by_patterns():
    case = mlp()
    assert unit_names(plan_for(case, "1 GiB")) == ["1", "2", "3", "4", "5"]
    by_hand = plan_for(case, "1 GiB", units=["[12]", "4.*"])
    assert unit_names(by_hand) == ["1", "2", "4.0", "4.1", "4.2", "4.3"]
    tight = plan_for(case, by_hand.least_feasible_bytes, units=["[12]", "4.*"])
    assert any(unit.option != "keep" for unit in tight.units)
    tight.apply(case.model)
    case.cycle()
    tight.remove(case.model)


def test_of_nested_modules_the_outermost_are_units():
    case = mlp()
    assert unit_names(plan_for(case, "1 GiB", units="3*")) == ["3"]
    assert unit_names(plan_for(case, "1 GiB", units=["*", "3.0"])) == ["0", "1", "2", "3", "4", "5", "6"]


def test_a_pattern_without_a_module_names_one_that_was_perhaps_meant():
    case = mlp()
    with pytest.raises(ValueError, match=r"no module of this Sequential matches '5\.9', .* such as '5\.\d'"):
        plan_for(case, "1 GiB", units=["1", "5.9"])


def test_a_budget_beyond_all_memory(mlp_case):
    made = plan_for(mlp_case, 2**70)
    assert all(unit.option == "keep" for unit in made.units)
    assert made.for_budget("99999999 PiB").units == made.units
