"""Units whose saved tensors wait on the host: the same gradients, less memory, and no waiting for the link."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.checkpoint import Plan, plan
from gradkern.checkpoint._apply import apply_recompute, remove_recompute
from gradkern.checkpoint._gpus import find_gpu
from gradkern.checkpoint._offload import Offload
from gradkern.checkpoint._offloading import traffic
from gradkern.checkpoint._preserve import same_bits
from gradkern.checkpoint._profile import Span, Visit
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._simulate import Simulation

WIDTH, ROWS = 128, 512
OFFLOADS = (Offload("0", "2", "1"), Offload("2", "4", "3"))


def blocks(count=5):
    torch.manual_seed(0)
    inner = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH)) for _ in range(5)
    ]
    return nn.Sequential(*inner[:count])


def gradients(model, inputs, *, calls=1):
    torch.manual_seed(1)
    for _ in range(calls):
        model(inputs).square().mean().backward()
    found = [param.grad for param in model.parameters()]
    model.zero_grad()
    return found


def offloaded(model, offloads=OFFLOADS, recompute=None):
    """Offload in a simulation that computes with real values, and return it."""
    simulation = Simulation(find_gpu("H100"), 1, compares_bits=True)
    apply_recompute(model, recompute or {}, (), offloads, plan_id="test", link=simulation.link)
    return simulation


def equal(left, right):
    return all(map(same_bits, left, right))


@pytest.mark.parametrize("recompute", [{}, {"1": Recompute(), "3": Recompute()}])
@pytest.mark.parametrize("calls", [1, 3])
def test_gradients_are_the_same_bits(recompute, calls):
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    expected = gradients(model, inputs, calls=calls)
    with offloaded(model, recompute=recompute):
        assert equal(gradients(model, inputs, calls=calls), expected)


class Gated(nn.Module):
    """Saves three views of one storage, at different places in it, transposed too."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        a, b, c = self.inner(x).chunk(3, dim=-1)
        return self.outer(a * b.sigmoid() @ (c.t() @ c) / ROWS)


def test_views_of_one_storage_come_back_where_they_were():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*(Gated() for _ in range(5))), torch.randn(ROWS, WIDTH)
    expected = gradients(model, inputs)
    with offloaded(model):
        assert equal(gradients(model, inputs), expected)


def test_what_was_sent_does_not_take_memory_meanwhile():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    peaks = []
    for offloads in ((), OFFLOADS):
        with offloaded(model, offloads) as simulation:
            loss = model(inputs).square().mean()
            held = simulation.live_bytes
            loss.backward()
            peaks.append((held, simulation.peak_bytes))
        remove_recompute(model)
        model.zero_grad()
    block = ROWS * WIDTH * 4
    # Of a block: the output of its first layer, what GELU made of it, and the mask and output of dropout, whose four
    # tensors are three and a quarter of a block's.
    assert peaks[0][0] - peaks[1][0] > 2 * 3 * block
    assert peaks[1][1] < peaks[0][1]


def test_all_that_was_sent_comes_back_before_it_is_asked_for():
    """The way back begins where the schedule says, not where the tensor is unpacked."""
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    with offloaded(model) as simulation:
        loss = model(inputs).square().mean()
        before = simulation.live_bytes
        seen = []
        model[2][0].weight.register_hook(lambda grad: seen.append(simulation.live_bytes))
        loss.backward()
    assert seen
    assert seen[0] < before + 4 * ROWS * WIDTH * 4


def test_a_graph_can_be_run_twice():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    torch.manual_seed(1)
    loss = model(inputs).square().mean()
    expected = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)]
    with offloaded(model):
        torch.manual_seed(1)
        loss = model(inputs).square().mean()
        for wanted in expected:
            assert equal(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), wanted)


def test_two_forwards_before_two_backwards():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    torch.manual_seed(1)
    losses = [model(inputs + shift).square().mean() for shift in (0, 1)]
    expected = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    with offloaded(model):
        torch.manual_seed(1)
        losses = [model(inputs + shift).square().mean() for shift in (0, 1)]
        for loss, wanted in reversed(list(zip(losses, expected, strict=True))):
            assert equal(torch.autograd.grad(loss, list(model.parameters())), wanted)


def test_a_step_that_fails_leaves_nothing_behind():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    expected = gradients(model, inputs)
    with offloaded(model):
        model(inputs)
        with pytest.raises(RuntimeError, match=r"shape|size"):
            model(torch.randn(ROWS, WIDTH + 1))
        with torch.no_grad():
            model(inputs)
        assert equal(gradients(model, inputs), expected)


class ChangesLater(nn.Module):
    """Writes into what an earlier block has saved."""

    def __init__(self):
        super().__init__()
        self.blocks = blocks(3)

    def forward(self, x):
        x = self.blocks[0](x * 1)
        y = self.blocks[1](x)
        x += 1
        return self.blocks[2](x + y)


def test_a_saved_tensor_that_is_written_later_is_noticed():
    model, inputs = ChangesLater(), torch.randn(ROWS, WIDTH)
    offloads = (Offload("blocks.1", "blocks.2", "blocks.2"),)
    with offloaded(model, offloads), pytest.raises(RuntimeError, match="modified by an inplace"):
        model(inputs).sum().backward()


def test_parameters_that_change_before_backward_are_noticed():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    with offloaded(model):
        loss = model(inputs).square().mean()
        with torch.no_grad():
            model[0][3].weight += 1
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


def spans(seconds, saved_bytes, count=12):
    ends = Span(0, (Visit(0, 0), Visit(0, 0)), 0.5, 1.0)
    unit = Span(saved_bytes, (Visit(saved_bytes, 0), Visit(saved_bytes, 0)), seconds, 2 * seconds)
    return [ends, *[unit] * count, ends]


@pytest.mark.parametrize("saved_bytes", [50, 100, 150, 250, 999])
def test_the_link_is_never_waited_for(saved_bytes):
    """Replayed by hand: every copy is done where it is released or asked for, one at a time each way."""
    names = [str(at) for at in range(12)]
    measured = spans(1.0, saved_bytes)
    ways = traffic(names, names, measured, 100.0)
    assert ways
    assert len(ways[0].offloads) == max(len(way.offloads) for way in ways)
    for way in ways:
        starts = {str(at): 0.5 + at for at in range(12)}
        free = 0.0
        for each in way.offloads:
            begin = starts[each.unit] + 1.0
            assert begin >= free
            free = begin + saved_bytes / 100
            assert starts[each.released_at] >= free
        backward = {str(at): 1.0 + 2.0 * (11 - at) for at in range(12)}
        free = 0.0
        for each in reversed(way.offloads):
            free = max(free, backward[each.fetched_at]) + saved_bytes / 100
            assert backward[each.unit] >= free - 1e-9


def test_a_unit_too_large_for_the_link_keeps_no_other_back():
    names = [str(at) for at in range(12)]
    measured = spans(1.0, 100)
    measured[1] = spans(1.0, 10**6)[1]
    (first, *_) = traffic(names, names, measured, 100.0)
    assert len(first.offloads) > 5


def test_nothing_travels_over_a_link_that_is_too_slow():
    names = [str(at) for at in range(12)]
    assert traffic(names, names, spans(1.0, 10**6), 100.0) == []
    assert traffic(names, (), spans(1.0, 100), 100.0) == []


@pytest.fixture(scope="module")
def large():
    """A model, its batch and loss, and how it is planned without offloading: on meta, for no memory is needed."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True, dtype=torch.bfloat16) for _ in range(10)]
        model, inputs = nn.Sequential(*layers), torch.empty(16, 1024, 1024, dtype=torch.bfloat16)

    def loss_fn(output, _):
        return output.float().square().mean()

    free = plan(model, inputs, loss_fn, budget="100 GiB", gpu="RTX4090")
    budget = (2 * free.least_feasible_bytes + free.natural_peak_bytes) // 3
    return model, inputs, loss_fn, budget


def test_a_plan_that_offloads_is_faster_and_holds(large, tmp_path):
    model, inputs, loss_fn, budget = large
    without = plan(model, inputs, loss_fn, budget=budget, gpu="RTX4090")
    made = plan(model, inputs, loss_fn, budget=budget, gpu="RTX4090", offload=True)
    assert without.offloads == ()
    assert made.predicted_peak_bytes <= budget
    assert 0 < len(made.offloads) == sum(unit.option == "offload" for unit in made.units)
    assert made.extra_s < 0.9 * without.extra_s
    assert f"offloaded       {len(made.offloads):>12} of 12 units" in str(made)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    made.plot(tmp_path / "plan.png")
    assert made.for_budget("100 GiB").offloads == ()
    assert made.for_budget(budget).extra_s >= made.extra_s
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(
        text.replace(f'"released_at": "{made.offloads[0].released_at}"', '"released_at": "x"')
    )
    with pytest.raises(ValueError, match="which are no units"):
        Plan.load(tmp_path / "plan.json")


def test_on_a_cpu_an_offloaded_unit_is_kept():
    """A plan for a GPU, applied where memory is the host's: nothing travels, and the bits are the same."""
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    expected = gradients(model, inputs)
    apply_recompute(model, {"1": Recompute()}, (), OFFLOADS, plan_id="test")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal(gradients(each, inputs), expected)
    remove_recompute(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_offloading_needs_a_gpu_and_one_length():
    model, inputs = blocks(), torch.randn(ROWS, WIDTH)
    with pytest.raises(ValueError, match="offload=True needs gpu="):
        gk.checkpoint.plan(model, inputs, lambda y, _: y.mean(), budget="1 GiB", offload=True)
    with pytest.raises(ValueError, match="not shapes="):
        gk.checkpoint.plan(
            model, inputs, lambda y, _: y.mean(), budget="1 GiB", gpu="H100", offload=True, shapes=[32, 64, WIDTH]
        )
