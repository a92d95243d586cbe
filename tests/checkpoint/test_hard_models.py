"""Models that recomputation could get wrong: each is trained under the plan that recomputes all it may."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from checkpoint_cases import Case, gpt2
from torch import nn

from gradkern.checkpoint import plan


def mean_square(y, _):
    return y.square().mean()


def least(case, **options):
    """The plan of least memory."""
    free = plan(case.model, case.batch, case.loss_fn, budget="1 GiB", **options)
    return plan(case.model, case.batch, case.loss_fn, budget=free.least_feasible_bytes, **options)


def recomputed(made):
    return [unit.name for unit in made.units if unit.option != "keep"]


def assert_trains_alike(case, made, passes=2):
    """Gradients and buffers of a planned copy are bit-equal to those of the model."""
    twin = copy.deepcopy(case.model)
    made.apply(twin)
    for _ in range(passes):
        grads = []
        for model in (case.model, twin):
            torch.manual_seed(7)
            case.loss(model).backward()
            grads.append([param.grad for param in model.parameters()])
        for left, right in zip(*grads, strict=True):
            assert torch.equal(left, right)
        for left, right in zip(case.model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(left, right)


class Block(nn.Module):
    """Two layers, with what ``pre`` does to the input first."""

    def __init__(self, pre=lambda h: h + 1, width=32):
        super().__init__()
        self.pre = pre
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)

    def forward(self, h, scale=None):
        h = self.pre(h) if scale is None else self.pre(h) + scale[0]
        return self.fall(torch.tanh(self.rise(h)))


class Chain(nn.Module):
    """Blocks run one after the other as ``call`` says."""

    def __init__(self, call, blocks):
        super().__init__()
        self.call = call
        self.stem = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = self.call(block, h)
        return h


def chain(call, make=Block, count=4):
    torch.manual_seed(0)
    return Case(Chain(call, [make() for _ in range(count)]), torch.randn(64, 32), mean_square)


def add_in_place(block, h):
    h += block(h)
    return h


def add_in_place_by_keyword(block, h):
    h += block(h=h)
    return h


def scaled(block, h):
    scale = torch.ones(32)
    out = block(h, scale=[scale])
    scale += 1
    return out


@pytest.mark.parametrize("call", [add_in_place, add_in_place_by_keyword, scaled])
def test_units_whose_inputs_change_later_are_kept(call):
    case = chain(call)
    made = least(case)
    assert recomputed(made) == []
    assert_trains_alike(case, made)


@pytest.mark.parametrize("call", [add_in_place, add_in_place_by_keyword, scaled])
def test_inputs_that_change_after_planning_raise(call):
    case = chain(lambda block, h: h + block(h))
    made = least(case)
    assert "blocks.0" in recomputed(made)
    case.model.call = call
    made.apply(case.model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.loss().backward()


def test_keyword_and_nested_arguments_are_recomputed():
    case = chain(lambda block, h: h + block(scale=(torch.full((32,), 2.0),), h=h))
    made = least(case)
    assert "blocks.0" in recomputed(made)
    assert_trains_alike(case, made)


@pytest.mark.parametrize("pre", [lambda h: h.relu_(), lambda h: h.mul_(2)])
def test_units_that_change_their_own_input_are_kept(pre):
    case = chain(lambda block, h: block(h), lambda: Block(pre))
    made = least(case)
    assert recomputed(made) == []
    assert_trains_alike(case, made)


def test_in_place_activations_as_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(inplace=True), nn.Linear(128, 32))
    case = Case(model, torch.randn(64, 32), mean_square)
    made = least(case)
    assert "1" not in recomputed(made)
    assert_trains_alike(case, made)


def norm_block():
    return nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.Tanh(), nn.Linear(128, 32))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def test_statistics_frozen_while_planning_count_once_when_they_train():
    case = chain(lambda block, h: h + block(h), norm_block)
    for norm in norms(case.model):
        norm.eval()
    made = least(case)
    assert recomputed(made)
    case.model.train()
    assert_trains_alike(case, made)
    assert {int(norm.num_batches_tracked) for norm in norms(case.model)} == {2}


def test_statistics_count_once_in_a_unit_in_eval_mode():
    case = chain(lambda block, h: h + block(h), norm_block)
    made = least(case)
    assert recomputed(made)
    for block in case.model.blocks:
        block.training = False
    assert_trains_alike(case, made)
    assert {int(norm.num_batches_tracked) for norm in norms(case.model)} == {2}


def test_frozen_norms_plan_with_a_batch_of_one():
    case = chain(lambda block, h: h + block(h), norm_block)
    case.batch = case.batch[:1]
    for norm in norms(case.model):
        norm.eval()
    least(case)


class Drops(nn.Module):
    """Stochastic depth: skips blocks by one of the global generators."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            if self.draw() < 0.5:
                x = x + block(x)
        return x


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), random.random, np.random.random],
    ids=["torch", "python", "numpy"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stochastic_depth_by_a_global_generator(draw, accumulate):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    case = Case(Drops(draw), torch.randn(64, 32), mean_square)
    made = least(case, accumulate=accumulate)
    assert made.predicted_peak_bytes == made.least_feasible_bytes


def test_stochastic_depth_by_a_generator_of_its_own_is_named():
    generator = torch.Generator().manual_seed(0)
    case = Case(Drops(lambda: torch.rand((), generator=generator)), torch.randn(64, 32), mean_square)
    with pytest.raises(ValueError, match=r"unit 'blocks\.\d' ran in one forward pass and not in another"):
        least(case)


class Noise(nn.Module):
    """A block that multiplies by what ``draw`` returns."""

    def __init__(self, draw):
        super().__init__()
        self.block = Block()
        self.draw = draw

    def forward(self, h):
        return self.block(h * self.draw())


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: torch.rand((), generator=GENERATOR)],
    ids=["python", "numpy", "own"],
)
def test_units_that_do_not_repeat_are_kept(draw):
    case = chain(lambda block, h: h + block(h), lambda: Noise(lambda: 1.0))
    case.model.blocks[2].draw = draw
    before = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    made = least(case)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before  # noqa: NPY002
    assert "blocks.0" in recomputed(made)
    assert "blocks.2" not in recomputed(made)
    kept = next(unit for unit in made.units if unit.name == "blocks.2")
    assert [option.name for option in kept.options] == ["keep"]


class EndsInRRelu(nn.Module):
    """The functional form, which no module gives away: it fills the noise for backward after autograd has saved it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, h):
        return nn.functional.rrelu(self.linear(h), training=True)


def test_a_unit_whose_recomputation_changes_gradients_is_kept_and_no_other():
    case = chain(lambda block, h: block(h), count=6)
    for name in ("0", "2"):
        setattr(case.model.blocks, name, EndsInRRelu())
    made = least(case)
    assert {"blocks.0", "blocks.2"}.isdisjoint(recomputed(made))
    assert "blocks.1" in recomputed(made)
    assert_trains_alike(case, made)


class DriftsInBackward(torch.autograd.Function):
    """Gradients that no run repeats."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        DriftsInBackward.calls += 1
        return grad * (1.0 + 1e-3 * DriftsInBackward.calls)


def test_gradients_that_no_run_repeats_do_not_keep_everything():
    case = chain(lambda block, h: DriftsInBackward.apply(block(h)))
    assert recomputed(least(case))


class Unruly(nn.Module):
    """Resizes one buffer, drops one, registers one and changes a third, in its first forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 1)
        self.register_buffer("grown", torch.arange(3.0))
        self.register_buffer("dropped", torch.ones(2), persistent=False)
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.grown.resize_(5).fill_(9)
        if "dropped" in self._buffers:
            del self.dropped
            self.register_buffer("late", torch.ones(4))
        self.counted += 1
        return self.linear(x)


def test_buffers_come_back_whatever_the_forward_does_to_them_and_gradients_too():
    model = Unruly().eval()
    grad = model.linear.weight.grad = torch.full((1, 32), 3.0)
    buffers, keys = dict(model._buffers), list(model.state_dict())
    plan(model, torch.randn(4, 32), mean_square, budget="1 GiB")
    assert model.linear.weight.grad is grad
    assert torch.equal(grad, torch.full((1, 32), 3.0))
    assert list(model._buffers) == list(buffers)
    assert all(model._buffers[name] is buffer for name, buffer in buffers.items())
    assert (model.grown.tolist(), model.dropped.tolist(), float(model.counted)) == ([0, 1, 2], [1, 1], 0)
    assert list(model.state_dict()) == keys
    assert not model.training


def test_planned_model_compiles():
    case = chain(lambda block, h: h + block(h=h), lambda: Block(torch.tanh))
    made = least(case)
    assert "blocks.0" in recomputed(made)
    case.loss().backward()
    expected = [param.grad for param in case.model.parameters()]
    case.model.zero_grad()
    made.apply(case.model)
    case.loss(torch.compile(case.model, backend="eager", fullgraph=True)).backward()
    for param, grad in zip(case.model.parameters(), expected, strict=True):
        assert torch.equal(param.grad, grad)


class Wrapper(nn.Module):
    """A language model inside another module, called without and with an own ``use_cache``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        output = self.inner(input_ids=ids, labels=ids)
        self.cache = output.past_key_values
        return output.loss


@pytest.mark.parametrize("budget", ["1 GiB", None])
def test_cache_is_off_inside_a_wrapper_whatever_the_plan_recomputes(budget):
    inner = gpt2()
    inner.model.config.use_cache = True  # as by default
    case = Case(Wrapper(inner.model), inner.batch["input_ids"])
    made = least(case) if budget is None else plan(case.model, case.batch, budget=budget)
    assert bool(recomputed(made)) == (budget is None)
    case.model.cache = None
    before = [dict(module._forward_pre_hooks) for module in case.model.modules()]
    made.apply(case.model)
    case.loss().backward()
    assert case.model.cache is None
    made.remove(case.model)
    assert [dict(module._forward_pre_hooks) for module in case.model.modules()] == before
    case.loss()
    assert case.model.cache is not None


class Positional(nn.Module):
    """Takes ``use_cache`` by position."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.seen = []

    def forward(self, x, use_cache=True):
        self.seen.append(use_cache)
        return self.linear(x)


def test_cache_argument_by_position():
    model = nn.ModuleDict({"only": Positional()})
    model.forward = lambda x: model["only"](x, True)
    made = plan(model, torch.randn(2, 4), mean_square, budget="1 GiB")
    made.apply(model)
    model["only"].seen.clear()
    model(torch.randn(2, 4))
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert model["only"].seen == [False, True]


def test_plans_do_not_nest():
    case = chain(lambda block, h: h + block(h))
    whole = least(case)
    half = Case(nn.Sequential(*case.model.blocks), case.batch, mean_square)
    part = least(half)
    outer = nn.Sequential(case.model)
    around = plan(outer, case.batch, mean_square, budget="1 GiB")
    whole.apply(case.model)
    for model in (half.model, outer):
        with pytest.raises(RuntimeError, match="reaches into it"):
            plan(model, case.batch, mean_square, budget="1 GiB")
    with pytest.raises(RuntimeError, match="at '0'"):
        part.apply(half.model)
    with pytest.raises(RuntimeError, match="at '0'"):
        around.apply(outer)
    with pytest.raises(RuntimeError, match="nothing to remove"):
        part.remove(half.model)
    whole.remove(case.model)
    part.apply(half.model)
    part.remove(half.model)
    assert_trains_alike(case, whole)
